// Sampling options from JSON, for the programs that tests run.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "dynexport/sampler.hpp"

inline dynexport::Sampling sampling_of(const nlohmann::json& given) {
  dynexport::Sampling sampling;
  const auto take = [&given](const char* name, auto& field) {
    if (given.contains(name)) given.at(name).get_to(field);
  };
  take("temperature", sampling.temperature);
  take("top_p", sampling.top_p);
  take("min_p", sampling.min_p);
  take("typical_p", sampling.typical_p);
  take("repetition_penalty", sampling.repetition_penalty);
  take("frequency_penalty", sampling.frequency_penalty);
  take("presence_penalty", sampling.presence_penalty);
  take("top_k", sampling.top_k);
  take("min_new_tokens", sampling.min_new_tokens);
  take("no_repeat_ngram_size", sampling.no_repeat_ngram_size);
  take("suppress_tokens", sampling.suppress_tokens);
  take("begin_suppress_tokens", sampling.begin_suppress_tokens);
  take("bad_words_ids", sampling.bad_words_ids);
  if (given.contains("seed")) sampling.seed = given["seed"].get<std::uint64_t>();
  if (given.contains("logprobs")) sampling.logprobs = given["logprobs"].get<std::int64_t>();
  if (given.contains("logit_bias")) {
    for (const auto& [token, bias] : given["logit_bias"].items()) sampling.logit_bias[std::stoll(token)] = bias;
  }
  return sampling;
}
