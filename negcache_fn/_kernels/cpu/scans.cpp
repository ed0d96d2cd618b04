// Scans over one number per slot or row: the lowest keys, the slots of ids, repeated ids.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "blocks.h"
#include "failure.h"

namespace negcache {
namespace {

// The lowest keys so far, ties by slot: all that may be among the `keep` lowest of those offered, in ascending slots.
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

constexpr int64_t kAnonymous = -1;  // as in negcache_fn._cache.ids

// A set of ids, and the last row of each; most others are known not to be there after one look at a small table.
class Rows {
 public:
  Rows(const int64_t* ids, int64_t count) : filter_(1 << kFilterBits), rows_(table_size(count), -1), ids_(ids) {
    for (int64_t row = 0; row < count; ++row) {
      if (ids[row] == kAnonymous) continue;
      filter_[hash(ids[row]) >> (64 - kFilterBits)] = 1;
      rows_[place(ids[row])] = row;
    }
  }
  // -1 if it is not there.
  int64_t of(int64_t id) const { return filter_[hash(id) >> (64 - kFilterBits)] ? rows_[place(id)] : -1; }
  bool is_last(int64_t row) const { return ids_[row] == kAnonymous || of(ids_[row]) == row; }

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

// The slots of the `keep` lowest keys that are not to be skipped, ascending, ties by slot; -1 if there are fewer.
void lowest(const int64_t* keys, const uint8_t* skip, int64_t capacity, int64_t keep, int64_t* slots) {
  Failure failure;
  std::vector<Lowest> of_threads(omp_get_max_threads(), Lowest{(size_t)keep, {}});
#pragma omp parallel if (8 * capacity > kWorthThreads)
  {
    Lowest mine{(size_t)keep, {}};
#pragma omp for schedule(static)
    for (int64_t first = 0; first < capacity; first += kBlock) {
      const int64_t end = std::min(first + kBlock, capacity);
      // The lowest key of a block is found by vectors, and rules out most blocks.
      int64_t lowest = mine.threshold;
      for (int64_t slot = first; slot < end; ++slot)
        lowest = std::min(lowest, skip[slot] ? mine.threshold : keys[slot]);
      if (lowest == mine.threshold) continue;
      failure.attempt([&] {
        for (int64_t slot = first; slot < end; ++slot)
          if (!skip[slot]) mine.offer(keys[slot], slot);
      });
    }
    of_threads[omp_get_thread_num()] = std::move(mine);
  }
  failure.raise();
  std::vector<Lowest::Entry> found;
  for (const Lowest& theirs : of_threads) found.insert(found.end(), theirs.found.begin(), theirs.found.end());
  const int64_t count = std::min<int64_t>(keep, found.size());
  std::partial_sort(found.begin(), found.begin() + count, found.end());
  for (int64_t i = 0; i < keep; ++i) slots[i] = i < count ? found[i].slot : -1;
}

// slots[row] = the live slot of ids[row], which `rows` are of, -1 if there is none. Rows with the same id get the same.
void find_slots(const Rows& rows, const int64_t* ids, int64_t count, const int64_t* cached, const int64_t* embedded_at,
                int64_t capacity, int64_t* slots) {
  std::fill(slots, slots + count, -1);
#pragma omp parallel for schedule(static) if (8 * capacity > kWorthThreads)
  for (int64_t slot = 0; slot < capacity; ++slot) {
    if (cached[slot] == kAnonymous) continue;
    const int64_t row = rows.of(cached[slot]);
    if (row >= 0 && embedded_at[slot] >= 0) slots[row] = slot;  // ids of live slots are unique
  }
  for (int64_t row = 0; row < count; ++row)
    if (ids[row] != kAnonymous) slots[row] = slots[rows.of(ids[row])];
}

// The log-weight of a live slot that has none of the ids, -inf of another.
void bias_without(const int64_t* ids, int64_t count, const int64_t* cached, const int64_t* embedded_at,
                  const float* log_weight, int64_t capacity, float* bias) {
  const Rows rows(ids, count);
#pragma omp parallel for schedule(static) if (8 * capacity > kWorthThreads)
  for (int64_t slot = 0; slot < capacity; ++slot)
    bias[slot] = embedded_at[slot] >= 0 && (cached[slot] == kAnonymous || rows.of(cached[slot]) < 0)
                     ? log_weight[slot]
                     : -std::numeric_limits<float>::infinity();
}

// Whether no later row has the same id.
void last_of_each(const int64_t* ids, int64_t count, uint8_t* last) {
  const Rows rows(ids, count);
  for (int64_t row = 0; row < count; ++row) last[row] = rows.is_last(row);
}

// slots[row] = the slot that the row takes: that of its id, or else the next of the lowest keys. -1 if it is not
// wanted, or a later row that is has the same id.
void assign_slots(const int64_t* ids, const uint8_t* wanted, int64_t count, const int64_t* cached,
                  const int64_t* embedded_at, const int64_t* keys, int64_t capacity, int64_t* slots) {
  std::vector<int64_t> names(ids, ids + count), evicted(count);
  for (int64_t row = 0; row < count; ++row)
    if (!wanted[row]) names[row] = kAnonymous;
  const Rows rows(names.data(), count);
  std::vector<uint8_t> replaced(capacity);
  find_slots(rows, names.data(), count, cached, embedded_at, capacity, slots);
  for (int64_t row = 0; row < count; ++row)
    if (slots[row] >= 0) replaced[slots[row]] = 1;
  lowest(keys, replaced.data(), capacity, count, evicted.data());
  const int64_t* next = evicted.data();
  for (int64_t row = 0; row < count; ++row)
    if (!wanted[row] || !rows.is_last(row))
      slots[row] = -1;
    else if (slots[row] < 0)
      slots[row] = *next++;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int negcache_lowest(const int64_t* keys, const uint8_t* skip, int64_t capacity, int64_t keep, int64_t* slots) {
  return guarded([&] {
    lowest(keys, skip, capacity, keep, slots);
    return kDone;
  });
}

int negcache_find_slots(const int64_t* ids, int64_t count, const int64_t* cached, const int64_t* embedded_at,
                        int64_t capacity, int64_t* slots) {
  return guarded([&] {
    find_slots(Rows(ids, count), ids, count, cached, embedded_at, capacity, slots);
    return kDone;
  });
}

int negcache_bias_without(const int64_t* ids, int64_t count, const int64_t* cached, const int64_t* embedded_at,
                          const float* log_weight, int64_t capacity, float* bias) {
  return guarded([&] {
    bias_without(ids, count, cached, embedded_at, log_weight, capacity, bias);
    return kDone;
  });
}

int negcache_assign_slots(const int64_t* ids, const uint8_t* wanted, int64_t count, const int64_t* cached,
                          const int64_t* embedded_at, const int64_t* keys, int64_t capacity, int64_t* slots) {
  return guarded([&] {
    assign_slots(ids, wanted, count, cached, embedded_at, keys, capacity, slots);
    return kDone;
  });
}

int negcache_last_of_each(const int64_t* ids, int64_t count, uint8_t* last) {
  return guarded([&] {
    last_of_each(ids, count, last);
    return kDone;
  });
}

}  // extern "C"
#pragma GCC visibility pop

}  // namespace negcache
