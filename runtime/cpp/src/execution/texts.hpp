// The text that each row of a cache holds and its truncations, to tell which marks are valid.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "dynexport/kv_cache.hpp"

namespace dynexport {

class Texts {
 public:
  explicit Texts(std::int64_t rows);

  // A number, unique in the process, of a row's text.
  std::uint64_t tenant(std::int64_t row) const { return rows_[static_cast<std::size_t>(row)].tenant; }
  // Truncations of all rows.
  std::uint64_t truncations() const { return truncations_; }
  // Begins another text in a row.
  void renew(std::int64_t row);
  // Records that a row was truncated to some tokens.
  void truncate(std::int64_t row, std::int64_t tokens);
  // Throws Error for a mark of an earlier text of its row, which holds ``position`` tokens, or one beyond a truncation.
  void check(const Mark& mark, std::int64_t position) const;

 private:
  struct Text {
    std::uint64_t tenant = 0;
    // Number of a truncation and the tokens left; a truncation to fewer tokens replaces earlier ones.
    std::vector<std::pair<std::uint64_t, std::int64_t>> cuts;
  };

  std::uint64_t truncations_ = 0;
  std::vector<Text> rows_;
};

}  // namespace dynexport
