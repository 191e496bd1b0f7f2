// Methods, attributes, elements and slices of the values of chat templates.
#include <algorithm>
#include <initializer_list>
#include <map>
#include <optional>

#include "text/python_text.hpp"
#include "text/template_builtins.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

using Method = Value (*)(const std::string&, const Arguments&, Budget&);

// Every method of Python's types: what is not one is a key or undefined.
constexpr std::string_view kTextMethods =
    " capitalize casefold center count encode endswith expandtabs find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
    "maketrans partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split "
    "splitlines "
    "startswith strip swapcase title translate upper zfill ";
constexpr std::string_view kListMethods = " append clear copy count extend index insert pop remove reverse sort ";
constexpr std::string_view kDictMethods = " clear copy fromkeys get items keys pop popitem setdefault update values ";
constexpr std::string_view kNumberMethods =
    " as_integer_ratio bit_count bit_length conjugate denominator from_bytes fromhex hex imag is_integer numerator "
    "real "
    "to_bytes ";

bool is_among(std::string_view names, const std::string& name) {
  return names.find(" " + name + " ") != std::string_view::npos;
}

std::optional<std::string> optional_text(const Arguments& arguments, std::size_t place) {
  if (arguments.given.size() <= place || arguments.given[place].is_none()) return std::nullopt;
  return arguments.text(place, "a method of str");
}

std::int64_t number_or(const Arguments& arguments, int place, const char* name, std::int64_t otherwise) {
  const Value* found = arguments.find(place, name);
  if (found == nullptr) return otherwise;
  if (!found->integer()) throw template_failed("'" + found->type() + "' object cannot be interpreted as an integer");
  return *found->integer();
}

template <bool kLeft, bool kRight>
Value strip(const std::string& text, const Arguments& arguments, Budget&) {
  arguments.check("strip", 0, 1);
  return Value::of(stripped(text, optional_text(arguments, 0), kLeft, kRight));
}

Value texts(const std::vector<std::string>& parts, Budget& budget) {
  std::vector<Value> values;
  for (const std::string& part : parts) {
    budget.bytes(part.size() + sizeof(Value));
    values.push_back(Value::of(part));
  }
  return Value::of(std::move(values));
}

Value split_text(const std::string& text, const Arguments& arguments, Budget& budget) {
  arguments.check("split", 0, 2, {"sep", "maxsplit"});
  const Value* separator = arguments.find(0, "sep");
  std::optional<std::string> wanted;
  if (separator != nullptr && !separator->is_none()) {
    if (separator->text() == nullptr) throw template_failed("must be str or None, not " + separator->type());
    wanted = *separator->text();
    if (wanted->empty()) throw template_failed("empty separator");
  }
  return texts(split(text, wanted, number_or(arguments, 1, "maxsplit", -1)), budget);
}

bool begins(const std::string& text, const std::string& part) { return text.compare(0, part.size(), part) == 0; }

bool ends(const std::string& text, const std::string& part) {
  return text.size() >= part.size() && text.compare(text.size() - part.size(), part.size(), part) == 0;
}

// startswith and endswith: of one text, or of any of a tuple.
template <bool (*kMatches)(const std::string&, const std::string&)>
Value matches(const std::string& text, const Arguments& arguments, Budget& budget) {
  arguments.check("startswith", 1, 1);
  const Value& wanted = arguments.given[0];
  if (wanted.text() != nullptr) return Value::of(kMatches(text, *wanted.text()));
  if (wanted.items() == nullptr || wanted.items()->kind != Items::Kind::kTuple) {
    throw template_failed("startswith first arg must be str or a tuple of str, not " + wanted.type());
  }
  bool any = false;
  for (const Value& part : iterated(wanted, budget))
    any = any || (part.text() != nullptr && kMatches(text, *part.text()));
  return Value::of(any);
}

Value replace(const std::string& text, const Arguments& arguments, Budget& budget) {
  arguments.check("replace", 2, 3);
  const std::string &from = arguments.text(0, "replace"), &to = arguments.text(1, "replace");
  budget.bytes((text.size() + 1) * (to.size() / std::max<std::size_t>(1, from.size()) + 1));
  return Value::of(replaced_text(text, from, to, number_or(arguments, 2, "", -1)));
}

Value joined(const std::string& text, const Arguments& arguments, Budget& budget) {
  arguments.check("join", 1, 1);
  std::string out;
  bool first = true;
  for (const Value& part : iterated(arguments.given[0], budget)) {
    if (part.text() == nullptr)
      throw template_failed("sequence item: expected str instance, " + part.type() + " found");
    out += (first ? "" : text) + *part.text();
    budget.bytes(text.size() + part.text()->size());
    first = false;
  }
  return Value::of(std::move(out));
}

Value find(const std::string& text, const Arguments& arguments, Budget&) {
  arguments.check("find", 1, 1);
  const std::size_t found = text.find(arguments.text(0, "find"));
  if (found == std::string::npos) return Value::of(std::int64_t{-1});
  return Value::of(character_count(std::string_view(text).substr(0, found)));
}

Value count(const std::string& text, const Arguments& arguments, Budget&) {
  arguments.check("count", 1, 1);
  const std::string& part = arguments.text(0, "count");
  if (part.empty()) return Value::of(character_count(text) + 1);
  std::int64_t found = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++found;
  return Value::of(found);
}

Value lines(const std::string& text, const Arguments& arguments, Budget& budget) {
  arguments.check("splitlines", 0, 0);
  return texts(split_lines(text), budget);
}

template <std::string (*kChange)(std::string_view)>
Value changed(const std::string& text, const Arguments& arguments, Budget&) {
  arguments.check("a method of str", 0, 0);
  return Value::of(kChange(text));
}

Value without_prefix(const std::string& text, const Arguments& arguments, Budget&) {
  arguments.check("removeprefix", 1, 1);
  const std::string& part = arguments.text(0, "removeprefix");
  return Value::of(begins(text, part) ? text.substr(part.size()) : text);
}

Value without_suffix(const std::string& text, const Arguments& arguments, Budget&) {
  arguments.check("removesuffix", 1, 1);
  const std::string& part = arguments.text(0, "removesuffix");
  return Value::of(ends(text, part) ? text.substr(0, text.size() - part.size()) : text);
}

const std::map<std::string, Method, std::less<>>& methods() {
  static const std::map<std::string, Method, std::less<>> known = {
      {"strip", strip<true, true>},
      {"lstrip", strip<true, false>},
      {"rstrip", strip<false, true>},
      {"split", split_text},
      {"startswith", matches<begins>},
      {"endswith", matches<ends>},
      {"replace", replace},
      {"join", joined},
      {"find", find},
      {"count", count},
      {"splitlines", lines},
      {"upper", changed<upper>},
      {"lower", changed<lower>},
      {"capitalize", changed<capitalized>},
      {"removeprefix", without_prefix},
      {"removesuffix", without_suffix},
  };
  return known;
}

Value call_dict(const Dict& dict, const std::string& name, const Arguments& arguments, Budget& budget) {
  if (name == "get") {
    arguments.check("get", 1, 2);
    const std::string* key = arguments.given[0].text();
    const Value* found = key == nullptr ? nullptr : dict.find(*key);
    if (found != nullptr) return *found;
    return arguments.given.size() > 1 ? arguments.given[1] : Value();
  }
  if (name != "items" && name != "keys" && name != "values")
    throw not_known("the method " + shown(name) + " of a dict");
  arguments.check(name, 0, 0);
  std::vector<Value> out;
  budget.bytes(dict.entries().size() * 2 * sizeof(Value));
  for (const auto& [key, value] : dict.entries()) {
    if (name == "items") {
      out.push_back(Value::of({Value::of(key), value}, Items::Kind::kTuple));
    } else {
      out.push_back(name == "keys" ? Value::of(key) : value);
    }
  }
  return Value::of(std::move(out), Items::Kind::kView);
}

Value loop_attribute(const Loop& loop, const std::string& name) {
  const auto at = static_cast<std::int64_t>(loop.at), size = static_cast<std::int64_t>(loop.values->size());
  if (name == "index") return Value::of(at + 1);
  if (name == "index0") return Value::of(at);
  if (name == "revindex") return Value::of(size - at);
  if (name == "revindex0") return Value::of(size - at - 1);
  if (name == "first") return Value::of(at == 0);
  if (name == "last") return Value::of(at + 1 == size);
  if (name == "length") return Value::of(size);
  if (name == "depth") return Value::of(loop.depth);
  if (name == "depth0") return Value::of(loop.depth - 1);
  if (name == "previtem") return at > 0 ? (*loop.values)[loop.at - 1] : Value::undefined("there is no previous item");
  if (name == "nextitem")
    return at + 1 < size ? (*loop.values)[loop.at + 1] : Value::undefined("there is no next item");
  throw not_known("loop." + name);
}

[[nodiscard]] Value missing(const Value& value, const std::string& name) {
  const std::string type = value.is_none() ? "None" : "'" + value.type() + " object'";
  return Value::undefined(type + " has no attribute " + python_repr(name));
}

}  // namespace

bool has_method(const Value& value, const std::string& name) {
  if (value.text() != nullptr) return is_among(kTextMethods, name);
  if (value.dict() != nullptr) return is_among(kDictMethods, name);
  if (value.number()) return is_among(kNumberMethods, name);
  return value.items() != nullptr && is_among(kListMethods, name);
}

Value call_method(const Value& value, const std::string& name, const Arguments& arguments, Budget& budget) {
  budget.step();
  if (const auto* text = value.text()) {
    const auto found = methods().find(name);
    if (found == methods().end()) throw not_known("the method " + shown(name) + " of a text");
    budget.bytes(text->size());
    return found->second(*text, arguments, budget);
  }
  if (const Dict* dict = value.dict()) return call_dict(*dict, name, arguments, budget);
  throw not_known("the method " + shown(name) + " of a " + value.type());
}

Value attribute(const Value& value, const std::string& name) {
  if (const auto* undefined = value.as<Undefined>()) throw template_failed(undefined->why);
  if (name.compare(0, 2, "__") == 0 || has_method(value, name)) throw not_known("the attribute " + shown(name));
  if (const auto* loop = value.as<std::shared_ptr<const Loop>>()) return loop_attribute(**loop, name);
  const Value* found = nullptr;
  if (const Dict* dict = value.dict()) found = dict->find(name);
  if (const auto* space = value.as<std::shared_ptr<Namespace>>()) found = (*space)->fields.find(name);
  return found == nullptr ? missing(value, name) : *found;
}

Value item(const Value& value, const Value& key) {
  if (const auto* undefined = value.as<Undefined>()) throw template_failed(undefined->why);
  if (const std::string* name = key.text()) {
    const Value* found = value.dict() == nullptr ? nullptr : value.dict()->find(*name);
    return found == nullptr ? attribute(value, *name) : *found;
  }
  const auto place = key.integer();
  const Items* list = value.items();
  const bool indexed = value.text() != nullptr || (list != nullptr && list->kind <= Items::Kind::kTuple);
  const std::string type = value.is_none() ? "None" : value.type() + " object";
  if (!place || !indexed) return Value::undefined(type + " has no such element");
  const std::int64_t size = length(value), at = *place < 0 ? *place + size : *place;
  if (at < 0 || at >= size) return Value::undefined(type + " has no element " + std::to_string(*place));
  if (list != nullptr) return list->values[static_cast<std::size_t>(at)];
  std::size_t byte = 0;
  for (std::int64_t i = 0; i < at; ++i) byte += length_at(*value.text(), byte);
  return Value::of(value.text()->substr(byte, length_at(*value.text(), byte)));
}

Value slice(const Value& value, const Value* begin, const Value* end, const Value* step, Budget& budget) {
  if (const auto* undefined = value.as<Undefined>()) throw template_failed(undefined->why);
  const Items* list = value.items();
  if (value.text() == nullptr && (list == nullptr || list->kind > Items::Kind::kTuple)) {
    throw template_failed("'" + value.type() + "' object is not subscriptable");
  }
  const auto number = [](const Value* given) -> std::optional<std::int64_t> {
    if (given == nullptr || given->is_none()) return std::nullopt;
    if (!given->integer()) throw template_failed("slice indices must be integers or None or have an __index__ method");
    return given->integer();
  };
  const std::int64_t size = length(value), by = number(step).value_or(1);
  if (by == 0) throw template_failed("slice step cannot be zero");
  // As Python's slice.indices.
  const std::int64_t low = by > 0 ? 0 : -1, high = by > 0 ? size : size - 1;
  const auto place = [&](const Value* given, std::int64_t otherwise) {
    const auto found = number(given);
    if (!found) return otherwise;
    return std::clamp(*found < 0 ? *found + size : *found, low, high);
  };
  const std::int64_t from = place(begin, by > 0 ? low : high), to = place(end, by > 0 ? high : low);
  const std::u32string codes = list == nullptr ? code_points(*value.text()) : std::u32string();
  std::vector<Value> values;
  std::u32string text;
  const std::int64_t stride = std::clamp(by, -size - 1, size + 1);
  for (std::int64_t at = from; by > 0 ? at < to : at > to; at += stride) {
    budget.step();
    if (list != nullptr) {
      values.push_back(list->values[static_cast<std::size_t>(at)]);
    } else {
      text += codes[static_cast<std::size_t>(at)];
    }
  }
  return list == nullptr ? Value::of(utf8(text)) : Value::of(std::move(values), list->kind);
}

}  // namespace dynexport::text
