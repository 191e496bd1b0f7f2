// The choice of tokens: penalties, biases, filters, draws, log probabilities.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "dynexport/error.hpp"

namespace dynexport {

// The options by which tokens are chosen; the defaults give greedy choice. Meanings, order and ranges are those of
// Python's Sampling (runtime/generation/sampling.py).
struct Sampling {
  double temperature = 0.0, top_p = 1.0, min_p = 0.0, typical_p = 1.0, repetition_penalty = 1.0,
         frequency_penalty = 0.0, presence_penalty = 0.0;
  std::int64_t top_k = 0, min_new_tokens = 0, no_repeat_ngram_size = 0;
  std::optional<std::uint64_t> seed;
  std::map<std::int64_t, double> logit_bias;
  std::vector<std::int64_t> suppress_tokens, begin_suppress_tokens;
  std::vector<std::vector<std::int64_t>> bad_words_ids;
  std::optional<std::int64_t> logprobs;

  // Throws Error for a field outside its range.
  void check() const;
  // Throws Error for a token id outside a vocabulary of this size.
  void check_ids(std::int64_t vocab_size) const;
};

struct Choice {
  std::int64_t token = 0;
  std::optional<double> logprob;                     // of the token, before any option is applied
  std::vector<std::pair<std::int64_t, double>> top;  // the most probable tokens, most probable first
};

// Logits that no token can be chosen from: the engine's failure, not the options'.
class NotFinite : public Error {
 public:
  using Error::Error;
};

// Chooses the tokens of one row; its choices depend only on its seed, its seed index, its own logits and its own
// tokens.
class Sampler {
 public:
  // ``eos`` are the ids that end a text; ``prompt`` counts for repetition_penalty and n-grams; ``seed_index`` selects
  // one of a seed's independent random sequences, so that rows with one seed differ. Throws as Sampling's checks.
  Sampler(const Sampling& sampling, const std::vector<std::int64_t>& prompt, const std::vector<std::int64_t>& eos,
          std::int64_t vocab_size, std::uint32_t seed_index = 0);
  ~Sampler();
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;
  // Chooses the next token from logits float32 [vocab]; minus infinity excludes a token. Among equally probable tokens,
  // greedy choice takes the lowest id. Throws NotFinite for a NaN or a largest logit that is infinite, and Error for
  // options that leave no token; ``row`` is named there.
  Choice choose(const float* logits, std::int64_t row = 0);
  // A guess of the token that it will choose after ``index`` others, from logits of another depth: greedily, or with
  // the random number that the choice will use.
  std::int64_t draft(const float* logits, std::int64_t index);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
