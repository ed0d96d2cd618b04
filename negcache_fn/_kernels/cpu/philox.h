// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011), four uniform variates of each counter.
#pragma once

#include <algorithm>
#include <cstdint>

namespace negcache {

constexpr int64_t kQuad = 4;  // variates of a counter

// Midpoints of 2^32 cells of (0, 1), of the counter (quad, row, step, level). The same operations in the same precision
// as negcache_fn.random.gumbel: equal bits.
inline void uniform_quad(int64_t seed, int64_t step, int64_t row, int64_t quad, int64_t level, float* out) {
  constexpr int kRounds = 10;
  constexpr float kBelowOne = 1.0f - 0x1p-24f;
  uint32_t word0 = quad, word1 = row, word2 = step, word3 = level;
  uint32_t key0 = seed, key1 = (uint64_t)seed >> 32;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t first = (uint64_t)0xD2511F53u * word0, second = (uint64_t)0xCD9E8D57u * word2;
    word0 = (uint32_t)(second >> 32) ^ word1 ^ key0;
    word1 = (uint32_t)second;
    word2 = (uint32_t)(first >> 32) ^ word3 ^ key1;
    word3 = (uint32_t)first;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const uint32_t words[kQuad] = {word0, word1, word2, word3};
  for (int64_t i = 0; i < kQuad; ++i) out[i] = std::min(((float)words[i] + 0.5f) * 0x1p-32f, kBelowOne);
}

}  // namespace negcache
