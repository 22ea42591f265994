// Attention without a score matrix: blocks of queries meet chunks of keys, with a running softmax.
#pragma once
#include <vector>

#include "block.h"
#include "kernels.h"
#include "parallel.h"

namespace FASTDIFF_ISA {

using fastdiff::Attention;
using fastdiff::JointAttention;

constexpr int64_t kPanel = 1 << 20;  // bytes of blocks that meet a stretch before the next one

// Runs blocks of queries past the keys of one or two sequences; one object per thread.
template <typename T, int N>
class Attend {
 public:
  // keys: the number of keys of each sequence.
  Attend(const int64_t (&keys)[N], int64_t width, int64_t most_blocks)
      : scores_(scratch<float>((kKeys + kTall) * kQueries)) {
    bool whole = true;
    for (int s = 0; s < N; ++s) {
      stretches_.emplace_back(keys[s], width);
      whole = whole && stretches_[s].keys() >= keys[s];
    }
    // what a head's blocks share is copied once, or as rarely as the L2 cache allows
    const int64_t fit = std::max<int64_t>(1, kPanel / Block<T>::bytes(width));
    const int64_t count = whole ? 1 : std::min(fit, most_blocks);
    for (int64_t i = 0; i < count; ++i) blocks_.emplace_back(width);
  }

  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  Block<T>& block(int64_t i) { return blocks_[i]; }

  // Runs the first `count` blocks past all keys of sequence s of head `number`; mask(i): the mask of
  // block i.
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
  int64_t held_[2] = {-1, -1};  // the head in each stretch
};

// Prefetches a block's rows of a tensor: they are too far apart for the processor to predict.
template <typename T>
static void ask(const T* rows, int64_t ld, int64_t count, int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < std::min(count, kQueries); ++i)
    for (int64_t c = 0; c < width; c += line) __builtin_prefetch(rows + i * ld + c);
}

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
      T* out = static_cast<T*>(p.out) + (b * p.queries * p.heads + h) * p.width;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (begin + i) * kQueries;
        attend.block(i).begin(q + at * p.q_stride[1], p.q_stride[1],
                              std::min(kQueries, p.queries - at), p.scale);
        ask(q + (at + kQueries) * p.q_stride[1], p.q_stride[1], p.queries - at - kQueries, p.width);
        ask(out + at * p.heads * p.width, p.heads * p.width, p.queries - at, p.width);
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
        attend.block(i).write(out + (begin + i) * kQueries * p.heads * p.width, p.heads * p.width);
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
      // f(block, its sequence, its first query)
      const auto each_block = [&](const auto& f) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t block = task % blocks + i;
          if (block < picture_blocks) f(attend.block(i), p.picture, block * kQueries);
          else f(attend.block(i), p.text, (block - picture_blocks) * kQueries);
        }
      };
      const auto out_at = [&](const JointAttention::Sequence& s, int64_t query) {
        return static_cast<T*>(s.out) + ((b * s.queries + query) * p.heads + h) * p.width;
      };
      const auto meet = [&](int s, const JointAttention::Sequence& keys, const float* bias) {
        attend.meet(s, number,
                    {head_at<T>(keys.k, keys.k_stride, b, h),
                     head_at<T>(keys.v, keys.v_stride, b, h), keys.k_stride[1], keys.v_stride[1],
                     keys.keys},
                    count, [&](int64_t) { return Mask<float>{bias, 0, 1}; });
      };
      each_block([&](Block<T>& block, const JointAttention::Sequence& s, int64_t at) {
        const T* q = head_at<T>(s.q, s.q_stride, b, h) + at * s.q_stride[1];
        block.begin(q, s.q_stride[1], std::min(kQueries, s.queries - at), p.scale);
        ask(q + kQueries * s.q_stride[1], s.q_stride[1], s.queries - at - kQueries, p.width);
        ask(out_at(s, at), p.heads * p.width, s.queries - at, p.width);
      });
      meet(0, p.picture, nullptr);
      meet(1, p.text, p.text_bias);
      each_block([&](Block<T>& block, const JointAttention::Sequence& s, int64_t at) {
        block.write(out_at(s, at), p.heads * p.width);
      });
    }
  });
}

}  // namespace FASTDIFF_ISA
