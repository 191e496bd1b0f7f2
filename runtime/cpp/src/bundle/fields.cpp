// Reads the fields of a JSON value by what is expected there.
#include "bundle/fields.hpp"

#include <algorithm>
#include <cmath>

#include "bundle/text.hpp"
#include "dynexport/error.hpp"

namespace dynexport {
namespace {

// Most characters of a place, and of a value, in an error.
constexpr std::size_t kPlace = 80, kFound = 80;

// Returns a short value as Python's repr; a long text is cut before it is escaped.
std::string found_text(const Json& json) {
  if (!json.is_string()) return std::string(cut(quoted_value(json), kFound));
  return std::string(cut(in_quotes(std::string_view(json.get_ref<const std::string&>())), kFound));
}

// Whether the text wrote a whole number; one of more than 64 bits, of at most 40 digits, is floating point.
bool is_whole(const Json& json) {
  if (json.is_number_integer()) return true;
  if (!json.is_number_float()) return false;
  const double value = json.get<double>();
  return std::abs(value) >= 9.2e18 && std::abs(value) < 1e40 && std::trunc(value) == value;
}

std::int64_t bounded(const Value& value, std::int64_t least, std::uint64_t end, const char* end_text) {
  const Json& json = value.json();
  if (!is_whole(json)) value.refuse("a valid integer");
  const bool above =
      json.is_number_float() ? json.get<double>() > 0 : json.is_number_unsigned() && json.get<std::uint64_t>() >= end;
  if (above) value.refuse(std::string("less than ") + end_text);
  if (json.is_number_float() || json.get<std::int64_t>() < least) {
    value.refuse("greater than or equal to " + std::to_string(least));
  }
  return json.get<std::int64_t>();
}

}  // namespace

std::string Value::path() const {
  std::vector<const Value*> way;
  for (const Value* value = this; value->parent_ != nullptr; value = value->parent_) way.push_back(value);
  std::string result;
  for (auto at = way.rbegin(); at != way.rend(); ++at) {
    if (at != way.rbegin()) result += '.';
    result += (*at)->indexed_ ? std::to_string((*at)->index_) : std::string((*at)->name_);
  }
  return std::string(cut(result, kPlace));
}

void Value::refuse_as(const std::string& message) const {
  const std::string place = path();
  throw Error(where_ + ": " + place + (place.empty() ? "" : ": ") + without_breaks(message));
}

void Value::refuse(const std::string& expected) const {
  refuse_as("Input should be " + expected + (json_.is_structured() ? "" : ", found " + found_text(json_)));
}

void Value::refuse_pattern(const std::string& pattern) const {
  refuse_as("String should match pattern '" + pattern + "', found " + found_text(json_));
}

std::string text(const Value& value) {
  if (!value.json().is_string()) value.refuse("a valid string");
  return value.json().get<std::string>();
}

bool boolean(const Value& value) {
  if (!value.json().is_boolean()) value.refuse("a valid boolean");
  return value.json().get<bool>();
}

double number(const Value& value) {
  if (!value.json().is_number()) value.refuse("a valid number");
  return value.json().get<double>();
}

std::int64_t whole(const Value& value, std::int64_t least) {
  return bounded(value, least, std::uint64_t{1} << 63, "9223372036854775808");
}

std::int64_t below_end(const Value& value, std::int64_t least) {
  return bounded(value, least, static_cast<std::uint64_t>(kSizeEnd), "2147483648");
}

std::string sha256(const Value& value) {
  std::string found = text(value);
  const auto is_digit = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
  if (found.size() != 64 || !std::all_of(found.begin(), found.end(), is_digit)) {
    value.refuse_pattern("^[0-9a-f]{64}$");
  }
  return found;
}

std::size_t choice(const Value& value, std::initializer_list<std::string_view> choices) {
  const Json& json = value.json();
  if (json.is_string()) {
    const auto at = std::find(choices.begin(), choices.end(), json.get_ref<const std::string&>());
    if (at != choices.end()) return static_cast<std::size_t>(at - choices.begin());
  }
  std::string expected;
  std::size_t left = choices.size();
  for (const std::string_view name : choices) {
    --left;
    expected += "'" + std::string(name) + (left > 1 ? "', " : left == 1 ? "' or " : "'");
  }
  value.refuse(expected);
}

double above_0(const Value& value) {
  const double found = number(value);
  if (!(found > 0)) value.refuse("greater than 0");
  return found;
}

double from_0_to_1(const Value& value) {
  const double found = number(value);
  if (!(found >= 0)) value.refuse("greater than or equal to 0");
  if (!(found <= 1)) value.refuse("less than or equal to 1");
  return found;
}

double share(const Value& value) {
  if (!(number(value) <= 1)) value.refuse("less than or equal to 1");
  return above_0(value);
}

std::int64_t at_most(const Value& value, std::int64_t most) {
  const std::int64_t found = size(value);
  if (found > most) value.refuse("less than or equal to " + std::to_string(most));
  return found;
}

std::string tag(const Value& value, std::string_view name, std::initializer_list<std::string_view> choices) {
  const Json& fields = object(value);
  const auto found = fields.find(name);
  if (found == fields.end()) value.refuse_as("Unable to extract tag using discriminator '" + std::string(name) + "'");
  std::string expected;
  for (const std::string_view known : choices) {
    if (*found == known) return std::string(known);
    expected += (expected.empty() ? "'" : ", '") + std::string(known) + "'";
  }
  const std::string shown = found->is_string() ? found->get<std::string>() : quoted_value(*found);
  value.refuse_as("Input tag '" + shown + "' found using '" + std::string(name) +
                  "' does not match any of the expected tags: " + expected);
}

const Json& object(const Value& value) {
  if (!value.json().is_object()) value.refuse("an object");
  return value.json();
}

const Json& array(const Value& value) {
  if (!value.json().is_array()) value.refuse("a valid array");
  return value.json();
}

Fields::Fields(const Value& value) : value_(value) { object(value); }

const Json* Fields::find(std::string_view name) {
  known_.push_back(name);
  for (const auto& [key, found] : value_.json().items()) {
    if (key == name) return &found;
  }
  return nullptr;
}

void Fields::done() const {
  for (const auto& [key, found] : value_.json().items()) {
    if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
    const std::string shown = found.is_structured() ? "" : ", found " + found_text(found);
    Value(found, value_, key).refuse_as("Extra inputs are not permitted" + shown);
  }
}

}  // namespace dynexport
