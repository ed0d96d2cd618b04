// The input of every score kernel, and the step from products to scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "blocks.h"
#include "failure.h"
#include "vectors.h"

namespace negcache {

// The same fields, in the same order, as `_Problem` in call.py.
struct Problem {
  const void* embeddings;  // [capacity, dim], in the storage dtype
  int64_t storage;         // its number in _codec.py
  int64_t capacity, dim, rows;
  const float* queries;     // [rows, dim]
  const float* bias;        // [capacity]
  const int64_t* excluded;  // [rows, exclusions]
  int64_t exclusions;
  const float* max_score;      // [rows], of the score without its bias; null: no limit
  const int32_t* row_labels;   // [rows]; null: no labels
  const int32_t* slot_labels;  // [capacity]
  const float* row_scale;      // [capacity]: an embedding is its stored numbers times it; null: the numbers themselves
  const int64_t* places;       // [blocks()]: the place of each block's embeddings in the storage; null: in order

  int64_t blocks() const { return (capacity + kBlock - 1) / kBlock; }

  template <typename T>
  const T* embeddings_of(const T* stored, int64_t block) const {
    return stored + (places ? places[block] : block) * kBlock * dim;
  }
};

// Calls `function` with the embeddings as a pointer to numbers of the storage's type.
template <typename Function>
Status with_storage(const Problem& problem, Function function) {
  switch (problem.storage) {
    case 0:
      function((const float*)problem.embeddings);
      break;
    case 1:
      function((const Bfloat16*)problem.embeddings);
      break;
    case 2:
      function((const _Float16*)problem.embeddings);
      break;
    case 3:
      function((const int8_t*)problem.embeddings);
      break;
    default:
      return kUnknownStorage;
  }
  return kDone;
}

// The excluded slots by block, so that a block reads its own only, however many there are.
class Exclusions {
 public:
  struct Entry {
    int32_t row, place;  // place: of the slot in its block
  };

  explicit Exclusions(const Problem& problem) {
    const int64_t all = problem.rows * problem.exclusions;
    if (all == 0) return;
    starts_.resize(problem.blocks() + 1);
    const auto inside = [&](int64_t slot) { return slot >= 0 && slot < problem.capacity; };
    for (int64_t i = 0; i < all; ++i)
      if (inside(problem.excluded[i])) ++starts_[problem.excluded[i] / kBlock + 1];
    std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
    entries_.resize(starts_.back());
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t i = 0; i < all; ++i) {  // so the rows of a block ascend
      const int64_t slot = problem.excluded[i];
      if (!inside(slot)) continue;
      entries_[next[slot / kBlock]++] = {(int32_t)(i / problem.exclusions), (int32_t)(slot % kBlock)};
    }
  }

  // Calls `function(row, place)` for those of a block and of the rows first_row ... first_row + rows - 1.
  template <typename Function>
  void of_block(int64_t block, int64_t first_row, int64_t rows, Function function) const {
    if (starts_.empty()) return;
    const Entry* end = entries_.data() + starts_[block + 1];
    const Entry* entry = std::lower_bound(entries_.data() + starts_[block], end, first_row,
                                          [](const Entry& one, int64_t row) { return one.row < row; });
    for (; entry != end && entry->row < first_row + rows; ++entry) function(entry->row, entry->place);
  }

 private:
  std::vector<int64_t> starts_;  // [blocks + 1]; empty: there are none
  std::vector<Entry> entries_;
};

// Sets scores of a block [kBlock slots][kLanes rows] to -inf where the slot is excluded for the row, has its label, or
// is above its limit.
inline void exclude(const Problem& problem, const Exclusions& excluded, int64_t first_row, int64_t lanes,
                    int64_t first_slot, const float* bias, float* scores) {
  if (problem.max_score) {
    const Floats limit = load(problem.max_score + first_row, lanes);
    for (int64_t j = 0; j < kBlock; ++j) {
      const Floats score = load(scores + j * kLanes);
      store(scores + j * kLanes, score > limit + bias[j] ? splat(-kInfinity) : score);
    }
  }
  if (problem.row_labels) {
    const Ints label = load(problem.row_labels + first_row, lanes);
    const int64_t count = std::min(kBlock, problem.capacity - first_slot);
    for (int64_t j = 0; j < count; ++j) {
      const Floats score = load(scores + j * kLanes);
      store(scores + j * kLanes, label == problem.slot_labels[first_slot + j] ? splat(-kInfinity) : score);
    }
  }
  excluded.of_block(first_slot / kBlock, first_row, lanes,
                    [&](int64_t row, int64_t place) { scores[place * kLanes + row - first_row] = -kInfinity; });
}

// The factor of the products of a slot's stored numbers.
inline float scale_of(const Problem& problem, int64_t slot) {
  return problem.row_scale ? problem.row_scale[slot] : 1.0f;
}

// Products with the stored numbers of a block [kBlock slots][kLanes rows] become scores.
inline void scale_products(const Problem& problem, int64_t first_slot, int64_t count, const float* bias,
                           float* scores) {
  for (int64_t j = 0; j < count; ++j)
    store(scores + j * kLanes, load(scores + j * kLanes) * problem.row_scale[first_slot + j] + bias[j]);
  for (int64_t j = count; j < kBlock; ++j) store(scores + j * kLanes, splat(-kInfinity));
}

// The bias of a block's slots, -inf past the end of the cache.
inline void load_bias(const Problem& problem, int64_t slot, int64_t count, float* bias) {
  std::copy(problem.bias + slot, problem.bias + slot + count, bias);
  std::fill(bias + count, bias + kBlock, -kInfinity);
}

}  // namespace negcache
