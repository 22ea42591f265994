// Vectors of floats as wide as the instruction set this file is compiled for, and functions on
// them.
// Included once per instruction set, inside the namespace FASTDIFF_ISA.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace FASTDIFF_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

static inline vf splat(float value) { return value - vf{}; }

static inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
// Conversion between 16 and 32 bits; __builtin_convertvector takes four or more instructions in gcc
// 12.
static inline vu widen(const bf16* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
#endif
}
static inline vh narrow(vu v) {
#if defined(__AVX512F__)
  return (vh)_mm512_maskz_cvtepi32_epi16(-1, (__m512i)v);
#else
  return __builtin_convertvector(v, vh);
#endif
}

static inline vf load(const bf16* p) { return (vf)(widen(p) << 16); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
static inline vh rounded(vf v) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);  // denormal numbers become 0
#else
  const vu bits = (vu)v;
  const vu nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
  return narrow(v == v ? nearest : (vu)(splat(0) == splat(0)) & 0x7fc0);
#endif
}
static inline void store(bf16* p, vf v) { *reinterpret_cast<vh_unaligned*>(p) = rounded(v); }
// V vectors side by side
template <int V>
static inline void store_all(float* p, const vf (&v)[V]) {
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) store(p + i * W, v[i]);
}
template <int V>
static inline void store_all(bf16* p, const vf (&v)[V]) {
  int i = 0;
#if defined(__AVX512BF16__)
#pragma GCC unroll 2
  for (; i + 2 <= V; i += 2)  // a whole line of the cache
    _mm512_storeu_si512(p + i * W,
                        (__m512i)_mm512_cvtne2ps_pbh((__m512)v[i + 1], (__m512)v[i]));
#endif
#pragma GCC unroll 4
  for (; i < V; ++i) store(p + i * W, v[i]);
}

static inline float load1(const float* p) { return *p; }
static inline float load1(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline void store1(float* p, float value) { *p = value; }
static inline void store1(bf16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(value == value ? nearest : 0x7fc0);
}

// The first n <= W elements; the rest is zero, and nothing beyond them is read or written.
#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
static inline vf load_n(const float* p, int n) {
  if (n == W) return load(p);
  return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
static inline vf load_n(const bf16* p, int n) {
  if (n == W) return load(p);
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(-1, _mm256_maskz_loadu_epi16(first_lanes(n), p)) << 16);
}
static inline void store_n(float* p, vf v, int n) {
  if (n == W) return store(p, v);
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
static inline void store_n(bf16* p, vf v, int n) {
  if (n == W) return store(p, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)rounded(v));
}
#else
template <typename T>
static inline vf load_n(const T* p, int n) {
  if (n == W) return load(p);
  T whole[W] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <typename T>
static inline void store_n(T* p, vf v, int n) {
  if (n == W) return store(p, v);
  T whole[W];
  store(whole, v);
  std::memcpy(p, whole, n * sizeof(T));
}
#endif

// Calls f(c, elements) for each vector of `width` elements; the last may be partial.
template <typename F>
static inline void each_vector(int64_t width, const F& f) {
  int64_t c = 0;
  for (; c + W <= width; c += W) f(c, W);
  if (c < width) f(c, static_cast<int>(width - c));
}

static inline float sum(vf v) {
#if defined(__AVX512F__)
  const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const auto half = v;
#endif
#if defined(__AVX2__)
  const auto quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) +
                       __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
  const auto quarter = half;
#endif
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
// The elements of each pair exchanged, the first then negated.
static inline vf turned(vf v) {
#if defined(__AVX512F__)
  const vf other =
      __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif defined(__AVX2__)
  const vf other = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  const vf other = __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
  vf sign;
  for (int i = 0; i < W; ++i) sign[i] = i % 2 ? 1.0f : -1.0f;
  return other * sign;
}
// a > b ? a : b (a < b ? a : b), lane by lane: b if either is NaN
static inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(-1, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
static inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(-1, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// e^x: x = n ln2 + r with |r| <= ln2 / 2, a degree-6 fit of e^r (relative error 2e-9), then 2^n by
// the exponent bits. 0 below -87.3, or below -103.9 if the instruction set makes denormal numbers;
// NaN stays NaN.
static inline vf exp(vf x) {
#if defined(__AVX512F__)
  const vf y = max(splat(-104.0f), min(splat(89.0f), x));
  const vf n = (vf)_mm512_maskz_roundscale_ps(-1, (__m512)(y * 1.44269504f),
                                              _MM_FROUND_TO_NEAREST_INT);
#else
  const vf bottom = splat(-87.3f), y = max(bottom, min(splat(88.3f), x));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = y * 1.44269504f + magic;
  const vf n = shifted - magic;
#endif
  vf r = n * -0.693359375f + y;
  r = n * 2.12194440e-4f + r;
  vf p = splat(0.0013828241f);
  p = p * r + 0.0083755896f;
  p = p * r + 0.0416684257f;
  p = p * r + 0.1666641106f;
  p = p * r + 0.4999999098f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(-1, (__m512)p, (__m512)n);
#else
  const vf power = (vf)(((vi)shifted + (127 - 0x4b400000)) << 23);
  return x < bottom ? vf{} : p * power;
#endif
}

static inline vf silu(vf x) { return x / (1.0f + exp(-x)); }

// x * Phi(x), the exact (erf) GELU. With z = |x| / sqrt(2) and t = 1 / (1 + 0.4 z),
// erfc(z) = exp(-z^2) t P(t); P is our fit of erfcx on z in [0, 10], relative error 9e-9.
static inline vf gelu(vf x) {
  const vf z = (x < 0.0f ? -x : x) * 0.70710678f;
  const vf t = 1.0f / (1.0f + 0.4f * z);
  vf p = splat(-0.030429895967245102f);
  p = p * t + 0.20237118005752563f;
  p = p * t - 0.5086156129837036f;
  p = p * t + 0.5598930716514587f;
  p = p * t - 0.29419630765914917f;
  p = p * t + 0.2770496606826782f;
  p = p * t + 0.1280595362186432f;
  p = p * t + 0.21524423360824585f;
  p = p * t + 0.2249155044555664f;
  p = p * t + 0.22570866346359253f;
  const vf tail = 0.5f * (exp(-z * z) * (t * p));  // Phi(-|x|)
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 u)
static inline vf gelu_tanh(vf x) {
  return x / (1.0f + exp(x * (x * x * -0.07135481627f - 1.5957691216f)));
}

}  // namespace FASTDIFF_ISA
