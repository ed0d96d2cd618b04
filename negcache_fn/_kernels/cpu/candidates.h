// The best scores of every row, kept while slots stream by.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "selection.h"
#include "vectors.h"

namespace negcache {

constexpr int64_t kRowGroup = 32;               // a multiple of the rows that are multiplied together
constexpr int64_t kCandidateBytes = 512 << 20;  // for the candidates of all threads

// Leaves the `keep` best of `count` scores, at least as many, and their slots, which ascend: of ties the first. Returns
// the lowest that stays. `spare` has room for 2 * count.
inline float keep_best(float* scores, int64_t* slots, int64_t count, int64_t keep, float* spare) {
  std::copy(scores, scores + count, spare);
  const float lowest = nth_largest(spare, spare + count, count, keep);
  int64_t ties = keep, kept = 0;
  for (int64_t i = 0; i < count; ++i) ties -= scores[i] > lowest;
  for (int64_t i = 0; i < count; ++i) {
    const bool tied = scores[i] == lowest, stays = (scores[i] > lowest) | (tied & (ties > 0));
    ties -= tied;
    scores[kept] = scores[i];
    slots[kept] = slots[i];
    kept += stays;
  }
  return lowest;
}

// The best candidates of every row so far: all that may be among the `keep` best of those offered.
struct Candidates {
  int64_t keep, room;
  std::vector<float> scores;   // [rows][room]
  std::vector<int64_t> slots;  // [rows][room], which ascend
  std::vector<int64_t> counts;
  std::vector<float> thresholds, spare;

  Candidates(int64_t rows, int64_t keep)
      : keep(keep),
        room(2 * keep + kBlock),
        scores(rows * room),
        slots(rows * room),
        counts(rows, 0),
        thresholds(rows + kLanes, -kInfinity),
        spare(2 * room) {}

  // How many rows each thread may keep candidates of at a time: as many as fit, in whole groups of vectors and tiles.
  static int64_t rows_at_once(int64_t keep, int64_t threads) {
    const int64_t row_bytes = (2 * keep + kBlock) * (sizeof(float) + sizeof(int64_t));
    return std::max<int64_t>(1, kCandidateBytes / (threads * row_bytes * kRowGroup)) * kRowGroup;
  }

  // Slots must ascend: one that equals the threshold comes after `keep` that are as good.
  void offer(int64_t slot, int64_t row, int64_t lanes, Floats offered) {
    uint32_t better = lanes_above(offered, load(thresholds.data() + row)) & ((1u << lanes) - 1);
    for (; better; better &= better - 1) {
      const int64_t lane = __builtin_ctz(better), i = row + lane;
      float* score = scores.data() + i * room;
      score[counts[i]] = offered[lane];
      slots[i * room + counts[i]] = slot;
      if (++counts[i] < room) continue;
      thresholds[i] = keep_best(score, slots.data() + i * room, room, keep, spare.data());
      counts[i] = keep;
    }
  }
};

}  // namespace negcache
