// Values of a chat template: making, comparing, iterating, showing.
#include "text/template_value.hpp"

#include <algorithm>
#include <cmath>

#include "bundle/number_text.hpp"
#include "text/python_text.hpp"
#include "text/utf8.hpp"

namespace dynexport::text {

namespace {

constexpr int kDeepest = 64;

void check_depth(int depth) {
  if (depth > kDeepest) throw not_known("so deep a nesting of lists");
}

[[noreturn]] void fail_undefined(const Undefined& value) { throw template_failed(value.why); }

std::string joined(const std::vector<Value>& values, Budget& budget) {
  std::string out;
  for (const Value& value : values) out += (out.empty() ? "" : ", ") + represented(value, budget);
  return out;
}

std::string shown_items(const Items& items, Budget& budget) {
  if (items.kind == Items::Kind::kList) return "[" + joined(items.values, budget) + "]";
  if (items.kind != Items::Kind::kTuple) throw not_known("the text of an iterator");
  return "(" + joined(items.values, budget) + (items.values.size() == 1 ? ",)" : ")");
}

std::string shown_dict(const Dict& dict, Budget& budget) {
  std::string out = "{";
  for (const auto& [key, value] : dict.entries()) {
    out += (out.size() == 1 ? "" : ", ") + python_repr(key) + ": " + represented(value, budget);
    budget.bytes(out.size() / 8);
  }
  return out + "}";
}

bool equal_items(const std::vector<Value>& left, const std::vector<Value>& right, Budget& budget) {
  return left.size() == right.size() &&
         std::equal(left.begin(), left.end(), right.begin(),
                    [&](const Value& one, const Value& other) { return equal(one, other, budget); });
}

bool equal_dicts(const Dict& left, const Dict& right, Budget& budget) {
  if (left.entries().size() != right.entries().size()) return false;
  return std::all_of(left.entries().begin(), left.entries().end(), [&](const auto& entry) {
    const Value* other = right.find(entry.first);
    return other != nullptr && equal(entry.second, *other, budget);
  });
}

}  // namespace

Error not_known(const std::string& what) {
  return Error("chat_template.jinja: " + what + " is not known to this runtime; render conversations yourself");
}

Error template_failed(const std::string& why) {
  return Error("chat_template.jinja: the chat template failed: " + why.substr(0, 500));
}

void Budget::spend(std::int64_t& left, std::int64_t count) {
  left -= count;
  if (left < 0) throw template_failed("it takes too many steps, or too much memory");
}

const Value* Dict::find(const std::string& key) const {
  const auto found = places_.find(key);
  return found == places_.end() ? nullptr : &entries_[found->second].second;
}

void Dict::set(const std::string& key, Value value) {
  if (!value.is_plain()) throw not_known("a " + value.type() + " in a dict");
  depth_ = std::max(depth_, value.depth() + 1);
  check_depth(depth_);
  const auto [place, is_new] = places_.try_emplace(key, entries_.size());
  if (is_new) {
    entries_.emplace_back(key, std::move(value));
  } else {
    entries_[place->second].second = std::move(value);
  }
}

Value Value::of(std::vector<Value> values, Items::Kind kind) {
  auto items = std::make_shared<Items>();
  items->kind = kind;
  for (const Value& value : values) {
    if (!value.is_plain()) throw not_known("a " + value.type() + " in a list");
    items->depth = std::max(items->depth, value.depth() + 1);
  }
  check_depth(items->depth);
  items->values = std::move(values);
  return Value(Data(std::move(items)));
}

Value Value::of_json(const nlohmann::ordered_json& json, int depth) {
  check_depth(depth);
  if (json.is_null()) return {};
  if (json.is_boolean()) return of(json.get<bool>());
  if (json.is_string()) return of(json.get<std::string>());
  if (json.is_number_float()) return of(json.get<double>());
  if (json.is_number_unsigned() && json.get<std::uint64_t>() > std::uint64_t{INT64_MAX}) {
    throw Error("template variables: expected integers of 64 bits, found " + json.dump().substr(0, 40));
  }
  if (json.is_number()) return of(json.get<std::int64_t>());
  if (json.is_array()) {
    std::vector<Value> values;
    for (const auto& entry : json) values.push_back(of_json(entry, depth + 1));
    return of(std::move(values));
  }
  Dict dict;
  for (const auto& [key, entry] : json.items()) dict.set(key, of_json(entry, depth + 1));
  return of(std::move(dict));
}

std::optional<std::int64_t> Value::integer() const {
  if (const auto* flag = as<bool>()) return *flag ? 1 : 0;
  if (const auto* number = as<std::int64_t>()) return *number;
  return std::nullopt;
}

std::optional<double> Value::number() const {
  if (const auto* real = as<double>()) return *real;
  if (const auto whole = integer()) return static_cast<double>(*whole);
  return std::nullopt;
}

int Value::depth() const {
  if (const Items* list = items()) return list->depth;
  if (const Dict* mapping = dict()) return mapping->depth();
  return 0;
}

bool Value::is_plain() const { return data_.index() < 8; }

std::string Value::type() const {
  constexpr const char* kNames[] = {"Undefined", "NoneType", "bool",      "int",      "float",      "str",
                                    "list",      "dict",     "Namespace", "function", "LoopContext"};
  return kNames[data_.index()];
}

bool is_true(const Value& value) {
  if (value.is_undefined() || value.is_none()) return false;
  if (const auto number = value.number()) return *number != 0;
  if (const auto* text = value.text()) return !text->empty();
  if (const Items* items = value.items()) return items->kind == Items::Kind::kIterator || !items->values.empty();
  if (const Dict* dict = value.dict()) return !dict->entries().empty();
  return true;
}

bool equal(const Value& left, const Value& right, Budget& budget) {
  budget.step();
  if (left.is_undefined() || right.is_undefined()) return left.is_undefined() && right.is_undefined();
  if (left.is_none() || right.is_none()) return left.is_none() && right.is_none();
  if (left.integer() && right.integer()) return *left.integer() == *right.integer();
  if (left.number() && right.number()) return *left.number() == *right.number();
  if (left.text() != nullptr && right.text() != nullptr) return *left.text() == *right.text();
  if (left.items() != nullptr && right.items() != nullptr) {
    if (left.items()->kind > Items::Kind::kTuple) throw not_known("a comparison of iterators");
    return left.items()->kind == right.items()->kind &&
           equal_items(left.items()->values, right.items()->values, budget);
  }
  if (left.dict() != nullptr && right.dict() != nullptr) return equal_dicts(*left.dict(), *right.dict(), budget);
  return false;
}

int compared(const Value& left, const Value& right, Budget& budget) {
  budget.step();
  for (const Value* value : {&left, &right}) {
    if (const auto* missing = value->as<Undefined>()) fail_undefined(*missing);
  }
  const auto order = [](const auto& one, const auto& other) { return one < other ? -1 : one == other ? 0 : 1; };
  if (left.integer() && right.integer()) return order(*left.integer(), *right.integer());
  if (left.number() && right.number()) return order(*left.number(), *right.number());
  if (left.text() != nullptr && right.text() != nullptr) return order(*left.text(), *right.text());
  if (left.items() != nullptr && right.items() != nullptr) throw not_known("an order of lists");
  throw template_failed("'<' not supported between instances of '" + left.type() + "' and '" + right.type() + "'");
}

bool contains(const Value& container, const Value& value, Budget& budget) {
  if (const auto* text = container.text()) {
    const auto* part = value.text();
    if (part == nullptr) throw template_failed("'in <string>' requires string as left operand, not " + value.type());
    return text->find(*part) != std::string::npos;
  }
  if (const Dict* dict = container.dict()) return value.text() != nullptr && dict->find(*value.text()) != nullptr;
  if (container.is_undefined()) return false;
  if (!is_iterable(container)) throw template_failed("argument of type '" + container.type() + "' is not iterable");
  for (const Value& item : iterated(container, budget)) {
    if (equal(item, value, budget)) return true;
  }
  return false;
}

std::int64_t length(const Value& value) {
  if (value.is_undefined()) return 0;
  if (const auto* text = value.text()) return character_count(*text);
  if (const Dict* dict = value.dict()) return static_cast<std::int64_t>(dict->entries().size());
  const Items* items = value.items();
  if (items != nullptr && items->kind != Items::Kind::kIterator) return static_cast<std::int64_t>(items->values.size());
  throw template_failed("object of type '" + (items == nullptr ? value.type() : "generator") + "' has no len()");
}

bool is_iterable(const Value& value) {
  return value.is_undefined() || value.text() != nullptr || value.items() != nullptr || value.dict() != nullptr;
}

std::vector<Value> iterated(const Value& value, Budget& budget) {
  std::vector<Value> values;
  if (Items* items = value.items()) {
    budget.bytes(items->values.size() * sizeof(Value));
    if (items->kind == Items::Kind::kIterator) return std::exchange(items->values, {});
    return items->values;
  }
  if (const auto* text = value.text()) {
    budget.bytes(text->size() * sizeof(Value));
    for (std::size_t at = 0; at < text->size(); at += length_at(*text, at)) {
      values.push_back(Value::of(text->substr(at, length_at(*text, at))));
    }
  } else if (const Dict* dict = value.dict()) {
    for (const auto& [key, entry] : dict->entries()) values.push_back(Value::of(key));
  } else if (!value.is_undefined()) {
    throw template_failed("'" + value.type() + "' object is not iterable");
  }
  return values;
}

std::string shown_text(const Value& value, Budget& budget) {
  if (value.is_undefined()) return "";
  if (const auto* text = value.text()) {
    budget.bytes(text->size());
    return *text;
  }
  return represented(value, budget);
}

std::string represented(const Value& value, Budget& budget) {
  budget.step();
  std::string out;
  if (value.is_undefined()) {
    out = "Undefined";
  } else if (value.is_none()) {
    out = "None";
  } else if (const auto* flag = value.as<bool>()) {
    out = *flag ? "True" : "False";
  } else if (const auto* number = value.as<std::int64_t>()) {
    out = std::to_string(*number);
  } else if (const auto* real = value.as<double>()) {
    out = number_text(*real);
  } else if (const auto* text = value.text()) {
    out = python_repr(*text);
  } else if (const Items* items = value.items()) {
    out = shown_items(*items, budget);
  } else if (const Dict* dict = value.dict()) {
    out = shown_dict(*dict, budget);
  } else {
    throw not_known("the text of a " + value.type());
  }
  budget.bytes(out.size());
  return out;
}

}  // namespace dynexport::text
