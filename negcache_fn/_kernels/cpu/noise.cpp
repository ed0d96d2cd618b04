// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011), four uniform variates of each counter.

#include <algorithm>
#include <cstdint>

#include "blocks.h"

namespace negcache {
namespace {

constexpr int kRounds = 10;
constexpr float kBelowOne = 1.0f - 0x1p-24f;

struct Product {
  uint32_t high, low;
};

inline Product multiply(uint32_t a, uint32_t b) {
  const uint64_t product = (uint64_t)a * b;
  return {(uint32_t)(product >> 32), (uint32_t)product};
}

// The same operations in the same precision as negcache_fn.random.gumbel: equal bits.
inline float uniform(uint32_t word) { return std::min(((float)word + 0.5f) * 0x1p-32f, kBelowOne); }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// out[4 i ... 4 i + 3] = midpoints of 2^32 cells of (0, 1), of the counters (quad[i], row[i], step, level).
void negcache_uniform(int64_t seed, int64_t step, const int64_t* row, const int64_t* quad, int64_t count, int64_t level,
                      float* out) {
#pragma omp parallel for schedule(static) if (64 * count > kWorthThreads)
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word0 = quad[i], word1 = row[i], word2 = step, word3 = level;
    uint32_t key0 = seed, key1 = (uint64_t)seed >> 32;
    for (int round = 0; round < kRounds; ++round) {
      const Product first = multiply(0xD2511F53u, word0), second = multiply(0xCD9E8D57u, word2);
      word0 = second.high ^ word1 ^ key0;
      word1 = second.low;
      word2 = first.high ^ word3 ^ key1;
      word3 = first.low;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    out[4 * i] = uniform(word0);
    out[4 * i + 1] = uniform(word1);
    out[4 * i + 2] = uniform(word2);
    out[4 * i + 3] = uniform(word3);
  }
}

}  // extern "C"
#pragma GCC visibility pop

}  // namespace negcache
