// The tokens of one row, and the changes to its logits that depend on them.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "dynexport/sampler.hpp"
#include "generation/row_math.hpp"

namespace dynexport {

// Biases, penalties and forbidden tokens. ``sampling`` is checked and must live longer.
class History {
 public:
  // ``eos`` are the ids that end the row; min_new_tokens forbids them.
  History(const Sampling& sampling, const std::vector<std::int64_t>& prompt, const std::vector<std::int64_t>& eos);

  // Adds a generated token.
  void push(std::int64_t token);
  // Returns a copy of the logits with biases and penalties; forbidden tokens get minus infinity.
  std::vector<float> adjusted(Row row) const;

 private:
  using Word = std::vector<std::int64_t>;

  std::size_t take(std::int64_t token);
  void penalize(std::vector<float>& row) const;
  void forbid_repeats(std::vector<float>& row) const;
  void forbid_words(std::vector<float>& row) const;

  const Sampling& sampling_;
  std::vector<std::int64_t> eos_, tokens_, never_;
  std::int64_t generated_ = 0;
  // The distinct tokens, the number of times that each was generated, and each one's index.
  std::vector<std::int64_t> distinct_, counts_;
  std::unordered_map<std::int64_t, std::size_t> places_;
  // Sequences of more than one token, by their second-to-last token.
  std::unordered_map<std::int64_t, std::vector<Word>> words_;
};

}  // namespace dynexport
