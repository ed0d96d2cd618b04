// Products by vectors: queries lie in the lanes, and the numbers of the embeddings, read where they are, are broadcast.
// Only the queries are rearranged.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "problem.h"
#include "vectors.h"

namespace negcache {

constexpr int kVectors = 2;                    // of queries
constexpr int kSlots = kLanes == 16 ? 8 : 4;   // times kVectors: as many sums as fit into the registers
constexpr int64_t kGroup = kVectors * kLanes;  // queries
constexpr int64_t kSteps = 128;                // of a group of queries at a time: they stay in the nearest cache
constexpr int64_t kPanelRows = 1024;           // queries at a time: they stay in the next one
static_assert(kBlock % kSlots == 0, "a block is multiplied kSlots slots at a time");

// Numbers of a row as float32, zeros from `dim` to `padded`.
template <typename T>
inline void convert(const T* from, int64_t dim, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
  for (const int64_t rest = d; d < padded; ++d) to[d] = load(from + rest, dim - rest)[d - rest];
}

// A product that takes one number of each row in a step.
struct Singles {
  using Number = float;
  static constexpr int64_t kWidth = 1;
  static Floats multiply_add(Floats sum, const float* embedding, Floats queries) {
    return sum + splat(*embedding) * queries;
  }
};

#ifdef NEGCACHE_BFLOAT16

template <typename T>
inline void convert(const T* from, int64_t dim, int64_t padded, Bfloat16* to) {
  for (int64_t d = 0; d < padded; d += kLanes) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(from + std::min(d, dim), dim - d));
    std::memcpy(to + d, &rounded, std::min<int64_t>(kLanes, padded - d) * sizeof(Bfloat16));
  }
}

// A product that takes two numbers of each row in a step, both sides rounded to bfloat16.
struct Pairs {
  using Number = Bfloat16;
  static constexpr int64_t kWidth = 2;
  static Floats multiply_add(Floats sum, const Bfloat16* embedding, Floats queries) {
    int32_t pair;
    std::memcpy(&pair, embedding, sizeof(pair));
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)queries, (__m512bh)_mm512_set1_epi32(pair));
  }
};

#endif  // NEGCACHE_BFLOAT16

// Queries as [groups][steps][kGroup], a float's worth of numbers each.
template <typename Product>
void pack_groups(const float* queries, int64_t rows, int64_t dim, int64_t steps, float* packed) {
  const int64_t groups = (rows + kGroup - 1) / kGroup, padded = steps * Product::kWidth;
#pragma omp parallel for schedule(static) if (rows * dim > kWorthThreads)
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<typename Product::Number> row(padded);
    float* to = packed + group * steps * kGroup;
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t query = group * kGroup + i;
      if (query < rows) convert(queries + query * dim, dim, padded, row.data());
      for (int64_t step = 0; step < steps; ++step)
        if (query < rows)
          std::memcpy(to + step * kGroup + i, row.data() + step * Product::kWidth, sizeof(float));
        else
          to[step * kGroup + i] = 0.0f;
    }
  }
}

// Adds some steps of the products of kSlots slots and a group of queries to their scores, [kVectors][kBlock][kLanes];
// the first steps start from the bias.
template <typename Product>
inline void multiply_slots(const typename Product::Number* embeddings, int64_t stride, const float* group,
                           int64_t steps, const float* bias, float* scores) {
  Floats sums[kSlots][kVectors];
  for (int s = 0; s < kSlots; ++s)
    for (int v = 0; v < kVectors; ++v) sums[s][v] = bias ? splat(bias[s]) : load(scores + (v * kBlock + s) * kLanes);
  for (int64_t step = 0; step < steps; ++step) {
    Floats queries[kVectors];
    for (int v = 0; v < kVectors; ++v) queries[v] = load(group + step * kGroup + v * kLanes);
#pragma GCC unroll 8
    for (int s = 0; s < kSlots; ++s)
      for (int v = 0; v < kVectors; ++v)
        sums[s][v] = Product::multiply_add(sums[s][v], embeddings + s * stride + step * Product::kWidth, queries[v]);
  }
  for (int s = 0; s < kSlots; ++s)
    for (int v = 0; v < kVectors; ++v) store(scores + (v * kBlock + s) * kLanes, sums[s][v]);
}

// Streams the cache. Each thread makes its own consumer and hands it the scores of every block in a contiguous range of
// blocks: consume(block, first row, rows, scores [kBlock slots][kLanes rows]).
template <typename Product, typename T, typename MakeConsumer>
void stream_by_vectors(const T* embeddings, const Problem& problem, MakeConsumer make_consumer) {
  using Number = typename Product::Number;
  const int64_t blocks = problem.blocks();
  const Exclusions excluded(problem);
  const int64_t steps = (problem.dim + Product::kWidth - 1) / Product::kWidth, padded = steps * Product::kWidth;
  const bool in_place = std::is_same<T, Number>::value && padded == problem.dim;
  std::vector<float> packed((std::min(kPanelRows, problem.rows) + kGroup - 1) / kGroup * kGroup * steps);
  for (int64_t first = 0; first < problem.rows; first += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, problem.rows - first);
    pack_groups<Product>(problem.queries + first * problem.dim, rows, problem.dim, steps, packed.data());
#pragma omp parallel if (problem.capacity * rows * problem.dim > kWorthThreads)
    {
      auto consume = make_consumer();
      std::vector<Number> converted(kBlock * padded);
      std::vector<float> panel_scores((rows + kGroup - 1) / kGroup * kGroup * kBlock);
      float bias[kBlock];
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t slot = block * kBlock, count = std::min(kBlock, problem.capacity - slot);
        load_bias(problem, slot, count, bias);
        const Number* numbers = (const Number*)(embeddings + slot * problem.dim);
        if (!in_place || count < kBlock) {
          for (int64_t j = 0; j < count; ++j)
            convert(embeddings + (slot + j) * problem.dim, problem.dim, padded, converted.data() + j * padded);
          std::fill(converted.begin() + count * padded, converted.end(), Number{});
          numbers = converted.data();
        }
        for (int64_t step = 0; step < steps; step += kSteps)
          for (int64_t group = 0; group < rows; group += kGroup)
            for (int64_t j = 0; j < kBlock; j += kSlots)
              multiply_slots<Product>(numbers + j * padded + step * Product::kWidth, padded,
                                      packed.data() + (group / kGroup * steps + step) * kGroup,
                                      std::min(kSteps, steps - step), step == 0 ? bias + j : nullptr,
                                      panel_scores.data() + group * kBlock + j * kLanes);
        for (int64_t group = 0; group < rows; group += kLanes) {
          const int64_t lanes = std::min<int64_t>(kLanes, rows - group);
          float* scores = panel_scores.data() + group * kBlock;
          exclude(problem, excluded, first + group, lanes, slot, bias, scores);
          consume(block, first + group, lanes, scores);
        }
      }
    }
  }
}

}  // namespace negcache
