// Sums over the rows of a batch, of each slot and of each column of a matrix, as logarithms.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"
#include "vectors.h"

namespace negcache {

// exp(x), and 0 below the range of `exponential`. NaN stays NaN.
inline Floats mass_of(Floats x) { return x < -86.0f ? Floats{} : exponential(x); }

// The logarithm of sums relative to exp(shift).
inline Floats logarithm_of(Floats shift, Floats total) {
  return total == 0.0f ? splat(-kInfinity) : shift + logarithm(total);
}

// A consumer of `stream`: out[slot] = logaddexp(out[slot], logsumexp over the rows of score + weight). A row with the
// weight -inf does not count, for any scores. `log_scale[block]` is about the log-sum-exp of the block's results, so
// that one exponential a score is enough; of a slot that is smaller by a factor of exp(-60) only the largest term
// counts.
class SlotMasses {
 public:
  // `weight` is as long as whole vectors, filled up with -inf.
  SlotMasses(const float* weight, const float* log_scale, float* out)
      : weight_(weight), log_scale_(log_scale), out_(out) {}
  SlotMasses(const SlotMasses&) = delete;
  ~SlotMasses() { finish(); }

  void operator()(int64_t block, int64_t row, int64_t, const float* scores) {
    if (block != block_) {
      finish();
      block_ = block;
      shift_ = log_scale_[block] == -kInfinity ? 0.0f : log_scale_[block];
      std::fill(total_, total_ + kBlock * kLanes, 0.0f);
      std::fill(top_, top_ + kBlock * kLanes, -kInfinity);
    }
    const Floats weight = load(weight_ + row) - splat(shift_);
    for (int64_t j = 0; j < kBlock; ++j) {
      const Floats relative = weight == -kInfinity ? splat(-kInfinity) : load(scores + j * kLanes) + weight;
      store(top_ + j * kLanes, maximum(relative, load(top_ + j * kLanes)));
      store(total_ + j * kLanes, load(total_ + j * kLanes) + mass_of(relative));
    }
  }

 private:
  // Adds up the lanes of each slot, and the sums of earlier rows.
  void finish() {
    if (block_ < 0) return;
    float* out = out_ + block_ * kBlock;
    for (int64_t j = 0; j < kBlock; ++j) {
      const float before = out[j] - shift_;
      const float total = sum(load(total_ + j * kLanes)) + mass_of(splat(before))[0];
      const float top = std::max(before, *std::max_element(top_ + j * kLanes, top_ + (j + 1) * kLanes));
      out[j] = shift_ + (total < kSmall ? top : logarithm(splat(total))[0]);
    }
  }

  static constexpr float kSmall = 8.8e-27f;  // exp(-60)

  const float *weight_, *log_scale_;
  float* out_;
  int64_t block_ = -1;
  float shift_ = 0.0f;
  float total_[kBlock * kLanes], top_[kBlock * kLanes];
};

// out[column] = logsumexp over the rows of value + weight; a row with the weight -inf does not count.
inline void sum_of_rows(const float* values, const float* weight, int64_t rows, int64_t columns, float* out) {
#pragma omp parallel for schedule(static) if (rows * columns > kWorthThreads)
  for (int64_t first = 0; first < columns; first += kBlock) {
    constexpr int64_t kVectorsOfBlock = kBlock / kLanes;
    const int64_t count = std::min(kBlock, columns - first);
    Floats top[kVectorsOfBlock], total[kVectorsOfBlock] = {};
    for (Floats& largest : top) largest = splat(-kInfinity);
    const auto visit = [&](auto use) {
      for (int64_t row = 0; row < rows; ++row) {
        if (weight[row] == -kInfinity) continue;
        const float* from = values + row * columns + first;
        for (int64_t v = 0; v * kLanes < count; ++v)
          use(v, load(from + v * kLanes, count - v * kLanes) + splat(weight[row]));
      }
    };
    visit([&](int64_t v, Floats mass) { top[v] = maximum(mass, top[v]); });
    for (Floats& largest : top) largest = largest == -kInfinity ? Floats{} : largest;
    visit([&](int64_t v, Floats mass) { total[v] += mass_of(mass - top[v]); });
    for (int64_t v = 0; v * kLanes < count; ++v) {
      float lanes[kLanes];
      store(lanes, logarithm_of(top[v], total[v]));
      std::copy(lanes, lanes + std::min<int64_t>(kLanes, count - v * kLanes), out + first + v * kLanes);
    }
  }
}

// The largest of some numbers, 0 where all are -inf, and the sum of their exponentials relative to it.
struct Sum {
  float shift, total;
};

inline Sum sum_of(const float* values, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  Floats tops = splat(-kInfinity), totals = {};
  for (int64_t i = 0; i < whole; i += kLanes) tops = maximum(load(values + i), tops);
  float top = largest_lane(tops);
  for (int64_t i = whole; i < count; ++i) top = std::max(top, values[i]);
  if (top == kInfinity) return {top, 1.0f};
  const float shift = top == -kInfinity ? 0.0f : top;
  for (int64_t i = 0; i < whole; i += kLanes) totals += mass_of(load(values + i) - shift);
  float total = sum(totals);
  for (int64_t i = whole; i < count; ++i) total += mass_of(splat(values[i] - shift))[0];
  return {shift, total};
}

inline float logsumexp_of(const float* values, int64_t count) {
  const Sum sum = sum_of(values, count);
  return logarithm_of(splat(sum.shift), splat(sum.total))[0];
}

// out[row] = logsumexp of the row's values.
inline void logsumexp_of_rows(const float* values, int64_t rows, int64_t columns, float* out) {
#pragma omp parallel for schedule(static) if (rows * columns > kWorthThreads)
  for (int64_t row = 0; row < rows; ++row) out[row] = logsumexp_of(values + row * columns, columns);
}

}  // namespace negcache
