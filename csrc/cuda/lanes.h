// Elements that a thread moves at once, their float32 values, and asynchronous copies; and their
// host versions, with which the tests run a kernel's phases.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <type_traits>

#if defined(__CUDACC__)
#define HD __host__ __device__ __forceinline__
#else
#define HD inline
#endif

namespace fastdiff::cuda {

template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T lane[N];
};

HD float wide(float v) { return v; }
HD float wide(__half v) { return __half2float(v); }
HD float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
HD T narrow(float v) {
  if constexpr (std::is_same_v<T, float>) return v;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  else return __float2bfloat16_rn(v);
}

HD float silu(float v) {
#if defined(__CUDA_ARCH__)
  return __fdividef(v, 1.0f + __expf(-v));
#else
  return v / (1.0f + std::exp(-v));
#endif
}

// A load marked as one from global memory, for a pointer that was chosen among several.
template <typename T>
HD T loaded(const T* global) {
#if defined(__CUDA_ARCH__)
  return __ldg(global);
#else
  return *global;
#endif
}

// Copies 16 bytes to shared memory without a register in between.
template <typename T, int N>
HD void copy(Vector<T, N>* shared, const Vector<T, N>* global) {
#if defined(__CUDA_ARCH__)
  if constexpr (N == 1) {
    shared->lane[0] = loaded(&global->lane[0]);
  } else {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  }
#else
  *shared = *global;
#endif
}
HD void commit() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all but the last `left` groups of this thread's copies.
HD void arrived([[maybe_unused]] int left) {
#if defined(__CUDA_ARCH__)
  switch (left) {  // needs an immediate operand
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
#endif
}

}  // namespace fastdiff::cuda
