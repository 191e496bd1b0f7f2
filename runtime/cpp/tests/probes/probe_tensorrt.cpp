// Runs a conversation on a backend: JSON of a bundle, options and operations in, JSON of their results out.
// An operation that is refused gives {"error": ..}, and the next one follows.
#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "dynexport/error.hpp"
#include "dynexport/executor.hpp"

namespace {

using nlohmann::json;
using Rows = std::vector<std::int64_t>;
using Tokens = std::vector<Rows>;

// A conversation on a cache of its own; several may share an executor.
struct Talk {
  std::shared_ptr<const dynexport::Bundle> bundle;
  dynexport::BackendOptions options;
  dynexport::Executor& executor;
  std::unique_ptr<dynexport::KvCache> cache;

  dynexport::Depth depth(const json& op) const {
    return bundle->depth(op.contains("depth") ? std::optional<std::string>(op["depth"]) : std::nullopt);
  }
};

json prompt(Talk& talk, const json& op) {
  dynexport::Batch batch;
  batch.rows = op.at("rows").get<Rows>();
  batch.tokens = op.at("tokens").get<Tokens>();
  batch.depths = {talk.depth(op)};
  batch.wanted = dynexport::Wanted::kAll;
  const dynexport::StepResult result = talk.executor.run(*talk.cache, batch);
  json routes = json::array();
  for (const dynexport::Decisions& decisions : result.decisions) routes.push_back(decisions.ran);
  return {{"logits", result.logits}, {"ran", routes}};
}

// Feeds tokens, and then for the other steps the most likely ones.
json decode(Talk& talk, const json& op) {
  const auto rows = op.at("rows").get<Rows>();
  auto tokens = op.at("tokens").get<Rows>();
  const auto vocabulary = static_cast<std::size_t>(talk.bundle->manifest().model.vocab_size);
  json logits = json::array(), chosen = json::array();
  for (int step = 0; step < op.value("steps", 1); ++step) {
    const float* found = talk.executor.decode(*talk.cache, rows, tokens, {talk.depth(op)});
    logits = json::array();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const float* row = found + i * vocabulary;
      tokens[i] = std::max_element(row, row + vocabulary) - row;
      logits.push_back(std::vector<float>(row, row + vocabulary));
    }
    chosen.push_back(tokens);
  }
  return {{"logits", logits}, {"tokens", chosen}};
}

json change_cache(Talk& talk, const json& op) {
  dynexport::KvCache& cache = *talk.cache;
  const std::int64_t row = op.at("row"), target = op.value("target", std::int64_t{0});
  const std::string what = op.at("op");
  if (what == "rewind") cache.rewind(row);
  if (what == "copy") cache.copy_prefix(cache.mark(row), target);
  if (what == "save") {  // and restore in another row
    cache.restore(target, cache.save(row, Rows(cache.lengths(row).size()), 0));
  }
  return json::object();
}

// One call of a graph with zeros, its sizes given by symbol.
json call(Talk& talk, const json& op) {
  const auto backend = dynexport::open_backend(talk.bundle, talk.options);
  const auto engine = backend->open(talk.bundle->manifest().graph(op.at("graph").get<std::string>()));
  dynexport::Shapes shapes;
  for (const dynexport::TensorSpec& spec : engine->graph().inputs) {
    if (spec.name.compare(0, dynexport::kPast.size(), dynexport::kPast) == 0) continue;
    for (const dynexport::Dimension& dimension : spec.shape) {
      shapes[spec.name].push_back(dimension.symbol.empty() ? dimension.size
                                                           : op.at("sizes").at(dimension.symbol).get<std::int64_t>());
    }
  }
  engine->bind(shapes, {})->run();
  return json::object();
}

json run(Talk& talk, const json& op) {
  const std::string what = op.at("op");
  if (what == "cache") {
    talk.cache = talk.executor.cache(op.at("rows"), op.at("tokens"));
    talk.cache->acquire(op.at("rows"));
    return json::object();
  }
  if (what == "prompt") return prompt(talk, op);
  if (what == "decode") return decode(talk, op);
  return what == "call" ? call(talk, op) : change_cache(talk, op);
}

json results_of(Talk& talk, const json& ops) {
  json results = json::array();
  for (const json& op : ops) {
    try {
      results.push_back(run(talk, op));
    } catch (const dynexport::Error& error) {
      results.push_back({{"error", error.what()}});
    }
  }
  return results;
}

json talk_about(const json& request) {
  dynexport::BackendOptions options;
  options.kind = request.value("backend", options.kind);
  options.threads = 1;
  options.library = request.value("library", options.library);
  options.plugins = request.value("plugins", options.plugins);
  options.trust_engines = request.value("trust", false);
  const auto bundle = dynexport::Bundle::open(request.at("bundle").get<std::string>());
  dynexport::Executor executor(bundle, options);
  // The same in several threads, each of which gives its results.
  std::vector<json> results(request.value("threads", 1U));
  std::vector<std::thread> threads;
  threads.reserve(results.size());
  for (json& result : results) {
    threads.emplace_back([&] {
      Talk talk{bundle, options, executor, nullptr};
      result = results_of(talk, request.at("ops"));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results.size() == 1 ? results[0] : json(results);
}

}  // namespace

int main() {
  try {
    std::cout << talk_about(json::parse(std::cin)) << "\n";
    return dynexport::kExitGood;
  } catch (const dynexport::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return dynexport::kExitBadInput;
  }
}
