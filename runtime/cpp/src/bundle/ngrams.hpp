// A table of short token sequences, each with the token that is likeliest to follow, as Python's
// runtime/bundle/ngrams.py.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dynexport/bundle.hpp"

namespace dynexport {

// Most tokens of a context.
constexpr std::size_t kLongestContext = 4;

class NgramTable {
 public:
  struct Said {
    std::int64_t token;
    double probability;
  };

  // The table of a file's content: all keys, all tokens, all probabilities. Throws Error, which names ``where``, for
  // content that is not a table of so many entries for a vocabulary of this size.
  NgramTable(const std::string& content, std::int64_t entries, std::int64_t vocabulary, const std::string& where);
  // A bundle's table; null if it has none. Throws Error as the constructor.
  static std::unique_ptr<const NgramTable> of_bundle(const Bundle& bundle);

  // What the longest stored end of some ids, at most the last four of a text, says; none if none is stored.
  std::optional<Said> likeliest(const std::int64_t* ids, std::size_t count) const;

 private:
  std::vector<std::uint64_t> keys_;
  std::vector<std::int32_t> tokens_;
  std::vector<std::uint8_t> parts_;
};

}  // namespace dynexport
