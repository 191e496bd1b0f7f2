// The checks of sampling options.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "dynexport/sampler.hpp"
#include "execution/checks.hpp"
#include "bundle/number_text.hpp"
#include "generation/sampling_rules.hpp"

namespace dynexport {
namespace {

constexpr std::size_t kMostBiases = 1024, kMostWords = 1024, kMostIds = 65'536;
constexpr std::int64_t kLongestNgram = 1024, kMostLogprobs = 20;
constexpr double kLargestBias = 100;
constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();

void require(bool holds, const std::string& field, const std::string& expected, const std::string& found) {
  if (!holds) refuse_option(field, expected, found);
}

bool is_share(double value) { return 0 < value && value <= 1; }
bool is_penalty(double value) { return -2 <= value && value <= 2; }

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
            "a number from -100 to 100", number_text(bias));
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

const std::vector<NumberRule>& number_rules() {
  static const std::vector<NumberRule> rules = {
      {"temperature", &Sampling::temperature, [](double value) { return std::isfinite(value) && value >= 0; },
       "a finite number >= 0"},
      {"top_p", &Sampling::top_p, is_share, "0 < top_p <= 1"},
      {"typical_p", &Sampling::typical_p, is_share, "0 < typical_p <= 1"},
      {"min_p", &Sampling::min_p, [](double value) { return 0 <= value && value <= 1; }, "0 <= min_p <= 1"},
      {"repetition_penalty", &Sampling::repetition_penalty, [](double value) { return 1e-6 <= value && value <= 1e6; },
       "a number from 1e-6 to 1e6"},
      {"frequency_penalty", &Sampling::frequency_penalty, is_penalty, "a number from -2 to 2"},
      {"presence_penalty", &Sampling::presence_penalty, is_penalty, "a number from -2 to 2"},
  };
  return rules;
}

const std::vector<CountRule>& count_rules() {
  static const std::vector<CountRule> rules = {
      {"top_k", &Sampling::top_k, kAny, "an integer >= 0"},
      {"min_new_tokens", &Sampling::min_new_tokens, kAny, "at least 0"},
      {"no_repeat_ngram_size", &Sampling::no_repeat_ngram_size, kLongestNgram, "0..1024"},
  };
  return rules;
}

void refuse_option(const std::string& field, const std::string& expected, const std::string& found) {
  throw Error(field + ": expected " + expected + ", found " + found);
}

void Sampling::check() const {
  for (const NumberRule& rule : number_rules()) {
    const double value = this->*rule.field;
    require(rule.holds(value), rule.name, rule.expected, number_text(value));
  }
  for (const CountRule& rule : count_rules()) {
    const std::int64_t value = this->*rule.field;
    require(0 <= value && value <= rule.most, rule.name, rule.expected, std::to_string(value));
  }
  if (logprobs) checked_count("logprobs", *logprobs, 0, kMostLogprobs);
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
