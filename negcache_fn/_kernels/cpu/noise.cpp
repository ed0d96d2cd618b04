// Choosing among places by their log-masses plus Gumbel noise.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "failure.h"
#include "masses.h"
#include "philox.h"
#include "vectors.h"

namespace negcache {
namespace {

constexpr int64_t kStrip = 4 * kLanes;  // variates made at a time
constexpr int64_t kVariateCost = 16;    // of one, in numbers read

// What makes the noise of a level, but for row and column.
struct Level {
  int64_t seed, step, number;
};

// -log(-log1p(-u)), with full relative precision in the upper tail.
inline Floats gumbel(Floats u) {
  const Floats rest = 1.0f - u;
  // Kahan's log1p: the second factor takes back the rounding of `rest`.
  const Floats exponential = rest == 1.0f ? u : logarithm(rest) * (u / (rest - 1.0f));
  return -logarithm(exponential);
}

// The place of the largest log-mass plus noise, ties to the first, and that sum; 0 and -inf if there is none. The noise
// is of the columns `column ...` of a row.
struct Choice {
  int64_t place;
  float perturbed;
};

Choice choose(const Level& level, int64_t row, int64_t column, const float* log_mass, int64_t count) {
  Floats best = splat(-kInfinity);
  Ints place = {}, lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t first = 0; first < count; first += kStrip) {
    const int64_t from = column + first, skipped = from % kQuad, here = std::min(kStrip, count - first);
    float uniforms[kStrip + kQuad + kLanes] = {};
    for (int64_t i = 0; i < skipped + here; i += kQuad)
      uniform_quad(level.seed, level.step, row, from / kQuad + i / kQuad, level.number, uniforms + i);
    for (int64_t i = 0; i < here; i += kLanes) {
      const Ints at = lane + (int32_t)(first + i);
      const Floats noisy = load(log_mass + first + i, here - i) + gumbel(load(uniforms + skipped + i));
      const Ints better = (noisy > best) & (at < (int32_t)count);
      best = better ? noisy : best;
      place = better ? at : place;
    }
  }
  Choice found{0, -kInfinity};
  for (int i = 0; i < kLanes; ++i)
    if (best[i] > found.perturbed || (best[i] == found.perturbed && place[i] < found.place))
      found = {place[i], best[i]};
  return found;
}

// For each query the log-sum-exp of all blocks; for each of its samples the group, its perturbed log-mass and its
// blocks.
void choose_groups(const Level& level, const float* blocks, int64_t queries, int64_t count, const int64_t* noise_rows,
                   int64_t samples, int64_t first_group, int64_t width, int64_t* group, float* perturbed,
                   float* log_normalizer, float* of_group) {
  const int64_t groups = (count + width - 1) / width;
  Failure failure;
#pragma omp parallel for schedule(static) if (queries * (count + kVariateCost * samples * groups) > kWorthThreads)
  for (int64_t query = 0; query < queries; ++query)
    failure.attempt([&] {
      const float* of_query = blocks + query * count;
      const int64_t padded = (groups + kLanes - 1) / kLanes * kLanes;
      std::vector<float> masses(padded), totals(padded);
      for (int64_t i = 0; i < groups; ++i) {
        const Sum sum = sum_of(of_query + i * width, std::min(width, count - i * width));
        masses[i] = sum.shift, totals[i] = sum.total;
      }
      for (int64_t i = 0; i < padded; i += kLanes)
        store(masses.data() + i, logarithm_of(load(masses.data() + i), load(totals.data() + i)));
      log_normalizer[query] = logsumexp_of(masses.data(), groups);
      for (int64_t at = query * samples; at < (query + 1) * samples; ++at) {
        const Choice found = choose(level, noise_rows[at], first_group, masses.data(), groups);
        group[at] = first_group + found.place;
        perturbed[at] = found.perturbed;
        float* to = of_group + at * width;
        const int64_t first = found.place * width, end = std::min(first + width, count);
        std::fill(std::copy(of_query + first, of_query + end, to), to + width, -kInfinity);
      }
    });
  failure.raise();
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// out[4 i ... 4 i + 3] = uniform variates of the counters (quad[i], row[i], step, level).
void negcache_uniform(int64_t seed, int64_t step, const int64_t* row, const int64_t* quad, int64_t count, int64_t level,
                      float* out) {
#pragma omp parallel for schedule(static) if (4 * kVariateCost * count > kWorthThreads)
  for (int64_t i = 0; i < count; ++i) uniform_quad(seed, step, row[i], quad[i], level, out + kQuad * i);
}

// Of blocks[queries, count], `width` of which are a group: see `choose_groups` above.
int negcache_choose_groups(int64_t seed, int64_t step, int64_t level, const float* blocks, int64_t queries,
                           int64_t count, const int64_t* noise_rows, int64_t samples, int64_t first_group,
                           int64_t width, int64_t* group, float* perturbed, float* log_normalizer, float* of_group) {
  return guarded([&] {
    choose_groups({seed, step, level}, blocks, queries, count, noise_rows, samples, first_group, width, group,
                  perturbed, log_normalizer, of_group);
    return kDone;
  });
}

// child[i] = the number of the child chosen of parent[i], by the log-masses [count, width] of its children; score[i] =
// its log-mass.
void negcache_choose_children(int64_t seed, int64_t step, int64_t level, const float* log_mass,
                              const int64_t* noise_rows, const int64_t* parent, int64_t count, int64_t width,
                              int64_t* child, float* score) {
#pragma omp parallel for schedule(static) if (kVariateCost * count * width > kWorthThreads)
  for (int64_t i = 0; i < count; ++i) {
    const float* of_parent = log_mass + i * width;
    const Choice found = choose({seed, step, level}, noise_rows[i], parent[i] * width, of_parent, width);
    child[i] = parent[i] * width + found.place;
    score[i] = of_parent[found.place];
  }
}

}  // extern "C"
#pragma GCC visibility pop

}  // namespace negcache
