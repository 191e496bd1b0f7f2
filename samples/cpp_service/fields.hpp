// Reads the fields of a JSON object one by one, with the errors of the Python server.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "json.hpp"

namespace service {

// Whole numbers without a bound of their own end here, so that sums of them fit.
constexpr std::int64_t kLargest = std::int64_t{1} << 40;

using Ids = std::vector<std::int64_t>;

// The range of a number; none has no end.
struct Range {
  std::optional<double> least, above, most;
};

// The fields of an object, read in the order in which the first wrong one is reported. Every method throws ApiError for
// a field that is wrong; a field that is null counts as not given, except where it is required.
class Fields {
 public:
  // ``place`` is the object's own field, with which errors begin; the object must live longer.
  explicit Fields(const Json& object, std::string place = "") : object_(object), place_(std::move(place)) {}

  std::string text(std::string_view name);
  std::optional<std::string> text_or_none(std::string_view name);
  std::optional<bool> boolean(std::string_view name, bool nullable = true);
  std::optional<std::int64_t> integer(std::string_view name, std::optional<std::int64_t> least,
                                      std::optional<std::int64_t> most = std::nullopt);
  // A seed: any 64-bit integer.
  std::optional<std::int64_t> seed(std::string_view name);
  std::optional<double> number(std::string_view name, const Range& range);
  std::optional<Ids> ids(std::string_view name);
  Ids required_ids(std::string_view name);
  // An object; null if it is not given.
  const Json* object(std::string_view name, std::string_view what = "a valid dictionary");
  // A list of objects; null if it is not given.
  const Json* objects(std::string_view name, bool required);
  // One of some texts.
  std::optional<std::string> one_of(std::string_view name, const std::vector<std::string>& known);
  // A field that may only be false, or only null.
  void only_false(std::string_view name);
  void only_null(std::string_view name);
  // The value as it is; null if it is not given.
  const Json* any(std::string_view name);
  // The value as it is, null included.
  const Json& required(std::string_view name);

  // Refuses fields that were not read.
  void finish() const;

  // The name of a field in errors.
  std::string where(std::string_view name) const;

 private:
  const Json* find(std::string_view name);
  Ids ids_of(std::string_view name, const Json& list) const;

  const Json& object_;
  std::string place_;
  std::unordered_set<std::string> known_;
};

// Throws ApiError for a field with another value than expected; a number is shown, text is not repeated.
[[noreturn]] void refuse(const std::string& where, const std::string& expected, const Json& found);

// Returns ", found .." for a number or constant, else nothing.
std::string found_text(const Json& found);

// Whether a value is a list of token ids.
bool are_ids(const Json& value);

// Returns a whole number, at most kLargest. The value must be one.
std::int64_t bounded(const Json& value);

}  // namespace service
