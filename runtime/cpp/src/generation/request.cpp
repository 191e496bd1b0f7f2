// The state of one request, and the end of its text.
#include "dynexport/request.hpp"

#include <algorithm>

namespace dynexport {

std::string_view name_of(Finish finish) { return finish == Finish::kStop ? "stop" : "length"; }

void Generation::push(const Piece& piece) {
  ids.push_back(piece.token);
  text += piece.text;
  if (piece.finish) finish = *piece.finish;
  stop_reason = piece.stop_reason;
  if (piece.logprobs) logprobs.push_back(*piece.logprobs);
}

Request::Request(std::int64_t index, Depth depth, Sampler sampler, std::shared_ptr<const Tokenizer> tokenizer,
                 RequestLimits limits)
    : index_(index), depth_(std::move(depth)), sampler_(std::move(sampler)), limits_(std::move(limits)) {
  if (tokenizer != nullptr) decoder_.emplace(std::move(tokenizer));
  if (!limits_.stop.empty()) stops_.emplace(limits_.stop);
}

Piece Request::push(const Choice& choice) {
  --limits_.new_tokens;
  --limits_.room;
  if (std::find(limits_.eos.begin(), limits_.eos.end(), choice.token) != limits_.eos.end()) {
    return end(choice, "", Finish::kStop, choice.token);
  }
  std::string text = decoder_ ? decoder_->push(choice.token) : "";
  if (stops_) {
    text = stops_->push(text);
    if (stops_->stopped()) return piece(choice, std::move(text), Finish::kStop, stops_->found());
  }
  if (limits_.new_tokens == 0 || limits_.room < 0) return end(choice, text, Finish::kLength, {});
  return piece(choice, std::move(text), std::nullopt, {});
}

// Returns the last piece with all text that was held back; that text may complete a stop string.
Piece Request::end(const Choice& choice, const std::string& text, Finish finish, StopReason reason) {
  std::string rest = decoder_ ? decoder_->finish() : "";
  if (stops_) {
    rest = stops_->push(rest);
    if (stops_->stopped()) return piece(choice, text + rest, Finish::kStop, stops_->found());
    rest += stops_->finish();
  }
  return piece(choice, text + rest, finish, std::move(reason));
}

Piece Request::piece(const Choice& choice, std::string text, std::optional<Finish> finish, StopReason reason) const {
  Piece made{index_, choice.token, std::move(text), finish, std::move(reason), std::nullopt, 0, std::nullopt};
  if (choice.logprob) made.logprobs = TokenLogprobs{*choice.logprob, choice.top};
  return made;
}

}  // namespace dynexport
