// Weighted sums of embeddings under the softmax of every row, accumulated while scores stream by.
//
// The weights of a row are relative to exp(log_scale), which stays near its largest block so far: sums are rescaled
// only when a block is so much larger that float32 might overflow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "blocks.h"
#include "problem.h"
#include "vectors.h"

namespace negcache {

constexpr int kSumRows = kLanes == 16 ? 8 : 4;  // times kSumVectors: as many sums as fit into the registers
constexpr int kSumVectors = 2;
constexpr float kHeadroom = 40.0f;  // exp of it, times the number of slots, is far from overflow
// Of a sum of weights, which is at least about 1: smaller ones are zeros. A product that is near the end of float32's
// range takes a CPU a hundred times as long as another.
constexpr float kNothing = 1e-25f;

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

#ifdef NEGCACHE_INTEGERS

// The embeddings of a whole block as 16-bit integers, those of an even and an odd slot side by side, times a factor of
// each slot.
template <typename T>
struct BlockOfIntegers {
  static constexpr float kMost = 32767.0f;
  int64_t stride;
  std::vector<Words> pairs;  // [kBlock / 2][stride / kLanes]
  float factors[kBlock];
  int64_t taken = -1;  // the block that they are of

  explicit BlockOfIntegers(int64_t stride) : stride(stride), pairs(kBlock / 2 * stride / kLanes) {}

  void take(int64_t block, const T* embeddings, int64_t dim) {
    if (block == taken) return;
    taken = block;
    for (int64_t j = 0; j < kBlock; j += 2) {
      const T* even = embeddings + j * dim;
      const auto pair = [&](auto integers_of) {
        for (int64_t d = 0; d < dim; d += kLanes)
          pairs[(j / 2 * stride + d) / kLanes] = ((Words)integers_of(0, load(even + d, dim - d)) & 0xffffu) |
                                                 (Words)integers_of(1, load(even + dim + d, dim - d)) << 16;
      };
      if constexpr (std::is_same<T, int8_t>::value) {
        factors[j] = factors[j + 1] = 1.0f;
        pair([](int, Floats numbers) { return (Ints)_mm512_cvtps_epi32((__m512)numbers); });
      } else {
        const Scaling scaling[2] = {{largest_size(even, dim), kMost}, {largest_size(even + dim, dim), kMost}};
        factors[j] = scaling[0].factor, factors[j + 1] = scaling[1].factor;
        pair([&](int odd, Floats numbers) { return scaling[odd].integers(numbers); });
      }
    }
  }

  // Adds the products with weights [kBlock][kLanes rows] to the sums of these rows. The weights of a row become 16-bit
  // integers too, so small that the sum of the products fits into 32 bits.
  void add_products(const float* weights, float* sums) const {
    Floats most = {};
    const auto weight_of = [&](int64_t j) { return load(weights + j * kLanes) * factors[j]; };
    for (int64_t j = 0; j < kBlock; ++j)
      most = std::is_same<T, int8_t>::value ? maximum(weight_of(j), most) : most + weight_of(j);
    const Floats to_integers = most < kSmallest ? Floats{} : kMost / most, factor = most / kMost;
    Words of_pairs[kBlock / 2];
    const auto integers = [&](int64_t j) {
      return (Words)(Ints)_mm512_cvtps_epi32((__m512)(weight_of(j) * to_integers));
    };
    for (int64_t j = 0; j < kBlock; j += 2) of_pairs[j / 2] = integers(j) | integers(j + 1) << 16;
    const auto* weight_pair = (const int32_t*)of_pairs;
    for (int64_t d = 0; d < stride; d += kLanes) {
      Ints total[kLanes] = {};
      for (int64_t j = 0; j < kBlock / 2; ++j) {
        const auto embedding = (__m512i)pairs[(j * stride + d) / kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          total[i] =
              (Ints)_mm512_dpwssd_epi32((__m512i)total[i], embedding, _mm512_set1_epi32(weight_pair[j * kLanes + i]));
      }
      for (int i = 0; i < kLanes; ++i) {
        float* sum = sums + i * stride + d;
        store(sum, load(sum) + __builtin_convertvector(total[i], Floats) * factor[i]);
      }
    }
  }

 private:
  static constexpr float kSmallest = 1e-30f;  // whose inverse, times kMost, is finite
};

#endif  // NEGCACHE_INTEGERS

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
#ifdef NEGCACHE_INTEGERS
  // Rounded numbers are multiplied as integers, at twice the rate, and others where that is precise enough.
  static constexpr bool kRounded = std::is_same<T, Bfloat16>::value || std::is_same<T, int8_t>::value;
  bool as_integers;
  BlockOfIntegers<T> integers;
#endif

  WeightedSums(const T* embeddings, const Problem& problem, bool rounds)
      : embeddings(embeddings),
        row_scale(problem.row_scale),
        capacity(problem.capacity),
        dim(problem.dim),
        stride((problem.dim + kLanes - 1) / kLanes * kLanes),
        negligible(17.0f + std::log((float)problem.blocks())),
        sums((problem.rows + kLanes) * stride),
        log_scales(problem.rows + kLanes, -kInfinity),
        largest(problem.rows + kLanes, -kInfinity)
#ifdef NEGCACHE_INTEGERS
        ,
        as_integers(kRounded || rounds),
        integers(as_integers ? stride : 0)
#endif
  {
  }

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
      Floats factor = exponential(log_scale - logsumexp);
      factor = factor < kNothing ? Floats{} : factor;
      for (; overflowing; overflowing &= overflowing - 1) {
        const int i = __builtin_ctz(overflowing);
        log_scale[i] = logsumexp[i];
        float* mine = sums.data() + (row + i) * stride;
        for (int64_t d = 0; d < stride; ++d) mine[d] *= factor[i];
      }
      store(log_scales.data() + row, log_scale);
    }
    const Floats scale = top == -kInfinity ? splat(0.0f) : exponential(top - log_scale);
    const Floats least_counted = kNothing / scale;
    const int64_t count = std::min(kBlock, capacity - block * kBlock);
    for (int64_t j = 0; j < count; ++j) {
      const Floats relative = load(exponentials + j * kLanes);
      const Floats weight = (relative < least_counted ? Floats{} : relative) * scale;
      store(exponentials + j * kLanes, row_scale ? weight * row_scale[block * kBlock + j] : weight);
    }
    multiply(block, exponentials, sums.data() + row * stride);
  }

  void multiply(int64_t block, const float* weights, float* to) {
    const int64_t count = std::min(kBlock, capacity - block * kBlock);
    const T* from = embeddings + block * kBlock * dim;
#ifdef NEGCACHE_INTEGERS
    if (as_integers && count == kBlock) {
      integers.take(block, from, dim);
      return integers.add_products(weights, to);
    }
#endif
    int64_t d = 0;
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
      if (factor < kNothing) continue;
      const float* from = theirs->sums.data() + row * theirs->stride;
      for (int64_t d = 0; d < problem.dim; ++d) to[d] += factor * from[d];
    }
  }
}

}  // namespace negcache
