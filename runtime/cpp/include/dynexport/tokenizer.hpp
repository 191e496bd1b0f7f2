// Text to token ids and back, from a bundle's tokenizer.json.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "dynexport/bundle.hpp"

namespace dynexport {

// A byte-level or byte-fallback BPE tokenizer, exact against Hugging Face tokenizers. Immutable; threads may share it.
class Tokenizer {
 public:
  // Throws Error for a tokenizer that has a part which is not known, or that fails the bundle's own check strings.
  static std::shared_ptr<const Tokenizer> open(const Bundle& bundle);
  // From the text of a tokenizer.json; ``where`` is named in errors.
  static std::shared_ptr<const Tokenizer> parse(std::string_view json, const std::string& where);
  ~Tokenizer();

  // Throws Error for a text that is not UTF-8.
  std::vector<std::int64_t> encode(std::string_view text, bool add_special_tokens = true) const;
  // Unknown ids are left out; bytes that are not UTF-8 become U+FFFD.
  std::string decode(const std::vector<std::int64_t>& ids, bool skip_special_tokens = true) const;
  // Whether decode always leaves this id out: it is unknown, or special and skipped.
  bool is_silent(std::int64_t id, bool skip_special_tokens = true) const;
  // Whether the tokenizer's decoder cleans spaces up, so that the end of a text may still change.
  bool cleans_up() const;

 private:
  struct State;
  explicit Tokenizer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Decodes a stream of ids: each push returns the text that is final now.
class StreamDecoder {
 public:
  explicit StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  std::string push(std::int64_t id);
  std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Finds stop strings in a stream of text; text that may begin one is held back.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops);
  // Returns the text that is final now, without a stop string; ``found`` is then that string.
  std::string push(const std::string& text);
  std::string finish();
  bool stopped() const { return stopped_; }
  const std::string& found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  std::string held_, found_;
  bool stopped_ = false;
};

}  // namespace dynexport
