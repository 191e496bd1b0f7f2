// The routers' decisions for tokens, as Python's runtime/execution/decisions.py.
#include "execution/decisions.hpp"

#include <algorithm>
#include <cmath>

#include "dynexport/error.hpp"
#include "execution/arrays.hpp"

namespace dynexport {
namespace {

using Longs = std::vector<std::int64_t>;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

// Appends columns to a matrix [rows, width] that is stored row by row.
template <typename T>
void append(std::vector<T>& all, const std::vector<T>& more, std::int64_t rows, std::int64_t width,
            std::int64_t added) {
  std::vector<T> joined;
  joined.reserve(all.size() + more.size());
  for (std::int64_t row = 0; row < rows; ++row) {
    joined.insert(joined.end(), all.begin() + row * width, all.begin() + (row + 1) * width);
    joined.insert(joined.end(), more.begin() + row * added, more.begin() + (row + 1) * added);
  }
  all = std::move(joined);
}

}  // namespace

// The outputs of a call, [R, B, S].
struct DecisionReader::Values {
  Longs choices;
  const float* scores = nullptr;
  const float* margins = nullptr;
};

void refuse_nan_in_hop(std::int64_t hop, std::int64_t row, std::int64_t position) {
  throw Error("hop " + std::to_string(hop) + ": row " + std::to_string(row) + ", position " + std::to_string(position) +
              ": expected router scores, found NaN or infinity; the hidden states before it overflow");
}

DecisionReader::DecisionReader(const Manifest& manifest)
    : manifest_(manifest),
      layers_(std::get_if<LayerRouting>(&manifest.routing)),
      paths_(std::get_if<PathRouting>(&manifest.routing)) {
  if (layers_ != nullptr) rows_ = overflows_ = layers_->decisions();
  if (paths_ != nullptr) {
    rows_ = paths_->hops;
    overflows_ = 1;
  }
}

std::vector<std::string> DecisionReader::outputs() const {
  if (layers_ != nullptr) return {"routes", "route_scores", "route_margins", "overflow"};
  if (paths_ != nullptr) return {"paths", "path_scores", "path_margins"};
  return {};
}

void DecisionReader::check_forced(const Longs& forced, std::int64_t tokens) const {
  const std::int64_t layers = manifest_.model.layers, most = paths_ == nullptr ? 1 : layers - (paths_->exit ? 0 : 1);
  for (std::size_t i = 0; i < forced.size(); ++i) {
    if (forced[i] >= -1 && forced[i] <= most) continue;
    if (paths_ == nullptr)
      throw Error("forced: expected 1 to run, 0 to skip or -1 to leave it to the router, found " +
                  std::to_string(forced[i]));
    throw Error("forced path: hop " + std::to_string(static_cast<std::int64_t>(i) / std::max<std::int64_t>(tokens, 1)) +
                ": expected a layer 0.." + std::to_string(layers - 1) +
                (paths_->exit ? ", " + std::to_string(layers) + " to leave" : "") + " or -1, found " +
                std::to_string(forced[i]));
  }
}

Decisions DecisionReader::joined(const std::vector<Decisions>& parts) const {
  Decisions all;
  all.rows = rows_;
  all.overflow.assign(at(overflows_), 0);
  for (const Decisions& part : parts) {
    append(all.ran, part.ran, manifest_.model.layers, all.tokens, part.tokens);
    append(all.choices, part.choices, rows_, all.tokens, part.tokens);
    append(all.scores, part.scores, rows_, all.tokens, part.tokens);
    append(all.margins, part.margins, rows_, all.tokens, part.tokens);
    all.tokens += part.tokens;
    for (std::size_t i = 0; i < part.overflow.size(); ++i) all.overflow[i] += part.overflow[i];
  }
  return all;
}

Read DecisionReader::read(Binding& binding, const Graph& graph, const ReadFor& of) const {
  const auto rows = static_cast<std::int64_t>(of.counts.size());
  const Longs shape{rows_, rows, of.tokens};
  const std::vector<std::string> names = outputs();
  Values values;
  const Tensor choices = result_of(binding, graph, names[0], layers_ != nullptr ? Type::kBool : Type::kInt64, shape);
  if (layers_ != nullptr)
    values.choices.assign(choices.as<std::uint8_t>(), choices.as<std::uint8_t>() + choices.elements());
  else
    values.choices.assign(choices.as<std::int64_t>(), choices.as<std::int64_t>() + choices.elements());
  values.scores = result_of(binding, graph, names[1], Type::kFloat, shape).as<float>();
  values.margins = result_of(binding, graph, names[2], Type::kFloat, shape).as<float>();
  Longs overflow(at(overflows_ * rows));
  if (binding.has_result("overflow")) {
    const Tensor told = result_of(binding, graph, "overflow", Type::kInt64, {overflows_, rows});
    std::copy_n(told.as<std::int64_t>(), overflow.size(), overflow.begin());
    for (const std::int64_t count : overflow)
      if (count < 0 || count > rows_ * of.tokens)
        throw Error(graph.file + ": overflow: expected numbers of tokens, found " + std::to_string(count));
  }
  check_scores(values, of);
  check_overflow(overflow, of);
  Read found{entries(values.choices, of), {}};
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t start = row * of.tokens;
    found.decisions.push_back(of_row(values.choices.data() + start, values.scores + start, values.margins + start,
                                     rows * of.tokens, of.counts[at(row)], of.active));
    for (std::int64_t i = 0; i < overflows_; ++i) found.decisions.back().overflow[at(i)] = overflow[at(i * rows + row)];
  }
  return found;
}

Decisions DecisionReader::of_row(const std::int64_t* choices, const float* scores, const float* margins,
                                 std::int64_t step, std::int64_t tokens,
                                 const std::vector<std::uint8_t>& active) const {
  Decisions made = layers_ != nullptr ? unrouted(active, tokens) : unrouted({}, tokens);
  made.rows = rows_;
  made.overflow.assign(at(overflows_), 0);
  made.ran.resize(at(manifest_.model.layers * tokens));
  for (std::int64_t place = 0; place < rows_; ++place) {
    made.choices.insert(made.choices.end(), choices + place * step, choices + place * step + tokens);
    made.scores.insert(made.scores.end(), scores + place * step, scores + place * step + tokens);
    made.margins.insert(made.margins.end(), margins + place * step, margins + place * step + tokens);
    for (std::int64_t token = 0; token < tokens; ++token) {
      const std::int64_t choice = choices[place * step + token];
      for (std::int64_t more = 0; layers_ != nullptr && more < layers_->span; ++more) {
        if (layers_->skipped_kv == SkippedKv::kComputed) break;
        std::uint8_t& ran = made.ran[at((layers_->layer_of(place) + more) * tokens + token)];
        const bool first = place % static_cast<std::int64_t>(layers_->parts.size()) == 0;
        ran = choice == 1 || (!first && ran != 0) ? 1 : 0;
      }
      if (layers_ != nullptr) continue;
      if (choice >= 0 && choice < manifest_.model.layers) made.ran[at(choice * tokens + token)] = 1;
    }
  }
  return made;
}

Decisions DecisionReader::unrouted(const std::vector<std::uint8_t>& active, std::int64_t tokens) const {
  Decisions made;
  made.tokens = tokens;
  for (const std::uint8_t runs : active) made.ran.insert(made.ran.end(), at(tokens), runs);
  return made;
}

std::optional<Read> DecisionReader::first(const Decisions* decisions, std::int64_t tokens,
                                          const std::vector<std::uint8_t>& active) const {
  if (decisions == nullptr) {
    Read found;
    for (const std::uint8_t runs : active) found.entries.push_back(runs != 0 ? tokens : 0);
    found.decisions.push_back(unrouted(active, tokens));
    return found;
  }
  const auto counts = [](std::int64_t count) { return count != 0; };
  const bool mixed = paths_ != nullptr && paths_->places_are_layers;
  if (mixed || std::any_of(decisions->overflow.begin(), decisions->overflow.end(), counts)) return std::nullopt;
  Decisions kept = of_row(decisions->choices.data(), decisions->scores.data(), decisions->margins.data(),
                          decisions->tokens, tokens, active);
  const Longs one{tokens}, position{0};
  return Read{entries(kept.choices, {one, position, active, 0, tokens}), {std::move(kept)}};
}

Longs DecisionReader::layers_run(const Decisions& decisions) const {
  Longs found(at(decisions.tokens));
  for (std::size_t i = 0; paths_ != nullptr && i < decisions.choices.size(); ++i)
    found[i % found.size()] += decisions.choices[i] >= 0 && decisions.choices[i] < manifest_.model.layers ? 1 : 0;
  for (std::size_t i = 0; paths_ == nullptr && i < decisions.ran.size(); ++i)
    found[i % found.size()] += decisions.ran[i];
  return found;
}

Longs DecisionReader::entries(const Longs& choices, const ReadFor& of) const {
  const auto rows = static_cast<std::int64_t>(of.counts.size());
  Longs added(manifest_.caches.size() * at(rows));
  if (layers_ != nullptr)
    for (std::int64_t layer = 0; layer < manifest_.model.layers; ++layer)
      for (std::int64_t row = 0; row < rows; ++row)
        added[at(layer * rows + row)] = of.active[at(layer)] != 0 ? of.counts[at(row)] : 0;
  if (layers_ != nullptr && layers_->skipped_kv != SkippedKv::kNone) return added;
  if (layers_ != nullptr)
    for (const std::int64_t layer : layers_->layers) std::fill_n(added.begin() + layer * rows, rows * layers_->span, 0);
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(choices.size()); ++i) {
    const std::int64_t place = i / (rows * of.tokens), row = i / of.tokens % rows, choice = choices[at(i)];
    const bool first = layers_ != nullptr && place % static_cast<std::int64_t>(layers_->parts.size()) == 0;
    for (std::int64_t more = 0; first && more < layers_->span; ++more)
      added[at((layers_->layer_of(place) + more) * rows + row)] += choice != 0 ? 1 : 0;
    if (layers_ != nullptr) continue;
    if (choice >= 0 && choice < manifest_.model.layers)
      added[at((paths_->places_are_layers ? choice : place) * rows + row)] += 1;
  }
  return added;
}

void DecisionReader::check_scores(const Values& values, const ReadFor& of) const {
  const auto rows = static_cast<std::int64_t>(of.counts.size());
  for (std::int64_t i = 0; i < rows_ * rows * of.tokens; ++i) {
    const float score = values.scores[i];
    const bool bad = (paths_ != nullptr ? !std::isfinite(score) : std::isnan(score)) || std::isnan(values.margins[i]);
    const std::int64_t place = i / (rows * of.tokens), row = i / of.tokens % rows, token = i % of.tokens;
    if (!bad || token >= of.counts[at(row)]) continue;
    if (paths_ != nullptr) refuse_nan_in_hop(place, of.first + row, of.positions[at(row)] + token);
    throw Error("layer " + std::to_string(layers_->layer_of(place)) + ": row " + std::to_string(of.first + row) +
                ", token " + std::to_string(token) +
                ": expected a router score, found NaN; the hidden states before it overflow, look for the layer with: "
                "dynexport verify");
  }
}

void DecisionReader::check_overflow(const Longs& overflow, const ReadFor& of) const {
  if (layers_ == nullptr || !layers_->overflow_is_error) return;
  const auto found = std::find_if(overflow.begin(), overflow.end(), [](std::int64_t count) { return count != 0; });
  if (found == overflow.end()) return;
  const std::int64_t i = found - overflow.begin(), rows = static_cast<std::int64_t>(of.counts.size());
  const std::int64_t layer = layers_->layer_of(i / rows);
  const auto most = manifest_.caches.at(at(layer)).most;
  throw RouteError("layer " + std::to_string(layer) + ": row " + std::to_string(of.first + i % rows) + ": all " +
                   (most ? std::to_string(*most) : "None") +
                   " entries of its cache are used, and the contract's cache.overflow is error; convert with a larger "
                   "cache.capacity, or with residual");
}

}  // namespace dynexport
