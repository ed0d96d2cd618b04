// Selecting the largest of some numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

namespace negcache {

constexpr int kQuickRounds = 32;  // of a selection, before the one that no order of values makes slow

// The n-th largest of some numbers, n >= 1; loses both arrays. No branch depends on a number, unlike std::nth_element.
template <typename T>
T nth_largest(T* values, T* spare, int64_t count, int64_t n) {
  for (int round = 0; round < kQuickRounds; ++round) {
    const T a = values[0], b = values[count / 2], c = values[count - 1];
    const T pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    int64_t above = 0, below = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T value = values[i];
      values[above] = spare[below] = value;
      above += value > pivot;
      below += value < pivot;
    }
    const int64_t equal = count - above - below;
    if (n > above && n <= above + equal) return pivot;
    if (n <= above) {
      count = above;
    } else {
      n -= above + equal;
      count = below;
      std::swap(values, spare);
    }
  }
  std::nth_element(values, values + n - 1, values + count, std::greater<T>());
  return values[n - 1];
}

// The places of the `keep` largest values, ascending, ties by place: in the order of `ordered` in _cache/select.py,
// which has a place for NaN.
inline void places_of_largest(const float* values, int64_t count, int64_t keep, int64_t* places) {
  std::vector<int32_t> keys(count), spare(2 * count);
  std::memcpy(keys.data(), values, count * sizeof(int32_t));
  for (int32_t& key : keys) key = key < 0 ? -(key & std::numeric_limits<int32_t>::max()) : key;
  std::copy(keys.begin(), keys.end(), spare.begin());
  const int32_t lowest = nth_largest(spare.data(), spare.data() + count, count, keep);
  int64_t ties = keep;
  for (const int32_t key : keys) ties -= key > lowest;
  for (int64_t i = 0; i < count; ++i)
    if (keys[i] > lowest || (keys[i] == lowest && ties-- > 0)) *places++ = i;
}

}  // namespace negcache
