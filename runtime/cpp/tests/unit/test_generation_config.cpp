// What generation_config.json recommends.
#include <doctest/doctest.h>

#include <string>

#include "dynexport/error.hpp"
#include "dynexport/generator.hpp"

using dynexport::read_generation_config;

namespace {

std::string refusal(const std::string& text) {
  try {
    read_generation_config(text);
  } catch (const dynexport::Error& error) {
    return error.what();
  }
  return "none";
}

}  // namespace

TEST_CASE("greedy unless the file samples") {
  CHECK(read_generation_config("{}").sampling.temperature == 0);
  CHECK(read_generation_config(R"({"temperature": 0.6, "eos_token_id": [1, 2]})").sampling.temperature == 0);
  const auto sampling = read_generation_config(R"({"do_sample": true, "temperature": null})").sampling;
  CHECK(sampling.temperature == 1);
  CHECK(sampling.top_k == 50);
  CHECK(read_generation_config(R"({"do_sample": true, "top_k": -1})").sampling.top_k == 0);
}

TEST_CASE("fields are taken in both cases") {
  const auto sampling = read_generation_config(
                            R"({"top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.3, "top_k": 20,
      "min_new_tokens": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "begin_suppress_tokens": [6, 7],
      "bad_words_ids": [[1], [2, 3]], "frequency_penalty": 1})")
                            .sampling;
  CHECK(sampling.top_p == 0.9);
  CHECK(sampling.min_p == 0.1);
  CHECK(sampling.typical_p == 0.8);
  CHECK(sampling.repetition_penalty == 1.3);
  CHECK(sampling.frequency_penalty == 0);
  CHECK(sampling.top_k == 20);
  CHECK(sampling.min_new_tokens == 4);
  CHECK(sampling.no_repeat_ngram_size == 3);
  CHECK(sampling.suppress_tokens == std::vector<std::int64_t>{5});
  CHECK(sampling.begin_suppress_tokens == std::vector<std::int64_t>{6, 7});
  CHECK(sampling.bad_words_ids == std::vector<std::vector<std::int64_t>>{{1}, {2, 3}});
}

TEST_CASE("what is not done is named, and what changes nothing is not") {
  const auto found = read_generation_config(
      R"({"min_length": 3, "num_beams": 4, "sequence_bias": [[[1], 2.0]], "use_cache": true, "eta_cutoff": 0.0,
      "force_words_ids": [], "constraints": null})");
  CHECK(found.left_out == std::vector<std::string>{"min_length 3", "num_beams 4", "sequence_bias [[[1], 2.0]]"});
}

TEST_CASE("stop strings") {
  CHECK(read_generation_config(R"({"stop_strings": "END"})").stop == std::vector<std::string>{"END"});
  CHECK(read_generation_config(R"({"stop_strings": ["a", "b"]})").stop == std::vector<std::string>{"a", "b"});
}

TEST_CASE("what cannot be used is refused in Python's words") {
  const std::string file = "generation_config.json: ";
  CHECK(refusal("[]") == file + "expected a JSON object, found list");
  CHECK(refusal(R"({"do_sample": "yes"})") == file + "do_sample: expected true or false, found 'yes'");
  CHECK(refusal(R"({"do_sample": true, "temperature": "hot"})") ==
        file + "temperature: expected a finite number >= 0, found 'hot'");
  CHECK(refusal(R"({"bad_words_ids": [3]})") == file + "bad_words_ids: expected a list of token ids, found 3");
  CHECK(refusal(R"({"suppress_tokens": [1.5]})") == file + "suppress_tokens: expected token ids, found 1.5");
  CHECK(refusal(R"({"min_new_tokens": -1})") == file + "min_new_tokens: expected at least 0, found -1");
  CHECK(refusal(R"({"top_p": 7})") == file + "top_p: expected 0 < top_p <= 1, found 7");
  CHECK(refusal(R"({"top_k": 2.5})") == file + "top_k: expected an integer >= 0, found 2.5");
  CHECK(refusal(R"({"stop_strings": [""]})") == file + "stop_strings: expected text or several, found ['']");
}
