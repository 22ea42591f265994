#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>

namespace fastdiff {
namespace {

// libgomp's entry point for `#pragma omp parallel`; LLVM's and Intel's runtimes have it, too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Runtime {
  GompParallel parallel = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
};

Runtime find_runtime() {
  Runtime runtime;
  // Already loaded by `import torch`; dlsym on its handle also searches its dependencies.
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return runtime;
  runtime.parallel = reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
  runtime.max_threads = reinterpret_cast<int (*)()>(dlsym(torch, "omp_get_max_threads"));
  runtime.in_parallel = reinterpret_cast<int (*)()>(dlsym(torch, "omp_in_parallel"));
  if (!runtime.max_threads || !runtime.in_parallel) runtime.parallel = nullptr;
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Region {
  Body body;
  void* context;
  int64_t tasks;
  int64_t parts;
  std::atomic<int64_t> next{0};  // the runtime may start fewer threads than requested
  std::atomic<bool> failed{false};
  std::exception_ptr failure;  // an exception (out of memory) must not cross the C runtime
};

void work(void* argument) {
  auto* region = static_cast<Region*>(argument);
  for (int64_t i; (i = region->next.fetch_add(1)) < region->parts;) {
    try {
      region->body(region->context, region->tasks * i / region->parts,
                   region->tasks * (i + 1) / region->parts);
    } catch (...) {
      if (!region->failed.exchange(true)) region->failure = std::current_exception();
    }
  }
}

}  // namespace

int num_threads() {
  const Runtime& rt = runtime();
  return rt.parallel && !rt.in_parallel() ? rt.max_threads() : 1;
}

const char* thread_runtime() { return runtime().parallel ? "torch's OpenMP" : "none: serial"; }

void run_parallel(int64_t tasks, Body body, void* context) {
  const int64_t threads = num_threads();
  const int64_t parts = tasks < threads ? tasks : threads;
  if (parts <= 1) {
    if (tasks > 0) body(context, 0, tasks);
    return;
  }
  Region region{body, context, tasks, parts};
  runtime().parallel(work, &region, static_cast<unsigned>(parts), 0);
  if (region.failure) std::rethrow_exception(region.failure);
}

}  // namespace fastdiff
