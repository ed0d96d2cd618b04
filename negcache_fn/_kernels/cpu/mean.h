// Weighted sums of embeddings under the softmax of every row, accumulated while scores stream by.
//
// The weights of a row are relative to exp(log_scale), which stays near its largest block so far: sums are rescaled
// only when a block is so much larger that float32 might overflow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "blocks.h"
#include "problem.h"
#include "vectors.h"

namespace negcache {

constexpr int kSumRows = kLanes == 16 ? 8 : 4;  // times kSumVectors: as many sums as fit into the registers
constexpr int kSumVectors = 2;
constexpr float kHeadroom = 40.0f;  // exp of it, times the number of slots, is far from overflow

// Adds the products of the weights [count][kLanes rows] and some columns of embeddings to sums of kSumRows rows.
template <int kVectorsHere, typename Load>
inline void add_products(const float* weights, int64_t count, Load load_embedding, float* sums, int64_t stride) {
  Floats total[kSumRows][kVectorsHere] =
      {};  // of the block alone: a slot's part of the whole sum may be below rounding
  for (int64_t j = 0; j < count; ++j) {
    Floats embedding[kVectorsHere];
    for (int v = 0; v < kVectorsHere; ++v) embedding[v] = load_embedding(j, v);
#pragma GCC unroll 8
    for (int i = 0; i < kSumRows; ++i)
      for (int v = 0; v < kVectorsHere; ++v) total[i][v] += splat(weights[j * kLanes + i]) * embedding[v];
  }
  for (int i = 0; i < kSumRows; ++i)
    for (int v = 0; v < kVectorsHere; ++v) {
      float* sum = sums + i * stride + v * kLanes;
      store(sum, load(sum) + total[i][v]);
    }
}

// Adds the products of a whole block in the columns that it returns the end of.
template <typename T>
inline int64_t add_pairs(const T*, int64_t, const float*, float*, int64_t) {
  return 0;
}

#ifdef NEGCACHE_BFLOAT16

// Numbers of an even and an odd slot side by side.
inline Words paired(Halves even, Halves odd) {
  return __builtin_convertvector(even, Words) | __builtin_convertvector(odd, Words) << 16;
}
inline Words paired(const Bfloat16* even, const Bfloat16* odd) {
  return paired(load_vector<Halves>(even), load_vector<Halves>(odd));
}
inline Words paired(const int8_t* even, const int8_t* odd) {  // which bfloat16 holds exactly
  return (Words)load(even) >> 16 | ((Words)load(odd) & 0xffff0000u);
}

inline Halves rounded(Floats x) {
  const __m256bh numbers = _mm512_cvtneps_pbh((__m512)x);
  Halves bits;
  std::memcpy(&bits, &numbers, sizeof(bits));
  return bits;
}

// The weights are rounded as the embeddings are, and two slots multiplied in a step.
template <typename T>
inline int64_t add_rounded(const T* embeddings, int64_t dim, const float* weights, float* sums, int64_t stride) {
  Words pairs[kBlock / 2];
  for (int64_t j = 0; j < kBlock; j += 2)
    pairs[j / 2] = paired(rounded(load(weights + j * kLanes)), rounded(load(weights + (j + 1) * kLanes)));
  const auto* pair_of = (const uint32_t*)pairs;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Floats total[kLanes] = {};
    for (int64_t j = 0; j < kBlock; j += 2) {
      const T* from = embeddings + j * dim + d;
      const Words embedding = paired(from, from + dim);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        total[i] = (Floats)_mm512_dpbf16_ps((__m512)total[i], (__m512bh)embedding,
                                            (__m512bh)_mm512_set1_epi32(pair_of[j / 2 * kLanes + i]));
    }
    for (int i = 0; i < kLanes; ++i) store(sums + i * stride + d, load(sums + i * stride + d) + total[i]);
  }
  return d;
}

inline int64_t add_pairs(const Bfloat16* embeddings, int64_t dim, const float* weights, float* sums, int64_t stride) {
  return add_rounded(embeddings, dim, weights, sums, stride);
}
inline int64_t add_pairs(const int8_t* embeddings, int64_t dim, const float* weights, float* sums, int64_t stride) {
  return add_rounded(embeddings, dim, weights, sums, stride);
}

#endif  // NEGCACHE_BFLOAT16

// The sums of one thread, over the slots that it has seen.
template <typename T>
struct WeightedSums {
  const T* embeddings;
  const float* row_scale;
  int64_t capacity, dim, stride;
  // A block so far below the largest is skipped: all blocks together then lose less than a rounding, 2^-24.
  float negligible;
  std::vector<float> sums;        // [rows][stride]
  std::vector<float> log_scales;  // [rows]
  std::vector<float> largest;     // [rows] log-sum-exp of a block

  WeightedSums(const T* embeddings, const Problem& problem)
      : embeddings(embeddings),
        row_scale(problem.row_scale),
        capacity(problem.capacity),
        dim(problem.dim),
        stride((problem.dim + kLanes - 1) / kLanes * kLanes),
        negligible(17.0f + std::log((float)problem.blocks())),
        sums((problem.rows + kLanes) * stride),
        log_scales(problem.rows + kLanes, -kInfinity),
        largest(problem.rows + kLanes, -kInfinity) {}

  // Takes exp(scores - top) of a block, [kBlock slots][kLanes rows], and scales them.
  void add(int64_t block, int64_t row, int64_t lanes, Floats top, Floats logsumexp, float* exponentials) {
    const Floats most = load(largest.data() + row);
    const Floats least = maximum(most - negligible, splat(-std::numeric_limits<float>::max()));
    const uint32_t rows = (1u << lanes) - 1;
    if ((lanes_above(least, logsumexp) & rows) == rows) return;
    store(largest.data() + row, maximum(logsumexp, most));
    Floats log_scale = load(log_scales.data() + row);
    uint32_t overflowing = lanes_above(logsumexp, log_scale + kHeadroom) & rows;
    if (overflowing) {
      const Floats factor = exponential(log_scale - logsumexp);
      for (; overflowing; overflowing &= overflowing - 1) {
        const int i = __builtin_ctz(overflowing);
        log_scale[i] = logsumexp[i];
        float* mine = sums.data() + (row + i) * stride;
        for (int64_t d = 0; d < stride; ++d) mine[d] *= factor[i];
      }
      store(log_scales.data() + row, log_scale);
    }
    const Floats scale = top == -kInfinity ? splat(0.0f) : exponential(top - log_scale);
    const int64_t count = std::min(kBlock, capacity - block * kBlock);
    for (int64_t j = 0; j < count; ++j) {
      const Floats weight = load(exponentials + j * kLanes) * scale;
      store(exponentials + j * kLanes, row_scale ? weight * row_scale[block * kBlock + j] : weight);
    }
    multiply(block * kBlock, exponentials, sums.data() + row * stride);
  }

  void multiply(int64_t slot, const float* weights, float* to) const {
    const int64_t count = std::min(kBlock, capacity - slot);
    const T* from = embeddings + slot * dim;
    int64_t d = count == kBlock ? add_pairs(from, dim, weights, to, stride) : 0;
    for (; d + kSumVectors * kLanes <= dim; d += kSumVectors * kLanes)
      for (int i = 0; i < kLanes; i += kSumRows)
        add_products<kSumVectors>(
            weights + i, count, [&](int64_t j, int v) { return load(from + j * dim + d + v * kLanes); },
            to + i * stride + d, stride);
    for (; d < dim; d += kLanes)
      for (int i = 0; i < kLanes; i += kSumRows)
        add_products<1>(
            weights + i, count, [&](int64_t j, int) { return load(from + j * dim + d, dim - d); }, to + i * stride + d,
            stride);
  }
};

// Adds up the sums of all threads: total[row, :] in units of exp(log_scale[row]).
template <typename T>
void merge_sums(const std::vector<std::optional<WeightedSums<T>>>& of_threads, const Problem& problem, float* total,
                float* log_scale) {
#pragma omp parallel for schedule(static) if (problem.rows * problem.dim > kWorthThreads)
  for (int64_t row = 0; row < problem.rows; ++row) {
    float* to = total + row * problem.dim;
    std::fill(to, to + problem.dim, 0.0f);
    log_scale[row] = -kInfinity;
    for (const auto& theirs : of_threads)
      if (theirs) log_scale[row] = std::max(log_scale[row], theirs->log_scales[row]);
    for (const auto& theirs : of_threads) {
      if (!theirs || theirs->log_scales[row] == -kInfinity) continue;
      const float factor = std::exp(theirs->log_scales[row] - log_scale[row]);
      const float* from = theirs->sums.data() + row * theirs->stride;
      for (int64_t d = 0; d < problem.dim; ++d) to[d] += factor * from[d];
    }
  }
}

}  // namespace negcache
