// The size of a block, which build.py takes from blocks.py, and the size from which work is worth threads.
#pragma once

#include <cstdint>

#ifndef NEGCACHE_BLOCK
#error "NEGCACHE_BLOCK, the number of slots in a block, is not defined: build.py passes it"
#endif

namespace negcache {

constexpr int64_t kBlock = NEGCACHE_BLOCK;
constexpr int64_t kWorthThreads = 1 << 20;  // numbers to read or multiply: below it, waking threads takes longer

}  // namespace negcache
