// Chooses the tokens of one row.
#include "dynexport/sampler.hpp"

#include <cmath>
#include <deque>
#include <string>

#include "bundle/number_text.hpp"
#include "generation/filters.hpp"
#include "generation/history.hpp"
#include "generation/random.hpp"
#include "generation/row_math.hpp"

namespace dynexport {
namespace {

bool adjusts(const Sampling& sampling) {
  return sampling.repetition_penalty != 1 || sampling.frequency_penalty != 0 || sampling.presence_penalty != 0 ||
         !sampling.logit_bias.empty() || sampling.min_new_tokens != 0 || !sampling.suppress_tokens.empty() ||
         !sampling.begin_suppress_tokens.empty() || sampling.no_repeat_ngram_size != 0 ||
         !sampling.bad_words_ids.empty();
}

Choice with_logprobs(Row logits, float largest, std::int64_t token, const std::optional<std::int64_t>& count) {
  if (!count) return {token, std::nullopt, {}};
  const double total = log_of_sum(logits, largest);
  const auto logprob = [&](std::size_t id) { return static_cast<double>(logits[id]) - total; };
  Choice choice{token, logprob(static_cast<std::size_t>(token)), {}};
  for (const std::uint32_t id : largest_ids(logits, static_cast<std::size_t>(*count))) {
    choice.top.emplace_back(id, logprob(id));
  }
  return choice;
}

}  // namespace

struct Sampler::State {
  State(const Sampling& options, const std::vector<std::int64_t>& prompt, const std::vector<std::int64_t>& eos,
        std::int64_t vocab_size, std::uint32_t index)
      : sampling(options), vocabulary(static_cast<std::size_t>(vocab_size)), seed_index(index) {
    if (adjusts(sampling)) history.emplace(sampling, prompt, eos);
  }

  // Returns the id of the largest logit.
  std::size_t checked_largest(Row logits, std::int64_t row) const {
    const std::size_t token = first_largest(logits);
    if (std::isfinite(logits[token])) return token;
    throw NotFinite("logits: row " + std::to_string(row) + ": expected a finite largest logit and no NaN, found " +
                    number_text(logits[token]) + "; the model's arithmetic has overflowed or its weights are corrupt");
  }

  double uniform() {
    if (drawn.empty()) return next();
    const double first = drawn.front();
    drawn.pop_front();
    return first;
  }

  // The number that ``uniform`` will return after ``index`` others.
  double upcoming(std::int64_t index) {
    while (static_cast<std::int64_t>(drawn.size()) <= index) drawn.push_back(next());
    return drawn[static_cast<std::size_t>(index)];
  }

  double next() {
    if (!random) random.emplace(sampling.seed, seed_index);
    return random->next();
  }

  Sampling sampling;
  std::size_t vocabulary;
  std::uint32_t seed_index;
  std::optional<History> history;
  std::optional<RandomSequence> random;
  std::deque<double> drawn;  // random numbers that were looked at and not used
};

Sampler::Sampler(const Sampling& sampling, const std::vector<std::int64_t>& prompt,
                 const std::vector<std::int64_t>& eos, std::int64_t vocab_size, std::uint32_t seed_index) {
  if (vocab_size < 1) throw Error("vocabulary: expected at least 1, found " + std::to_string(vocab_size));
  sampling.check();
  sampling.check_ids(vocab_size);
  state_ = std::make_unique<State>(sampling, prompt, eos, vocab_size, seed_index);
}

Sampler::~Sampler() = default;
Sampler::Sampler(Sampler&&) noexcept = default;
Sampler& Sampler::operator=(Sampler&&) noexcept = default;

Choice Sampler::choose(const float* logits, std::int64_t row) {
  const Row given{logits, state_->vocabulary};
  std::size_t token = state_->checked_largest(given, row);
  const float largest = given[token];
  std::vector<float> changed;
  Row adjusted = given;
  if (state_->history) {
    changed = state_->history->adjusted(given);
    adjusted.values = changed.data();
    token = first_largest(adjusted);
    if (!std::isfinite(adjusted[token])) {
      throw Error("logits: row " + std::to_string(row) +
                  ": expected a token that may be generated, found all of them forbidden or out of range after biases, "
                  "penalties and the schema; forbid fewer");
    }
  }
  auto chosen = static_cast<std::int64_t>(token);
  if (state_->sampling.temperature > 0) {
    chosen = draw(adjusted, adjusted[token], state_->sampling, state_->uniform());
  }
  if (state_->history) state_->history->push(chosen);
  return with_logprobs(given, largest, chosen, state_->sampling.logprobs);
}

std::int64_t Sampler::draft(const float* logits, std::int64_t index) {
  const Row given{logits, state_->vocabulary};
  const std::size_t token = first_largest(given);
  const float largest = given[token];
  if (state_->sampling.temperature > 0 && std::isfinite(largest))
    return draw(given, largest, state_->sampling, state_->upcoming(index));
  return static_cast<std::int64_t>(token);  // the full model reports logits that are not numbers
}

}  // namespace dynexport
