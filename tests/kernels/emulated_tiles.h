// Intel's tile instructions in plain C++, so that the code that uses them is tested on CPUs without them.
#include <immintrin.h>

#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace emulated {

inline thread_local unsigned char tiles[8][16][64];

inline void load(int tile, const void* from, long stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tiles[tile][row], (const char*)from + row * stride, 64);
}

inline void save(int tile, void* to, long stride) {
  for (int row = 0; row < 16; ++row) std::memcpy((char*)to + row * stride, tiles[tile][row], 64);
}

inline float number(const unsigned char* at) {
  unsigned int bits = (at[0] | at[1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void multiply(int to, int left, int right) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float sum;
      std::memcpy(&sum, tiles[to][row] + 4 * column, 4);
      for (int pair = 0; pair < 16; ++pair)
        for (int half = 0; half < 2; ++half)
          sum += number(tiles[left][row] + 4 * pair + 2 * half) * number(tiles[right][pair] + 4 * column + 2 * half);
      std::memcpy(tiles[to][row] + 4 * column, &sum, 4);
    }
}

}  // namespace emulated

#define _tile_loadconfig(config) (void)(config)
#define _tile_release() std::memset(emulated::tiles, 255, sizeof(emulated::tiles))
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, sizeof(emulated::tiles[tile]))
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::save(tile, to, stride)
#define _tile_dpbf16ps(to, left, right) emulated::multiply(to, left, right)
