// group_norm_silu as phases between barriers. What a thread does in each phase is a function here,
// for the device and, one thread after another, for the host (group_norm_silu_host.cpp), so that
// the arithmetic can be tested without a GPU.
//
// A tile is whole groups of one picture, K channels wide; its rows are pixels. A cluster of CTAs
// shares them; each CTA keeps its slab [rows, K] in shared memory between the single read and the
// single write. A thread owns the same N channels of every `stride`-th row, so it needs no barrier
// to read what it copied itself.
//
//   load        begin to copy the slab; each group's pivot
//   accumulate  mean and centred squares of the thread's channels (Welford)
//   gather      those of a group's channels in some threads -> one of `slots` moments of the group
//   fold        8 moments -> 1, until a group has one
//   combine     the moments of all CTAs of the cluster -> mean and 1 / deviation
//   write       normalise, SiLU, store
//
// All values are taken relative to a pivot, the group's first value in the picture. It is within
// sqrt(n) deviations of the mean, so float32 is enough wherever the mean is.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "lanes.h"

namespace fastdiff::cuda {

using Args = GroupNormSilu;

constexpr int kThreads = 512;
constexpr int kStages = 4;  // copies are awaited in quarters: statistics begin with the first
constexpr int kFan = 8;     // moments that a thread folds into one

struct Moments {
  float count, mean, squares;  // of values minus their pivot; squares around the mean
};
struct Part {
  float mean, squares;
};
struct Norm {  // of a group; the mean is of values minus the pivot
  float pivot, mean, rstd;
};

// Chan's formula for many parts; each part is read twice, the second time around the common mean.
template <typename F>
HD Moments merged(int parts, const F& part) {
  Moments all{0, 0, 0};
#pragma unroll 1
  for (int i = 0; i < parts; ++i) {
    const Moments one = part(i);
    all.count += one.count;
    all.mean += one.count * one.mean;
  }
  all.mean = all.count > 0 ? all.mean / all.count : 0.0f;  // a CTA without rows has no values
#pragma unroll 1
  for (int i = 0; i < parts; ++i) {
    const Moments one = part(i);
    const float apart = one.mean - all.mean;
    all.squares += one.squares + one.count * apart * apart;
  }
  return all;
}

// A thread of a CTA. It loads N elements at once: 16 bytes, or one element.
template <typename T, int N>
class Thread {
 public:
  using V = Vector<T, N>;

  HD Thread(const Args& a, int block, int picture, int index, char* shared)
      : a_(a), picture_(picture), index_(index), K_(a.groups * a.W), stride_(kThreads / (K_ / N)),
        slots_(kThreads / a.groups), first_(block / a.cluster * K_) {
    const int begin = block % a.cluster * a.rows, left = a.L > begin ? a.L - begin : 0;
    rows_ = left < a.rows ? left : a.rows;
    row_ = index / (K_ / N);
    column_ = index % (K_ / N) * N;
    count_ = row_ < stride_ ? passes(row_) : 0;  // only threads that fill whole rows work
    begin_ = begin;
    slab_ = reinterpret_cast<T*>(shared);
    parts_ = reinterpret_cast<Part*>(shared + slab_bytes(a));
    moments_ = reinterpret_cast<Moments*>(parts_ + kThreads * N);
    norms_ = reinterpret_cast<Norm*>(moments_ + kThreads);
  }

  HD static int64_t slab_bytes(const Args& a) {
    return (static_cast<int64_t>(a.rows) * a.groups * a.W * sizeof(T) + 15) / 16 * 16;
  }
  static int64_t shared_bytes(const Args& a) {
    return slab_bytes(a) + kThreads * (N * sizeof(Part) + sizeof(Moments)) +
           a.groups * sizeof(Norm);
  }

  HD int slots() const { return slots_; }
  HD Moments* moments() const { return moments_; }

  HD void load() {
    const Source from = source(first_ + column_);
#pragma unroll 1
    for (int k = 0, stage = 0; stage < kStages; ++stage) {
#pragma unroll 4
      for (; k < end_of(stage); ++k) copy(own(k), at(from.first, pixel(k) * from.width));
      commit();
    }
    if (index_ >= a_.groups) return;
    const int channel = first_ + index_ * a_.W;
    float pivot = wide(loaded(source(channel).first)) + added(channel);
    if (sums(channel)) pivot += value(a_.residual, x_at(0) + channel);
    norms_[index_].pivot = pivot;
  }

  HD void accumulate() {
    if (!count_) return;
    if (sums(first_ + column_)) add_residual();
    float offset[N], mean[N] = {}, squares[N] = {};
    offsets(offset);
#pragma unroll 1
    for (int k = 0, stage = 0; stage < kStages; ++stage) {
      arrived(kStages - 1 - stage);
#pragma unroll 1
      for (; k < end_of(stage); ++k) {
        const V v = *own(k);
        const float weight = 1.0f / static_cast<float>(k + 1);
        for (int i = 0; i < N; ++i) {
          const float value = wide(v.lane[i]) + offset[i], before = value - mean[i];
          mean[i] += before * weight;
          squares[i] += before * (value - mean[i]);
        }
      }
    }
    for (int i = 0; i < N; ++i) parts_[row_ * K_ + column_ + i] = {mean[i], squares[i]};
  }

  HD void gather() {
    const int group = index_ / slots_, slot = index_ % slots_;
    if (group >= a_.groups) return;
    const int all = (rows_ < stride_ ? rows_ : stride_) * a_.W;  // parts of the group
    const int mine = all > slot ? (all - slot + slots_ - 1) / slots_ : 0;
    moments_[index_] = merged(mine, [&](int i) {
      const int part = slot + i * slots_, row = part / a_.W;
      const Part& one = parts_[row * K_ + group * a_.W + part % a_.W];
      return Moments{static_cast<float>(passes(row)), one.mean, one.squares};
    });
  }

  // Folds the first `width` moments of each group in place; returns how many are left. Only the
  // thread that writes a slot reads it.
  HD int fold(int width) {
    const int left = (width + kFan - 1) / kFan, group = index_ / slots_, slot = index_ % slots_;
    if (group < a_.groups && slot < left)
      moments_[index_] = merged((width - slot + left - 1) / left,
                                [&](int i) { return moments_[index_ + i * left]; });
    return left;
  }

  // moments(r): the moments of CTA r of the cluster.
  template <typename F>
  HD void combine(const F& moments) {
    if (index_ >= a_.groups) return;
    const Moments all =
        merged(a_.cluster, [&](int rank) { return moments(rank)[index_ * slots_]; });
    norms_[index_].mean = all.mean;
    norms_[index_].rstd = 1.0f / std::sqrt(all.squares / all.count + a_.eps);
  }

  HD void write() {
    if (!count_) return;
    float offset[N], scale[N], rest[N];
    offsets(offset);
    each_channel([&](int i, int channel, const Norm& norm) {
      scale[i] = norm.rstd * value(a_.weight, channel);
      rest[i] = value(a_.bias, channel) - norm.mean * scale[i];
    });
    const int C = a_.C + a_.C2;
    T* y = static_cast<T*>(a_.y) + int64_t{picture_} * a_.L * C + first_ + column_;
#pragma unroll 1
    for (int k = 0; k < count_; ++k) {
      V v = *own(k);
      for (int i = 0; i < N; ++i) {
        const float out = (wide(v.lane[i]) + offset[i]) * scale[i] + rest[i];
        v.lane[i] = narrow<T>(a_.silu ? silu(out) : out);
      }
      *at(y, pixel(k) * C) = v;
    }
  }

 private:
  struct Source {  // a channel's value in the picture's first pixel; channels of its tensor
    const T* first;
    int width;
  };
  HD Source source(int channel) const {
    if (channel < a_.C) return {static_cast<const T*>(a_.x) + x_at(0) + channel, a_.C};
    const int64_t from = int64_t{picture_ % a_.copies} * a_.L * a_.C2 + channel - a_.C;
    return {static_cast<const T*>(a_.beside) + from, a_.C2};
  }

  HD bool sums(int channel) const { return a_.residual && channel < a_.C; }

  // The slab becomes the sum, rounded as it is written.
  HD void add_residual() {
    const T* residual = static_cast<const T*>(a_.residual) + first_ + column_;
    T* total = static_cast<T*>(a_.total) + first_ + column_;
    float plus[N];
    each_channel([&](int i, int channel, const Norm&) { plus[i] = added(channel); });
    arrived(0);
#pragma unroll 1
    for (int k = 0; k < count_; ++k) {
      V v = *own(k);
      const V other = *at(residual, x_at(pixel(k)));
      for (int i = 0; i < N; ++i)
        v.lane[i] = narrow<T>(wide(v.lane[i]) + plus[i] + wide(other.lane[i]));
      *at(total, x_at(pixel(k))) = v;
      *own(k) = v;
    }
  }

  // What turns the slab's values into t minus the pivot.
  HD void offsets(float (&offset)[N]) const {
    each_channel([&](int i, int channel, const Norm& norm) {
      offset[i] = (sums(channel) ? 0.0f : added(channel)) - norm.pivot;
    });
  }

  // row + shift
  HD float added(int channel) const {
    float sum = 0;
    if (channel >= a_.C) return sum;
    if (a_.row) sum += value(a_.row, picture_ * a_.ld_row + channel);
    if (a_.shift) sum += value(a_.shift, channel);
    return sum;
  }

  // f(i, channel, its group's norm) for each of the thread's channels.
  template <typename F>
  HD void each_channel(const F& f) const {
    int group = column_ / a_.W, within = column_ % a_.W;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      f(i, first_ + column_ + i, norms_[group]);
      if (++within == a_.W) within = 0, ++group;
    }
  }

  HD static float value(const void* tensor, int64_t offset) {
    return wide(loaded(static_cast<const T*>(tensor) + offset));
  }
  template <typename E>
  HD static auto at(E* first, int64_t offset) {
    return reinterpret_cast<std::conditional_t<std::is_const_v<E>, const V, V>*>(first + offset);
  }
  HD V* own(int k) const { return at(slab_, (row_ + k * stride_) * K_ + column_); }
  HD int64_t pixel(int k) const { return begin_ + row_ + k * stride_; }
  HD int64_t x_at(int64_t pixel) const { return (int64_t{picture_} * a_.L + pixel) * a_.C; }
  // The number of rows that the threads at `row` of a stride process.
  HD int passes(int row) const {
    return row < rows_ ? (rows_ - row + stride_ - 1) / stride_ : 0;
  }
  // The end of the rows that a thread copies in a stage.
  HD int end_of(int stage) const { return count_ * (stage + 1) / kStages; }

  const Args& a_;
  int picture_, index_, K_, stride_, slots_;  // stride_: rows that the CTA's threads cover at once
  int first_, begin_, rows_;        // the tile's first channel; the slab's first pixel, its pixels
  int row_, column_, count_;        // the thread's first row and channel, and number of rows
  T* slab_;                         // [rows, K]
  Part* parts_;                     // [stride, K]
  Moments* moments_;                // [groups, slots]
  Norm* norms_;                     // [groups]
};

}  // namespace fastdiff::cuda
