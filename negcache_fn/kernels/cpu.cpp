// Passes over the scores of a batch of queries against the cache, fused so that no score leaves a core's own cache.
// Built on the user's machine by cpu.py, without any header of torch; never required.
//
// Vectors are those of GCC and Clang, as wide as the machine's (-march=native). Products are made in one of two ways:
//
// - By vectors: queries lie in the lanes, and the numbers of the embeddings, read where they are, are broadcast. Nothing
//   is rearranged but the queries.
// - By bfloat16 tiles (AMX), where there are enough queries to fill them. Numbers are split into bfloat16 parts,
//   x = x0 + x1 + ..., each 2^-8 of the one before, and a product of P parts is the sum of x_i y_j over i + j < P,
//   accumulated in float32: P = 3 has the precision of float32, P = 2 an error of about 2^-17 |x| |y|.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define NEGCACHE_BFLOAT16 1  // multiplies pairs of bfloat16
#endif
#if defined(__AMX_BF16__) && defined(NEGCACHE_BFLOAT16) && defined(__linux__)
#define NEGCACHE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t kBlock = 64;  // negcache_fn.streaming.BLOCK
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int64_t kWorthThreads = 1 << 20;  // numbers to read or multiply: below it, waking threads takes longer
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef _Float16 Float16s __attribute__((vector_size(2 * kLanes)));

struct Bfloat16 {
  uint16_t bits;
};

template <typename Vector, typename T>
inline Vector load_vector(const T* from) {
  Vector to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline Floats load(const float* from) { return load_vector<Floats>(from); }
inline Floats load(const _Float16* from) { return __builtin_convertvector(load_vector<Float16s>(from), Floats); }
inline Floats load(const Bfloat16* from) {
  return (Floats)(__builtin_convertvector(load_vector<Halves>(from), Words) << 16);
}

// The first `count` numbers of a vector; zeros from there on.
template <typename T>
inline Floats load(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T padded[kLanes] = {};
  std::copy(from, from + std::max<int64_t>(0, count), padded);
  return load(padded);
}

inline void store(float* to, Floats from) { std::memcpy(to, &from, sizeof(from)); }

inline Floats splat(float value) { return value - Floats{}; }

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// A bit for every lane where a > b.
inline uint32_t lanes_above(Floats a, Floats b) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (uint32_t)(a[i] > b[i]) << i;
  return bits;
#endif
}

inline float sum(Floats v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// exp(x) for x <= 0, to 2 ulp; below -86, where float32 all but ends, exp(-86). NaN stays NaN. (Cephes expf.)
inline Floats exponential(Floats x) {
  x = x < -86.0f ? splat(-86.0f) : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The integer sits in the low bits of `shifted`: add it to the exponent.
  return (Floats)((Words)p + ((Words)shifted << 23));
}

// log(x) for x > 0, to 2 ulp. NaN stays NaN. (Cephes logf.)
inline Floats logarithm(Floats x) {
  const Ints bits = (Ints)x;
  Floats m = (Floats)((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  Floats e = __builtin_convertvector((bits >> 23) - 126, Floats);
  const Ints low = m < 0.707106781186547524f;
  e = low ? e - 1.0f : e;
  m = (low ? m + m : m) - 1.0f;
  const Floats z = m * m;
  Floats y = m * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = y * m * z - e * 2.12194440e-4f - z * 0.5f;
  const Floats result = m + y + e * 0.693359375f;
  return x == x ? result : x;
}

template <typename T>
inline float dot(const float* query, const T* embedding, int64_t dim) {
  Floats total[2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
    total[0] += load(query + d) * load(embedding + d);
    total[1] += load(query + d + kLanes) * load(embedding + d + kLanes);
  }
  for (; d < dim; d += kLanes) total[0] += load(query + d, dim - d) * load(embedding + d, dim - d);
  return sum(total[0] + total[1]);
}

// Calls `function` with a pointer of the storage's type: 0 float32, 1 bfloat16, 2 float16.
template <typename Function>
void with_storage(const void* embeddings, int storage, Function function) {
  if (storage == 0) function((const float*)embeddings);
  if (storage == 1) function((const Bfloat16*)embeddings);
  if (storage == 2) function((const _Float16*)embeddings);
}

struct Problem {
  int64_t capacity, dim, rows;
  const float* queries;     // [rows, dim]
  const float* bias;        // [capacity]
  const int64_t* excluded;  // [rows, exclusions]
  int64_t exclusions;
  const float* max_score;   // [rows], of the score without its bias; null: no limit
};

template <typename T>
void score_blocks(const T* embeddings, const Problem& problem, const int64_t* blocks, int64_t samples, float* out) {
  const int64_t dim = problem.dim;
#pragma omp parallel for schedule(static) if (problem.rows * samples * kBlock * problem.dim > kWorthThreads)
  for (int64_t pair = 0; pair < problem.rows * samples; ++pair) {
    const int64_t row = pair / samples, first = blocks[pair] * kBlock;
    const int64_t count = std::min(kBlock, problem.capacity - first);
    const float* bias = problem.bias + first;
    float products[kBlock];
    float* scores = out + pair * kBlock;
    std::fill(scores + count, scores + kBlock, -kInfinity);
    for (int64_t j = 0; j < count; ++j) {
      products[j] = dot(problem.queries + row * dim, embeddings + (first + j) * dim, dim);
      scores[j] = products[j] + bias[j];
    }
    for (int64_t p = 0; p < problem.exclusions; ++p) {
      const int64_t place = problem.excluded[row * problem.exclusions + p] - first;
      if (place >= 0 && place < count) scores[place] = -kInfinity;
    }
    if (!problem.max_score) continue;
    // A block that was chosen has a document below the limit, whatever rounding says here: the lowest stays.
    float lowest = kInfinity;
    for (int64_t j = 0; j < count; ++j)
      if (scores[j] > -kInfinity) lowest = std::min(lowest, products[j]);
    const float limit = std::max(problem.max_score[row], lowest);
    for (int64_t j = 0; j < count; ++j)
      if (products[j] > limit) scores[j] = -kInfinity;
  }
}

// What both ways of multiplying share.

// Scores of a block [64 slots][kLanes rows]: -inf where the slot is excluded for the row, or above its limit.
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

// The bias of a block's slots, -inf past the end of the cache.
inline void load_bias(const Problem& problem, int64_t slot, int64_t count, float* bias) {
  std::copy(problem.bias + slot, problem.bias + slot + count, bias);
  std::fill(bias + count, bias + kBlock, -kInfinity);
}

// Products by vectors.

constexpr int kVectors = 2;                     // of queries
constexpr int kSlots = kLanes == 16 ? 8 : 4;    // times kVectors: as many sums as fit into the registers
constexpr int64_t kGroup = kVectors * kLanes;   // queries
constexpr int64_t kSteps = 128;                 // of a group of queries at a time: they stay in the nearest cache
constexpr int64_t kPanelRows = 1024;            // queries at a time: they stay in the next one

// Numbers of a row as float32, zeros from `dim` to `padded`.
template <typename T>
inline void convert(const T* from, int64_t dim, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
  for (const int64_t rest = d; d < padded; ++d) to[d] = load(from + rest, dim - rest)[d - rest];
}

// A product, one number of each row a step.
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

// Two bfloat16 numbers of each row a step, both sides rounded to it.
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

// Adds some steps of the products of kSlots slots and a group of queries to their scores, [kVectors][64][kLanes]; the
// first steps start from the bias.
template <typename Product>
inline void multiply_slots(const typename Product::Number* embeddings, int64_t stride, const float* group,
                           int64_t steps, const float* bias, float* scores) {
  Floats sums[kSlots][kVectors];
  for (int s = 0; s < kSlots; ++s)
    for (int v = 0; v < kVectors; ++v)
      sums[s][v] = bias ? splat(bias[s]) : load(scores + (v * kBlock + s) * kLanes);
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

// Streams the cache. Each thread makes a consumer of its own, and hands it the scores of every block of a contiguous
// range of them: consume(block, first row, rows, scores [64 slots][kLanes rows]).
template <typename Product, typename T, typename MakeConsumer>
void stream_by_vectors(const T* embeddings, const Problem& problem, MakeConsumer make_consumer) {
  using Number = typename Product::Number;
  const int64_t blocks = (problem.capacity + kBlock - 1) / kBlock;
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
          exclude(problem, first + group, lanes, slot, bias, scores);
          consume(block, first + group, lanes, scores);
        }
      }
    }
  }
}

#ifdef NEGCACHE_AMX

// Products by tiles.

constexpr int kTile = 16;   // rows of a tile: queries or slots
constexpr int kDepth = 32;  // bfloat16 in a row of a tile
constexpr int kTileSize = kTile * kDepth;
constexpr int kQuarters = kBlock / kTile;
constexpr int kPanelBytes = 1 << 23;  // of packed queries
constexpr int kChunkBytes = 32 << 10;  // of a block's packed embeddings: they should stay in the nearest cache

// The bfloat16 part of x; what is left goes back into x.
inline __m256bh next_part(Floats* x) {
  const __m256bh part = _mm512_cvtneps_pbh((__m512)*x);
  Bfloat16 rounded[kLanes];
  std::memcpy(rounded, &part, sizeof(rounded));
  *x -= load(rounded);
  return part;
}

// Queries as the right operands of the tile product: for each group of 16 queries and each 32 dimensions, one tile a
// part, [16 pairs of dimensions][16 queries][2].
void pack_queries(const float* queries, int64_t rows, int64_t dim, int64_t depths, int parts, uint16_t* packed) {
  const int64_t groups = (rows + kTile - 1) / kTile, group_size = depths * parts * kTileSize;
#pragma omp parallel for schedule(static) if (rows * dim > kWorthThreads)
  for (int64_t group = 0; group < groups; ++group) {
    uint16_t* to = packed + group * group_size;
    std::memset(to, 0, group_size * sizeof(uint16_t));
    for (int64_t i = 0; i < std::min<int64_t>(kTile, rows - group * kTile); ++i) {
      const float* query = queries + (group * kTile + i) * dim;
      for (int64_t d = 0; d < dim; d += kLanes) {
        Floats rest = load(query + d, dim - d);
        for (int part = 0; part < parts; ++part) {
          const __m256bh numbers = next_part(&rest);
          uint16_t value[kLanes];
          std::memcpy(value, &numbers, sizeof(value));
          uint16_t* tile = to + ((d / kDepth) * parts + part) * kTileSize + (d % kDepth / 2) * kDepth;
          for (int j = 0; j < kLanes; ++j) tile[(j / 2) * kDepth + 2 * i + j % 2] = value[j];
        }
      }
    }
  }
}

// A block of embeddings as left operands: for each 32 dimensions and each part a tile for every 16 slots.
template <int kParts, typename T>
void pack_block(const T* embeddings, int64_t count, int64_t dim, int64_t depths, uint16_t* packed) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < depths * kDepth; d += kLanes) {
      Floats rest = load(embeddings + i * dim + std::min(d, dim), dim - d);
      for (int part = 0; part < kParts; ++part) {
        const __m256bh numbers = next_part(&rest);
        uint16_t* tile = packed + ((d / kDepth * kParts + part) * kQuarters + i / kTile) * kTileSize;
        std::memcpy(tile + i % kTile * kDepth + d % kDepth, &numbers, sizeof(numbers));
      }
    }
  }
}

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) bytes_per_row[i] = 64, rows[i] = kTile;
  }
};

// One part of 16 slots, in tile 7, times the parts of the queries, in tiles 4 ...; tile numbers must be literals.
#define NEGCACHE_ACCUMULATE(quarter)                          \
  _tile_loadd(7, slots + quarter * kTileSize, 64);            \
  _tile_dpbf16ps(quarter, 7, 4);                              \
  if constexpr (kProducts > 1) _tile_dpbf16ps(quarter, 7, 5); \
  if constexpr (kProducts > 2) _tile_dpbf16ps(quarter, 7, 6);

template <int kProducts>
inline void accumulate(const uint16_t* slots) {
  NEGCACHE_ACCUMULATE(0)
  NEGCACHE_ACCUMULATE(1)
  NEGCACHE_ACCUMULATE(2)
  NEGCACHE_ACCUMULATE(3)
}

#undef NEGCACHE_ACCUMULATE

// Adds to the products [64 slots][16 queries] of one block and one group of queries those of some of the dimensions.
template <int kParts, int kBlockParts>
inline void multiply(const uint16_t* block, const uint16_t* group, int64_t depths, bool first, float* products) {
  constexpr int64_t kPartSize = kQuarters * kTileSize;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, products, 64);
    _tile_loadd(1, products + kTile * kTile, 64);
    _tile_loadd(2, products + 2 * kTile * kTile, 64);
    _tile_loadd(3, products + 3 * kTile * kTile, 64);
  }
  for (int64_t depth = 0; depth < depths; ++depth) {
    _tile_loadd(4, group, 64);
    if constexpr (kParts > 1) _tile_loadd(5, group + kTileSize, 64);
    if constexpr (kParts > 2) _tile_loadd(6, group + 2 * kTileSize, 64);
    accumulate<kParts>(block);
    if constexpr (kBlockParts > 1) accumulate<kParts - 1>(block + kPartSize);
    if constexpr (kBlockParts > 2) accumulate<kParts - 2>(block + 2 * kPartSize);
    group += kParts * kTileSize;
    block += kBlockParts * kPartSize;
  }
  _tile_stored(0, products, 64);
  _tile_stored(1, products + kTile * kTile, 64);
  _tile_stored(2, products + 2 * kTile * kTile, 64);
  _tile_stored(3, products + 3 * kTile * kTile, 64);
}

// As stream_by_vectors.
template <int kParts, typename T, typename MakeConsumer>
void stream_by_tiles(const T* embeddings, const Problem& problem, MakeConsumer make_consumer) {
  constexpr int kExactParts = std::is_same<T, Bfloat16>::value ? 1 : std::is_same<T, _Float16>::value ? 2 : 3;
  constexpr int kBlockParts = kParts < kExactParts ? kParts : kExactParts;
  const int64_t blocks = (problem.capacity + kBlock - 1) / kBlock, depths = (problem.dim + kDepth - 1) / kDepth;
  const int64_t group_size = depths * kParts * kTileSize;
  const int64_t panel = std::max<int64_t>(1, kPanelBytes / (group_size * sizeof(uint16_t))) * kTile;
  const int64_t step = std::max<int64_t>(1, kChunkBytes / (kBlockParts * kBlock * kDepth * sizeof(uint16_t)));
  std::vector<uint16_t> packed((std::min(panel, problem.rows) + kTile - 1) / kTile * group_size);
  for (int64_t first = 0; first < problem.rows; first += panel) {
    const int64_t rows = std::min(panel, problem.rows - first);
    pack_queries(problem.queries + first * problem.dim, rows, problem.dim, depths, kParts, packed.data());
#pragma omp parallel if (problem.capacity * rows * problem.dim > kWorthThreads)
    {
      auto consume = make_consumer();
      const TileConfig config;
      _tile_loadconfig(&config);
      std::vector<uint16_t> parts(kBlockParts * kBlock * depths * kDepth);
      std::vector<float> panel_scores((rows + kTile - 1) / kTile * kBlock * kTile);
      float bias[kBlock];
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t slot = block * kBlock, count = std::min(kBlock, problem.capacity - slot);
        pack_block<kBlockParts>(embeddings + slot * problem.dim, count, problem.dim, depths, parts.data());
        load_bias(problem, slot, count, bias);
        for (int64_t depth = 0; depth < depths; depth += step)
          for (int64_t group = 0; group < rows; group += kTile)
            multiply<kParts, kBlockParts>(parts.data() + depth * kBlockParts * kBlock * kDepth,
                                          packed.data() + group / kTile * group_size + depth * kParts * kTileSize,
                                          std::min(step, depths - depth), depth == 0,
                                          panel_scores.data() + group * kBlock);
        for (int64_t group = 0; group < rows; group += kTile) {
          const int64_t lanes = std::min<int64_t>(kTile, rows - group);
          float* scores = panel_scores.data() + group * kBlock;
          // Past the end the operands are what an earlier block left, and may be anything: replace, do not add.
          for (int64_t j = 0; j < kBlock; ++j)
            store(scores + j * kTile, j < count ? load(scores + j * kTile) + bias[j] : splat(-kInfinity));
          exclude(problem, first + group, lanes, slot, bias, scores);
          consume(block, first + group, lanes, scores);
        }
      }
      _tile_release();
    }
  }
}

#endif  // NEGCACHE_AMX

// How products are made: by tiles, of so many bfloat16 parts, or by vectors, of pairs of bfloat16 if one part is enough.
struct Arithmetic {
  int tiles, parts;
};

template <typename T, typename MakeConsumer>
void stream(const T* embeddings, const Problem& problem, Arithmetic arithmetic, MakeConsumer make_consumer) {
#ifdef NEGCACHE_AMX
  if (arithmetic.tiles) {
    if (arithmetic.parts == 1) stream_by_tiles<1>(embeddings, problem, make_consumer);
    if (arithmetic.parts == 2) stream_by_tiles<2>(embeddings, problem, make_consumer);
    if (arithmetic.parts == 3) stream_by_tiles<3>(embeddings, problem, make_consumer);
    return;
  }
#endif
#ifdef NEGCACHE_BFLOAT16
  if (arithmetic.parts == 1) return stream_by_vectors<Pairs>(embeddings, problem, make_consumer);
#endif
  stream_by_vectors<Singles>(embeddings, problem, make_consumer);
}

// The logsumexp of each column of a block's scores.
inline Floats column_logsumexp(const float* scores) {
  Floats top = splat(-kInfinity);
  for (int64_t j = 0; j < kBlock; ++j) top = maximum(load(scores + j * kLanes), top);
  const Floats shift = top == -kInfinity ? splat(0.0f) : top;
  Floats total = {};
  for (int64_t j = 0; j < kBlock; ++j) total += exponential(load(scores + j * kLanes) - shift);
  return top + logarithm(total);
}

struct Candidate {
  float score;
  int64_t slot;
  bool operator<(const Candidate& other) const {  // better first
    return score > other.score || (score == other.score && slot < other.slot);
  }
};

// For every row the best candidates so far: all that may be among the `keep` best of what was offered.
struct Candidates {
  int64_t keep, room;
  std::vector<Candidate> all;
  std::vector<int64_t> counts;
  std::vector<float> thresholds;

  Candidates(int64_t rows, int64_t keep)
      : keep(keep), room(2 * keep + kBlock), all(rows * room), counts(rows, 0), thresholds(rows + kLanes, -kInfinity) {}

  // Slots must ascend: one that equals the threshold comes after `keep` that are as good.
  void offer(int64_t slot, int64_t row, int64_t lanes, Floats scores) {
    uint32_t better = lanes_above(scores, load(thresholds.data() + row)) & ((1u << lanes) - 1);
    for (; better; better &= better - 1) {
      const int64_t lane = __builtin_ctz(better), i = row + lane;
      Candidate* mine = all.data() + i * room;
      mine[counts[i]++] = {scores[lane], slot};
      if (counts[i] == room) {
        std::nth_element(mine, mine + keep - 1, mine + room);
        counts[i] = keep;
        thresholds[i] = mine[keep - 1].score;
      }
    }
  }
};

template <typename T>
void hardest(const T* embeddings, const Problem& problem, Arithmetic arithmetic, int64_t keep, float* scores, int64_t* slots) {
  std::vector<Candidates*> of_threads(omp_get_max_threads(), nullptr);
  stream(embeddings, problem, arithmetic, [&] {
    Candidates*& mine = of_threads[omp_get_thread_num()];
    if (!mine) mine = new Candidates(problem.rows, keep);
    return [mine](int64_t block, int64_t row, int64_t lanes, const float* tile) {
      for (int64_t j = 0; j < kBlock; ++j) mine->offer(block * kBlock + j, row, lanes, load(tile + j * kLanes));
    };
  });
#pragma omp parallel for schedule(static) if (problem.rows * keep * problem.dim > kWorthThreads)
  for (int64_t row = 0; row < problem.rows; ++row) {
    std::vector<Candidate> found;
    for (const Candidates* theirs : of_threads)
      if (theirs) {
        const Candidate* first = theirs->all.data() + row * theirs->room;
        found.insert(found.end(), first, first + theirs->counts[row]);
      }
    const int64_t count = std::min<int64_t>(keep, found.size());
    std::partial_sort(found.begin(), found.begin() + count, found.end());
    for (int64_t i = 0; i < count; ++i) {
      const T* embedding = embeddings + found[i].slot * problem.dim;
      found[i].score = dot(problem.queries + row * problem.dim, embedding, problem.dim) + problem.bias[found[i].slot];
    }
    std::sort(found.begin(), found.begin() + count);
    for (int64_t i = 0; i < keep; ++i) {
      scores[row * keep + i] = i < count ? found[i].score : -kInfinity;
      slots[row * keep + i] = i < count ? found[i].slot : -1;
    }
  }
  for (Candidates* theirs : of_threads) delete theirs;
}

// The lowest keys so far, ties by slot: all that may be among the `keep` lowest of what was offered, in ascending slots.
struct Lowest {
  struct Entry {
    int64_t key, slot;
    bool operator<(const Entry& other) const { return key < other.key || (key == other.key && slot < other.slot); }
  };
  size_t keep;
  std::vector<Entry> found;
  int64_t threshold = std::numeric_limits<int64_t>::max();

  void offer(int64_t key, int64_t slot) {
    if (key >= threshold) return;
    found.push_back({key, slot});
    if (found.size() < 2 * keep + kBlock) return;
    std::nth_element(found.begin(), found.begin() + keep - 1, found.end());
    found.resize(keep);
    threshold = found[keep - 1].key;
  }
};

// A set of ids, and the row of each; most others are known not to be there after one look at a small table.
class Rows {
 public:
  Rows(const int64_t* ids, int64_t count) : filter_(1 << kFilterBits), rows_(table_size(count), -1), ids_(ids) {
    for (int64_t row = 0; row < count; ++row) {
      if (ids[row] < 0) continue;
      filter_[hash(ids[row]) >> (64 - kFilterBits)] = 1;
      rows_[place(ids[row])] = row;
    }
  }
  // -1 if it is not there.
  int64_t of(int64_t id) const { return filter_[hash(id) >> (64 - kFilterBits)] ? rows_[place(id)] : -1; }

 private:
  static constexpr int kFilterBits = 14;
  static size_t table_size(int64_t count) {
    size_t size = 64;
    while (size < 4 * (size_t)count) size *= 2;
    return size;
  }
  static uint64_t hash(int64_t id) {
    const uint64_t mixed = (uint64_t)id * 0x9e3779b97f4a7c15ull;
    return (mixed ^ (mixed >> 32)) * 0xd6e8feb86659fd93ull;
  }
  size_t place(int64_t id) const {
    size_t at = hash(id) & (rows_.size() - 1);
    while (rows_[at] >= 0 && ids_[rows_[at]] != id) at = (at + 1) & (rows_.size() - 1);
    return at;
  }
  std::vector<uint8_t> filter_;
  std::vector<int64_t> rows_;
  const int64_t* ids_;
};

}  // namespace

extern "C" {

// Whether this machine multiplies bfloat16 tiles, and the operating system lets it.
int negcache_has_amx() {
#ifdef NEGCACHE_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

// out[row, sample, :] = scores of the block blocks[row, sample].
void negcache_score_blocks(const void* embeddings, int storage, int64_t capacity, int64_t dim, const float* queries,
                           int64_t rows, const float* bias, const int64_t* excluded, int64_t exclusions,
                           const float* max_score, const int64_t* blocks, int64_t samples, float* out) {
  const Problem problem{capacity, dim, rows, queries, bias, excluded, exclusions, max_score};
  with_storage(embeddings, storage, [&](auto* typed) { score_blocks(typed, problem, blocks, samples, out); });
}

// out[row, block] = logsumexp over the block's slots of the scores; -inf for a block without a finite score.
void negcache_block_logsumexp(const void* embeddings, int storage, int64_t capacity, int64_t dim, const float* queries,
                              int64_t rows, const float* bias, const int64_t* excluded, int64_t exclusions,
                              const float* max_score, int tiles, int parts, float* out) {
  const Problem problem{capacity, dim, rows, queries, bias, excluded, exclusions, max_score};
  const int64_t blocks = (capacity + kBlock - 1) / kBlock;
  with_storage(embeddings, storage, [&](auto* typed) {
    stream(typed, problem, {tiles, parts}, [=] {
      return [=](int64_t block, int64_t row, int64_t lanes, const float* scores) {
        const Floats logsumexp = column_logsumexp(scores);
        for (int64_t i = 0; i < lanes; ++i) out[(row + i) * blocks + block] = logsumexp[i];
      };
    });
  });
}

// The `keep` best scores of each row and their slots, by (score descending, slot ascending); (-inf, -1) if fewer. They
// are found among the streamed products and then rescored in float32.
void negcache_hardest(const void* embeddings, int storage, int64_t capacity, int64_t dim, const float* queries,
                      int64_t rows, const float* bias, const int64_t* excluded, int64_t exclusions, const float* max_score,
                      int tiles, int parts, int64_t keep, float* scores, int64_t* slots) {
  const Problem problem{capacity, dim, rows, queries, bias, excluded, exclusions, max_score};
  with_storage(embeddings, storage, [&](auto* typed) { hardest(typed, problem, {tiles, parts}, keep, scores, slots); });
}

// The slots of the `keep` lowest keys that are not to be skipped, ascending, ties by slot; -1 if there are fewer.
void negcache_lowest(const int64_t* keys, const uint8_t* skip, int64_t capacity, int64_t keep, int64_t* slots) {
  std::vector<Lowest> of_threads(omp_get_max_threads(), Lowest{(size_t)keep, {}});
#pragma omp parallel if (8 * capacity > kWorthThreads)
  {
    Lowest mine{(size_t)keep, {}};
#pragma omp for schedule(static)
    for (int64_t slot = 0; slot < capacity; ++slot)
      if (!skip[slot]) mine.offer(keys[slot], slot);
    of_threads[omp_get_thread_num()] = std::move(mine);
  }
  std::vector<Lowest::Entry> found;
  for (const Lowest& theirs : of_threads) found.insert(found.end(), theirs.found.begin(), theirs.found.end());
  const int64_t count = std::min<int64_t>(keep, found.size());
  std::partial_sort(found.begin(), found.begin() + count, found.end());
  for (int64_t i = 0; i < keep; ++i) slots[i] = i < count ? found[i].slot : -1;
}

// slots[row] = the live slot of ids[row], -1 if there is none. Rows with the same id get the same.
void negcache_find_slots(const int64_t* ids, int64_t count, const int64_t* cached, const int64_t* embedded_at,
                         int64_t capacity, int64_t* slots) {
  const Rows rows(ids, count);
  std::fill(slots, slots + count, -1);
#pragma omp parallel for schedule(static) if (8 * capacity > kWorthThreads)
  for (int64_t slot = 0; slot < capacity; ++slot) {
    if (cached[slot] < 0) continue;
    const int64_t row = rows.of(cached[slot]);
    if (row >= 0 && embedded_at[slot] >= 0) slots[row] = slot;  // ids of live slots are unique
  }
  for (int64_t row = 0; row < count; ++row)
    if (ids[row] >= 0) slots[row] = slots[rows.of(ids[row])];
}

}  // extern "C"
