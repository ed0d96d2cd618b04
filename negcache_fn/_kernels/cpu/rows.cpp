// Copies of whole rows.

#include <cstdint>
#include <cstring>
#include <vector>

#include "failure.h"

namespace negcache {
namespace {

// The same fields, in the same order, as in rows.py.
struct Column {
  char* to;          // [C] rows
  const char* from;  // [M] rows
  int64_t row_bytes;
};

// Row `row` of each column goes into its slot `slots[row]`, if that is not negative. All are read before any is
// written, because they may be rows of the same columns.
void write_rows(const Column* columns, int64_t count, const int64_t* slots, int64_t rows) {
  std::vector<int64_t> written;
  for (int64_t row = 0; row < rows; ++row)
    if (slots[row] >= 0) written.push_back(row);
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += columns[i].row_bytes * written.size();
  std::vector<char> read(bytes);
  char* next = read.data();
  for (int64_t i = 0; i < count; ++i)
    for (const int64_t row : written) {
      const auto [to, from, row_bytes] = columns[i];
      std::memcpy(next, from + row * row_bytes, row_bytes);
      next += row_bytes;
    }
  next = read.data();
  for (int64_t i = 0; i < count; ++i)
    for (const int64_t row : written) {
      const auto [to, from, row_bytes] = columns[i];
      std::memcpy(to + slots[row] * row_bytes, next, row_bytes);
      next += row_bytes;
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int negcache_write_rows(const Column* columns, int64_t count, const int64_t* slots, int64_t rows) {
  return guarded([&] {
    write_rows(columns, count, slots, rows);
    return kDone;
  });
}

}  // extern "C"
#pragma GCC visibility pop

}  // namespace negcache
