// What every score kernel reads, and how products become scores.
#pragma once

#include <algorithm>
#include <cstdint>

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
  const float* max_score;  // [rows], of the score without its bias; null: no limit
  const float* row_scale;  // [capacity]: an embedding is its stored numbers times it; null: the numbers themselves

  int64_t blocks() const { return (capacity + kBlock - 1) / kBlock; }
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

// Sets scores of a block [kBlock slots][kLanes rows] to -inf where the slot is excluded for the row, or above its
// limit.
inline void exclude(const Problem& problem, int64_t first_row, int64_t lanes, int64_t first_slot, const float* bias,
                    float* scores) {
  if (problem.max_score) {
    const Floats limit = load(problem.max_score + first_row, lanes);
    for (int64_t j = 0; j < kBlock; ++j) {
      const Floats score = load(scores + j * kLanes);
      store(scores + j * kLanes, score > limit + bias[j] ? splat(-kInfinity) : score);
    }
  }
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t p = 0; p < problem.exclusions; ++p) {
      const int64_t place = problem.excluded[(first_row + i) * problem.exclusions + p] - first_slot;
      if (place >= 0 && place < kBlock) scores[place * kLanes + i] = -kInfinity;
    }
}

// What the products of a slot's stored numbers are to be multiplied with.
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
