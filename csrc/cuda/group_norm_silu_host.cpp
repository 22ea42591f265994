// Runs the phases of group_norm_silu.h on the host: the CTAs of a cluster and their threads one
// after another, forwards or backwards. This shows that indices and arithmetic are right and, by
// both orders, that no thread needs another's result from the same phase, so a barrier between
// phases is enough. It cannot show that the kernel has those barriers, that one CTA reaches
// another's shared memory, or how exact the device's own exponential and division are. Built only
// by tests/kernels/test_cuda.py.
#include <algorithm>
#include <vector>

#include "group_norm_silu.h"

namespace fastdiff::cuda {

template <typename T, int N>
static int64_t run(const Args& a, bool backwards) {
  struct alignas(16) Chunk {
    char bytes[16];
  };
  const int64_t size = Thread<T, N>::shared_bytes(a);
  const int blocks = (a.C + a.C2) / (a.groups * a.W) * a.cluster;
  for (int picture = 0; picture < a.batch; ++picture)
    for (int first = 0; first < blocks; first += a.cluster) {
      Chunk poison;
      for (char& byte : poison.bytes) byte = -1;  // NaN in every type
      const std::vector<Chunk> fresh((size + 15) / 16, poison);
      std::vector<std::vector<Chunk>> shared(a.cluster, fresh);
      std::vector<Thread<T, N>> threads;
      for (int rank = 0; rank < a.cluster; ++rank)
        for (int i = 0; i < kThreads; ++i)
          threads.emplace_back(a, first + rank, picture, i, shared[rank].data()->bytes);
      const auto each = [&](const auto& phase) {
        if (backwards) std::for_each(threads.rbegin(), threads.rend(), phase);
        else std::for_each(threads.begin(), threads.end(), phase);
      };
      each([](auto& thread) { thread.load(); });
      each([](auto& thread) { thread.accumulate(); });
      each([](auto& thread) { thread.gather(); });
      for (int width = threads[0].slots(), left = 0; width > 1; width = left)
        each([&](auto& thread) { left = thread.fold(width); });
      const auto of_rank = [&](int rank) { return threads[rank * kThreads].moments(); };
      each([&](auto& thread) { thread.combine(of_rank); });
      each([](auto& thread) { thread.write(); });
    }
  return size;
}

template <typename T>
static int64_t run(const Args& a, bool vector, bool backwards) {
  return vector ? run<T, 16 / sizeof(T)>(a, backwards) : run<T, 1>(a, backwards);
}

}  // namespace fastdiff::cuda

// Returns the bytes of shared memory per CTA.
extern "C" int64_t emulate(int dtype, bool vector, const uintptr_t* addresses, const int64_t* sizes,
                           float eps, bool silu, bool backwards) {
  using namespace fastdiff::cuda;
  const Args a = group_norm_silu(addresses, sizes, eps, silu);
  return dtype == kFloat32   ? run<float>(a, vector, backwards)
         : dtype == kFloat16 ? run<__half>(a, vector, backwards)
                             : run<__nv_bfloat16>(a, vector, backwards);
}
