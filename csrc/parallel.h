// Threads borrowed from torch's own OpenMP pool.
//
// A second pool on the same cores costs more than it gains: libgomp's idle workers spin for
// milliseconds after each region, so two pools keep taking cores from each other. Measured on two
// cores, ms for a step of the demo: one pool 7.1, without threads in our kernels 13.3, a second pool
// beside torch's 20. So we link no OpenMP at all, and call the runtime that libtorch_cpu has loaded.
#pragma once
#include <cstdint>

namespace fastdiff {

// The threads that parallel_for will use: torch.get_num_threads(), or 1 if torch has no OpenMP.
int num_threads();

// The borrowed runtime's name ("torch's OpenMP"), or "none: serial".
const char* thread_runtime();

using Body = void (*)(void* context, int64_t begin, int64_t end);
void run_parallel(int64_t tasks, Body body, void* context);

// Calls body(begin, end) on disjoint ranges that cover [0, tasks), one contiguous range per thread.
template <typename F>
void parallel_for(int64_t tasks, const F& body) {
  run_parallel(
      tasks,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&body));
}

}  // namespace fastdiff
