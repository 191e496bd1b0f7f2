// Stop strings, as Python's StopStrings (runtime/text/text.py).
#include <algorithm>
#include <string_view>
#include <utility>

#include "dynexport/error.hpp"
#include "dynexport/tokenizer.hpp"

namespace dynexport {

namespace {

// The length of the longest end of a text that begins a stop string.
std::size_t undecided(std::string_view text, const std::vector<std::string>& stops) {
  std::size_t longest = 1;
  for (const std::string& stop : stops) longest = std::max(longest, stop.size());
  for (std::size_t length = std::min(text.size(), longest - 1); length > 0; --length) {
    const std::string_view end = text.substr(text.size() - length);
    for (const std::string& stop : stops) {
      if (stop.compare(0, length, end) == 0) return length;
    }
  }
  return 0;
}

}  // namespace

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  const auto is_empty = [](const std::string& stop) { return stop.empty(); };
  if (std::any_of(stops_.begin(), stops_.end(), is_empty)) {
    throw Error("stop: expected non-empty strings, found an empty one");
  }
}

std::string StopStrings::push(const std::string& text) {
  if (stopped_) return "";
  held_ += text;
  // The one that is complete first; of several that end together, the longest.
  std::size_t first = std::string::npos, first_end = std::string::npos;
  for (const std::string& stop : stops_) {
    const std::size_t begin = held_.find(stop);
    if (begin == std::string::npos) continue;
    const std::size_t end = begin + stop.size();
    if (end > first_end || (end == first_end && begin >= first)) continue;
    first = begin;
    first_end = end;
    found_ = stop;
    stopped_ = true;
  }
  const std::size_t length = stopped_ ? first : held_.size() - undecided(held_, stops_);
  std::string piece = held_.substr(0, length);
  held_ = stopped_ ? "" : held_.substr(length);
  return piece;
}

std::string StopStrings::finish() { return std::exchange(held_, ""); }

}  // namespace dynexport
