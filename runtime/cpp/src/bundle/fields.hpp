// Reads the fields of a JSON value by what is expected there; an error names the place, in pydantic's words.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "bundle/json_text.hpp"

namespace dynexport {

// A value in JSON, and the way to it. It refers to its parent, which must outlive it.
class Value {
 public:
  // The whole; ``where`` starts every error.
  Value(const Json& json, const std::string& where) : json_(json), where_(where) {}
  Value(const Json& json, const Value& parent, std::string_view name)
      : json_(json), where_(parent.where_), parent_(&parent), name_(name) {}
  Value(const Json& json, const Value& parent, std::size_t index)
      : json_(json), where_(parent.where_), parent_(&parent), index_(index), indexed_(true) {}

  const Json& json() const { return json_; }

  // Throws Error: the place, what was expected there, and what was found.
  [[noreturn]] void refuse(const std::string& expected) const;
  // The same for a string that a regular expression does not match.
  [[noreturn]] void refuse_pattern(const std::string& pattern) const;
  // The same for a message that is complete.
  [[noreturn]] void refuse_as(const std::string& message) const;

 private:
  // Names from the outside in, joined by dots.
  std::string path() const;

  const Json& json_;
  const std::string& where_;
  const Value* parent_ = nullptr;
  std::string_view name_;
  std::size_t index_ = 0;
  bool indexed_ = false;
};

constexpr std::int64_t kSmallest = std::numeric_limits<std::int64_t>::min();
// Above every size of the format.
constexpr std::int64_t kSizeEnd = std::int64_t{1} << 31;

std::string text(const Value& value);
bool boolean(const Value& value);
double number(const Value& value);
// A whole number of 64 bits, from ``least``.
std::int64_t whole(const Value& value, std::int64_t least);
inline std::int64_t any_whole(const Value& value) { return whole(value, kSmallest); }
inline std::int64_t at_least_0(const Value& value) { return whole(value, 0); }
inline std::int64_t at_least_1(const Value& value) { return whole(value, 1); }
// A whole number from ``least``, below 2^31.
std::int64_t below_end(const Value& value, std::int64_t least);
inline std::int64_t from_0(const Value& value) { return below_end(value, 0); }
inline std::int64_t size(const Value& value) { return below_end(value, 1); }
// A whole number 1..most.
std::int64_t at_most(const Value& value, std::int64_t most);
// 64 hexadecimal digits.
std::string sha256(const Value& value);
// The index of a text in a list of choices.
std::size_t choice(const Value& value, std::initializer_list<std::string_view> choices);

double above_0(const Value& value);
double from_0_to_1(const Value& value);
// A number above 0, at most 1.
double share(const Value& value);
// The text in the field ``name`` of an object, one of the choices, which decides how the object is read.
std::string tag(const Value& value, std::string_view name, std::initializer_list<std::string_view> choices);

const Json& object(const Value& value);
const Json& array(const Value& value);

// A list, whose items are read by ``item``.
template <typename Item>
auto list(const Value& value, Item item, std::size_t least = 0) {
  std::vector<decltype(item(value))> result;
  const Json& items = array(value);
  result.reserve(items.size());
  for (std::size_t i = 0; i < items.size(); ++i) result.push_back(item(Value(items[i], value, i)));
  if (items.size() < least) {
    value.refuse_as("Tuple should have at least " + std::to_string(least) + " item after validation, not " +
                    std::to_string(items.size()));
  }
  return result;
}

// An object whose fields have any name, read by ``item``.
template <typename Item>
auto by_name(const Value& value, Item item) {
  std::map<std::string, decltype(item(value))> result;
  for (const auto& [name, found] : object(value).items()) result.emplace(name, item(Value(found, value, name)));
  return result;
}

// A value that may be null, else read by ``item``.
template <typename Item>
auto nullable(Item item) {
  return [item](const Value& value) {
    std::optional<decltype(item(value))> result;
    if (!value.json().is_null()) result = item(value);
    return result;
  };
}

// The fields of an object. Call done() at the end: fields that nobody asked for are errors.
class Fields {
 public:
  explicit Fields(const Value& value);

  template <typename Item>
  auto required(std::string_view name, Item item) {
    const Json* found = find(name);
    if (found == nullptr) Value(value_.json(), value_, name).refuse_as("Field required");
    return item(Value(*found, value_, name));
  }
  template <typename Item, typename Default>
  auto optional(std::string_view name, Item item, Default otherwise) {
    const Json* found = find(name);
    if (found == nullptr) return static_cast<decltype(item(value_))>(otherwise);
    return item(Value(*found, value_, name));
  }
  void done() const;

 private:
  const Json* find(std::string_view name);

  const Value& value_;
  std::vector<std::string_view> known_;
};

}  // namespace dynexport
