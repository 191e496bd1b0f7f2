// The choice of tokens: penalties, biases, filters, draws, log probabilities.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

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
  void check(std::int64_t vocab_size) const;
};

struct Choice {
  std::int64_t token = 0;
  std::optional<double> logprob;                     // of the token, before any option is applied
  std::vector<std::pair<std::int64_t, double>> top;  // the most probable tokens, most probable first
};

// Chooses the tokens of one row.
class Sampler {
 public:
  // ``eos`` are the ids that end a text; ``prompt`` counts for repetition_penalty and n-grams; ``seed_index`` selects
  // one of a seed's independent random sequences, so that rows with one seed differ. Throws as Sampling::check.
  Sampler(const Sampling& sampling, const std::vector<std::int64_t>& prompt, const std::vector<std::int64_t>& eos,
          std::int64_t vocab_size, std::uint32_t seed_index = 0);
  ~Sampler();
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;
  // Chooses the next token from logits float32 [vocab]. Throws Error for logits that are NaN, and for options that
  // leave no token.
  Choice choose(const float* logits);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
