// Passes over the scores of a batch of queries against the cache, fused so that no score leaves a core's own cache.
// Built on the user's machine by build.py, without any header of torch; never required.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "candidates.h"
#include "failure.h"
#include "masses.h"
#include "mean.h"
#include "problem.h"
#include "stream.h"
#include "vectors.h"

#ifdef NEGCACHE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace negcache {
namespace {

template <typename T>
void score_blocks(const T* embeddings, const Problem& problem, const int64_t* blocks, int64_t samples, float* out) {
  const int64_t dim = problem.dim;
#pragma omp parallel for schedule(static) if (problem.rows * samples * kBlock * problem.dim > kWorthThreads)
  for (int64_t pair = 0; pair < problem.rows * samples; ++pair) {
    const int64_t row = pair / samples, first = blocks[pair] * kBlock;
    const int64_t count = std::min(kBlock, problem.capacity - first);
    const float* bias = problem.bias + first;
    float products[kBlock];
    float* scores = out + pair * kBlock;
    std::fill(scores + count, scores + kBlock, -kInfinity);
    for (int64_t j = 0; j < count; ++j) {
      products[j] =
          dot(problem.queries + row * dim, embeddings + (first + j) * dim, dim) * scale_of(problem, first + j);
      scores[j] = products[j] + bias[j];
    }
    for (int64_t p = 0; p < problem.exclusions; ++p) {
      const int64_t place = problem.excluded[row * problem.exclusions + p] - first;
      if (place >= 0 && place < count) scores[place] = -kInfinity;
    }
    for (int64_t j = 0; problem.row_labels && j < count; ++j)
      if (problem.slot_labels[first + j] == problem.row_labels[row]) scores[j] = -kInfinity;
    if (!problem.max_score) continue;
    // A chosen block has a document below the limit, even if rounding differs here: the lowest one stays.
    float lowest = kInfinity;
    for (int64_t j = 0; j < count; ++j)
      if (scores[j] > -kInfinity) lowest = std::min(lowest, products[j]);
    const float limit = std::max(problem.max_score[row], lowest);
    for (int64_t j = 0; j < count; ++j)
      if (products[j] > limit) scores[j] = -kInfinity;
  }
}

constexpr int kChains = 4;  // of additions or comparisons, each of which waits for the one before
static_assert(kBlock % kChains == 0, "the slots of a block are shared out among the chains");

inline Floats column_maximum(const float* scores) {
  Floats tops[kChains];
  for (int c = 0; c < kChains; ++c) tops[c] = load(scores + c * kLanes);
  for (int64_t j = kChains; j < kBlock; j += kChains)
    for (int c = 0; c < kChains; ++c) tops[c] = maximum(load(scores + (j + c) * kLanes), tops[c]);
  return maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]));
}

// The logsumexp of each column of a block's scores, whose maxima are `top`; `keep(j, exp(score - top))` of slot j.
template <typename Keep>
inline Floats column_logsumexp(const float* scores, Floats top, Keep keep) {
  const Floats shift = top == -kInfinity ? splat(0.0f) : top;
  Floats totals[kChains] = {};
  for (int64_t j = 0; j < kBlock; j += kChains)
    for (int c = 0; c < kChains; ++c) {
      const Floats e = exponential(load(scores + (j + c) * kLanes) - shift);
      keep(j + c, e);
      totals[c] += e;
    }
  return top + logarithm((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

template <typename T>
void blocks_and_sums(const T* embeddings, const Problem& problem, Arithmetic arithmetic, float* out, float* total,
                     float* log_scale) {
  const int64_t blocks = problem.blocks();
  std::vector<std::optional<WeightedSums<T>>> of_threads(omp_get_max_threads());
  Failure failure;
  stream(embeddings, problem, arithmetic, [&] {
    std::optional<WeightedSums<T>>& mine = of_threads[omp_get_thread_num()];
    if (!mine) failure.attempt([&] { mine.emplace(embeddings, problem, arithmetic.rounds()); });
    return [=, &mine](int64_t block, int64_t row, int64_t lanes, const float* scores) {
      if (!mine) return;
      float exponentials[kBlock * kLanes];
      const Floats top = column_maximum(scores);
      const Floats logsumexp =
          column_logsumexp(scores, top, [&](int64_t j, Floats e) { store(exponentials + j * kLanes, e); });
      for (int64_t i = 0; i < lanes; ++i) out[(row + i) * blocks + block] = logsumexp[i];
      mine->add(block, row, lanes, top, logsumexp, exponentials);
    };
  });
  failure.raise();
  merge_sums(of_threads, problem, total, log_scale);
}

template <typename T>
void hardest_at_once(const T* embeddings, const Problem& problem, Arithmetic arithmetic, int64_t keep, float* scores,
                     int64_t* slots) {
  std::vector<std::optional<Candidates>> of_threads(omp_get_max_threads());
  Failure failure;
  stream(embeddings, problem, arithmetic, [&] {
    std::optional<Candidates>& mine = of_threads[omp_get_thread_num()];
    if (!mine) failure.attempt([&] { mine.emplace(problem.rows, keep); });
    return [&mine](int64_t block, int64_t row, int64_t lanes, const float* tile) {
      if (!mine) return;
      for (int64_t j = 0; j < kBlock; ++j) mine->offer(block * kBlock + j, row, lanes, load(tile + j * kLanes));
    };
  });
  failure.raise();
  const auto merge = [&](int64_t row) {
    std::vector<float> found;
    std::vector<int64_t> places;  // they ascend from thread to thread
    for (const std::optional<Candidates>& theirs : of_threads)
      if (theirs) {
        const int64_t first = row * theirs->room, end = first + theirs->counts[row];
        found.insert(found.end(), theirs->scores.begin() + first, theirs->scores.begin() + end);
        places.insert(places.end(), theirs->slots.begin() + first, theirs->slots.begin() + end);
      }
    const int64_t all = found.size(), count = std::min(keep, all);
    std::vector<float> spare(2 * all);
    if (all > keep) keep_best(found.data(), places.data(), all, keep, spare.data());
    for (int64_t i = 0; i < count; ++i) {
      const float product = dot(problem.queries + row * problem.dim, embeddings + places[i] * problem.dim, problem.dim);
      found[i] = product * scale_of(problem, places[i]) + problem.bias[places[i]];
    }
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return found[i] > found[j]; });
    for (int64_t i = 0; i < keep; ++i) {
      scores[row * keep + i] = i < count ? found[order[i]] : -kInfinity;
      slots[row * keep + i] = i < count ? places[order[i]] : -1;
    }
  };
#pragma omp parallel for schedule(static) if (problem.rows * keep * problem.dim > kWorthThreads)
  for (int64_t row = 0; row < problem.rows; ++row) failure.attempt([&] { merge(row); });
  failure.raise();
}

template <typename T>
void hardest(const T* embeddings, const Problem& problem, Arithmetic arithmetic, int64_t keep, float* scores,
             int64_t* slots) {
  const int64_t at_once = Candidates::rows_at_once(keep, omp_get_max_threads());
  for (int64_t first = 0; first < problem.rows; first += at_once) {
    Problem some = problem;
    some.rows = std::min(at_once, problem.rows - first);
    some.queries += first * problem.dim;
    some.excluded += first * problem.exclusions;
    if (some.max_score) some.max_score += first;
    if (some.row_labels) some.row_labels += first;
    hardest_at_once(embeddings, some, arithmetic, keep, scores + first * keep, slots + first * keep);
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Whether this machine multiplies bfloat16 tiles, and the operating system lets it.
int negcache_has_amx() {
#ifdef NEGCACHE_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

// out[row, sample, :] = scores of the block blocks[row, sample].
int negcache_score_blocks(const Problem* problem, const int64_t* blocks, int64_t samples, float* out) {
  return guarded([&] {
    return with_storage(*problem, [&](auto* typed) { score_blocks(typed, *problem, blocks, samples, out); });
  });
}

// out[row, block] = logsumexp over the block's slots of the scores; -inf for a block without a finite score.
int negcache_block_logsumexp(const Problem* problem, int tiles, int parts, float* out) {
  const int64_t blocks = problem->blocks();
  const auto make_consumer = [=] {
    return [=](int64_t block, int64_t row, int64_t lanes, const float* scores) {
      const Floats logsumexp = column_logsumexp(scores, column_maximum(scores), [](int64_t, Floats) {});
      for (int64_t i = 0; i < lanes; ++i) out[(row + i) * blocks + block] = logsumexp[i];
    };
  };
  return guarded([&] {
    return with_storage(*problem, [&](auto* typed) { stream(typed, *problem, {tiles, parts}, make_consumer); });
  });
}

// out[slot] = logsumexp over the rows of score + weight[row], of every slot of the blocks; -inf past the end.
int negcache_slot_masses(const Problem* problem, int tiles, int parts, const float* weight, const float* log_scale,
                         float* out) {
  std::fill(out, out + problem->blocks() * kBlock, -kInfinity);
  return guarded([&] {
    std::vector<float> padded(weight, weight + problem->rows);
    padded.resize((problem->rows + kLanes - 1) / kLanes * kLanes, -kInfinity);
    const auto make_consumer = [&] { return SlotMasses(padded.data(), log_scale, out); };
    return with_storage(*problem, [&](auto* typed) { stream(typed, *problem, {tiles, parts}, make_consumer); });
  });
}

// out[column] = logsumexp over the rows of values[rows, columns] + weight[row].
void negcache_sum_of_rows(const float* values, const float* weight, int64_t rows, int64_t columns, float* out) {
  sum_of_rows(values, weight, rows, columns, out);
}

// out[row] = logsumexp of values[row, :].
void negcache_logsumexp(const float* values, int64_t rows, int64_t columns, float* out) {
  logsumexp_of_rows(values, rows, columns, out);
}

// The log-sum-exp of blocks, and total[row, :] = the sum of exp(score - log_scale[row]) times the embedding, over all
// slots. A row without a finite score has the log-scale -inf and the total 0.
int negcache_blocks_and_sums(const Problem* problem, int tiles, int parts, float* out, float* total, float* log_scale) {
  return guarded([&] {
    return with_storage(*problem,
                        [&](auto* typed) { blocks_and_sums(typed, *problem, {tiles, parts}, out, total, log_scale); });
  });
}

// The `keep` best scores of each row and their slots, by (score descending, slot ascending); (-inf, -1) if fewer. They
// are found among the streamed products and then rescored in float32.
int negcache_hardest(const Problem* problem, int tiles, int parts, int64_t keep, float* scores, int64_t* slots) {
  return guarded([&] {
    return with_storage(*problem, [&](auto* typed) { hardest(typed, *problem, {tiles, parts}, keep, scores, slots); });
  });
}

}  // extern "C"
#pragma GCC visibility pop

}  // namespace negcache
