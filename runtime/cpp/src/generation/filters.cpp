// Filters of a distribution, and draws.
#include "generation/filters.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

namespace dynexport {
namespace {

// Shorter rows are computed in float64, which is as fast for them.
constexpr std::size_t kShort = 4096;
// top_p searches first among tokens with at least 1/4096, then 1/16384, of the probability that it leaves out.
constexpr std::array<double, 2> kParts = {4096, 16384};
// The second search pays if the first one found at least this share of top_p.
constexpr double kNearly = 0.9;
// Float32 can divide by temperatures in this range.
constexpr double kColdest = 1e-6, kHottest = 1e6;
// Values that are sorted first when the shortest prefix with some weight is searched.
constexpr std::size_t kFirstSorted = 128;

// Some tokens of a row with their weights, ids ascending.
struct Weighted {
  Ids ids;
  std::vector<double> weights;

  template <typename Keeps>
  void keep(const Keeps& keeps) {
    std::size_t kept = 0;
    for (std::size_t place = 0; place < ids.size(); ++place) {
      if (!keeps(place)) continue;
      ids[kept] = ids[place];
      weights[kept++] = weights[place];
    }
    ids.resize(kept);
    weights.resize(kept);
  }

  double total() const { return std::accumulate(weights.begin(), weights.end(), 0.0); }
  void normalize() {
    const double sum = total();
    for (double& weight : weights) weight /= sum;
  }
};

Ids all_ids(std::size_t size) {
  Ids ids(size);
  std::iota(ids.begin(), ids.end(), 0U);
  return ids;
}

// Sorts places by ``before`` as far as needed for their weights to reach ``wanted``. Returns the index of the place
// that reaches it, or the last one. There is at least one place.
template <typename Before>
std::size_t reach(Ids& places, const std::vector<double>& weights, double wanted, const Before& before) {
  double sum = 0.0;
  std::size_t sorted = 0;
  for (std::size_t part = kFirstSorted; sorted < places.size(); part *= 8) {
    const std::size_t end = std::min(places.size(), part);
    const auto first = places.begin() + static_cast<std::ptrdiff_t>(sorted);
    const auto last = places.begin() + static_cast<std::ptrdiff_t>(end);
    if (end < places.size()) std::nth_element(first, last, places.end(), before);
    std::sort(first, last, before);
    for (; sorted < end; ++sorted) {
      sum += weights[places[sorted]];
      if (sum >= wanted) return sorted;
    }
  }
  return places.size() - 1;
}

// Keeps the fewest most probable tokens whose weights reach ``wanted``; lower ids win ties.
void keep_smallest_set(Weighted& tokens, double wanted) {
  Ids places = all_ids(tokens.ids.size());
  const auto before = [&](std::uint32_t left, std::uint32_t right) {
    const double of_left = tokens.weights[left], of_right = tokens.weights[right];
    return of_left != of_right ? of_left > of_right : left < right;
  };
  const std::uint32_t edge = places[reach(places, tokens.weights, wanted, before)];
  tokens.keep([&, weight = tokens.weights[edge]](std::size_t place) {
    return tokens.weights[place] > weight || (tokens.weights[place] == weight && place <= edge);
  });
}

// Keeps the tokens nearest to the entropy that reach ``mass`` (Meister et al. 2022).
void keep_typical(Weighted& tokens, double mass) {
  std::vector<double> probabilities = tokens.weights, distances(tokens.ids.size());
  const double sum = tokens.total();
  double entropy = 0.0;
  for (std::size_t place = 0; place < distances.size(); ++place) {
    probabilities[place] /= sum;
    distances[place] = -std::log(probabilities[place]);
    if (probabilities[place] > 0) entropy += distances[place] * probabilities[place];
  }
  for (double& distance : distances) distance = std::abs(distance - entropy);
  Ids places = all_ids(tokens.ids.size());
  const auto before = [&](std::uint32_t left, std::uint32_t right) {
    return distances[left] != distances[right] ? distances[left] < distances[right] : left < right;
  };
  const double farthest = distances[places[reach(places, probabilities, mass, before)]];
  tokens.keep([&](std::size_t place) { return distances[place] <= farthest; });
}

// Returns a superset of the ids of the ``count`` largest logits and their ties, ascending; ``count`` is below the size.
Ids reaching(Row row, std::size_t count) {
  // At least count tokens reach the count-th largest of the largest logits of groups, and rarely many more.
  const std::size_t groups = row.size / kBlock;
  std::vector<float> largest(row.values, row.values + row.size);
  if (count <= groups / 2) {
    largest.resize(groups);
    for (std::size_t start = groups; start + groups <= groups * kBlock; start += groups) {
      for (std::size_t group = 0; group < groups; ++group) {
        largest[group] = std::max(largest[group], row.values[start + group]);
      }
    }
  }
  const auto nth = largest.begin() + static_cast<std::ptrdiff_t>(count) - 1;
  std::nth_element(largest.begin(), nth, largest.end(), std::greater<>());
  Ids ids;
  for (std::size_t place = 0; place < row.size; ++place) {
    if (row[place] >= *nth) ids.push_back(static_cast<std::uint32_t>(place));
  }
  return ids;
}

// Returns the filtered distribution of a row's token, computed in float64, normalized over the tokens that top_k keeps.
Weighted distribution(Row row, const Sampling& sampling) {
  const bool all = sampling.top_k == 0 || static_cast<std::uint64_t>(sampling.top_k) >= row.size;
  Weighted tokens{all ? all_ids(row.size) : largest_ids(row, static_cast<std::size_t>(sampling.top_k)), {}};
  std::sort(tokens.ids.begin(), tokens.ids.end());
  double most = -std::numeric_limits<double>::infinity();
  for (const std::uint32_t id : tokens.ids) most = std::max(most, static_cast<double>(row[id]));
  tokens.weights.reserve(tokens.ids.size());
  for (const std::uint32_t id : tokens.ids) {
    tokens.weights.push_back(std::exp((static_cast<double>(row[id]) - most) / sampling.temperature));
  }
  tokens.normalize();
  if (sampling.top_p < 1) keep_smallest_set(tokens, sampling.top_p);
  if (sampling.min_p > 0) {
    const double least = sampling.min_p * *std::max_element(tokens.weights.begin(), tokens.weights.end());
    tokens.keep([&](std::size_t place) { return tokens.weights[place] >= least; });
  }
  if (sampling.typical_p < 1) keep_typical(tokens, sampling.typical_p);
  return tokens;
}

// Returns the token whose cumulative share exceeds ``uniform``.
std::int64_t pick(const Weighted& tokens, double uniform) {
  std::vector<double> cumulative(tokens.weights.size());
  std::partial_sum(tokens.weights.begin(), tokens.weights.end(), cumulative.begin());
  for (double& share : cumulative) share /= cumulative.back();  // the last is then exactly 1, above every draw
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), uniform);
  return tokens.ids[std::min(static_cast<std::size_t>(found - cumulative.begin()), tokens.ids.size() - 1)];
}

// As pick, of all tokens of a row; the search is by block, then inside it.
std::int64_t draw_from_all(const std::vector<float>& weights, double uniform) {
  std::vector<double> cumulative = block_sums(weights);
  std::partial_sum(cumulative.begin(), cumulative.end(), cumulative.begin());
  const double total = cumulative.back();
  for (double& share : cumulative) share /= total;
  const auto found = std::upper_bound(cumulative.begin(), cumulative.end() - 1, uniform);
  const auto block = static_cast<std::size_t>(found - cumulative.begin());
  const double before = block == 0 ? 0.0 : cumulative[block - 1];
  std::array<double, kBlock> inside{};
  double sum = 0.0;
  for (std::size_t place = 0; place < kBlock; ++place) inside[place] = sum += weights[block * kBlock + place];
  // Rounding can put the target at or beyond the block's end; the block's last token is right then.
  const double target = std::min((uniform - before) * total, std::nextafter(inside.back(), 0.0));
  const auto place = std::upper_bound(inside.begin(), inside.end(), target) - inside.begin();
  return static_cast<std::int64_t>(block * kBlock) + place;
}

// Returns the tokens of at least some weight.
Weighted at_least(const std::vector<float>& weights, std::size_t size, double least) {
  Weighted found;
  for (std::size_t place = 0; place < size; ++place) {
    if (weights[place] < least) continue;
    found.ids.push_back(static_cast<std::uint32_t>(place));
    found.weights.push_back(weights[place]);
  }
  return found;
}

std::int64_t draw_top_p(Row row, float largest, const Sampling& sampling, double uniform) {
  const std::vector<float> weights = weights_of(row, largest, static_cast<float>(sampling.temperature));
  const std::vector<double> sums = block_sums(weights);
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0), wanted = sampling.top_p * total;
  const auto drawn = [&](Weighted tokens) {
    keep_smallest_set(tokens, wanted);
    // The largest weight is 1.
    if (sampling.min_p > 0) tokens.keep([&](std::size_t place) { return tokens.weights[place] >= sampling.min_p; });
    return pick(tokens, uniform);
  };
  for (const double parts : kParts) {
    Weighted tokens = at_least(weights, row.size, (total - wanted) / parts);
    const double found = tokens.total();
    if (found > wanted) return drawn(std::move(tokens));
    if (found < kNearly * wanted) break;
  }
  return drawn(at_least(weights, row.size, 0.0));  // rare: most of the vocabulary is needed
}

// Draws with min_p alone, a threshold on logits: a few more tokens are taken, and ``distribution`` decides near it.
std::int64_t draw_min_p(Row row, float largest, const Sampling& sampling, double uniform) {
  const double edge = static_cast<double>(largest) + sampling.temperature * std::log(sampling.min_p);
  const double least = edge - 1e-5 * (1 + std::abs(edge));
  Ids near;
  std::vector<float> values;
  for (std::size_t place = 0; place < row.size; ++place) {
    if (row[place] < least) continue;
    near.push_back(static_cast<std::uint32_t>(place));
    values.push_back(row[place]);
  }
  return near[static_cast<std::size_t>(pick(distribution({values.data(), values.size()}, sampling), uniform))];
}

}  // namespace

std::int64_t draw(Row row, float largest, const Sampling& sampling, double uniform) {
  const bool extreme = sampling.temperature < kColdest || sampling.temperature > kHottest;
  if (row.size < kShort || sampling.top_k > 0 || sampling.typical_p < 1 || extreme) {
    return pick(distribution(row, sampling), uniform);
  }
  if (sampling.top_p < 1) return draw_top_p(row, largest, sampling, uniform);
  if (sampling.min_p > 0) return draw_min_p(row, largest, sampling, uniform);
  return draw_from_all(weights_of(row, largest, static_cast<float>(sampling.temperature)), uniform);
}

Ids largest_ids(Row row, std::size_t count) {
  if (count == 0) return {};
  Ids ids = count >= row.size ? all_ids(row.size) : reaching(row, count);
  const auto before = [&](std::uint32_t left, std::uint32_t right) {
    return row[left] != row[right] ? row[left] > row[right] : left < right;
  };
  const std::size_t kept = std::min(count, ids.size());
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(kept), ids.end(), before);
  ids.resize(kept);
  return ids;
}

}  // namespace dynexport
