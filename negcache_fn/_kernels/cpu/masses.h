// The log-sum-exp of each slot over the rows of a batch, from scores that come block by block.
#pragma once

#include <cstdint>

#include "problem.h"
#include "vectors.h"

namespace negcache {

// A consumer of `stream`: out[slot] = logaddexp(out[slot], logsumexp over the rows of score + weight). A row with the
// weight -inf does not count, for any scores.
class SlotMasses {
 public:
  SlotMasses(const float* weight, float* out) : weight_(weight), out_(out) {}
  SlotMasses(const SlotMasses&) = delete;
  ~SlotMasses() { finish(); }

  void operator()(int64_t block, int64_t row, int64_t lanes, const float* scores) {
    if (block != block_) {
      finish();
      block_ = block;
      for (int64_t j = 0; j < kBlock; ++j) {
        store(top_ + j * kLanes, splat(-kInfinity));
        store(total_ + j * kLanes, Floats{});
      }
    }
    float weights[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) weights[i] = i < lanes ? weight_[row + i] : -kInfinity;
    const Floats weight = load(weights);
    for (int64_t j = 0; j < kBlock; ++j) {
      const Floats mass = weight == -kInfinity ? splat(-kInfinity) : load(scores + j * kLanes) + weight;
      const Floats top = load(top_ + j * kLanes), larger = maximum(mass, top);
      const Floats shift = larger == -kInfinity ? splat(0.0f) : larger;
      const Floats total = load(total_ + j * kLanes) * exponential(top - shift) + exponential(mass - shift);
      store(top_ + j * kLanes, larger);
      store(total_ + j * kLanes, total);
    }
  }

 private:
  // Adds up the lanes of each slot, and the sums of earlier rows.
  void finish() {
    if (block_ < 0) return;
    float* out = out_ + block_ * kBlock;
    for (int64_t j = 0; j < kBlock; ++j) {
      float top = out[j];
      for (int i = 0; i < kLanes; ++i) top = top_[j * kLanes + i] > top ? top_[j * kLanes + i] : top;
      if (top == -kInfinity) continue;
      const Floats relative = load(total_ + j * kLanes) * exponential(load(top_ + j * kLanes) - splat(top));
      const float before = exponential(splat(out[j] - top))[0];
      out[j] = top + logarithm(splat(sum(relative) + (out[j] == -kInfinity ? 0.0f : before)))[0];
    }
  }

  const float* weight_;
  float* out_;
  int64_t block_ = -1;
  float top_[kBlock * kLanes], total_[kBlock * kLanes];
};

}  // namespace negcache
