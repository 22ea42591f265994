// Attention without a score matrix: blocks of queries against chunks of keys, softmax on the way.
#pragma once
#include <cmath>
#include <vector>

#include "flash.h"
#include "kernels.h"
#include "parallel.h"

namespace FASTDIFF_ISA {

using fastdiff::Attention;
using fastdiff::JointAttention;

constexpr int64_t kStretch = 4 << 20;  // bytes of keys and values that a thread copies at a time
constexpr int64_t kPanel = 1 << 20;    // bytes of blocks that meet a stretch before the next one
constexpr double kLog2e = 1.4426950408889634;

// What is added to the scores of one head's queries and keys; null: nothing.
template <typename M>
struct Mask {
  const M* at;
  int64_t query, key;  // elements from one to the next; 0 where it repeats

  Mask from(int64_t queries, int64_t keys) const {
    return {at ? at + queries * query + keys * key : nullptr, query, key};
  }
};

// One head's keys and values where they lie.
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
      : width_(width), steps_((width + kStep<T> - 1) / kStep<T>), keys_(std::min(keys, most(width))),
        k_(scratch<E>((keys_ + kTall) * steps_)),
        v_(scratch<E>((keys_ + kStep<T> - 1) / kStep<T> * width + W + kTall)) {}

  // Keys that one holds, at most: whole chunks.
  static int64_t most(int64_t width) {
    const int64_t bytes = 2 * width * static_cast<int64_t>(sizeof(E)) / kStep<T>;
    return std::max<int64_t>(1, kStretch / bytes / kKeys) * kKeys;
  }
  int64_t keys() const { return keys_; }
  int64_t steps() const { return steps_; }
  const E* k(int64_t key) const { return k_.get() + key * steps_; }
  const E* v(int64_t key) const { return v_.get() + key / kStep<T> * width_; }

  void read(const Head<T>& head, int64_t from, int64_t keys) {
    const T *k = head.k + from * head.k_ld, *v = head.v + from * head.v_ld;
    for (int64_t j = 0; j < keys + kTall; ++j) {  // a tile may reach beyond: the last key again
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
        each_vector(width_, [&](int64_t c, int n) {  // what it writes beyond, the next row replaces
          T both[2 * W] = {};
          std::memcpy(both, row + c, n * sizeof(T));
          if (second) std::memcpy(both + W, second + c, n * sizeof(T));
          const vu paired = pairs(both, both + W);
          std::memcpy(to + c, &paired, sizeof(paired));
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

  // `factor` turns products of q and k into exponents of 2; where it is negative, q changes its sign
  // instead, so that the largest product has the largest exponent.
  void begin(const T* rows, int64_t ld, int64_t count, float factor) {
    count_ = count;
    vectors_ = static_cast<int>((count + W - 1) / W);
    factor_ = std::abs(factor);
    for (int i = 0; i < vectors_; ++i) {
      for (int64_t s = 0; s < steps_; s += W) {
        vf lanes[W];
        for (int l = 0; l < W; ++l)
          lanes[l] = steps(rows + std::min<int64_t>(i * W + l, count - 1) * ld, s, factor < 0);
        transpose(lanes);
        for (int l = 0; l < W; ++l)
          store(reinterpret_cast<float*>(q_.get()) + ((s + l) * vectors_ + i) * W, lanes[l]);
      }
      top_[i] = splat(-std::numeric_limits<float>::infinity());
      total_[i] = vf{};
    }
    met_ = false;
  }

  // Past `keys` keys of a stretch; `scores` has room for a chunk's.
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
      // where all keys are masked out by -inf there is no largest score, and the result is NaN
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
  // W steps of a query from the `s`-th, as bits; zero beyond the width.
  vf steps(const T* row, int64_t s, bool minus) const {
    const int64_t c = s * kStep<T>, left = width_ - c;
    if constexpr (kPaired<T>) {
      const vf both = (vf)bits_n(row + c, static_cast<int>(std::min<int64_t>(2 * W, left)));
      return minus ? (vf)((vu)both ^ 0x80008000) : both;
    } else {
      const vf one = load_n(row + c, static_cast<int>(std::min<int64_t>(W, left)));
      return minus ? -one : one;
    }
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
        // finite even where every key so far is masked out
        base[v] = max(now[v], splat(-std::numeric_limits<float>::max()));
        shrink[v] = exp2<5>(top[v] - base[v]);
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

  // Turns scores into exponents of 2 with the mask in them; `top` becomes the largest.
  template <int V, typename M>
  void add(const Mask<M>& mask, int64_t keys, float* scores, vf (&top)[V]) const {
    const float lowest = -std::numeric_limits<float>::max(), log2e = static_cast<float>(kLog2e);
    const auto exponent = [&](vf m) {  // what is finite stays so
      return m < lowest ? m : max(m * log2e, splat(lowest));
    };
    for (int v = 0; v < V; ++v) top[v] = splat(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < keys; ++j)
      for (int v = 0; v < V; ++v) {
        vf m = splat(load1(mask.at + j * mask.key));
        if (mask.query)
          for (int l = 0; l < W; ++l)
            m[l] = load1(mask.at + std::min<int64_t>(v * W + l, count_ - 1) * mask.query +
                         j * mask.key);
        float* at = scores + (j * V + v) * W;
        const vf sum = load(at) * factor_ + exponent(m);
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
  bool met_ = false;  // any keys so far
};

// Takes blocks of queries past the keys of one or two sequences. A thread's own.
template <typename T, int N>
class Attend {
 public:
  // The keys of each sequence.
  Attend(const int64_t (&keys)[N], int64_t width, int64_t most_blocks)
      : scores_(scratch<float>((kKeys + kTall) * kQueries)) {
    bool whole = true;
    for (int s = 0; s < N; ++s) {
      stretches_.emplace_back(keys[s], width);
      whole = whole && stretches_[s].keys() >= keys[s];
    }
    // what a head's blocks share is copied once, or as seldom as the second cache allows
    const int64_t fit = std::max<int64_t>(1, kPanel / Block<T>::bytes(width));
    const int64_t count = whole ? 1 : std::min(fit, most_blocks);
    for (int64_t i = 0; i < count; ++i) blocks_.emplace_back(width);
  }

  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  Block<T>& block(int64_t i) { return blocks_[i]; }

  // The first `count` blocks past all keys of sequence s of the head `number`; mask(i) is of block i.
  template <typename F>
  void meet(int s, int64_t number, const Head<T>& head, int64_t count, const F& mask) {
    Stretch<T>& stretch = stretches_[s];
    for (int64_t from = 0; from < head.keys; from += stretch.keys()) {
      const int64_t keys = std::min(stretch.keys(), head.keys - from);
      if (held_[s] != number || keys < head.keys) stretch.read(head, from, keys);
      held_[s] = number;
      for (int64_t i = 0; i < count; ++i)
        blocks_[i].meet(stretch, keys, mask(i).from(0, from), scores_.get());
    }
  }

 private:
  std::vector<Stretch<T>> stretches_;
  std::vector<Block<T>> blocks_;
  Scratch<float> scores_;
  int64_t held_[2] = {-1, -1};  // the head that a stretch holds
};

template <typename T>
static const T* head_at(const void* tensor, const int64_t* stride, int64_t b, int64_t h) {
  return static_cast<const T*>(tensor) + b * stride[0] + h * stride[2];
}

template <typename T>
static void attention(const Attention& p) {
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
  fastdiff::parallel_for(p.batch * p.heads * blocks, [&](int64_t first, int64_t last) {
    Attend<T, 1> attend({p.keys}, p.width, std::min(blocks, last - first));
    for (int64_t task = first, count; task < last; task += count) {
      const int64_t number = task / blocks, b = number / p.heads, h = number % p.heads;
      const int64_t begin = task % blocks;
      count = std::min({attend.blocks(), last - task, blocks - begin});
      const T* q = head_at<T>(p.q, p.q_stride, b, h);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (begin + i) * kQueries;
        attend.block(i).begin(q + at * p.q_stride[1], p.q_stride[1],
                              std::min(kQueries, p.queries - at), static_cast<float>(p.scale * kLog2e));
      }
      const T* mask = static_cast<const T*>(p.mask);
      if (mask) mask += b * p.mask_stride[0] + h * p.mask_stride[1];
      attend.meet(0, number,
                  {head_at<T>(p.k, p.k_stride, b, h), head_at<T>(p.v, p.v_stride, b, h),
                   p.k_stride[1], p.v_stride[1], p.keys},
                  count, [&](int64_t i) {
                    return Mask<T>{mask, p.mask_stride[2], p.mask_stride[3]}.from(
                        (begin + i) * kQueries, 0);
                  });
      for (int64_t i = 0; i < count; ++i)
        attend.block(i).write(static_cast<T*>(p.out) +
                                  ((b * p.queries + (begin + i) * kQueries) * p.heads + h) * p.width,
                              p.heads * p.width);
    }
  });
}

template <typename T>
static void joint_attention(const JointAttention& p) {
  const int64_t picture_blocks = (p.picture.queries + kQueries - 1) / kQueries;
  const int64_t blocks = picture_blocks + (p.text.queries + kQueries - 1) / kQueries;
  fastdiff::parallel_for(p.batch * p.heads * blocks, [&](int64_t first, int64_t last) {
    Attend<T, 2> attend({p.picture.keys, p.text.keys}, p.width, std::min(blocks, last - first));
    for (int64_t task = first, count; task < last; task += count) {
      const int64_t number = task / blocks, b = number / p.heads, h = number % p.heads;
      count = std::min({attend.blocks(), last - task, blocks - task % blocks});
      // f(block, the sequence that it is of, its first query)
      const auto each_block = [&](const auto& f) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t block = task % blocks + i;
          if (block < picture_blocks) f(attend.block(i), p.picture, block * kQueries);
          else f(attend.block(i), p.text, (block - picture_blocks) * kQueries);
        }
      };
      const auto meet = [&](int s, const JointAttention::Sequence& keys, const float* bias) {
        attend.meet(s, number,
                    {head_at<T>(keys.k, keys.k_stride, b, h), head_at<T>(keys.v, keys.v_stride, b, h),
                     keys.k_stride[1], keys.v_stride[1], keys.keys},
                    count, [&](int64_t) { return Mask<float>{bias, 0, 1}; });
      };
      each_block([&](Block<T>& block, const JointAttention::Sequence& s, int64_t at) {
        block.begin(head_at<T>(s.q, s.q_stride, b, h) + at * s.q_stride[1], s.q_stride[1],
                    std::min(kQueries, s.queries - at), static_cast<float>(p.scale * kLog2e));
      });
      meet(0, p.picture, nullptr);
      meet(1, p.text, p.text_bias);
      each_block([&](Block<T>& block, const JointAttention::Sequence& s, int64_t at) {
        block.write(static_cast<T*>(s.out) + ((b * s.queries + at) * p.heads + h) * p.width,
                    p.heads * p.width);
      });
    }
  });
}

}  // namespace FASTDIFF_ISA
