// Steps of a generation.
#include "generation/stream.hpp"

#include <utility>

#include "generation/layers.hpp"
#include "generation/speculation.hpp"

namespace dynexport {
namespace {

// A request and the logits that its next token is chosen from.
struct Live {
  Request* request;
  const float* logits;
};

// Runs the prompts. Returns the last token's logits of each run, and which run each request has.
StepResult run_prompts(Executor& executor, KvCache& cache, std::vector<Group>& groups, const Chunks& chunk,
                       std::vector<std::pair<Request*, std::size_t>>& runs) {
  const bool shared = !executor.limits().whole_prompts && !executor.limits().compete;
  Batch batch;
  for (Group& group : groups) {
    for (Request& request : group.requests) {
      if (!shared || &request == &group.requests.front()) {
        batch.rows.push_back(request.index());
        batch.tokens.push_back(group.prompt);
        batch.depths.push_back(request.depth());
      }
      runs.emplace_back(&request, batch.rows.size() - 1);
    }
  }
  batch.chunk = chunk;
  StepResult result = executor.run(cache, batch);
  for (const auto& [request, run] : runs) {
    const std::int64_t source = batch.rows[run];
    if (source != request->index()) cache.copy_prefix(cache.mark(source), request->index());
  }
  return result;
}

// A request that decodes with drafts.
struct Drafted {
  KnownTokens known;
  Acceptance acceptance;
};

// Gives the pieces of a row's step away, with the layers that the token before each ran in. Returns false if
// ``on_piece`` did.
bool deliver(const KvCache& cache, SpeculatedRow& row, bool generated, const OnPiece& on_piece) {
  auto from_end = static_cast<std::int64_t>(row.pieces.size());
  for (Piece& piece : row.pieces) {
    piece.layers = last_layers(cache, row.row, row.request->depth(), generated, from_end--);
    if (!on_piece(piece)) return false;
  }
  return true;
}

// Decode steps with drafts, from the logits of the prompts' last tokens.
bool run_drafted(Executor& executor, KvCache& cache, const std::vector<Live>& first,
                 const std::vector<const Group*>& groups, Speculator& speculator, const OnPiece& on_piece) {
  std::vector<Drafted> states(first.size());
  Rows live;
  for (std::size_t place = 0; place < first.size(); ++place) {
    Drafted& state = states[place];
    state.acceptance = speculator.acceptance();
    state.known.push(groups[place]->prompt);
    SpeculatedRow row;
    row.request = first[place].request;
    row.row = row.request->index();
    row.known = &state.known;
    row.acceptance = &state.acceptance;
    row.most_drafts = speculator.most();
    take(row, first[place].logits, executor.manifest().model.vocab_size, {});
    live.push_back(std::move(row));
  }
  for (bool generated = false; !live.empty(); generated = true) {
    if (generated) speculator.step(cache, live);
    Rows going;
    for (SpeculatedRow& row : live) {
      if (row.error) std::rethrow_exception(row.error);
      if (!deliver(cache, row, generated, on_piece)) return false;
      if (!row.pieces.back().finish) going.push_back(std::move(row));
    }
    live = std::move(going);
  }
  return true;
}

}  // namespace

bool run_requests(Executor& executor, KvCache& cache, std::vector<Group>& groups, const Chunks& chunk,
                  Speculator* speculator, const OnPiece& on_piece) {
  std::vector<std::pair<Request*, std::size_t>> runs;
  const StepResult prompts = run_prompts(executor, cache, groups, chunk, runs);
  std::vector<Live> live;
  live.reserve(runs.size());
  for (const auto& [request, run] : runs) live.push_back({request, prompts.logits[run].data()});
  if (speculator != nullptr) {
    std::vector<const Group*> of;
    for (const Group& group : groups) of.insert(of.end(), group.requests.size(), &group);
    return run_drafted(executor, cache, live, of, *speculator, on_piece);
  }
  const auto vocabulary = static_cast<std::size_t>(executor.manifest().model.vocab_size);
  for (bool generated = false; !live.empty(); generated = true) {
    std::vector<Live> going;
    std::vector<std::int64_t> rows, tokens;
    std::vector<Depth> depths;
    for (std::size_t place = 0; place < live.size(); ++place) {
      Request& request = *live[place].request;
      Piece piece = request.push(request.choose(live[place].logits, static_cast<std::int64_t>(place)));
      piece.layers = last_layers(cache, request.index(), request.depth(), generated);
      if (!on_piece(piece)) return false;
      if (piece.finish) continue;
      going.push_back(live[place]);
      rows.push_back(request.index());
      tokens.push_back(piece.token);
      depths.push_back(request.depth());
    }
    live = std::move(going);
    if (live.empty()) break;
    const float* logits = executor.decode(cache, rows, tokens, depths);
    for (std::size_t place = 0; place < live.size(); ++place) live[place].logits = logits + place * vocabulary;
  }
  return true;
}

}  // namespace dynexport
