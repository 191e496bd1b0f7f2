// The end of a request, without a tokenizer.
#include <doctest/doctest.h>

#include <array>

#include "dynexport/request.hpp"

using dynexport::Choice;
using dynexport::Finish;
using dynexport::Request;
using dynexport::RequestLimits;
using dynexport::Sampling;

namespace {

Request request_of(std::int64_t new_tokens, std::int64_t room, const Sampling& sampling = {}) {
  RequestLimits limits;
  limits.eos = {3};
  limits.new_tokens = new_tokens;
  limits.room = room;
  return {0, {}, {sampling, {1}, {3}, 4}, nullptr, limits};
}

}  // namespace

TEST_CASE("the largest number of new tokens ends a request") {
  Request request = request_of(2, 10);
  CHECK(!request.push({1, {}, {}}).finish);
  CHECK(request.push({1, {}, {}}).finish == Finish::kLength);
}

TEST_CASE("the context ends a request one token after the last that fits") {
  Request request = request_of(9, 1);
  CHECK(!request.push({1, {}, {}}).finish);
  CHECK(request.push({1, {}, {}}).finish == Finish::kLength);
}

TEST_CASE("an end-of-sequence token ends a request, even as its last token") {
  Request request = request_of(1, 10);
  const dynexport::Piece piece = request.push({3, {}, {}});
  CHECK(piece.finish == Finish::kStop);
  CHECK(std::get<std::int64_t>(piece.stop_reason) == 3);
}

TEST_CASE("log probabilities are those of the raw logits") {
  Sampling sampling;
  sampling.logprobs = 2;
  sampling.logit_bias[0] = 50;
  Request request = request_of(5, 10, sampling);
  const std::array<float, 4> logits = {0, 0, 0, 0};
  const dynexport::Piece piece = request.push(request.choose(logits.data()));
  CHECK(piece.token == 0);
  REQUIRE(piece.logprobs);
  CHECK(piece.logprobs->logprob == doctest::Approx(-1.3862944));
  CHECK(piece.logprobs->top.size() == 2);
}

TEST_CASE("a generation collects its pieces") {
  dynexport::Generation done;
  done.push({0, 5, "a", {}, {}, dynexport::TokenLogprobs{-1, {}}, 2, {}});
  done.push({0, 6, "b", Finish::kStop, std::string("b"), {}, 2, {}});
  CHECK(done.ids == std::vector<std::int64_t>{5, 6});
  CHECK(done.text == "ab");
  CHECK(done.finish == Finish::kStop);
  CHECK(std::get<std::string>(done.stop_reason) == "b");
  CHECK(done.logprobs.size() == 1);
}
