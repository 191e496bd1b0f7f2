// The exception of the library, and the exit codes of its programs.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace dynexport {

constexpr int kExitGood = 0;
constexpr int kExitCheckFailed = 1;
constexpr int kExitBadInput = 2;

// A usage or input error, in one line: what, where, expected and found, what to do. The message may quote hostile
// input, so control characters are escaped and its length is bounded, as in Python (runtime/bundle/errors.py).
class Error : public std::runtime_error {
 public:
  explicit Error(std::string_view message);
};

// A route that the contract defines as an error, such as a token that finds a layer's cache full.
class RouteError : public Error {
 public:
  using Error::Error;
};

// Returns a text in one line: control characters escaped, the middle removed if it is too long.
std::string one_line(std::string_view text);

// Returns a text in quotes for an error, as Python's repr does, of at most 80 characters.
std::string shown(std::string_view text);

}  // namespace dynexport
