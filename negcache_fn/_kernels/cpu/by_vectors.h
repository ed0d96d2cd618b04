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
constexpr int64_t kPanelRows = 1024;           // queries at a time: they stay in the next one
static_assert(kBlock % kSlots == 0, "a block is multiplied kSlots slots at a time");

// A product in float32.
struct Singles {
  using Number = float;
  using Sum = Floats;
  static constexpr int64_t kWidth = 1;    // numbers of a row in a step
  static constexpr int64_t kSteps = 128;  // of a group of queries at a time: they stay in the nearest cache
  static constexpr bool kFactors = false;
  // The numbers of a row, zeros from `dim` to `padded`; returns what the products with them have to be multiplied by.
  template <typename T>
  static float pack(const T* from, int64_t dim, int64_t padded, float* to) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
    for (const int64_t rest = d; d < padded; ++d) to[d] = load(from + rest, dim - rest)[d - rest];
    return 1.0f;
  }
  static float pack_query(const float* from, int64_t dim, int64_t padded, float* to) {
    return pack(from, dim, padded, to);
  }
  static float origin(const float*, int64_t) { return 0.0f; }
  static Floats begin(Floats before) { return before; }
  static Floats end(Floats sum, Floats, Floats, Floats) { return sum; }
  static Floats multiply_add(Floats sum, const float* embedding, Floats queries) {
    return sum + splat(*embedding) * queries;
  }
};

#ifdef NEGCACHE_INTEGERS

// A product that takes two numbers of each row in a step, both sides 16-bit integers times a factor of the row, which
// is exact for stored integers. The sums of kSteps steps are exact.
template <typename T>
struct Integers {
  using Number = int16_t;
  using Sum = Ints;
  static constexpr int64_t kWidth = 2;
  static constexpr bool kStored = std::is_same<T, int8_t>::value;
  static constexpr int64_t kSteps = kStored ? 128 : 32;
  static constexpr bool kFactors = true;
  static constexpr float kMost = kStored ? 127.0f : 11585.0f;  // of an embedding's numbers; sqrt(2^31 / 16)
  static constexpr float kMostOfQuery = 32767.0f;
  // Of the sizes of a query's numbers in kSteps steps: their products with those of an embedding fit into 32 bits.
  static constexpr float kMostTogether = 2147483647.0f / kMost - kSteps * kWidth;
  static float pack(const T* from, int64_t dim, int64_t padded, int16_t* to) {
    if constexpr (kStored) {
      for (int64_t d = 0; d < dim; ++d) to[d] = from[d];
      for (int64_t d = dim; d < padded; ++d) to[d] = 0;
      return 1.0f;
    } else {
      return round({largest_size(from, dim), kMost}, from, dim, padded, to);
    }
  }
  static float pack_query(const float* from, int64_t dim, int64_t padded, int16_t* to) {
    const float most = largest_size(from, dim);
    float together = 0.0f;  // relative to the largest number
    for (int64_t first = 0; most > 0.0f && first < dim; first += kSteps * kWidth) {
      float sum = 0.0f;
      for (int64_t d = first; d < std::min(dim, first + kSteps * kWidth); ++d) sum += std::fabs(from[d] / most);
      together = std::max(together, sum);
    }
    const float most_of_numbers = std::floor(std::min(kMostOfQuery, kMostTogether / std::max(together, 1.0f)));
    return round({most, most_of_numbers}, from, dim, padded, to);
  }
  static float origin(const int16_t*, int64_t) { return 0.0f; }
  static Ints begin(Floats) { return Ints{}; }
  static Floats end(Ints sum, Floats before, Floats factor, Floats) {
    return before + __builtin_convertvector(sum, Floats) * factor;
  }
  static Ints multiply_add(Ints sum, const int16_t* embedding, Floats queries) {
    int32_t pair;
    std::memcpy(&pair, embedding, sizeof(pair));
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)queries, _mm512_set1_epi32(pair));
  }

 private:
  template <typename Row>
  static float round(const Scaling& scaling, const Row* from, int64_t dim, int64_t padded, int16_t* to) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      const __m256i numbers = _mm512_cvtepi32_epi16((__m512i)scaling.integers(load(from + d)));
      std::memcpy(to + d, &numbers, sizeof(numbers));
    }
    for (const int64_t rest = d; d < padded; ++d)
      to[d] = (int16_t)scaling.integers(load(from + rest, dim - rest))[d - rest];
    return scaling.factor;
  }
};

// A product of stored 8-bit integers with queries rounded to 8 bits, four numbers of each row in a step. One side of
// the instruction is unsigned: the stored numbers are above -128, and a query's origin takes that back.
struct StoredIntegers {
  using Number = uint8_t;
  using Sum = Ints;
  static constexpr int64_t kWidth = 4;
  static constexpr int64_t kSteps = 128;  // whose sums float32 holds exactly
  static constexpr bool kFactors = true;
  static constexpr float kMostOfQuery = 127.0f;
  static float pack(const int8_t* from, int64_t dim, int64_t padded, uint8_t* to) {
    for (int64_t d = 0; d < dim; ++d) to[d] = (uint8_t)from[d] ^ 0x80u;
    std::fill(to + dim, to + padded, 0);
    return 1.0f;
  }
  static float pack_query(const float* from, int64_t dim, int64_t padded, uint8_t* to) {
    const Scaling scaling(largest_size(from, dim), kMostOfQuery);
    for (int64_t d = 0; d < padded; d += kLanes) {
      const __m128i numbers = _mm512_cvtepi32_epi8((__m512i)scaling.integers(load(from + d, dim - d)));
      std::memcpy(to + d, &numbers, std::min<int64_t>(kLanes, padded - d));
    }
    return scaling.factor;
  }
  static float origin(const uint8_t* query, int64_t padded) {
    int64_t sum = 0;
    for (int64_t d = 0; d < padded; ++d) sum += (int8_t)query[d];
    return -128.0f * sum;
  }
  static Ints begin(Floats) { return Ints{}; }
  static Floats end(Ints sum, Floats before, Floats factor, Floats origin) {
    return before + (__builtin_convertvector(sum, Floats) + origin) * factor;
  }
  static Ints multiply_add(Ints sum, const uint8_t* embedding, Floats queries) {
    int32_t four;
    std::memcpy(&four, embedding, sizeof(four));
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), (__m512i)queries);
  }
};

#endif  // NEGCACHE_INTEGERS

// Asks for some numbers of kSlots rows that are multiplied soon: the products wait at every new page of memory.
template <typename T>
inline void prefetch_slots(const T* embeddings, int64_t dim, int64_t count) {
  for (int64_t s = 0; s < kSlots; ++s)
    for (int64_t d = 0; d < count; d += 64 / sizeof(T)) __builtin_prefetch(embeddings + s * dim + d);
}

// Queries as [groups][steps][kGroup], a float's worth of numbers each, and their factors and origins.
template <typename Product>
void pack_groups(const float* queries, int64_t rows, int64_t dim, int64_t steps, float* packed, float* factors,
                 float* origins) {
  const int64_t groups = (rows + kGroup - 1) / kGroup, padded = steps * Product::kWidth;
#pragma omp parallel for schedule(static) if (rows * dim > kWorthThreads)
  for (int64_t group = 0; group < groups; ++group) {
    std::vector<typename Product::Number> row(padded);
    float* to = packed + group * steps * kGroup;
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t query = group * kGroup + i;
      factors[query] = query < rows ? Product::pack_query(queries + query * dim, dim, padded, row.data()) : 0.0f;
      origins[query] = Product::origin(row.data(), padded);
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
inline void multiply_slots(const typename Product::Number* embeddings, int64_t stride, const float* slot_factors,
                           const float* group, const float* factors, const float* origins, int64_t steps,
                           const float* bias, float* scores) {
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
      store(scores + (v * kBlock + s) * kLanes,
            Product::end(sums[s][v], before(s, v), load(factors + v * kLanes) * slot_factors[s],
                         bias ? load(origins + v * kLanes) : Floats{}));
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
  std::vector<float> packed(most * steps), factors(most), origins(most);
  for (int64_t first = 0; first < problem.rows; first += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, problem.rows - first);
    pack_groups<Product>(problem.queries + first * problem.dim, rows, problem.dim, steps, packed.data(), factors.data(),
                         origins.data());
#pragma omp parallel if (problem.capacity * rows * problem.dim > kWorthThreads)
    {
      auto consume = make_consumer();
      std::vector<Number> converted(kBlock * padded);
      float slot_factors[kBlock] = {};
      std::vector<float> panel_scores((rows + kGroup - 1) / kGroup * kGroup * kBlock);
      float bias[kBlock];
      const float nothing[kBlock] = {};
      const bool scaled_later = problem.row_scale && !Product::kFactors;
      const float* from = scaled_later ? nothing : bias;  // what the sums start from
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t slot = block * kBlock, count = std::min(kBlock, problem.capacity - slot);
        load_bias(problem, slot, count, bias);
        const T* stored = problem.embeddings_of(embeddings, block);
        const Number* numbers = (const Number*)stored;
        if (!in_place || count < kBlock) {
          for (int64_t j = 0; j < count; ++j)
            slot_factors[j] =
                Product::pack(stored + j * problem.dim, problem.dim, padded, converted.data() + j * padded) *
                scale_of(problem, slot + j);
          std::fill(converted.begin() + count * padded, converted.end(), Number{});
          numbers = converted.data();
        }
        const T* next = block + 1 < blocks ? problem.embeddings_of(embeddings, block + 1) : stored;
        for (int64_t step = 0; step < steps; step += Product::kSteps)
          for (int64_t group = 0; group < rows; group += kGroup)
            for (int64_t j = 0; j < kBlock; j += kSlots) {
              const int64_t d = step * Product::kWidth, some = std::min(Product::kSteps, steps - step);
              if (group == 0)
                prefetch_slots(next + j * problem.dim + d, problem.dim,
                               std::min(some * Product::kWidth, problem.dim - d));
              multiply_slots<Product>(numbers + j * padded + d, padded, slot_factors + j,
                                      packed.data() + (group / kGroup * steps + step) * kGroup, factors.data() + group,
                                      origins.data() + group, some, step == 0 ? from + j : nullptr,
                                      panel_scores.data() + group * kBlock + j * kLanes);
            }
        for (int64_t group = 0; group < rows; group += kLanes) {
          const int64_t lanes = std::min<int64_t>(kLanes, rows - group);
          float* scores = panel_scores.data() + group * kBlock;
          if (scaled_later) scale_products(problem, slot, count, bias, scores);
          exclude(problem, excluded, first + group, lanes, slot, bias, scores);
          consume(block, first + group, lanes, scores);
        }
      }
    }
  }
}

}  // namespace negcache
