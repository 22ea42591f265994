// The kernel of group_norm_silu: the phases of group_norm_silu.h with barriers, and its launch.
#include "group_norm_silu.h"

namespace fastdiff::cuda {

// Barriers and shared memory across a cluster; devices before sm_90 have neither.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
__device__ __forceinline__ const Moments* of_rank(Moments* shared, int rank) {
  return static_cast<const Moments*>(__cluster_map_shared_rank(shared, rank));
}
#else
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ const Moments* of_rank(Moments* shared, int) { return shared; }
#endif

// Two CTAs per SM if their slabs fit: 64 registers.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2) group_norm_silu(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) char shared[];
  Thread<T, N> thread(a, blockIdx.x, blockIdx.y, threadIdx.x, shared);
  thread.load();
  __syncthreads();
  thread.accumulate();
  __syncthreads();
  thread.gather();
  __syncthreads();
  for (int width = thread.slots(); width > 1;) {
    width = thread.fold(width);
    __syncthreads();
  }
  cluster_arrive();
  cluster_wait();
  thread.combine([&](int rank) { return of_rank(thread.moments(), rank); });
  cluster_arrive();  // this CTA has read what it needs of the others
  __syncthreads();
  thread.write();
  cluster_wait();  // none may exit while another reads its shared memory
}

template <typename T, int N>
static cudaError_t launch(const Args& a, cudaStream_t stream) {
  const auto kernel = group_norm_silu<T, N>;
  const int64_t shared = Thread<T, N>::shared_bytes(a);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared));
  if (error == cudaSuccess && a.cluster > 8)  // only up to 8 work on every device
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(a.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((a.C + a.C2) / (a.groups * a.W) * a.cluster, a.batch);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = a.cluster > 1 ? 1 : 0;  // sm_80 supports not even a cluster of one
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <typename T>
static cudaError_t launch(const Args& a, bool vector, cudaStream_t stream) {
  return vector ? launch<T, 16 / sizeof(T)>(a, stream) : launch<T, 1>(a, stream);
}

const char* start(const Args& a, int dtype, bool vector, int device, uintptr_t address) {
  const auto stream = reinterpret_cast<cudaStream_t>(address);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = dtype == kFloat32   ? launch<float>(a, vector, stream)
            : dtype == kFloat16 ? launch<__half>(a, vector, stream)
                                : launch<__nv_bfloat16>(a, vector, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastdiff::cuda
