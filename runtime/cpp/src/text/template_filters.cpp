// Filters and tests of chat templates.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>

#include "text/python_text.hpp"
#include "text/template_builtins.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

using Filter = Value (*)(const Value&, const Arguments&, Budget&);

Value made_iterator(std::vector<Value> values) { return Value::of(std::move(values), Items::Kind::kIterator); }

Value trim(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("trim", 0, 1, {"chars"});
  const Value* characters = arguments.find(0, "chars");
  std::optional<std::string> wanted;
  if (characters != nullptr && !characters->is_none()) wanted = shown_text(*characters, budget);
  return Value::of(stripped(shown_text(value, budget), wanted, true, true));
}

Value otherwise(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("default", 0, 2, {"default_value", "boolean"});
  (void)budget;
  const Value* instead = arguments.find(0, "default_value");
  const Value* boolean = arguments.find(1, "boolean");
  if (!value.is_undefined() && !(boolean != nullptr && is_true(*boolean) && !is_true(value))) return value;
  return instead == nullptr ? Value::of(std::string()) : *instead;
}

Value items(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("items", 0, 0);
  if (value.is_undefined()) return made_iterator({});
  if (value.dict() == nullptr) throw template_failed("Can only get item pairs from a mapping.");
  return made_iterator(iterated(call_method(value, "items", {}, budget), budget));
}

// Looks up a path such as "function.name", as the filters that take attributes do.
Value attribute_path(Value value, const Value& path) {
  if (path.text() == nullptr) return item(value, path);
  for (const std::string& part : split(*path.text(), ".", -1)) {
    const bool number =
        !part.empty() && std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (number) throw not_known("the path " + shown(*path.text()));
    value = item(value, Value::of(part));
  }
  return value;
}

Value join(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("join", 0, 2, {"d", "attribute"});
  const Value* separator = arguments.find(0, "d");
  const Value* path = arguments.find(1, "attribute");
  const std::string between = separator == nullptr ? "" : shown_text(*separator, budget);
  std::string out;
  bool first = true;
  for (const Value& entry : iterated(value, budget)) {
    const bool by_path = path != nullptr && !path->is_none();
    out += (first ? "" : between) + shown_text(by_path ? attribute_path(entry, *path) : entry, budget);
    budget.bytes(between.size());
    first = false;
  }
  return Value::of(std::move(out));
}

// select, reject, selectattr and rejectattr.
Value chosen(const Value& value, const Arguments& arguments, Budget& budget, bool by_attribute, bool wanted) {
  const std::size_t offset = by_attribute ? 1 : 0;
  if (!arguments.named.empty() || arguments.given.size() < offset)
    throw not_known("such a filter with select or reject");
  Arguments rest;
  std::string test;
  if (arguments.given.size() > offset) {
    test = arguments.text(offset, "select");
    rest.given.assign(arguments.given.begin() + static_cast<std::ptrdiff_t>(offset) + 1, arguments.given.end());
  }
  std::vector<Value> out;
  if (!is_true(value)) return made_iterator({});
  for (const Value& entry : iterated(value, budget)) {
    budget.step();
    const Value tested = by_attribute ? attribute_path(entry, arguments.given[0]) : entry;
    const bool found = test.empty() ? is_true(tested) : call_test(test, tested, rest, budget);
    if (found == wanted) out.push_back(entry);
  }
  return made_iterator(std::move(out));
}

template <bool kByAttribute, bool kWanted>
Value chosen_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  return chosen(value, arguments, budget, kByAttribute, kWanted);
}

Value map_filter(const Value& value, const Arguments& arguments, Budget& budget) {
  std::vector<Value> out;
  if (!is_true(value)) return made_iterator({});
  if (arguments.given.empty()) {
    arguments.check("map", 0, 0, {"attribute", "default"});
    const Value* path = arguments.find(-1, "attribute");
    const Value* instead = arguments.find(-1, "default");
    if (path == nullptr) throw template_failed("map requires a filter argument");
    if (instead != nullptr) throw not_known("map with a default");
    for (const Value& entry : iterated(value, budget)) out.push_back(attribute_path(entry, *path));
    return made_iterator(std::move(out));
  }
  const std::string& name = arguments.text(0, "map");
  Arguments rest{{arguments.given.begin() + 1, arguments.given.end()}, arguments.named};
  for (const Value& entry : iterated(value, budget)) out.push_back(call_filter(name, entry, rest, budget));
  return made_iterator(std::move(out));
}

Value first(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("first", 0, 0);
  Items* list = value.items();
  if (list != nullptr && list->kind == Items::Kind::kIterator && !list->values.empty()) {
    Value found = list->values.front();
    list->values.erase(list->values.begin());
    return found;
  }
  const std::vector<Value> values = iterated(value, budget);
  return values.empty() ? Value::undefined("No first item, sequence was empty.") : values.front();
}

Value last(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("last", 0, 0);
  const Items* list = value.items();
  if (value.is_undefined() || (list != nullptr && list->kind == Items::Kind::kIterator)) {
    throw not_known("last of an iterator");
  }
  const std::vector<Value> values = iterated(value, budget);
  return values.empty() ? Value::undefined("No last item, sequence was empty.") : values.back();
}

Value reversed(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("reverse", 0, 0);
  if (value.text() != nullptr) {
    std::u32string codes = code_points(*value.text());
    std::reverse(codes.begin(), codes.end());
    return Value::of(utf8(codes));
  }
  if (value.is_undefined()) throw not_known("reverse of an undefined value");
  const bool once = value.items() != nullptr && value.items()->kind == Items::Kind::kIterator;
  std::vector<Value> values = iterated(value, budget);
  std::reverse(values.begin(), values.end());
  return Value::of(std::move(values), once ? Items::Kind::kList : Items::Kind::kIterator);
}

std::optional<double> real_of(const std::string& text) {
  const std::string plain = stripped(text, std::nullopt, true, true);
  double found = 0;
  const auto [end, error] = std::from_chars(plain.data(), plain.data() + plain.size(), found);
  if (error != std::errc() || end != plain.data() + plain.size() || !std::isfinite(found)) return std::nullopt;
  return found;
}

Value to_integer(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("int", 0, 1, {"default"});
  (void)budget;
  std::optional<double> number = value.number();
  if (const auto whole = value.integer()) return Value::of(*whole);
  if (value.text() != nullptr) number = real_of(*value.text());
  const Value* instead = arguments.find(0, "default");
  if (!number || std::isnan(*number)) return instead == nullptr ? Value::of(std::int64_t{0}) : *instead;
  if (std::fabs(*number) > 9e15) throw not_known("so large a number");
  return Value::of(static_cast<std::int64_t>(*number));
}

Value replace(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("replace", 2, 3);
  const std::string from = shown_text(arguments.given[0], budget), to = shown_text(arguments.given[1], budget);
  const auto most = arguments.given.size() > 2 ? arguments.given[2].integer() : std::int64_t{-1};
  const std::string text = shown_text(value, budget);
  budget.bytes((text.size() + 1) * (to.size() / std::max<std::size_t>(1, from.size()) + 1));
  return Value::of(replaced_text(text, from, to, most.value_or(-1)));
}

template <std::string (*kChange)(std::string_view)>
Value changed(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("a filter of text", 0, 0);
  return Value::of(kChange(shown_text(value, budget)));
}

Value counted(const Value& value, const Arguments& arguments, Budget&) {
  arguments.check("length", 0, 0);
  return Value::of(length(value));
}

Value listed(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("list", 0, 0);
  return Value::of(iterated(value, budget));
}

Value text_of(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("string", 0, 0);
  return Value::of(shown_text(value, budget));
}

Value json_of(const Value& value, const Arguments& arguments, Budget& budget) {
  return Value::of(to_json(value, arguments, budget));
}

const std::map<std::string, Filter, std::less<>>& filters() {
  static const std::map<std::string, Filter, std::less<>> known = {
      {"trim", trim},
      {"default", otherwise},
      {"d", otherwise},
      {"items", items},
      {"join", join},
      {"select", chosen_filter<false, true>},
      {"reject", chosen_filter<false, false>},
      {"selectattr", chosen_filter<true, true>},
      {"rejectattr", chosen_filter<true, false>},
      {"map", map_filter},
      {"first", first},
      {"last", last},
      {"reverse", reversed},
      {"int", to_integer},
      {"replace", replace},
      {"upper", changed<upper>},
      {"lower", changed<lower>},
      {"capitalize", changed<capitalized>},
      {"length", counted},
      {"count", counted},
      {"list", listed},
      {"string", text_of},
      {"tojson", json_of},
  };
  return known;
}

std::int64_t whole(const Value& value) {
  const auto number = value.integer();
  if (!number) throw not_known("such a test of a " + value.type());
  return *number;
}

// Tests without arguments.
using Property = bool (*)(const Value&);

bool is_sequence(const Value& value) {
  return is_iterable(value) && (value.items() == nullptr || value.items()->kind <= Items::Kind::kTuple);
}

const std::map<std::string, Property, std::less<>>& properties() {
  using V = const Value&;
  static const std::map<std::string, Property, std::less<>> known = {
      {"defined", [](V value) { return !value.is_undefined(); }},
      {"undefined", [](V value) { return value.is_undefined(); }},
      {"none", [](V value) { return value.is_none(); }},
      {"string", [](V value) { return value.text() != nullptr; }},
      {"mapping", [](V value) { return value.dict() != nullptr; }},
      {"iterable", is_iterable},
      {"sequence", is_sequence},
      {"number", [](V value) { return value.number().has_value(); }},
      {"integer", [](V value) { return value.as<std::int64_t>() != nullptr; }},
      {"float", [](V value) { return value.as<double>() != nullptr; }},
      {"boolean", [](V value) { return value.as<bool>() != nullptr; }},
      {"true", [](V value) { return value.as<bool>() != nullptr && *value.as<bool>(); }},
      {"false", [](V value) { return value.as<bool>() != nullptr && !*value.as<bool>(); }},
      {"odd", [](V value) { return whole(value) % 2 != 0; }},
      {"even", [](V value) { return whole(value) % 2 == 0; }},
  };
  return known;
}

bool is_divisible(const Value& value, const Value& by, Budget&) {
  const std::int64_t divisor = whole(by);
  if (divisor == 0) throw template_failed("integer modulo by zero");
  return divisor == -1 || whole(value) % divisor == 0;
}

bool differs(const Value& value, const Value& other, Budget& budget) { return !equal(value, other, budget); }
bool is_in(const Value& value, const Value& other, Budget& budget) { return contains(other, value, budget); }
bool is_greater(const Value& value, const Value& other, Budget& budget) { return compared(value, other, budget) > 0; }
bool is_less(const Value& value, const Value& other, Budget& budget) { return compared(value, other, budget) < 0; }

// Tests with one argument.
using Relation = bool (*)(const Value&, const Value&, Budget&);

const std::map<std::string, Relation, std::less<>>& relations() {
  static const std::map<std::string, Relation, std::less<>> known = {
      {"divisibleby", is_divisible},
      {"eq", equal},
      {"equalto", equal},
      {"==", equal},
      {"ne", differs},
      {"!=", differs},
      {"in", is_in},
      {"gt", is_greater},
      {">", is_greater},
      {"lt", is_less},
      {"<", is_less},
  };
  return known;
}

}  // namespace

Value call_filter(const std::string& name, const Value& value, const Arguments& arguments, Budget& budget) {
  budget.step();
  const auto found = filters().find(name);
  if (found == filters().end()) throw not_known("the filter " + shown(name));
  return found->second(value, arguments, budget);
}

bool call_test(const std::string& name, const Value& value, const Arguments& arguments, Budget& budget) {
  budget.step();
  if (const auto property = properties().find(name); property != properties().end()) {
    arguments.check(name, 0, 0);
    return property->second(value);
  }
  const auto relation = relations().find(name);
  if (relation == relations().end()) throw not_known("the test " + shown(name));
  arguments.check(name, 1, 1);
  return relation->second(value, arguments.given[0], budget);
}

}  // namespace dynexport::text
