// Selecting the largest of some numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

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

}  // namespace negcache
