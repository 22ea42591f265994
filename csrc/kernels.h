// The CPU kernels: their arguments, and the table of kernels that each instruction set fills.
// Addresses are pointers; strides and leading dimensions are in elements. `Dtype` is the tensors'
// type; arithmetic is float32 throughout.
#pragma once
#include <cstdint>

namespace fastdiff {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1 };
// The algorithm of a convolution: direct products, or Winograd's F(2x2, 3x3) or F(2x4, 3x3).
enum Algorithm : int { kDirect = 0, kWinograd2x2 = 1, kWinograd2x4 = 2 };
// A gated one halves the columns: value * act(gate), the gate's columns last; with kSwigluFirst they
// come first.
enum Activation : int {
  kNone = 0, kSilu = 1, kGelu = 3, kGeluTanh = 4, kGeglu = 2, kSwiglu = 5, kSwigluFirst = 6
};
constexpr bool is_gated(int act) { return act == kGeglu || act >= kSwiglu; }

// out[b, y, x, n] = act(sum over taps and channels of x * w + bias) + residual
// A linear layer is the case kernel = 1, height = 1, width = rows.
struct Conv {
  int dtype;
  const void* x;  // [batch, height, width, channels]
  int64_t batch, height, width, channels;
  int64_t up_height, up_width;  // x is first enlarged to this size (nearest neighbour)
  int64_t kernel, stride, pad;  // square window; pad: zeros at the top and left
  int64_t out_height, out_width;
  const void* w;         // [kernel, kernel, channels, n] with n contiguous
  int64_t ld_w;          // elements from one input channel to the next
  int64_t n;             // columns of w; if gated, the output has n / 2
  const void* bias;      // [n] or null
  const void* residual;  // like out, or null
  int64_t residual_pixels;  // after this many pixels the residual repeats
  int act;
  int algorithm;         // all but kDirect need kernel 3, stride 1, pad 1, no gate
  void* out;             // contiguous
};

// out[b, i, h] = softmax(scale * q[b, i, h] . k[b, :, h] + mask) . v[b, :, h]
struct Attention {
  int dtype;
  const void *q, *k, *v, *mask;  // mask may be null
  int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, token, head
  int64_t mask_stride[4];                         // batch, head, query, key; 0 where it repeats
  int64_t batch, heads, queries, keys, width;
  float scale;
  void* out;  // [batch, queries, heads, width]
};

// Attention of a picture and a text together, both in place. The bias is added to the scores of the
// text's keys. With text.queries = 0 the text has no result.
struct JointAttention {
  int dtype;
  struct Sequence {
    const void *q, *k, *v;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // batch, token, head
    int64_t queries, keys;
    void* out;  // [batch, queries, heads, width]
  } picture, text;
  const float* text_bias;  // [text.keys] or null
  int64_t batch, heads, width;
  float scale;
};

// y = act(n * (1 + scale) + offset), n = (t - mean) / sqrt(var + eps) * weight + bias,
// t = x + row + residual
struct GroupNorm {
  int dtype;
  const void *x, *row, *residual, *weight, *bias;  // row and residual may be null
  const void* scale_shift;  // scale, then offset, for each picture; or null
  int64_t ld_row, ld_scale_shift;  // elements from one picture's row to the next; 0 if all share it
  int64_t batch, pixels, channels, groups;
  float eps;
  int act;
  void *y, *total;  // total receives t if there is a residual, else null
};

// y = norm(t) * weight + bias, then y * (1 + scale) + shift; t = residual + gate * x, or x without
// a residual. norm(t) = (t - mean) / sqrt(var + eps), or t / sqrt(mean(t^2) + eps).
struct AdaNorm {
  int dtype;
  const void *x, *weight, *bias;     // [batch, tokens, width], [width] or null
  const void *scale, *shift, *gate;  // rows of `width`, one per sample, or null
  int64_t ld_scale, ld_shift, ld_gate;
  const void* residual;  // [samples, tokens, width] or null: repeats after that many samples
  int64_t samples, batch, tokens, width;
  float eps;
  int rms;
  void *y, *total;  // total receives t if there is a residual, else null
};

// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, of q and of k; then each pair is
// turned: y' = y * cos + (-y[1], y[0]) * sin
struct QkNorm {
  int dtype;
  const void *q, *k, *q_weight, *k_weight;  // a weight may be null
  const float *cos, *sin;                   // [tokens, width], or null
  int64_t q_stride[3], k_stride[3];         // batch, token, head
  int64_t batch, tokens, heads, width;
  float eps;
  void *q_out, *k_out;  // [batch, tokens, heads, width]
};

// y = scale * (x + shift + gate * other), each pixel repeated `enlarge` times in both directions
struct Residual {
  int dtype;
  const void *x, *other, *shift, *gate;  // all but x may be null; gate: one row per sample
  int64_t ld_gate, batch, tokens, width;
  int64_t enlarge, columns;  // tokens in a row of a picture; they count only if it is enlarged
  float scale;
  void* y;
};

// The mean of every 2x2 pixels; an odd last row or column is left out.
struct MeanPool {
  int dtype;
  const void* x;  // [batch, height, width, channels]
  int64_t batch, height, width, channels;
  void* y;
};

// Mean, its float rounding error, and centred squares of each channel in slabs of `slab` rows, of
// which the last may be shorter.
struct SlabMoments {
  int dtype;
  const void* x;  // [rows, width]
  int64_t rows, width, slab;
  float* out;  // [slabs, 3, width]
};

// y = act((x - line[0]) * line[1] + line[2]) of each channel
struct LineSilu {
  int dtype;
  const void* x;      // [rows, width]
  const float* line;  // [3, width]
  int64_t rows, width;
  int silu;
  void* y;
};

// One scheduler step on float32 state; see fastdiff/kernels/guided_step for the mathematics.
struct GuidedStep {
  int dtype;            // of output and next
  const void* output;   // [copies, batch, elements], or twice the elements if wide
  const float* table;   // [steps, columns]
  const int64_t* step;  // [steps], steps = 1 or batch; one below 0: a place that is empty
  const float *noise, *mask, *original, *original_noise;  // [batch, elements] or null
  int64_t copies, batch, elements, columns, depth, steps;
  int64_t wide;  // the sample's channels if the output has as many more for the variance, else 0
  float *sample, *history;  // [batch, elements], [2, depth, batch, elements]: overwritten
  void* next;               // [batch, elements]
  float* limits;            // [batch] or null: overwritten
};

struct Kernels {
  const char* isa;
  void (*conv)(const Conv&);
  void (*attention)(const Attention&);
  void (*group_norm)(const GroupNorm&);
  void (*joint_attention)(const JointAttention&);
  void (*ada_norm)(const AdaNorm&);
  void (*qk_norm)(const QkNorm&);
  void (*residual)(const Residual&);
  void (*mean_pool)(const MeanPool&);
  void (*moments)(const SlabMoments&);
  void (*line_silu)(const LineSilu&);
  void (*guided_step)(const GuidedStep&);
};

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();

}  // namespace fastdiff
