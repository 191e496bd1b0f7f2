#include "fields.hpp"

#include <algorithm>
#include <limits>

#include "api_error.hpp"

namespace service {
namespace {

// Fields of OpenAI's API that are refused by name, as the answer would not be what they ask for.
const std::unordered_set<std::string> kUnsupported = {"audio",      "function_call",     "functions",
                                                      "modalities", "prediction",        "reasoning_effort",
                                                      "verbosity",  "web_search_options"};

bool above_int64(const Json& value) {
  return value.is_number_unsigned() && value.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max();
}

// Returns a bound as it is written: no exponent, no zeros at the end.
std::string bound_text(double bound) {
  std::string text = std::to_string(bound);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.back() == '.') text.pop_back();
  return text;
}

}  // namespace

std::string found_text(const Json& found) {
  if (found.is_boolean()) return found.get<bool>() ? ", found True" : ", found False";
  return found.is_number() ? ", found " + found.dump() : "";
}

void refuse(const std::string& where, const std::string& expected, const Json& found) {
  throw wrong_field(where, "expected " + expected + found_text(found));
}

bool are_ids(const Json& value) {
  return value.is_array() && std::all_of(value.begin(), value.end(), [](const Json& one) {
           return one.is_number_unsigned() || (one.is_number_integer() && one.get<std::int64_t>() >= 0);
         });
}

std::int64_t bounded(const Json& value) {
  return above_int64(value) ? kLargest : std::min(value.get<std::int64_t>(), kLargest);
}

std::string Fields::where(std::string_view name) const {
  return place_.empty() ? std::string(name) : place_ + "." + std::string(name);
}

const Json* Fields::find(std::string_view name) {
  known_.emplace(name);
  const auto found = object_.find(std::string(name));
  return found == object_.end() ? nullptr : &*found;
}

const Json* Fields::any(std::string_view name) {
  const Json* found = find(name);
  return found == nullptr || found->is_null() ? nullptr : found;
}

const Json& Fields::required(std::string_view name) {
  const Json* found = find(name);
  if (found == nullptr) {
    throw ApiError(400, "you must provide a " + where(name) + " parameter")
        .param(where(name))
        .code("missing_required_parameter");
  }
  return *found;
}

std::string Fields::text(std::string_view name) {
  const Json& found = required(name);
  if (!found.is_string()) refuse(where(name), "a valid string", found);
  return found.get<std::string>();
}

std::optional<std::string> Fields::text_or_none(std::string_view name) {
  return any(name) == nullptr ? std::nullopt : std::optional(text(name));
}

std::optional<bool> Fields::boolean(std::string_view name, bool nullable) {
  const Json* found = nullable ? any(name) : find(name);
  if (found == nullptr) return std::nullopt;
  if (!found->is_boolean()) refuse(where(name), "a valid boolean", *found);
  return found->get<bool>();
}

std::optional<std::int64_t> Fields::integer(std::string_view name, std::optional<std::int64_t> least,
                                            std::optional<std::int64_t> most) {
  const Json* found = any(name);
  if (found == nullptr) return std::nullopt;
  if (!found->is_number_integer()) refuse(where(name), "a valid integer", *found);
  const std::int64_t value = bounded(*found);
  if (least && value < *least) {
    refuse(where(name), "a number greater than or equal to " + std::to_string(*least), *found);
  }
  if (most && value > *most) refuse(where(name), "a number less than or equal to " + std::to_string(*most), *found);
  return value;
}

std::optional<std::int64_t> Fields::seed(std::string_view name) {
  const Json* found = any(name);
  if (found == nullptr) return std::nullopt;
  if (!found->is_number_integer()) refuse(where(name), "a valid integer", *found);
  if (above_int64(*found)) refuse(where(name), "a number less than 9223372036854775808", *found);
  return found->get<std::int64_t>();
}

std::optional<double> Fields::number(std::string_view name, const Range& range) {
  const Json* found = any(name);
  if (found == nullptr) return std::nullopt;
  if (!found->is_number()) refuse(where(name), "a valid number", *found);
  const auto value = found->get<double>();
  if (range.least && value < *range.least) {
    refuse(where(name), "a number greater than or equal to " + bound_text(*range.least), *found);
  }
  if (range.above && value <= *range.above) {
    refuse(where(name), "a number greater than " + bound_text(*range.above), *found);
  }
  if (range.most && value > *range.most) {
    refuse(where(name), "a number less than or equal to " + bound_text(*range.most), *found);
  }
  return value;
}

std::optional<Ids> Fields::ids(std::string_view name) {
  const Json* found = any(name);
  return found == nullptr ? std::nullopt : std::optional(ids_of(name, *found));
}

Ids Fields::required_ids(std::string_view name) { return ids_of(name, required(name)); }

Ids Fields::ids_of(std::string_view name, const Json& list) const {
  if (!list.is_array()) refuse(where(name), "a valid list", list);
  Ids result;
  result.reserve(list.size());
  for (const Json& one : list) {
    if (!one.is_number_integer() || bounded(one) < 0) {
      refuse(where(name) + "[" + std::to_string(result.size()) + "]",
             one.is_number_integer() ? "a number greater than or equal to 0" : "a valid integer", one);
    }
    result.push_back(bounded(one));
  }
  return result;
}

const Json* Fields::object(std::string_view name, std::string_view what) {
  const Json* found = any(name);
  if (found != nullptr && !found->is_object()) refuse(where(name), std::string(what), *found);
  return found;
}

const Json* Fields::objects(std::string_view name, bool required) {
  const Json* found = required ? &this->required(name) : any(name);
  if (found == nullptr) return nullptr;
  if (!found->is_array()) refuse(where(name), "a valid list", *found);
  for (std::size_t index = 0; index < found->size(); ++index) {
    const Json& one = (*found)[index];
    if (!one.is_object()) refuse(where(name) + "[" + std::to_string(index) + "]", "a valid dictionary", one);
  }
  return found;
}

std::optional<std::string> Fields::one_of(std::string_view name, const std::vector<std::string>& known) {
  const Json* found = any(name);
  if (found == nullptr) return std::nullopt;
  if (found->is_string() && std::count(known.begin(), known.end(), found->get<std::string>()) != 0) {
    return found->get<std::string>();
  }
  std::string expected;
  for (std::size_t index = 0; index < known.size(); ++index) {
    if (index != 0) expected += index + 1 == known.size() ? " or " : ", ";
    expected += "'" + known[index] + "'";
  }
  refuse(where(name), expected, *found);
}

void Fields::only_false(std::string_view name) {
  const Json* found = any(name);
  if (found != nullptr && *found != Json(false) && *found != Json(0)) refuse(where(name), "False", *found);
}

void Fields::only_null(std::string_view name) {
  const Json* found = any(name);
  if (found != nullptr) refuse(where(name), "None", *found);
}

void Fields::finish() const {
  for (const auto& item : object_.items()) {
    if (known_.count(item.key()) != 0) continue;
    const std::string place = where(item.key());
    if (kUnsupported.count(place) != 0) {
      throw ApiError(400, place + ": not supported by this server; leave it out")
          .param(place)
          .code("unsupported_parameter");
    }
    throw ApiError(400, "Unrecognized request argument supplied: " + place).param(place).code("unknown_parameter");
  }
}

}  // namespace service
