// GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up.
#include "text/byte_alphabet.hpp"

#include <array>

#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

constexpr char32_t kLetters = 324;  // the last letter is U+0143

bool stands_for_itself(unsigned byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

struct Alphabet {
  std::array<std::string, 256> letters;
  std::array<int, kLetters> bytes{};

  Alphabet() {
    bytes.fill(-1);
    char32_t next = 256;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const char32_t letter = stands_for_itself(byte) ? byte : next++;
      append(letters[byte], letter);
      bytes.at(letter) = static_cast<int>(byte);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet made;
  return made;
}

}  // namespace

std::string in_byte_alphabet(std::string_view bytes) {
  std::string out;
  out.reserve(2 * bytes.size());
  for (const char byte : bytes) out += alphabet().letters[static_cast<unsigned char>(byte)];
  return out;
}

std::optional<unsigned char> byte_of(char32_t letter) {
  const int byte = letter < kLetters ? alphabet().bytes[letter] : -1;
  if (byte < 0) return std::nullopt;
  return static_cast<unsigned char>(byte);
}

}  // namespace dynexport::text
