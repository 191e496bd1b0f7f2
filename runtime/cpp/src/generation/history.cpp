// Adjusts a row's logits by its tokens so far.
#include "generation/history.hpp"

#include <algorithm>
#include <cmath>

namespace dynexport {
namespace {

// A prompt may contain ids beyond the head's vocabulary.
bool fits(std::int64_t token, const std::vector<float>& row) { return static_cast<std::size_t>(token) < row.size(); }

void forbid(std::vector<float>& row, const std::vector<std::int64_t>& tokens) {
  for (const std::int64_t token : tokens) {
    if (fits(token, row)) row[static_cast<std::size_t>(token)] = -INFINITY;
  }
}

}  // namespace

History::History(const Sampling& sampling, const std::vector<std::int64_t>& prompt,
                 const std::vector<std::int64_t>& eos)
    : sampling_(sampling), eos_(eos), never_(sampling.suppress_tokens) {
  for (const Word& word : sampling.bad_words_ids) {
    if (word.size() > 1) {
      words_[word[word.size() - 2]].push_back(word);
    } else if (std::find(eos.begin(), eos.end(), word.front()) == eos.end()) {
      never_.push_back(word.front());
    }
  }
  for (const std::int64_t token : prompt) take(token);
}

void History::push(std::int64_t token) {
  ++generated_;
  ++counts_[take(token)];
}

std::size_t History::take(std::int64_t token) {
  tokens_.push_back(token);
  const auto [found, is_new] = places_.try_emplace(token, distinct_.size());
  if (is_new) {
    distinct_.push_back(token);
    counts_.push_back(0);
  }
  return found->second;
}

std::vector<float> History::adjusted(Row logits) const {
  std::vector<float> row(logits.values, logits.values + logits.size);
  for (const auto& [token, bias] : sampling_.logit_bias) {
    if (fits(token, row)) row[static_cast<std::size_t>(token)] += static_cast<float>(bias);
  }
  penalize(row);
  if (generated_ < sampling_.min_new_tokens) forbid(row, eos_);
  if (generated_ == 0) forbid(row, sampling_.begin_suppress_tokens);
  forbid(row, never_);
  if (sampling_.no_repeat_ngram_size > 0) forbid_repeats(row);
  if (!words_.empty() && !tokens_.empty()) forbid_words(row);
  return row;
}

void History::penalize(std::vector<float>& row) const {
  const auto penalty = static_cast<float>(sampling_.repetition_penalty);
  const bool counts = sampling_.frequency_penalty != 0 || sampling_.presence_penalty != 0;
  if (sampling_.repetition_penalty == 1 && !counts) return;
  for (std::size_t place = 0; place < distinct_.size(); ++place) {
    if (!fits(distinct_[place], row)) continue;
    float& logit = row[static_cast<std::size_t>(distinct_[place])];
    if (sampling_.repetition_penalty != 1) logit = logit < 0 ? logit * penalty : logit / penalty;
    if (counts) {
      const auto count = static_cast<double>(counts_[place]);
      logit -= static_cast<float>(sampling_.frequency_penalty * count + (count > 0 ? sampling_.presence_penalty : 0.0));
    }
  }
}

// Forbids the tokens that followed earlier occurrences of the last tokens.
void History::forbid_repeats(std::vector<float>& row) const {
  const auto before = static_cast<std::size_t>(sampling_.no_repeat_ngram_size) - 1;
  if (tokens_.size() <= before) return;
  const auto last = tokens_.end() - static_cast<std::ptrdiff_t>(before);
  for (std::size_t place = before; place < tokens_.size(); ++place) {
    const auto start = tokens_.begin() + static_cast<std::ptrdiff_t>(place - before);
    if (std::equal(last, tokens_.end(), start)) forbid(row, {tokens_[place]});
  }
}

void History::forbid_words(std::vector<float>& row) const {
  const auto found = words_.find(tokens_.back());
  if (found == words_.end()) return;
  for (const Word& word : found->second) {
    const std::size_t before = word.size() - 1;
    if (before > tokens_.size()) continue;
    if (std::equal(word.begin(), word.end() - 1, tokens_.end() - static_cast<std::ptrdiff_t>(before))) {
      forbid(row, {word.back()});
    }
  }
}

}  // namespace dynexport
