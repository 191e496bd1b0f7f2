// The tokenizer, streams and stop strings, for Python tests: a JSON object in on standard input, one out.
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "dynexport/error.hpp"
#include "dynexport/tokenizer.hpp"

using nlohmann::json;

namespace {

json streamed(const std::shared_ptr<const dynexport::Tokenizer>& tokenizer, const json& ids) {
  dynexport::StreamDecoder stream(tokenizer);
  json pieces = json::array();
  for (const auto& id : ids) pieces.push_back(stream.push(id.get<std::int64_t>()));
  pieces.push_back(stream.finish());
  return pieces;
}

json stopped(const json& task) {
  dynexport::StopStrings stops(task.at("stops").get<std::vector<std::string>>());
  json pieces = json::array();
  for (const auto& text : task.at("texts")) pieces.push_back(stops.push(text.get<std::string>()));
  pieces.push_back(stops.finish());
  return {{"pieces", pieces}, {"stopped", stops.stopped()}, {"found", stops.found()}};
}

// A tokenizer's answers: ids of texts, with and without special tokens; texts and streams of lists of ids.
json answers(const json& task) {
  const auto tokenizer = dynexport::Tokenizer::parse(task.at("tokenizer").get<std::string>(), "tokenizer.json");
  json out = {{"framed", json::array()}, {"ids", json::array()},     {"texts", json::array()},
              {"all", json::array()},    {"streams", json::array()}, {"cleans_up", tokenizer->cleans_up()}};
  for (const auto& text : task.value("encode", json::array())) {
    out["framed"].push_back(tokenizer->encode(text.get<std::string>()));
    out["ids"].push_back(tokenizer->encode(text.get<std::string>(), false));
  }
  for (const auto& ids : task.value("decode", json::array())) {
    out["texts"].push_back(tokenizer->decode(ids.get<std::vector<std::int64_t>>()));
    out["all"].push_back(tokenizer->decode(ids.get<std::vector<std::int64_t>>(), false));
    out["streams"].push_back(streamed(tokenizer, ids));
  }
  return out;
}

}  // namespace

int main() {
  const std::string text{std::istreambuf_iterator<char>(std::cin), {}};
  json results = json::array();
  const json tasks = json::parse(text);
  for (const auto& task : tasks) {
    try {
      results.push_back(task.contains("stops") ? stopped(task) : answers(task));
    } catch (const dynexport::Error& error) {
      results.push_back({{"error", error.what()}});
    }
  }
  std::cout << results.dump() << "\n";
}
