// Runs a schedule of operations on a cache: JSON on standard input, results as JSON, logits as raw float32 in a file.
#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dynexport/error.hpp"
#include "dynexport/executor.hpp"

namespace {

using dynexport::Batch;
using dynexport::Decisions;
using dynexport::Depth;
using dynexport::KvCache;
using nlohmann::json;
using Longs = std::vector<std::int64_t>;

// One schedule on one cache.
class Schedule {
 public:
  Schedule(dynexport::Executor& executor, const json& told)
      : executor_(executor), out_(told.value("logits", ""), std::ios::binary) {
    std::optional<std::int64_t> room;
    if (told.contains("room") && !told["room"].is_null()) room = told["room"].get<std::int64_t>();
    cache_ = executor.cache(told["rows"], told["tokens"], told.value("record", false), room);
  }

  // Returns what an operation gave, or its error.
  json run(const json& operation) {
    json found;
    try {
      found["found"] = result_of(operation);
    } catch (const dynexport::RouteError& error) {
      found["error"] = error.what();
      found["route"] = true;
    } catch (const dynexport::Error& error) {
      found["error"] = error.what();
    }
    found["state"] = state();
    return found;
  }

 private:
  json result_of(const json& told) {
    const std::string kind = told["op"];
    if (kind == "acquire") return cache_->acquire(told["count"]);
    if (kind == "release") return cache_->release(told["row"]), json();
    if (kind == "rewind") return cache_->rewind(told["row"]), json();
    if (kind == "mark") return marks_[told["name"]] = cache_->mark(told["row"]), json();
    if (kind == "truncate") return cache_->truncate(told["row"], marks_.at(told["mark"])), json();
    if (kind == "copy_prefix") return cache_->copy_prefix(marks_.at(told["mark"]), told["target"]), json();
    if (kind == "move") return cache_->move(told["row"], told["target"]), json();
    if (kind == "save") {
      const dynexport::Mark& from = marks_.at(told["mark"]);
      saved_[told["name"]] = cache_->save(told["row"], from.lengths, from.position);
      return json();
    }
    if (kind == "restore") return cache_->restore(told["row"], saved_.at(told["name"])), json();
    if (kind == "forge") return forge(told), json();
    if (kind == "decode") return decode(told);
    if (kind == "drafted") return drafted(told);
    return batch(told);
  }

  // Changes a mark or what was saved, as a hostile caller might.
  void forge(const json& told) {
    if (told.contains("mark")) {
      dynexport::Mark& mark = marks_.at(told["mark"]);
      mark.row = told.value("row", mark.row);
      mark.position = told.value("position", mark.position);
      mark.lengths = told.value("lengths", mark.lengths);
      mark.overflow = told.value("overflow", mark.overflow);
      mark.steps = told.value("steps", mark.steps);
      return;
    }
    dynexport::Saved& saved = saved_.at(told["saved"]);
    saved.last = told.value("last", saved.last);
    saved.added = told.value("added", saved.added);
    if (told.contains("bytes"))
      for (auto& [name, values] : saved.entries) values.resize(told["bytes"]);
    if (told.contains("without")) saved.entries.erase(told["without"].get<std::string>());
  }

  json decode(const json& told) {
    const Longs rows = told["rows"];
    const float* logits = executor_.decode(*cache_, rows, told["tokens"], depths_of(told));
    return {{"best", write(logits, rows.size())}};
  }

  // Runs some generated tokens of a row at once, and keeps the first of them.
  json drafted(const json& told) {
    Batch batch;
    batch.rows = {told["row"].get<std::int64_t>()};
    batch.tokens = {told["tokens"].get<Longs>()};
    batch.phase = dynexport::Phase::kDecode;
    batch.depths = depths_of(told);
    batch.wanted = dynexport::Wanted::kAll;
    const dynexport::Mark mark = cache_->mark(batch.rows[0]);
    const dynexport::StepResult result = executor_.run(*cache_, batch);
    batch.tokens[0].resize(told["kept"]);
    executor_.keep_first(*cache_, mark, batch.tokens[0], batch.depths[0],
                         result.decisions.empty() ? nullptr : result.decisions.data());
    const auto vocabulary = static_cast<std::size_t>(executor_.manifest().model.vocab_size);
    return {{"best", write(result.logits[0].data(), result.logits[0].size() / vocabulary)}};
  }

  json batch(const json& told) {
    Batch batch;
    batch.rows = told["rows"].get<Longs>();
    batch.tokens = told["tokens"].get<std::vector<Longs>>();
    batch.phase = told["phase"] == "prompt" ? dynexport::Phase::kPrompt : dynexport::Phase::kDecode;
    batch.depths = depths_of(told);
    const json wanted = told.value("wanted", json("last"));
    batch.wanted = wanted == "last"  ? dynexport::Wanted::kLast
                   : wanted == "all" ? dynexport::Wanted::kAll
                                     : dynexport::Wanted::kGiven;
    if (batch.wanted == dynexport::Wanted::kGiven) batch.places = wanted.get<std::vector<Longs>>();
    if (told.contains("forced")) batch.forced = told["forced"].get<std::vector<Longs>>();
    if (told.contains("chunk")) batch.chunk.first = told["chunk"];
    batch.chunk.even = told.value("even", false);
    const dynexport::StepResult result = executor_.run(*cache_, batch);
    json best = json::array(), decisions = json::array();
    const auto vocabulary = static_cast<std::size_t>(executor_.manifest().model.vocab_size);
    for (const std::vector<float>& logits : result.logits)
      best.push_back(write(logits.data(), logits.size() / vocabulary));
    for (const Decisions& made : result.decisions) decisions.push_back(shown(made));
    return {{"best", best}, {"entries", result.entries}, {"decisions", decisions}};
  }

  std::vector<Depth> depths_of(const json& told) const {
    std::vector<Depth> found;
    for (const json& name : told["depths"])
      found.push_back(executor_.bundle().depth(name.is_null() ? std::nullopt
                                                              : std::optional<std::string>(name.get<std::string>())));
    return found;
  }

  // Appends logits [rows, vocab] to the file and returns each row's best token.
  Longs write(const float* logits, std::size_t rows) {
    const auto vocabulary = static_cast<std::size_t>(executor_.manifest().model.vocab_size);
    out_.write(reinterpret_cast<const char*>(logits), static_cast<std::streamsize>(rows * vocabulary * sizeof(float)));
    Longs best;
    for (std::size_t row = 0; row < rows; ++row) {
      const float* first = logits + row * vocabulary;
      best.push_back(std::max_element(first, first + vocabulary) - first);
    }
    return best;
  }

  static json shown(const Decisions& made) {
    return {{"tokens", made.tokens}, {"ran", made.ran},          {"choices", made.choices},
            {"scores", made.scores}, {"margins", margins(made)}, {"overflow", made.overflow}};
  }

  // JSON has no infinity.
  static std::vector<float> margins(const Decisions& made) {
    std::vector<float> finite = made.margins;
    for (float& margin : finite) margin = std::min(margin, 3e38F);
    return finite;
  }

  json state() const {
    json lengths = json::array(), positions = json::array(), overflow = json::array(), steps = json::array();
    const auto counters = static_cast<std::int64_t>(counters_of());
    for (std::int64_t row = 0; row < cache_->rows(); ++row) {
      lengths.push_back(cache_->lengths(row));
      positions.push_back(cache_->position(row));
      Longs counted;
      for (std::int64_t i = 0; i < counters; ++i) counted.push_back(cache_->overflow(i, row));
      overflow.push_back(counted);
      steps.push_back(cache_->log(row).size());
    }
    return {{"lengths", lengths},
            {"positions", positions},
            {"overflow", overflow},
            {"steps", steps},
            {"free", cache_->free_rows()}};
  }

  std::size_t counters_of() const {
    const auto& routing = executor_.manifest().routing;
    if (const auto* layers = std::get_if<dynexport::LayerRouting>(&routing))
      return static_cast<std::size_t>(layers->decisions());
    return std::holds_alternative<dynexport::PathRouting>(routing) ? 1 : 0;
  }

  dynexport::Executor& executor_;
  std::unique_ptr<KvCache> cache_;
  std::ofstream out_;
  std::map<std::string, dynexport::Mark> marks_;
  std::map<std::string, dynexport::Saved> saved_;
};

}  // namespace

int main() try {
  const json told = json::parse(std::string(std::istreambuf_iterator<char>(std::cin), {}));
  const auto bundle = dynexport::Bundle::open(told["bundle"].get<std::string>());
  dynexport::BackendOptions options;
  options.threads = told.value("threads", 1);
  options.kind = told.value("backend", "onnxruntime");
  options.weights = told.value("weights", "packed");
  dynexport::Executor executor(bundle, options);
  json results = json::array();
  for (const json& each : told["schedules"]) {
    Schedule schedule(executor, each);
    json found = json::array();
    for (const json& operation : each["operations"]) found.push_back(schedule.run(operation));
    results.push_back(found);
  }
  std::cout << results << "\n";
  return dynexport::kExitGood;
} catch (const dynexport::Error& error) {
  std::cerr << "error: " << error.what() << "\n";
  return dynexport::kExitBadInput;
}
