// Everything after the network: guidance, scheduler step, history, the next input.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace FASTDIFF_ISA {

using fastdiff::GuidedStep;

constexpr int64_t kStepBlock = 512;  // elements whose double sums stay in L1

// The columns of a table row, as in fastdiff/kernels/guided_step/spec.py.
enum Column {
  kGuidance, kRescale, kPerturbed, kSample, kNoise, kLearned, kNextScale,
  kClipSample, kClipOutput, kLimit, kCeiling, kQuantile, kKeptOriginal, kKeptNoise, kHistory,
};

// Elements [at, at + n) of one copy of the network's output: those of the noise, or if `variance`,
// of the variance. Uses `space` if they are not contiguous.
template <typename T>
static inline const T* part(const GuidedStep& p, int64_t copy, int64_t at, int64_t n, bool variance,
                            T* space) {
  const int64_t all = p.batch * p.elements;
  const T* output = static_cast<const T*>(p.output);
  if (!p.wide) return output + copy * all + at;
  output += 2 * copy * all + (variance ? p.wide : 0);
  int64_t pixel = at / p.wide, channel = at % p.wide;
  for (int64_t i = 0; i < n; ++i) {
    space[i] = output[2 * pixel * p.wide + channel];
    if (++channel == p.wide) ++pixel, channel = 0;
  }
  return space;
}

// The guided output of elements [at, at + n), and its text part; without guidance, it twice.
template <typename T>
static inline void guided(const GuidedStep& p, const float* row, int64_t at, int64_t n,
                          double* output, double* text) {
  T spaces[2][kStepBlock];
  const double scale = row[kGuidance], perturbed = row[kPerturbed];
  const T* first = part(p, 0, at, n, false, spaces[0]);
  const T* second = p.copies == 1 ? first : part(p, 1, at, n, false, spaces[1]);
  for (int64_t i = 0; i < n; ++i) {
    const double plain = load1(first + i);
    text[i] = load1(second + i);
    output[i] = plain + scale * (text[i] - plain);
  }
  if (p.copies < 3 || perturbed == 0) return;
  const T* third = part(p, 2, at, n, false, spaces[0]);
  for (int64_t i = 0; i < n; ++i) output[i] += perturbed * (text[i] - load1(third + i));
}

// std(text) / std(guided) over one picture, in two passes.
template <typename T>
static double deviation_ratio(const GuidedStep& p, const float* row, int64_t picture) {
  double output[kStepBlock], text[kStepBlock], sums[2] = {}, squares[2] = {};
  const auto pass = [&](const auto& add) {
    for (int64_t at = 0; at < p.elements; at += kStepBlock) {
      const int64_t n = std::min(kStepBlock, p.elements - at);
      guided<T>(p, row, picture * p.elements + at, n, output, text);
      for (int64_t i = 0; i < n; ++i) add(output[i], text[i]);
    }
  };
  pass([&](double o, double t) { sums[0] += o, sums[1] += t; });
  const double means[2] = {sums[0] / p.elements, sums[1] / p.elements};
  pass([&](double o, double t) {
    squares[0] += (o - means[0]) * (o - means[0]);
    squares[1] += (t - means[1]) * (t - means[1]);
  });
  return std::sqrt(squares[1] / squares[0]);
}

// The limit of one picture's dynamic thresholding; `factor`: of guidance rescale.
template <typename T>
static double threshold(const GuidedStep& p, const float* row, int64_t picture, double factor) {
  double output[kStepBlock], text[kStepBlock];
  std::vector<double> sizes(p.elements);
  bool finite = true;
  for (int64_t begin = 0; begin < p.elements; begin += kStepBlock) {
    const int64_t n = std::min(kStepBlock, p.elements - begin), at = picture * p.elements + begin;
    guided<T>(p, row, at, n, output, text);
    for (int64_t i = 0; i < n; ++i) {
      const double clean = row[kClipSample] * double(p.sample[at + i]) +
                           row[kClipOutput] * (factor * output[i]);
      sizes[begin + i] = std::abs(clean);
      finite &= clean == clean;
    }
  }
  if (!finite) return std::nan("");
  const double position = double(row[kQuantile]) * (p.elements - 1);
  const auto at = sizes.begin() + static_cast<int64_t>(position);
  const double between = position - std::floor(position);
  std::nth_element(sizes.begin(), at, sizes.end());
  double quantile = *at;
  if (between > 0) quantile += between * (*std::min_element(at + 1, sizes.end()) - quantile);
  return std::min(std::max(quantile, double(row[kLimit])), double(row[kCeiling]));
}

// What the steps of one picture share; `factor` and `limit` are of guidance rescale and of the clip.
struct Picture {
  const float* row;
  int64_t slot;  // of the history, where this step's output and sample go
  double factor, limit;
  struct Term {
    double factor;
    const float* values;
  };
  std::vector<Term> terms;  // past outputs and samples, and noise
};

// The picture's row, history and factors. Leaves out terms with a zero factor, whose history may not
// be written yet.
template <typename T>
static Picture picture_of(const GuidedStep& p, int64_t picture, int64_t step) {
  const int64_t all = p.batch * p.elements, depth = p.depth;
  Picture made{p.table + step * p.columns, depth ? step % depth : 0, 1.0, 0.0, {}};
  const float *row = made.row, *b = row + kHistory, *c = row + kHistory + depth;  // c[h], h >= 1
  for (int64_t h = 1; h <= depth; ++h) {
    const int64_t slot = ((step - h) % depth + depth) % depth;
    if (b[h] != 0) made.terms.push_back({b[h], p.history + slot * all});
    if (c[h] != 0) made.terms.push_back({c[h], p.history + (depth + slot) * all});
  }
  if (p.noise && !(p.wide && row[kLearned] != 0)) made.terms.push_back({row[kNoise], p.noise});
  const double rescale = row[kRescale];
  if (p.copies > 1 && rescale != 0)
    made.factor = rescale * deviation_ratio<T>(p, row, picture) + (1 - rescale);
  made.limit = row[kLimit];
  if (p.limits && made.limit != 0) {
    made.limit = threshold<T>(p, row, picture, made.factor);
    p.limits[picture] = static_cast<float>(made.limit);
  }
  return made;
}

template <typename T>
static void guided_step(const GuidedStep& p) {
  const int64_t all = p.batch * p.elements, depth = p.depth;
  std::vector<Picture> pictures(p.batch);
  for (int64_t picture = 0; picture < p.batch; ++picture) {
    const int64_t step = p.step[p.steps == 1 ? 0 : picture];
    if (step >= 0) pictures[picture] = picture_of<T>(p, picture, step);  // else its place is empty
  }

  const int64_t blocks = (p.elements + kStepBlock - 1) / kStepBlock;
  const auto run = [&](int64_t first, int64_t last) {
    double output[kStepBlock], text[kStepBlock], result[kStepBlock];
    for (int64_t task = first; task < last; ++task) {
      const Picture& now = pictures[task / blocks];
      if (!now.row) continue;
      const float* row = now.row;
      const int64_t begin = task % blocks * kStepBlock;
      const int64_t n = std::min(kStepBlock, p.elements - begin);
      const int64_t at = task / blocks * p.elements + begin;
      guided<T>(p, row, at, n, output, text);
      const double own = row[kSample], of_output = row[kHistory], factor = now.factor;
      for (int64_t i = 0; i < n; ++i) output[i] *= factor;
      for (int64_t i = 0; i < n; ++i) result[i] = own * p.sample[at + i] + of_output * output[i];
      if (row[kLimit] != 0) {
        const double most = now.limit, shrink = row[kLimit] / most;
        const double clean_sample = row[kClipSample], clean_output = row[kClipOutput];
        for (int64_t i = 0; i < n; ++i) {
          const double clean = clean_sample * p.sample[at + i] + clean_output * output[i];
          result[i] += (clean > most ? most : clean < -most ? -most : clean) * shrink;  // NaN stays
        }
      }
      for (const Picture::Term& term : now.terms)
        for (int64_t i = 0; i < n; ++i) result[i] += term.factor * term.values[at + i];
      if (p.noise && p.wide && row[kLearned] != 0) {
        T space[kStepBlock];
        const double fresh = row[kNoise], learned = row[kLearned];
        const T* variance = part(p, p.copies > 1, at, n, true, space);
        for (int64_t i = 0; i < n; ++i)
          result[i] += fresh * std::exp(learned * load1(variance + i)) * p.noise[at + i];
      }
      if (p.mask) {
        const double of_original = row[kKeptOriginal], of_noise = row[kKeptNoise];
        for (int64_t i = at, end = at + n; i < end; ++i) {
          double kept = p.sample[i];
          if (p.original) kept = of_original * p.original[i] + of_noise * p.original_noise[i];
          result[i - at] = p.mask[i] * result[i - at] + (1.0 - p.mask[i]) * kept;
        }
      }
      if (depth) {
        float* outputs = p.history + now.slot * all + at;
        for (int64_t i = 0; i < n; ++i) outputs[i] = static_cast<float>(output[i]);
        std::copy_n(p.sample + at, n, p.history + (depth + now.slot) * all + at);
      }
      T* following = static_cast<T*>(p.next) + at;
      const double next = row[kNextScale];
      for (int64_t i = 0; i < n; ++i) {
        p.sample[at + i] = static_cast<float>(result[i]);
        store1(following + i, static_cast<float>(next * result[i]));
      }
    }
  };
  constexpr int64_t kSerialBelow = 1 << 14;  // elements that one core does while another wakes up
  if (all < kSerialBelow) run(0, p.batch * blocks);
  else fastdiff::parallel_for(p.batch * blocks, run);
}

}  // namespace FASTDIFF_ISA
