// Products by vectors: queries lie in the lanes, and the numbers of the embeddings, read where they are, are broadcast.
// Only the queries are rearranged.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
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
  using Sum = Floats;
  static constexpr int64_t kWidth = 1;
  static float pack(const float* query, int64_t dim, int64_t padded, float* to) {
    convert(query, dim, padded, to);
    return 1.0f;
  }
  static Floats begin(Floats before) { return before; }
  static Floats end(Floats sum, Floats, Floats) { return sum; }
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
  using Sum = Floats;
  static constexpr int64_t kWidth = 2;
  static float pack(const float* query, int64_t dim, int64_t padded, Bfloat16* to) {
    convert(query, dim, padded, to);
    return 1.0f;
  }
  static Floats begin(Floats before) { return before; }
  static Floats end(Floats sum, Floats, Floats) { return sum; }
  static Floats multiply_add(Floats sum, const Bfloat16* embedding, Floats queries) {
    int32_t pair;
    std::memcpy(&pair, embedding, sizeof(pair));
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)queries, (__m512bh)_mm512_set1_epi32(pair));
  }
};

#endif  // NEGCACHE_BFLOAT16

#ifdef NEGCACHE_INTEGERS

inline void convert(const int8_t* from, int64_t dim, int64_t padded, int16_t* to) {
  for (int64_t d = 0; d < dim; ++d) to[d] = from[d];
  for (int64_t d = dim; d < padded; ++d) to[d] = 0;
}

// A product that takes two numbers of each row in a step: stored integers, and queries as 16-bit integers times a
// factor of each query, which errs by 2^-16 of the query's largest number.
struct Integers {
  using Number = int16_t;
  using Sum = Ints;
  static constexpr int64_t kWidth = 2;
  static constexpr float kMost = 32767.0f;
  static_assert(kMost * 127.0 * kSteps * kWidth < 2147483648.0, "the sum of some steps fits into 32 bits");
  static float pack(const float* query, int64_t dim, int64_t padded, int16_t* to) {
    float largest = 0.0f;
    for (int64_t d = 0; d < dim; ++d) {
      const float size = std::fabs(query[d]);
      largest = size <= largest ? largest : size;  // NaN stays
      if (size != size) break;
    }
    const float factor = largest / kMost;
    const bool usable = factor > 0.0f && factor <= std::numeric_limits<float>::max();
    for (int64_t d = 0; d < padded; ++d)
      to[d] = usable && d < dim ? (int16_t)std::max(-kMost, std::min(kMost, std::nearbyint(query[d] / factor))) : 0;
    return usable ? factor : largest - largest;  // 0, or NaN where it is not finite
  }
  static Ints begin(Floats) { return Ints{}; }
  static Floats end(Ints sum, Floats before, Floats factor) {
    return before + __builtin_convertvector(sum, Floats) * factor;
  }
  static Ints multiply_add(Ints sum, const int16_t* embedding, Floats queries) {
    int32_t pair;
    std::memcpy(&pair, embedding, sizeof(pair));
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)queries, _mm512_set1_epi32(pair));
  }
};

#endif  // NEGCACHE_INTEGERS

// Asks for some numbers of kSlots rows that are multiplied soon: the products wait at every new page of memory.
template <typename T>
inline void prefetch_slots(const T* embeddings, int64_t dim, int64_t count) {
  for (int64_t s = 0; s < kSlots; ++s)
    for (int64_t d = 0; d < count; d += 64 / sizeof(T)) __builtin_prefetch(embeddings + s * dim + d);
}

// Queries as [groups][steps][kGroup], a float's worth of numbers each, and their factors.
template <typename Product>
void pack_groups(const float* queries, int64_t rows, int64_t dim, int64_t steps, float* packed, float* factors) {
  const int64_t groups = (rows + kGroup - 1) / kGroup, padded = steps * Product::kWidth;
#pragma omp parallel for schedule(static) if (rows * dim > kWorthThreads)
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<typename Product::Number> row(padded);
    float* to = packed + group * steps * kGroup;
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t query = group * kGroup + i;
      factors[query] = query < rows ? Product::pack(queries + query * dim, dim, padded, row.data()) : 0.0f;
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
                           const float* factors, int64_t steps, const float* bias, float* scores) {
  typename Product::Sum sums[kSlots][kVectors];
  const auto before = [&](int s, int v) { return bias ? splat(bias[s]) : load(scores + (v * kBlock + s) * kLanes); };
  for (int s = 0; s < kSlots; ++s)
    for (int v = 0; v < kVectors; ++v) sums[s][v] = Product::begin(before(s, v));
  for (int64_t step = 0; step < steps; ++step) {
    Floats queries[kVectors];
    for (int v = 0; v < kVectors; ++v) queries[v] = load(group + step * kGroup + v * kLanes);
#pragma GCC unroll 8
    for (int s = 0; s < kSlots; ++s)
      for (int v = 0; v < kVectors; ++v)
        sums[s][v] = Product::multiply_add(sums[s][v], embeddings + s * stride + step * Product::kWidth, queries[v]);
  }
  for (int s = 0; s < kSlots; ++s)
    for (int v = 0; v < kVectors; ++v)
      store(scores + (v * kBlock + s) * kLanes, Product::end(sums[s][v], before(s, v), load(factors + v * kLanes)));
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
  const int64_t most = (std::min(kPanelRows, problem.rows) + kGroup - 1) / kGroup * kGroup;
  std::vector<float> packed(most * steps), factors(most);
  for (int64_t first = 0; first < problem.rows; first += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, problem.rows - first);
    pack_groups<Product>(problem.queries + first * problem.dim, rows, problem.dim, steps, packed.data(),
                         factors.data());
#pragma omp parallel if (problem.capacity * rows * problem.dim > kWorthThreads)
    {
      auto consume = make_consumer();
      std::vector<Number> converted(kBlock * padded);
      std::vector<float> panel_scores((rows + kGroup - 1) / kGroup * kGroup * kBlock);
      float bias[kBlock];
      const float nothing[kBlock] = {};
      const float* from = problem.row_scale ? nothing : bias;  // what the sums start from
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t slot = block * kBlock, count = std::min(kBlock, problem.capacity - slot);
        load_bias(problem, slot, count, bias);
        const T* stored = problem.embeddings_of(embeddings, block);
        const Number* numbers = (const Number*)stored;
        if (!in_place || count < kBlock) {
          for (int64_t j = 0; j < count; ++j)
            convert(stored + j * problem.dim, problem.dim, padded, converted.data() + j * padded);
          std::fill(converted.begin() + count * padded, converted.end(), Number{});
          numbers = converted.data();
        }
        const T* next = block + 1 < blocks ? problem.embeddings_of(embeddings, block + 1) : stored;
        for (int64_t step = 0; step < steps; step += kSteps)
          for (int64_t group = 0; group < rows; group += kGroup)
            for (int64_t j = 0; j < kBlock; j += kSlots) {
              const int64_t d = step * Product::kWidth, some = std::min(kSteps, steps - step);
              if (group == 0)
                prefetch_slots(next + j * problem.dim + d, problem.dim,
                               std::min(some * Product::kWidth, problem.dim - d));
              multiply_slots<Product>(numbers + j * padded + d, padded,
                                      packed.data() + (group / kGroup * steps + step) * kGroup, factors.data() + group,
                                      some, step == 0 ? from + j : nullptr,
                                      panel_scores.data() + group * kBlock + j * kLanes);
            }
        for (int64_t group = 0; group < rows; group += kLanes) {
          const int64_t lanes = std::min<int64_t>(kLanes, rows - group);
          float* scores = panel_scores.data() + group * kBlock;
          if (problem.row_scale) scale_products(problem, slot, count, bias, scores);
          exclude(problem, excluded, first + group, lanes, slot, bias, scores);
          consume(block, first + group, lanes, scores);
        }
      }
    }
  }
}

}  // namespace negcache
