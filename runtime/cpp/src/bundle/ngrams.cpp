// Reads an n-gram table, whose bytes may be hostile, and looks token sequences up in it.
#include "bundle/ngrams.hpp"

#include <algorithm>
#include <array>
#include <functional>

#include "dynexport/error.hpp"

namespace dynexport {
namespace {

// A stored probability is a whole number of these parts.
constexpr double kParts = 255;
constexpr std::size_t kKeyBytes = 8, kTokenBytes = 4, kEntryBytes = kKeyBytes + kTokenBytes + 1;
constexpr std::uint64_t kFactor = 0x9E3779B97F4A7C15u;
constexpr int kShift = 29;

std::uint64_t little_endian(const char* bytes, std::size_t count) {
  std::uint64_t value = 0;
  for (std::size_t i = count; i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value;
}

}  // namespace

NgramTable::NgramTable(const std::string& content, std::int64_t entries, std::int64_t vocabulary,
                       const std::string& where) {
  const auto refuse = [&where](const std::string& expected, const std::string& found) {
    throw Error(where + ": expected " + expected + ", found " + found + "; make it again: calibrate --ngrams");
  };
  const auto count = static_cast<std::size_t>(entries);
  if (content.size() != count * kEntryBytes)
    refuse(std::to_string(count * kEntryBytes) + " bytes for " + std::to_string(count) + " entries",
           std::to_string(content.size()));
  const char* tokens = content.data() + count * kKeyBytes;
  const char* parts = tokens + count * kTokenBytes;
  for (std::size_t i = 0; i < count; ++i) {
    keys_.push_back(little_endian(content.data() + i * kKeyBytes, kKeyBytes));
    tokens_.push_back(static_cast<std::int32_t>(little_endian(tokens + i * kTokenBytes, kTokenBytes)));
    parts_.push_back(static_cast<std::uint8_t>(parts[i]));
  }
  if (std::adjacent_find(keys_.begin(), keys_.end(), std::greater_equal<>()) != keys_.end())
    refuse("ascending keys", "others");
  for (const std::int32_t token : tokens_)
    if (token < 0 || token >= vocabulary)
      refuse("token ids 0.." + std::to_string(vocabulary - 1), std::to_string(token));
  if (std::find(parts_.begin(), parts_.end(), 0) != parts_.end()) refuse("probabilities of 1..255 parts", "0");
}

std::unique_ptr<const NgramTable> NgramTable::of_bundle(const Bundle& bundle) {
  const auto& drafting = bundle.manifest().drafting;
  if (!drafting || !drafting->ngrams) return nullptr;
  const Ngrams& found = *drafting->ngrams;
  return std::make_unique<const NgramTable>(bundle.read(found.file), found.entries, bundle.manifest().model.vocab_size,
                                            (bundle.path() / found.file).native());
}

std::optional<NgramTable::Said> NgramTable::likeliest(const std::int64_t* ids, std::size_t count) const {
  std::array<std::uint64_t, kLongestContext> keys = {};  // of the last id, of the last two, ..
  std::uint64_t key = kFactor;
  for (std::size_t length = 0; length < count; ++length) {
    key = (key ^ static_cast<std::uint64_t>(ids[count - 1 - length])) * kFactor;
    key ^= key >> kShift;
    keys[length] = key;
  }
  for (std::size_t length = count; length-- > 0;) {
    const auto found = std::lower_bound(keys_.begin(), keys_.end(), keys[length]);
    if (found == keys_.end() || *found != keys[length]) continue;
    const auto place = static_cast<std::size_t>(found - keys_.begin());
    return Said{tokens_[place], parts_[place] / kParts};
  }
  return std::nullopt;
}

}  // namespace dynexport
