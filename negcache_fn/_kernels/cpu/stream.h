// One pass over the scores of all queries and slots, multiplied in the way asked for.
#pragma once

#include <cstdint>
#include <type_traits>

#include "by_tiles.h"
#include "by_vectors.h"
#include "problem.h"

namespace negcache {

// How to multiply: by tiles of that many bfloat16 parts (1, 2 or 3), or by vectors, where two mean that 16-bit integers
// are precise enough, and one that queries of 8 bits are for stored integers.
struct Arithmetic {
  int tiles, parts;
  bool rounds() const { return !tiles && parts < 3; }  // to integers, where the machine multiplies them
};

template <typename T, typename MakeConsumer>
void stream(const T* embeddings, const Problem& problem, Arithmetic arithmetic, MakeConsumer make_consumer) {
#ifdef NEGCACHE_AMX
  if (arithmetic.tiles) {
    if (arithmetic.parts == 1) return stream_by_tiles<1>(embeddings, problem, make_consumer);
    if (arithmetic.parts == 2) return stream_by_tiles<2>(embeddings, problem, make_consumer);
    return stream_by_tiles<3>(embeddings, problem, make_consumer);
  }
#endif
#ifdef NEGCACHE_INTEGERS
  if constexpr (std::is_same<T, int8_t>::value)
    if (arithmetic.parts < 2) return stream_by_vectors<StoredIntegers>(embeddings, problem, make_consumer);
  if (arithmetic.parts < 3) return stream_by_vectors<Integers<T>>(embeddings, problem, make_consumer);
#endif
  stream_by_vectors<Singles>(embeddings, problem, make_consumer);
}

}  // namespace negcache
