// The best scores of every row, kept while slots stream by.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "vectors.h"

namespace negcache {

struct Candidate {
  float score;
  int64_t slot;
  bool operator<(const Candidate& other) const {  // better first
    return score > other.score || (score == other.score && slot < other.slot);
  }
};

// The best candidates of every row so far: all that may be among the `keep` best of those offered.
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

}  // namespace negcache
