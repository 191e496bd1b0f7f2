// Steps of a generation.
#include "generation/stream.hpp"

#include <utility>

#include "generation/layers.hpp"

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

}  // namespace

bool run_requests(Executor& executor, KvCache& cache, std::vector<Group>& groups, const Chunks& chunk,
                  const OnPiece& on_piece) {
  std::vector<std::pair<Request*, std::size_t>> runs;
  const StepResult prompts = run_prompts(executor, cache, groups, chunk, runs);
  std::vector<Live> live;
  live.reserve(runs.size());
  for (const auto& [request, run] : runs) live.push_back({request, prompts.logits[run].data()});
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
