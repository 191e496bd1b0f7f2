// Chooses tokens from given logits: {"logits": file of float32, "vocab", "cases": [{"rows", "sampling", "prompt",
// "eos", "index"}]} to one list of choices a case, or an error.
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dynexport/sampler.hpp"
#include "sampling_json.hpp"

namespace {

using nlohmann::json;

json choose(const json& given, const std::vector<float>& logits, std::int64_t vocab) {
  const auto ids = given.value("prompt", std::vector<std::int64_t>()), eos = given.value("eos", ids);
  dynexport::Sampler sampler(sampling_of(given["sampling"]), ids, eos, vocab, given.value("index", 0U));
  json made = json::array();
  for (const std::size_t row : given["rows"]) {
    const auto choice = sampler.choose(logits.data() + row * static_cast<std::size_t>(vocab));
    json one = {{"token", choice.token}, {"top", choice.top}};
    if (choice.logprob) one["logprob"] = *choice.logprob;
    made.push_back(std::move(one));
  }
  return made;
}

}  // namespace

int main() try {
  const json given = json::parse(std::cin);
  std::ifstream file(given["logits"].get<std::string>(), std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> logits(bytes.size() / sizeof(float));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(logits.data()));
  json made = json::array();
  for (const json& one : given["cases"]) {
    try {
      made.push_back(choose(one, logits, given["vocab"]));
    } catch (const dynexport::Error& error) {
      made.push_back({{"error", error.what()}});
    }
  }
  std::cout << made;
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
