// Products by bfloat16 tiles (AMX), worth it only where there are enough queries to fill them.
//
// Numbers are split into bfloat16 parts, x = x0 + x1 + ..., each 2^-8 of the one before, and a product of P parts is
// the sum of x_i y_j over i + j < P, accumulated in float32: P = 3 has the precision of float32, P = 2 an error of
// about 2^-17 |x| |y|.
#pragma once

#include "vectors.h"

#ifdef NEGCACHE_AMX

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "problem.h"

namespace negcache {

constexpr int kTile = 16;   // rows of a tile: queries or slots
constexpr int kDepth = 32;  // bfloat16 in a row of a tile
constexpr int kTileSize = kTile * kDepth;
constexpr int kQuarters = kBlock / kTile;
static_assert(kBlock == 4 * kTile, "`multiply` has four accumulators, one for every 16 slots of a block");
static_assert(kLanes == kTile, "a vector holds a row of scores");
constexpr int kPanelBytes = 1 << 23;   // of packed queries
constexpr int kChunkBytes = 32 << 10;  // of a block's packed embeddings: they should stay in the nearest cache

// The bfloat16 part of x; what is left goes back into x.
inline __m256bh next_part(Floats* x) {
  const __m256bh part = _mm512_cvtneps_pbh((__m512)*x);
  Bfloat16 rounded[kLanes];
  std::memcpy(rounded, &part, sizeof(rounded));
  *x -= load(rounded);
  return part;
}

// Queries as the right operands of the tile product: for each group of 16 queries and each 32 dimensions, one tile per
// part, [16 pairs of dimensions][16 queries][2].
inline void pack_queries(const float* queries, int64_t rows, int64_t dim, int64_t depths, int parts, uint16_t* packed) {
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

// Adds the products over some of the dimensions to the products [kBlock slots][16 queries] of one block and one group.
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
  constexpr bool kOnePart = std::is_same<T, Bfloat16>::value || std::is_same<T, int8_t>::value;
  constexpr int kExactParts = kOnePart ? 1 : std::is_same<T, _Float16>::value ? 2 : 3;
  constexpr int kBlockParts = kParts < kExactParts ? kParts : kExactParts;
  const Exclusions excluded(problem);
  const int64_t blocks = problem.blocks(), depths = (problem.dim + kDepth - 1) / kDepth;
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
        pack_block<kBlockParts>(problem.embeddings_of(embeddings, block), count, problem.dim, depths, parts.data());
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
          // Past the end the operands are leftovers of an earlier block, and may be anything: replace, do not add.
          if (problem.row_scale)
            scale_products(problem, slot, count, bias, scores);
          else
            for (int64_t j = 0; j < kBlock; ++j)
              store(scores + j * kTile, j < count ? load(scores + j * kTile) + bias[j] : splat(-kInfinity));
          exclude(problem, excluded, first + group, lanes, slot, bias, scores);
          consume(block, first + group, lanes, scores);
        }
      }
      _tile_release();
    }
  }
}

}  // namespace negcache

#endif  // NEGCACHE_AMX
