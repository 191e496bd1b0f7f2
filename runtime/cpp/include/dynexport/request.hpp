// One request: its generated tokens, its text and its end.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "dynexport/manifest.hpp"
#include "dynexport/sampler.hpp"
#include "dynexport/tokenizer.hpp"

namespace dynexport {

// Why an answer ended: "stop" for an end-of-sequence token or a stop string, "length" for the largest number of new
// tokens or a full context.
enum class Finish { kStop, kLength };

std::string_view name_of(Finish finish);

// The log probability of a token before any sampling option is applied.
struct TokenLogprobs {
  double logprob = 0.0;
  std::vector<std::pair<std::int64_t, double>> top;  // the most probable tokens, most probable first
};

// The token id or the stop string that ended an answer; none for "length".
using StopReason = std::variant<std::monostate, std::int64_t, std::string>;

// One generated token.
struct Piece {
  std::int64_t row = 0;  // the index of the request
  std::int64_t token = 0;
  std::string text;              // the text that is final now; empty while a character or a stop string is incomplete
  std::optional<Finish> finish;  // none before the last token
  StopReason stop_reason;
  std::optional<TokenLogprobs> logprobs;  // set if Sampling::logprobs is
  std::int64_t layers = 0;  // layers that the last token before it ran in, whose hidden state it was chosen from
  std::optional<std::int64_t> draft;  // the id that was drafted in its place
};

// A finished answer.
struct Generation {
  std::int64_t prompt_tokens = 0;
  std::vector<std::int64_t> ids;  // of the generated tokens, including an end-of-sequence token
  std::string text;               // without special tokens and stop strings
  Finish finish = Finish::kLength;
  StopReason stop_reason;
  std::vector<TokenLogprobs> logprobs;  // one per generated token if Sampling::logprobs is set, else empty

  void push(const Piece& piece);
};

// The bounds of a request.
struct RequestLimits {
  std::vector<std::string> stop;  // strings that end it; they are not part of its text
  std::vector<std::int64_t> eos;  // ids of tokens that end it
  std::int64_t new_tokens = 0;    // the largest number of tokens to generate
  std::int64_t room = 0;          // the number of tokens that fit into the context after the prompt
};

// The state of one request while it runs.
class Request {
 public:
  // ``tokenizer`` is none for a bundle that has no tokenizer: pieces then have no text.
  Request(std::int64_t index, Depth depth, Sampler sampler, std::shared_ptr<const Tokenizer> tokenizer,
          RequestLimits limits);

  std::int64_t index() const { return index_; }
  const Depth& depth() const { return depth_; }
  // Chooses the next token from logits float32 [vocab], as Sampler::choose.
  Choice choose(const float* logits, std::int64_t row = 0) { return sampler_.choose(logits, row); }
  // The token to draft ``index`` tokens after the next one, as Sampler::draft.
  std::int64_t draft(const float* logits, std::int64_t index) { return sampler_.draft(logits, index); }
  // Tokens that may still be generated; the end of the context may come first.
  std::int64_t left() const { return limits_.new_tokens; }
  // Adds a token. Returns its piece: the text that is final now, and whether the request ends.
  Piece push(const Choice& choice);

 private:
  Piece end(const Choice& choice, const std::string& text, Finish finish, StopReason reason);
  Piece piece(const Choice& choice, std::string text, std::optional<Finish> finish, StopReason reason) const;

  std::int64_t index_;
  Depth depth_;
  Sampler sampler_;
  RequestLimits limits_;
  std::optional<StreamDecoder> decoder_;
  std::optional<StopStrings> stops_;
};

}  // namespace dynexport
