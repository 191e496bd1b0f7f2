// Verifies drafts, and keeps those that the full model chooses.
#include "generation/speculation.hpp"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <string>
#include <utility>

#include "dynexport/error.hpp"
#include "execution/checks.hpp"
#include "generation/ngram_drafts.hpp"

namespace dynexport {
namespace {

// A table always has a draft, whose probability is never quite right: they must promise so many times the speed.
constexpr double kLeastGainOfTable = 1.05;

using Seconds = std::chrono::duration<double>;

double since(std::chrono::steady_clock::time_point begun) {
  return Seconds(std::chrono::steady_clock::now() - begun).count();
}

// Whether one graph decodes in any layers, and no router decides on them.
bool runs_any_layers(const Manifest& manifest) {
  if (!std::holds_alternative<std::monostate>(manifest.routing)) return false;
  for (const Program& program : manifest.programs)
    if (program.phase == Phase::kDecode && !program.depth && program.graph)
      return manifest.graph(*program.graph).takes("layer_active");
  return false;
}

Depth depth_of_layers(const Manifest& manifest, const std::vector<std::int64_t>& keep) {
  for (const Depth& depth : manifest.depths)
    if (depth.keep == keep) return depth;
  if (!runs_any_layers(manifest))
    throw Error("drafting: expected the layers of a depth, as no graph of the bundle chooses layers, found " +
                listed(keep));
  Depth own;
  own.name = "draft";
  own.keep = keep;
  own.prompt = manifest.full().prompt;
  return own;
}

}  // namespace

void Speculation::check() const { checked_count("speculate", most, 1, kMostDrafts); }

Speculation Speculation::of(const Manifest& manifest) {
  Speculation result;
  if (!manifest.drafting) return result;
  result.most = manifest.drafting->most;
  if (manifest.drafting->keep) result.depth = depth_of_layers(manifest, *manifest.drafting->keep);
  return result;
}

Speculator::Speculator(Executor& executor, const Speculation& speculation)
    : executor_(executor),
      most_(speculation.most),
      always_(speculation.always),
      by_depth_(speculation.depth.has_value()),
      usual_(by_depth_ ? kHopedOfDepth : kHopedOfLookup) {
  speculation.check();
  if (executor.limits().compete)
    throw Error(executor.bundle().path().string() +
                ": speculate: expected a model whose tokens do not depend on the others of a call, found one whose "
                "tokens compete for a layer's places");
  if (!speculation.depth) {
    auto table = NgramTable::of_bundle(executor.bundle());
    if (table) {
      drafter_ = std::make_unique<NgramLookup>(std::move(table));
    } else {
      drafter_ = std::make_unique<PromptLookup>();
    }
    return;
  }
  draft_share_ =
      static_cast<double>(speculation.depth->keep.size()) / static_cast<double>(executor.manifest().model.layers);
  drafter_ = std::make_unique<ShallowDepth>(executor, *speculation.depth);
}

void Speculator::step(KvCache& cache, Rows& rows) {
  engine_seconds_ = 0;
  const std::vector<Counts> found = drafts(cache, rows);
  const auto none = [](const Counts& of_row) { return of_row.empty(); };
  if (!std::all_of(found.begin(), found.end(), none)) {
    try {
      verify(cache, rows, found);
      learn(rows, found);
      return;
    } catch (const RouteError&) {  // of a draft perhaps, which would never have run
    }
  }
  verify_one_each(cache, rows);
  learn(rows, std::vector<Counts>(rows.size()));
}

// Learns how many drafts of each row were accepted.
void Speculator::learn(const Rows& rows, const std::vector<Counts>& drafts) {
  for (std::size_t place = 0; place < rows.size(); ++place)
    if (!rows[place].error)
      usual_.add(static_cast<std::int64_t>(drafts[place].size()),
                 static_cast<std::int64_t>(rows[place].pieces.size()) - 1);
}

// How many tokens to draft for each row, which may have those of its proposal at most.
std::int64_t Speculator::count(const Proposals& proposals) const {
  std::vector<std::vector<double>> chances;
  std::size_t most = 0;
  double least_gain = 1;
  for (const Proposal& each : proposals) {
    chances.push_back(each.chances);
    most = std::max(most, each.chances.size());
    if (each.foreseen) least_gain = kLeastGainOfTable;
  }
  return always_ ? static_cast<std::int64_t>(most) : best_count(chances, calls_, draft_share_, least_gain);
}

std::vector<Counts> Speculator::drafts(KvCache& cache, Rows& rows) {
  Counts limits;
  for (SpeculatedRow& row : rows) {
    row.foreseen = false;
    const std::int64_t room = std::min(row.request->left() - 1, cache.tokens() - cache.position(row.row) - 1);
    limits.push_back(std::max<std::int64_t>(0, std::min({most_, row.most_drafts, room})));
  }
  std::vector<Counts> none(rows.size());
  // A call of several tokens would run the rows one by one.
  if (rows.size() > 1 && executor_.limits().together != Together::kAlways && !always_) return none;
  const Proposals proposals = drafter_->proposals(rows, limits);
  const std::int64_t most = count(proposals);
  if (most == 0) return none;
  Counts counts;
  for (std::size_t place = 0; place < rows.size(); ++place) {
    counts.push_back(std::min(most, static_cast<std::int64_t>(proposals[place].chances.size())));
    rows[place].foreseen = proposals[place].foreseen;
  }
  const auto begun = std::chrono::steady_clock::now();
  std::vector<Counts> found = drafter_->drafts(cache, rows, proposals, counts);
  const double seconds = since(begun);
  engine_seconds_ += seconds;
  const double plain = calls_.of(static_cast<std::int64_t>(rows.size()));
  if (plain > 0) draft_share_ += kLatest * (seconds / static_cast<double>(most) / plain - draft_share_);
  return found;
}

// Runs each row's latest token and its drafts, and keeps the drafts that are chosen.
void Speculator::verify(KvCache& cache, Rows& rows, const std::vector<Counts>& drafts) {
  Batch batch;
  batch.phase = Phase::kDecode;
  batch.wanted = Wanted::kAll;
  std::vector<Mark> marks;
  std::size_t longest = 0;
  for (std::size_t place = 0; place < rows.size(); ++place) {
    marks.push_back(cache.mark(rows[place].row));
    batch.rows.push_back(rows[place].row);
    batch.depths.push_back(rows[place].request->depth());
    Counts& tokens = batch.tokens.emplace_back(Counts{rows[place].token});
    tokens.insert(tokens.end(), drafts[place].begin(), drafts[place].end());
    longest = std::max(longest, tokens.size());
  }
  const auto begun = std::chrono::steady_clock::now();
  const StepResult result = executor_.run(cache, batch);
  const double seconds = since(begun);
  engine_seconds_ += seconds;
  calls_.add(static_cast<std::int64_t>(rows.size() * longest), seconds);
  for (std::size_t place = 0; place < rows.size(); ++place)
    take(rows[place], result.logits[place].data(), executor_.manifest().model.vocab_size, drafts[place]);
  for (std::size_t place = 0; place < rows.size(); ++place) {
    const std::size_t kept = rows[place].pieces.size();
    Counts& ran = batch.tokens[place];
    if (rows[place].error || kept >= ran.size()) continue;
    ran.resize(kept);
    const Decisions* decided = result.decisions.empty() ? nullptr : &result.decisions[place];
    executor_.keep_first(cache, marks[place], ran, batch.depths[place], decided);
  }
}

void Speculator::verify_one_each(KvCache& cache, Rows& rows) {
  Counts its_rows, tokens;
  std::vector<Depth> depths;
  for (const SpeculatedRow& row : rows) {
    its_rows.push_back(row.row);
    tokens.push_back(row.token);
    depths.push_back(row.request->depth());
  }
  const auto begun = std::chrono::steady_clock::now();
  const float* logits = executor_.decode(cache, its_rows, tokens, depths);
  const double seconds = since(begun);
  engine_seconds_ += seconds;
  calls_.add(static_cast<std::int64_t>(rows.size()), seconds);
  for (SpeculatedRow& row : rows) {
    take(row, logits, executor_.manifest().model.vocab_size, {});
    logits += executor_.manifest().model.vocab_size;
  }
}

Speculators::Lent Speculators::lend(Executor& executor, const Speculation& speculation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto same = [&speculation](const auto& idle) {
    const Speculation& its = idle.first;
    const bool by_same =
        its.depth ? speculation.depth && its.depth->keep == speculation.depth->keep : !speculation.depth;
    return its.most == speculation.most && its.always == speculation.always && by_same;
  };
  const auto found = std::find_if(idle_.begin(), idle_.end(), same);
  std::unique_ptr<Speculator> speculator;
  if (found == idle_.end()) {
    speculator = std::make_unique<Speculator>(executor, speculation);
  } else {
    speculator = std::move(found->second);
    idle_.erase(found);
  }
  return {speculator.release(), [this, speculation](Speculator* used) {
            std::unique_ptr<Speculator> idle(used);
            const std::lock_guard<std::mutex> locked(mutex_);
            idle_.emplace_back(speculation, std::move(idle));
          }};
}

void take(SpeculatedRow& row, const float* logits, std::int64_t vocabulary, const Counts& drafts) {
  row.pieces.clear();
  row.error = nullptr;
  try {
    for (std::size_t place = 0; place <= drafts.size(); ++place) {
      Piece piece = row.request->push(row.request->choose(logits));
      logits += vocabulary;
      if (place < drafts.size()) piece.draft = drafts[place];
      const bool ends = piece.finish || piece.draft != piece.token;
      row.known->push(piece.token);
      row.token = piece.token;
      row.pieces.push_back(std::move(piece));
      if (ends) break;
    }
  } catch (const Error&) {
    row.error = std::current_exception();
    return;
  }
  const auto count = static_cast<std::int64_t>(row.pieces.size());
  row.acceptance->add(static_cast<std::int64_t>(drafts.size()), count - 1, row.foreseen);
}

}  // namespace dynexport
