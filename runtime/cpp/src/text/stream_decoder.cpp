// Decoding of a stream of ids, as Python's StreamDecoder (runtime/text/text.py): the same pieces at the same pushes.
#include <algorithm>
#include <string_view>
#include <utility>

#include "dynexport/tokenizer.hpp"
#include "text/utf8.hpp"

namespace dynexport {

namespace {

// An unfinished character has at most 3 bytes, so at most 3 tokens. The rest of the window is context, which
// metaspace tokenizers need: they drop the leading space of the first token.
constexpr std::int64_t kUnfinished = 3, kContext = 8, kWindow = 3 * kContext;
constexpr std::int64_t kCleaned = 6;  // characters that clean-up may still change
constexpr char32_t kReplacement = 0xfffd;

// The number of characters at the end of a text that clean-up may change once more text follows: Python's
// ``[ '][ 'nvr]*$``, where $ also stands before a line feed at the end.
std::int64_t uncleaned(std::u32string_view text) {
  std::u32string_view tail = text.substr(text.size() - std::min<std::size_t>(text.size(), kCleaned));
  if (!tail.empty() && tail.back() == U'\n') tail.remove_suffix(1);
  std::size_t longest = 0;
  for (std::size_t length = 1; length <= tail.size(); ++length) {
    const char32_t c = tail[tail.size() - length];
    if (std::u32string_view(U" 'nvr").find(c) == std::u32string_view::npos) break;
    if (c == U' ' || c == U'\'') longest = length;
  }
  return static_cast<std::int64_t>(longest);
}

}  // namespace

// Lengths and places are in characters.
struct StreamDecoder::State {
  std::shared_ptr<const Tokenizer> tokenizer;
  std::vector<std::int64_t> window;
  std::u32string decoded;     // of the window
  std::int64_t emitted = 0;   // characters of it
  std::int64_t waiting = 0;   // tokens since the window last ended in a whole character
  std::int64_t boundary = 0;  // where the window will begin after it slides: between two characters

  std::int64_t length() const { return static_cast<std::int64_t>(decoded.size()); }
  std::u32string decode() const { return text::code_points(tokenizer->decode(window)); }

  // Returns the text up to a place that was not returned before.
  std::string take(std::int64_t end) {
    const auto begin = static_cast<std::size_t>(std::min(emitted, length()));
    const auto count = static_cast<std::size_t>(std::max<std::int64_t>(0, end - emitted));
    const std::u32string_view piece = std::u32string_view(decoded).substr(begin, count);
    emitted += static_cast<std::int64_t>(piece.size());
    return text::utf8(piece);
  }

  // The number of characters of the window that later tokens cannot change.
  std::int64_t final_length() {
    const std::size_t last = decoded.find_last_not_of(kReplacement);
    const auto whole = last == std::u32string::npos ? 0 : static_cast<std::int64_t>(last) + 1;
    waiting = whole == length() ? 0 : waiting + 1;
    // After 3 more tokens the bytes are known to be invalid; only the last can still begin a character.
    const std::int64_t final = waiting <= kUnfinished ? whole : length() - 1;
    if (!tokenizer->cleans_up()) return final;
    return final - uncleaned(std::u32string_view(decoded).substr(0, static_cast<std::size_t>(final)));
  }

  void slide() {
    const auto size = static_cast<std::int64_t>(window.size());
    std::int64_t start = 0;
    if (emitted == length() && size - boundary >= kContext) {
      start = boundary;
    } else if (size > kWindow) {
      start = size - 2 * kContext;
    } else {
      return;
    }
    const std::int64_t held_back = std::max<std::int64_t>(0, length() - emitted);
    window.erase(window.begin(), window.begin() + start);
    decoded = decode();
    emitted = std::max<std::int64_t>(0, length() - held_back);
    boundary = static_cast<std::int64_t>(window.size());
  }
};

StreamDecoder::StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer) : state_(std::make_unique<State>()) {
  state_->tokenizer = std::move(tokenizer);
}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::push(std::int64_t id) {
  if (state_->tokenizer->is_silent(id)) return "";
  state_->window.push_back(id);
  state_->decoded = state_->decode();
  std::string piece = state_->take(state_->final_length());
  state_->slide();
  return piece;
}

std::string StreamDecoder::finish() { return state_->take(state_->length()); }

}  // namespace dynexport
