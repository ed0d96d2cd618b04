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

constexpr int64_t kRowGroup = 32;               // a multiple of the rows that are multiplied together
constexpr int64_t kCandidateBytes = 512 << 20;  // for the candidates of all threads

// The best candidates of every row so far: all that may be among the `keep` best of those offered.
struct Candidates {
  int64_t keep, room;
  std::vector<Candidate> all;
  std::vector<int64_t> counts;
  std::vector<float> thresholds;

  Candidates(int64_t rows, int64_t keep)
      : keep(keep), room(2 * keep + kBlock), all(rows * room), counts(rows, 0), thresholds(rows + kLanes, -kInfinity) {}

  // How many rows each thread may keep candidates of at a time: as many as fit, in whole groups of vectors and tiles.
  static int64_t rows_at_once(int64_t keep, int64_t threads) {
    const int64_t row_bytes = (2 * keep + kBlock) * sizeof(Candidate);
    return std::max<int64_t>(1, kCandidateBytes / (threads * row_bytes * kRowGroup)) * kRowGroup;
  }

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
