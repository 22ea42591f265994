// The copies that attention keeps of a head's keys and values, and of a block of queries.
#pragma once
#include <cmath>

#include "flash.h"

namespace FASTDIFF_ISA {

constexpr int64_t kStretch = 4 << 20;  // bytes of keys and values that a thread copies at a time

// The mask added to the scores of one head; null: none.
template <typename M>
struct Mask {
  const M* at;
  int64_t query, key;  // strides in elements; 0 where it repeats

  Mask from(int64_t queries, int64_t keys) const {
    return {at ? at + queries * query + keys * key : nullptr, query, key};
  }
};

// One head's keys and values in place.
template <typename T>
struct Head {
  const T *k, *v;
  int64_t k_ld, v_ld, keys;
};

// A stretch of a head's keys and values, copied for the products: k[keys][steps of the width],
// v[steps of the keys][width].
template <typename T>
class Stretch {
 public:
  using E = Step<T>;

  Stretch(int64_t keys, int64_t width)
      : width_(width),
        steps_((width + kStep<T> - 1) / kStep<T>),
        keys_(std::min(keys, most(width))),
        k_(scratch<E>((keys_ + kTall) * steps_)),
        v_(scratch<E>((keys_ + kStep<T> - 1) / kStep<T> * width + W + kTall)) {}

  // The most keys in a stretch: whole chunks.
  static int64_t most(int64_t width) {
    const int64_t bytes = 2 * width * static_cast<int64_t>(sizeof(E)) / kStep<T>;
    return std::max<int64_t>(1, kStretch / bytes / kKeys) * kKeys;
  }
  int64_t keys() const { return keys_; }
  const E* k(int64_t key) const { return k_.get() + key * steps_; }
  const E* v(int64_t key) const { return v_.get() + key / kStep<T> * width_; }

  void read(const Head<T>& head, int64_t from, int64_t keys) {
    const T *k = head.k + from * head.k_ld, *v = head.v + from * head.v_ld;
    // a tile may extend beyond the last key: repeat it
    for (int64_t j = 0; j < keys + kTall; ++j) {
      const T* row = k + std::min(j, keys - 1) * head.k_ld;
      E* to = k_.get() + j * steps_;
      if constexpr (kPaired<T> || std::is_same_v<T, float>) {
        if (kStep<T> * steps_ != width_) std::memset(to + steps_ - 1, 0, sizeof(E));
        std::memcpy(to, row, width_ * sizeof(T));
      } else {
        each_vector(width_, [&](int64_t c, int n) { store_n(to + c, load_n(row + c, n), n); });
      }
    }
    for (int64_t j = 0; j < keys; j += kStep<T>) {
      const T* row = v + j * head.v_ld;
      E* to = v_.get() + j / kStep<T> * width_;
      if constexpr (kPaired<T>) {
        const T* second = j + 1 < keys ? row + head.v_ld : nullptr;
        // the next row overwrites what this writes beyond
        each_vector(width_, [&](int64_t c, int n) {
          vu both = (vu)load_n(row + c, n) >> 16;
          if (second) both |= (vu)load_n(second + c, n);
          store(reinterpret_cast<float*>(to + c), (vf)both);
        });
      } else {
        each_vector(width_, [&](int64_t c, int n) { store_n(to + c, load_n(row + c, n), n); });
      }
    }
  }

 private:
  int64_t width_, steps_, keys_;
  Scratch<E> k_, v_;
};

// A block of queries on its way past the keys.
template <typename T>
class Block {
 public:
  using E = Step<T>;

  explicit Block(int64_t width)
      : width_(width),
        steps_((width + kStep<T> - 1) / kStep<T>),
        q_(scratch<E>((steps_ + W) * kQueries)),
        result_(scratch<float>((width + W) * kQueries)) {}

  static int64_t bytes(int64_t width) { return 2 * width * kQueries * 4; }

  // Without pairs, q is scaled and scores are exponents of e, as in eager, so that both round to
  // float32 alike. Scores of pairs become exponents of 2 by a factor; q changes its sign if
  // necessary, so that the largest stays the largest.
  void begin(const T* rows, int64_t ld, int64_t count, float scale) {
    count_ = count;
    vectors_ = static_cast<int>((count + W - 1) / W);
    factor_ = kPaired<T> ? std::abs(scale) * kLog2e : 1.0f;
    for (int i = 0; i < vectors_; ++i) {
      for (int64_t s = 0; s < steps_; s += W) {
        vf lanes[W];
        for (int l = 0; l < W; ++l)
          lanes[l] = steps(rows + std::min<int64_t>(i * W + l, count - 1) * ld, s, scale);
        transpose(lanes);
        for (int l = 0; l < W; ++l)
          store(reinterpret_cast<float*>(q_.get()) + ((s + l) * vectors_ + i) * W, lanes[l]);
      }
      top_[i] = splat(-std::numeric_limits<float>::infinity());
      total_[i] = vf{};
    }
    met_ = false;
  }

  // Meets `keys` keys of a stretch; `scores` has room for one chunk's.
  template <typename M>
  void meet(const Stretch<T>& stretch, int64_t keys, const Mask<M>& mask, float* scores) {
    switch (vectors_) {
      case 1: return meet<1>(stretch, keys, mask, scores);
      case 2: return meet<2>(stretch, keys, mask, scores);
#if defined(__AVX512F__)
      case 3: return meet<3>(stretch, keys, mask, scores);
      case 4: return meet<4>(stretch, keys, mask, scores);
#endif
    }
  }

  void write(T* to, int64_t ld) const {
    for (int i = 0; i < vectors_; ++i) {
      // if -inf masks out all keys there is no largest score, and the result is NaN
      const vf lost = splat(-std::numeric_limits<float>::infinity());
      const vf share = 1.0f / (top_[i] == lost ? vf{} / vf{} : total_[i]);
      const int valid = static_cast<int>(std::min<int64_t>(W, count_ - i * W));
      for (int64_t d = 0; d < width_; d += W) {
        const int n = static_cast<int>(std::min<int64_t>(W, width_ - d));
        vf lanes[W];
        for (int l = 0; l < W; ++l)
          lanes[l] = load(result_.get() + ((d + l) * vectors_ + i) * W) * share;
        transpose(lanes);
        for (int l = 0; l < valid; ++l) store_n(to + (i * W + l) * ld + d, lanes[l], n);
      }
    }
  }

 private:
  // W steps of a query from step `s` on, as bits; zero beyond the width.
  vf steps(const T* row, int64_t s, float scale) const {
    const int64_t c = s * kStep<T>, n = std::min(kStep<T> * W, width_ - c);
    if constexpr (kPaired<T>) return (vf)(bits_n(row + c, n) ^ (scale < 0 ? 0x80008000 : 0));
    else return load_n(row + c, static_cast<int>(n)) * scale;
  }

  template <int V, typename M>
  void meet(const Stretch<T>& stretch, int64_t all, const Mask<M>& mask, float* scores) {
    vf top[V], total[V];
    for (int v = 0; v < V; ++v) top[v] = top_[v], total[v] = total_[v];
    for (int64_t from = 0; from < all; from += kKeys, met_ = true) {
      const int64_t keys = std::min(kKeys, all - from), inner = (keys + kStep<T> - 1) / kStep<T>;
      vf now[V], base[V], shrink[V], sum[V] = {};
      for (int v = 0; v < V; ++v) now[v] = splat(-std::numeric_limits<float>::infinity());
      score(stretch.k(from), keys, steps_, q_.get(), scores, now);
      for (int v = 0; v < V; ++v) now[v] *= factor_;
      if (mask.at) add(mask.from(0, from), keys, scores, now);
      for (int v = 0; v < V; ++v) {
        now[v] = max(top[v], now[v]);
        // finite even if every key so far is masked out
        base[v] = max(now[v], splat(-std::numeric_limits<float>::max()));
        shrink[v] = exp_fine((top[v] - base[v]) * (kPaired<T> ? 1 / kLog2e : 1.0f));
        top[v] = now[v];
      }
      weights_of(scores, keys, mask.at ? 1.0f : factor_, base, sum, E{});
      for (int v = 0; v < V; ++v) total[v] = total[v] * shrink[v] + sum[v];
      const E* weights = reinterpret_cast<const E*>(scores);
      if (met_) weigh<V, true>(weights, inner, stretch.v(from), width_, shrink, result_.get());
      else weigh<V, false>(weights, inner, stretch.v(from), width_, shrink, result_.get());
    }
    for (int v = 0; v < V; ++v) top_[v] = top[v], total_[v] = total[v];
  }

  // Turns scores into masked exponents; `top` becomes the largest.
  template <int V, typename M>
  void add(const Mask<M>& mask, int64_t keys, float* scores, vf (&top)[V]) const {
    const float lowest = -std::numeric_limits<float>::max();
    for (int v = 0; v < V; ++v) top[v] = splat(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < keys; ++j)
      for (int v = 0; v < V; ++v) {
        vf m = splat(load1(mask.at + j * mask.key));
        if (mask.query)
          for (int l = 0; l < W; ++l)
            m[l] = load1(mask.at + std::min<int64_t>(v * W + l, count_ - 1) * mask.query +
                         j * mask.key);
        // exponents of 2; finite values stay finite
        if (kPaired<T>) m = m < lowest ? m : max(m * kLog2e, splat(lowest));
        float* at = scores + (j * V + v) * W;
        const vf sum = load(at) * factor_ + m;
        store(at, sum);
        top[v] = max(top[v], sum);
      }
  }

  int64_t width_, steps_, count_ = 0;
  int vectors_ = 0;
  float factor_ = 1;
  Scratch<E> q_;
  Scratch<float> result_;
  vf top_[kQueryVectors], total_[kQueryVectors];
  bool met_ = false;  // whether it has met any keys
};

}  // namespace FASTDIFF_ISA
