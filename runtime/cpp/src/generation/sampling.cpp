// The checks of sampling options.
#include <algorithm>
#include <cmath>
#include <string>

#include "dynexport/sampler.hpp"
#include "generation/number_text.hpp"

namespace dynexport {
namespace {

constexpr std::size_t kMostBiases = 1024, kMostWords = 1024, kMostIds = 65'536;
constexpr std::int64_t kLongestNgram = 1024, kMostLogprobs = 20;
constexpr double kLargestBias = 100;

void require(bool holds, const std::string& field, const std::string& expected, const std::string& found) {
  if (!holds) throw Error(field + ": expected " + expected + ", found " + found);
}

void require(bool holds, const std::string& field, const std::string& expected, double found) {
  require(holds, field, expected, number_text(found));
}

void check_numbers(const Sampling& sampling) {
  const double temperature = sampling.temperature, repetition = sampling.repetition_penalty, min_p = sampling.min_p;
  require(std::isfinite(temperature) && temperature >= 0, "temperature", "a finite number >= 0", temperature);
  require(0 < sampling.top_p && sampling.top_p <= 1, "top_p", "0 < top_p <= 1", sampling.top_p);
  require(0 < sampling.typical_p && sampling.typical_p <= 1, "typical_p", "0 < typical_p <= 1", sampling.typical_p);
  require(sampling.top_k >= 0, "top_k", "an integer >= 0", std::to_string(sampling.top_k));
  require(0 <= min_p && min_p <= 1, "min_p", "0 <= min_p <= 1", min_p);
  require(1e-6 <= repetition && repetition <= 1e6, "repetition_penalty", "a number from 1e-6 to 1e6", repetition);
  for (const auto& [name, value] : {std::pair("frequency_penalty", sampling.frequency_penalty),
                                    std::pair("presence_penalty", sampling.presence_penalty)}) {
    require(-2 <= value && value <= 2, name, "a number from -2 to 2", value);
  }
}

void check_counts(const Sampling& sampling) {
  const std::int64_t least = sampling.min_new_tokens, ngram = sampling.no_repeat_ngram_size;
  require(least >= 0, "min_new_tokens", "at least 0", std::to_string(least));
  require(0 <= ngram && ngram <= kLongestNgram, "no_repeat_ngram_size", "0.." + std::to_string(kLongestNgram),
          std::to_string(ngram));
  const std::int64_t logprobs = sampling.logprobs.value_or(0);
  require(0 <= logprobs && logprobs <= kMostLogprobs, "logprobs", "0.." + std::to_string(kMostLogprobs),
          std::to_string(logprobs));
}

void check_list(const std::string& name, const std::vector<std::int64_t>& ids) {
  require(ids.size() <= kMostIds, name, "at most " + std::to_string(kMostIds) + " token ids",
          std::to_string(ids.size()));
  for (const std::int64_t id : ids) require(id >= 0, name, "token ids", std::to_string(id));
}

void check_biases(const std::map<std::int64_t, double>& biases) {
  require(biases.size() <= kMostBiases, "logit_bias", "at most " + std::to_string(kMostBiases) + " token ids",
          std::to_string(biases.size()));
  for (const auto& [token, bias] : biases) {
    require(token >= 0, "logit_bias", "a mapping of token ids to numbers", std::to_string(token));
    require(-kLargestBias <= bias && bias <= kLargestBias, "logit_bias: token " + std::to_string(token),
            "a number from -100 to 100", bias);
  }
}

void check_words(const std::vector<std::vector<std::int64_t>>& words) {
  require(words.size() <= kMostWords, "bad_words_ids", "at most " + std::to_string(kMostWords) + " sequences",
          std::to_string(words.size()));
  for (const auto& word : words) check_list("bad_words_ids", word);
  const bool all = std::none_of(words.begin(), words.end(), [](const auto& word) { return word.empty(); });
  require(all, "bad_words_ids", "sequences of at least one token id", "()");
}

}  // namespace

void Sampling::check() const {
  check_numbers(*this);
  check_counts(*this);
  check_biases(logit_bias);
  check_list("suppress_tokens", suppress_tokens);
  check_list("begin_suppress_tokens", begin_suppress_tokens);
  check_words(bad_words_ids);
}

void Sampling::check_ids(std::int64_t vocab_size) const {
  const auto check = [vocab_size](const std::string& name, std::int64_t largest) {
    require(largest < vocab_size, name, "token ids 0.." + std::to_string(vocab_size - 1), std::to_string(largest));
  };
  const auto largest_of = [](const std::vector<std::int64_t>& ids) {
    return ids.empty() ? 0 : *std::max_element(ids.begin(), ids.end());
  };
  check("logit_bias", logit_bias.empty() ? 0 : logit_bias.rbegin()->first);
  check("suppress_tokens", largest_of(suppress_tokens));
  check("begin_suppress_tokens", largest_of(begin_suppress_tokens));
  std::int64_t largest = 0;
  for (const auto& word : bad_words_ids) largest = std::max(largest, largest_of(word));
  check("bad_words_ids", largest);
}

}  // namespace dynexport
