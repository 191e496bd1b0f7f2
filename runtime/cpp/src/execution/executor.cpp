// The driver of every bundle, as Python's runtime/execution/executor.py.
#include "dynexport/executor.hpp"

#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>

#include "dynexport/error.hpp"
#include "execution/cache_state.hpp"
#include "execution/checking.hpp"
#include "execution/checks.hpp"
#include "execution/graph_set.hpp"
#include "execution/whole_step.hpp"

namespace dynexport {
namespace {

using Longs = std::vector<std::int64_t>;

std::size_t at(std::int64_t index) { return static_cast<std::size_t>(index); }

// The layers that run in a phase, [layers].
std::vector<std::uint8_t> mask_of(const Manifest& manifest, Phase phase, const Depth& depth) {
  std::vector<std::uint8_t> mask(at(manifest.model.layers));
  for (const std::int64_t layer : phase == Phase::kPrompt ? depth.prompt : depth.keep)
    mask[at(checked_count("depth: a kept layer", layer, 0, manifest.model.layers - 1))] = 1;
  return mask;
}

// A decode step of adjacent rows.
Call plain_call(std::int64_t first, const Longs& ids, std::int64_t decisions, std::vector<std::uint8_t> active) {
  const auto rows = static_cast<std::int64_t>(ids.size());
  Call call;
  call.first = first;
  call.rows = rows;
  call.tokens = call.asked = 1;
  call.ids = ids;
  call.counts.assign(ids.size(), 1);
  call.wanted.assign(ids.size(), 0);
  call.forced.assign(at(decisions * rows), -1);
  call.active = std::move(active);
  return call;
}

// Throws Error if one of some adjacent rows is free or has no room for another token.
void check_step(const KvCache::State& cache, const Longs& rows) {
  for (const std::int64_t row : rows) cache.check(row);
  for (const std::int64_t row : rows) cache.check_room(row, 1, false);
}

void collect(const std::vector<Slice>& pieces, const CallResult& result, std::int64_t first, std::int64_t vocabulary) {
  for (const Slice& piece : pieces) {
    Part& part = *piece.part;
    const std::int64_t row = part.row - first;
    const auto asked = static_cast<std::int64_t>(piece.wanted().size());
    const float* logits = result.logits + row * result.places * vocabulary;
    part.logits.insert(part.logits.end(), logits, logits + asked * vocabulary);
    if (!result.decisions.empty()) part.decisions.push_back(result.decisions[at(row)]);
    part.done += piece.count;
  }
}

}  // namespace

struct Executor::State {
  State(std::shared_ptr<const Bundle> of, const BackendOptions& options)
      : bundle(std::move(of)), backend(open_backend(bundle, options)), reader(bundle->manifest()) {}

  const Manifest& manifest() const { return bundle->manifest(); }

  // The loaded program of a phase and depth.
  Running& program(Phase phase, const Depth& depth) {
    const auto key = std::make_pair(phase, depth.name);
    {
      const std::shared_lock<std::shared_mutex> reading(known);
      const auto found = programs.find(key);
      if (found != programs.end()) return *found->second;
    }
    const std::lock_guard<std::mutex> lock(opening);
    auto found = programs.find(key);  // only this lock's holder writes
    if (found != programs.end()) return *found->second;
    std::unique_ptr<Running> made = opened(manifest().program(phase, depth));
    const std::unique_lock<std::shared_mutex> writing(known);
    return *(programs[key] = std::move(made));
  }

  void check(const KvCache::State& cache) const {
    if (cache.backend != backend) throw Error("cache: expected one of Executor::cache, found one of another executor");
  }

  // Runs rows at one depth, call by call.
  void run_at(KvCache::State& cache, const std::vector<Part*>& parts, const Depth& depth, const Batch& batch) {
    Running& running = program(batch.phase, depth);
    const std::vector<std::uint8_t> active = mask_of(manifest(), batch.phase, depth);
    Cutter(cache, manifest().limits, running.graph(), batch.chunk).each(parts, [&](const std::vector<Slice>& pieces) {
      const Call call = call_of(pieces, reader.rows(), active, batch.phase == Phase::kPrompt);
      const CallResult result = running.run(cache, call);
      cache.commit(call.first, call.counts, result.entries, result.decisions);
      collect(pieces, result, call.first, manifest().model.vocab_size);
    });
  }

  // A decode step of adjacent rows.
  const float* decode_plain(KvCache::State& cache, const Longs& rows, const Longs& tokens, const Depth& depth) {
    check_step(cache, rows);
    check_ids("tokens", tokens, manifest().model.vocab_size);
    std::int64_t longest = 0;
    for (const std::int64_t row : rows) longest = std::max(longest, cache.counts.position(row) + 1);
    cache.reserve(longest);
    const auto count = static_cast<std::int64_t>(rows.size());
    const bool again = cache.step.is(rows[0], count, depth);
    if (again && cache.step.bound) return cache.step.bound->run(cache, tokens);
    Running& running = program(Phase::kDecode, depth);
    const Call call = plain_call(rows[0], tokens, reader.rows(), mask_of(manifest(), Phase::kDecode, depth));
    const auto* whole = dynamic_cast<const WholeStep*>(&running);
    if (again && whole != nullptr && reader.rows() == 0 && !cache.logs) {
      cache.step.bound = std::make_unique<PlainStep>(*whole, cache, call);
      return cache.step.bound->run(cache, tokens);
    }
    AsItWas guard(cache, rows);
    CallResult result = running.run(cache, call);
    cache.commit(call.first, call.counts, result.entries, result.decisions);
    guard.keep();
    if (!again) cache.step = LatestStep{rows[0], count, depth, nullptr};
    if (result.own.empty()) return result.logits;
    cache.logits = std::move(result.own);
    return cache.logits.data();
  }

  std::shared_ptr<const Bundle> bundle;
  std::shared_ptr<Backend> backend;
  DecisionReader reader;

 private:
  std::unique_ptr<Running> opened(const Program& program) {
    if (!program.set) return std::make_unique<WholeStep>(manifest(), engine(*program.graph));
    SetEngines set;
    for (const std::string& name : program.set->names()) set[name] = engine(name);
    return std::make_unique<RunningSet>(manifest(), *program.set, set);
  }

  std::shared_ptr<Engine> engine(const std::string& name) {
    std::shared_ptr<Engine>& found = engines[name];
    if (!found) {
      bundle->check_unchanged();
      std::shared_ptr<Engine> made = backend->open(manifest().graph(name));
      bundle->check_unchanged();
      found = std::move(made);
    }
    return found;
  }

  std::mutex opening;
  std::shared_mutex known;
  std::map<std::string, std::shared_ptr<Engine>> engines;
  std::map<std::pair<Phase, std::string>, std::unique_ptr<Running>> programs;
};

Executor::Executor(std::shared_ptr<const Bundle> bundle, const BackendOptions& options)
    : state_(std::make_unique<State>(std::move(bundle), options)) {}

Executor::~Executor() = default;

const Bundle& Executor::bundle() const { return *state_->bundle; }

const Manifest& Executor::manifest() const { return state_->manifest(); }

const Limits& Executor::limits() const { return manifest().limits; }

std::int64_t Executor::decision_rows() const { return state_->reader.rows(); }

std::unique_ptr<KvCache> Executor::cache(std::int64_t rows, std::int64_t tokens, bool record,
                                         std::optional<std::int64_t> room) const {
  return std::make_unique<KvCache>(state_->bundle, state_->backend, rows, tokens, record, room);
}

StepResult Executor::run(KvCache& of, const Batch& batch) {
  KvCache::State& cache = of.state();
  state_->check(cache);
  const Claim::Held claim(cache.running);
  std::vector<Part> parts = checked_parts(cache, batch, state_->reader, bundle().path().string());
  std::int64_t longest = 0;
  std::vector<Longs> before;
  for (const Part& part : parts) {
    longest = std::max(longest, cache.counts.position(part.row) + part.left());
    before.push_back(cache.counts.lengths(part.row));
  }
  cache.reserve(longest);
  AsItWas guard(cache, batch.rows);
  for (const auto& [depth, group] : by_depth(parts, batch)) state_->run_at(cache, group, *depth, batch);
  StepResult result;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    Longs added = cache.counts.lengths(parts[i].row);
    for (std::size_t place = 0; place < added.size(); ++place) added[place] -= before[i][place];
    result.entries.push_back(std::move(added));
    result.logits.push_back(std::move(parts[i].logits));
    if (state_->reader.rows() > 0) result.decisions.push_back(state_->reader.joined(parts[i].decisions));
  }
  guard.keep();
  return result;
}

const float* Executor::decode(KvCache& of, const Longs& rows, const Longs& tokens, const std::vector<Depth>& depths) {
  KvCache::State& cache = of.state();
  state_->check(cache);
  if (rows.empty()) throw Error("rows: expected at least one, found none");
  if (is_plain(rows, tokens, depths)) {
    const Claim::Held claim(cache.running);
    return state_->decode_plain(cache, rows, tokens, depths.front());
  }
  Batch batch;
  batch.rows = rows;
  for (const std::int64_t token : tokens) batch.tokens.push_back({token});
  batch.phase = Phase::kDecode;
  batch.depths = depths;
  const StepResult result = run(of, batch);
  cache.logits.clear();
  for (const std::vector<float>& logits : result.logits)
    cache.logits.insert(cache.logits.end(), logits.begin(), logits.end());
  return cache.logits.data();
}

void Executor::keep_first(KvCache& of, const Mark& mark, const Longs& tokens, const Depth& depth,
                          const Decisions* decisions) {
  of.truncate(mark.row, mark);
  const auto active = mask_of(manifest(), Phase::kDecode, depth);
  const auto count = static_cast<std::int64_t>(tokens.size());
  const std::optional<Read> found = state_->reader.first(decisions, count, active);
  if (!found) {
    Batch batch;
    batch.rows = {mark.row};
    batch.tokens = {tokens};
    batch.phase = Phase::kDecode;
    batch.depths = {depth};
    batch.wanted = Wanted::kGiven;
    batch.places = {{}};
    run(of, batch);
    return;
  }
  KvCache::State& cache = of.state();
  const bool recorded = state_->reader.rows() > 0 || cache.logs;
  cache.commit(mark.row, {count}, found->entries, recorded ? found->decisions : std::vector<Decisions>());
}

void Executor::load(Phase phase, const Depth& depth) { state_->program(phase, depth); }

}  // namespace dynexport
