// The CUDA kernels: their arguments and their launchers. No CUDA header, so that any C++ compiler
// can read this. Addresses are of device memory, strides in elements.
#pragma once
#include <cstdint>

namespace fastdiff::cuda {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// y = silu((t - mean) / sqrt(var + eps) * weight + bias); the channels of t are those of
// x + row + shift + residual, then those of beside. An absent tensor's address is null.
struct GroupNormSilu {
  const void *x, *residual;     // [batch, L, C]
  const void* beside;           // [copies, L, C2]; picture b reads b % copies
  const void *row, *shift;      // [batch, C], [C]
  const void *weight, *bias;    // [C + C2]
  int64_t ld_row;               // from one picture's row to the next
  int batch, copies, L;         // pixels per picture
  int C, C2, W;                 // channels of x, of beside, per group
  int groups, cluster, rows;    // groups per tile; CTAs that share a picture; pixels per CTA
  float eps;
  int silu;
  void *y, *total;              // [batch, L, C + C2]; x + row + shift + residual if there is one
};

// Addresses in the order of the struct's pointers, sizes in the order of its integers.
inline GroupNormSilu group_norm_silu(const uintptr_t* address, const int64_t* size, float eps,
                                     bool silu) {
  const auto in = [&](int i) { return reinterpret_cast<const void*>(address[i]); };
  const auto out = [&](int i) { return reinterpret_cast<void*>(address[i]); };
  const auto count = [&](int i) { return static_cast<int>(size[i]); };
  return {in(0),    in(1),    in(2),    in(3),    in(4),    in(5),    in(6),
          size[0],  count(1), count(2), count(3), count(4), count(5), count(6),
          count(7), count(8), count(9), eps,      silu,     out(7),   out(8)};
}
constexpr int kAddresses = 9, kSizes = 10;

// Starts the kernel on a stream (an address; 0: the default) of a device. It neither allocates nor
// waits, so a graph can capture it. `vector`: all addresses and a tile's row segments are multiples
// of 16 bytes. Returns null, or CUDA's error.
const char* start(const GroupNormSilu&, int dtype, bool vector, int device, uintptr_t stream);

}  // namespace fastdiff::cuda
