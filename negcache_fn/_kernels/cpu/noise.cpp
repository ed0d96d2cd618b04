// Choosing among places by their log-masses plus Gumbel noise.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blocks.h"
#include "failure.h"
#include "masses.h"
#include "philox.h"
#include "selection.h"
#include "vectors.h"

namespace negcache {
namespace {

constexpr int64_t kStrip = 4 * kLanes;  // variates made at a time
constexpr int64_t kVariateCost = 16;    // of one, in numbers read

// All that the noise of a level depends on, apart from row and column.
struct Level {
  int64_t seed, step, number;
};

// log(1 + x), for x > -1, to full relative precision: the second factor takes back the rounding of the sum (Kahan).
inline Floats log1p(Floats x) {
  const Floats sum = 1.0f + x;
  return sum == 1.0f ? x : logarithm(sum) * (x / (sum - 1.0f));
}

// Calls `use(i, noisy)` with log-masses plus Gumbel noise, of the places i ... i + kLanes - 1 of `count`; behind them
// the sums are -inf. The noise is of the columns `column ...` of a row.
template <typename Use>
inline void perturb(const Level& level, int64_t row, int64_t column, const float* log_mass, int64_t count, Use use) {
  const Ints lane = lane_numbers();
  for (int64_t first = 0; first < count; first += kStrip) {
    const int64_t from = column + first, skipped = from % kQuad, here = std::min(kStrip, count - first);
    float uniforms[kStrip + kQuad + kLanes] = {};
    for (int64_t i = 0; i < skipped + here; i += kQuad)
      uniform_quad(level.seed, level.step, row, from / kQuad + i / kQuad, level.number, uniforms + i);
    for (int64_t i = 0; i < here; i += kLanes) {
      const Floats noise = -logarithm(-log1p(-load(uniforms + skipped + i)));
      const Floats noisy = load(log_mass + first + i, here - i) + noise;
      use(first + i, lane < (int32_t)(here - i) ? noisy : splat(-kInfinity));
    }
  }
}

struct Choice {
  int64_t place;
  float perturbed;
};

// The place of the largest of the sums of `perturb`, ties to the first, and that sum; 0 and -inf if there is none.
Choice choose(const Level& level, int64_t row, int64_t column, const float* log_mass, int64_t count) {
  Floats best = splat(-kInfinity);
  Ints place = {};
  perturb(level, row, column, log_mass, count, [&](int64_t first, Floats noisy) {
    const Ints better = noisy > best;
    best = better ? noisy : best;
    place = better ? lane_numbers() + (int32_t)first : place;
  });
  Choice found{0, -kInfinity};
  for (int i = 0; i < kLanes; ++i)
    if (best[i] > found.perturbed || (best[i] == found.perturbed && place[i] < found.place))
      found = {place[i], best[i]};
  return found;
}

// The log-sum-exp of every `width` of `count` log-masses.
std::vector<float> masses_of_groups(const float* log_mass, int64_t count, int64_t width) {
  const int64_t groups = (count + width - 1) / width, padded = (groups + kLanes - 1) / kLanes * kLanes;
  std::vector<float> masses(padded), totals(padded);
  for (int64_t i = 0; i < groups; ++i) {
    const Sum sum = sum_of(log_mass + i * width, std::min(width, count - i * width));
    masses[i] = sum.shift, totals[i] = sum.total;
  }
  for (int64_t i = 0; i < padded; i += kLanes)
    store(masses.data() + i, logarithm_of(load(masses.data() + i), load(totals.data() + i)));
  return masses;
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
      const std::vector<float> masses = masses_of_groups(of_query, count, width);
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

// The `keep` groups of largest perturbed log-mass, ascending, with that and their blocks.
void largest_groups(const Level& level, const float* blocks, int64_t groups, int64_t width, int64_t noise_row,
                    int64_t first_group, int64_t keep, int64_t* group, float* perturbed, float* of_group) {
  const std::vector<float> masses = masses_of_groups(blocks, groups * width, width);
  std::vector<float> noisy(masses.size());
  perturb(level, noise_row, first_group, masses.data(), groups,
          [&](int64_t first, Floats sums) { store(noisy.data() + first, sums); });
  places_of_largest(noisy.data(), groups, keep, group);
  for (int64_t i = 0; i < keep; ++i) {
    perturbed[i] = noisy[group[i]];
    std::copy(blocks + group[i] * width, blocks + (group[i] + 1) * width, of_group + i * width);
    group[i] += first_group;
  }
}

// Perturbed log-masses, changed so that the largest of them is `most`: see `_given_maximum` in _draws/choose.py.
void give_maximum(float most, int64_t count, float* perturbed) {
  const float largest = *std::max_element(perturbed, perturbed + count);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats noisy = load(perturbed + i), below = noisy - largest;
    const Floats difference = most - noisy + logarithm(1.0f - exponential(below));
    const Floats size = difference < 0.0f ? -difference : difference;
    const Floats softplus = maximum(difference, Floats{}) + log1p(exponential(-size));
    const Floats given = below == 0.0f ? splat(most) : most - softplus;
    store(perturbed + i, noisy == -kInfinity ? noisy : given);
  }
}

// The `keep` children of largest perturbed log-mass, ascending: their numbers, that and their log-mass, of `parents`
// numbers, their perturbed log-masses, and the log-masses [parents, width] of their children.
void largest_children(const Level& level, const float* log_mass, int64_t parents, int64_t width, int64_t noise_row,
                      const int64_t* parent, const float* maximum, int64_t keep, int64_t* child, float* perturbed,
                      float* mass) {
  std::vector<float> noisy(parents * width);
#pragma omp parallel for schedule(static) if (2 * kVariateCost * parents * width > kWorthThreads)
  for (int64_t i = 0; i < parents; ++i) {
    float* to = noisy.data() + i * width;
    perturb(level, noise_row, parent[i] * width, log_mass + i * width, width,
            [&](int64_t first, Floats sums) { store(to + first, sums); });
    give_maximum(maximum[i], width, to);
  }
  places_of_largest(noisy.data(), parents * width, keep, child);
  for (int64_t i = 0; i < keep; ++i) {
    const int64_t place = child[i];
    perturbed[i] = noisy[place];
    mass[i] = log_mass[place];
    child[i] = parent[place / width] * width + place % width;
  }
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

// Of blocks[groups, width]: see `largest_groups` above.
int negcache_largest_groups(int64_t seed, int64_t step, int64_t level, const float* blocks, int64_t groups,
                            int64_t width, int64_t noise_row, int64_t first_group, int64_t keep, int64_t* group,
                            float* perturbed, float* of_group) {
  return guarded([&] {
    largest_groups({seed, step, level}, blocks, groups, width, noise_row, first_group, keep, group, perturbed,
                   of_group);
    return kDone;
  });
}

// See `largest_children` above; `width` is a whole number of vectors.
int negcache_largest_children(int64_t seed, int64_t step, int64_t level, const float* log_mass, int64_t parents,
                              int64_t width, int64_t noise_row, const int64_t* parent, const float* maximum,
                              int64_t keep, int64_t* child, float* perturbed, float* mass) {
  return guarded([&] {
    largest_children({seed, step, level}, log_mass, parents, width, noise_row, parent, maximum, keep, child, perturbed,
                     mass);
    return kDone;
  });
}

}  // extern "C"
#pragma GCC visibility pop

}  // namespace negcache
