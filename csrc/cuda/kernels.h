// The CUDA kernels: their arguments and what starts them. No CUDA header, so that any C++ compiler
// reads it. Addresses are those of device memory, strides count elements.
#pragma once
#include <cstdint>

namespace fastdiff::cuda {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// y = silu((t - mean) / sqrt(var + eps) * weight + bias), where the channels of t are those of
// x + row + shift + residual and then those of beside. An address of what is absent is null.
struct GroupNormSilu {
  const void *x, *residual;     // [batch, L, C]
  const void* beside;           // [copies, L, C2]; picture b reads b % copies
  const void *row, *shift;      // [batch, C], [C]
  const void *weight, *bias;    // [C + C2]
  int64_t ld_row;               // from one picture's row to the next
  int batch, copies, L;         // pixels of a picture
  int C, C2, W;                 // channels of x, of beside, of a group
  int groups, cluster, rows;    // groups of a tile; CTAs that share a picture; pixels of each
  float eps;
  int silu;
  void *y, *total;              // [batch, L, C + C2]; x + row + shift + residual if there is one
};

// Addresses in the order of the struct's pointers, sizes in that of its integers.
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

// Starts the kernel on a stream (an address; 0: the default one) of a device; nothing is allocated
// or waited for, so it can be captured in a graph. `vector`: all addresses and row segments of a
// tile are multiples of 16 bytes. Returns null, or what CUDA says went wrong.
const char* start(const GroupNormSilu&, int dtype, bool vector, int device, uintptr_t stream);

}  // namespace fastdiff::cuda
