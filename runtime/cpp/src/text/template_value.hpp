// The values of a chat template: Python's, as far as templates see them.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "dynexport/error.hpp"

namespace dynexport::text {

class Value;
struct Function;
struct Loop;

// What one rendering may still use. Throws Error when it is used up.
class Budget {
 public:
  void step() { spend(steps_, 1); }
  void bytes(std::size_t count) { spend(bytes_, static_cast<std::int64_t>(count)); }

 private:
  static void spend(std::int64_t& left, std::int64_t count);
  std::int64_t steps_ = 5'000'000, bytes_ = std::int64_t{256} << 20;
};

// The error for what this runtime's subset of Jinja lacks.
Error not_known(const std::string& what);
// The error where the template itself fails.
Error template_failed(const std::string& why);

struct Undefined {
  std::string why;
};

// A list, a tuple, a view of a dict, or an iterator, which gives its values once.
struct Items {
  enum class Kind { kList, kTuple, kView, kIterator };
  Kind kind = Kind::kList;
  std::vector<Value> values;
  int depth = 1;
};

// A dict; keys are texts. A namespace is one, too, and the only one that changes.
class Dict {
 public:
  const Value* find(const std::string& key) const;
  void set(const std::string& key, Value value);
  const std::vector<std::pair<std::string, Value>>& entries() const { return entries_; }
  int depth() const { return depth_; }

 private:
  std::vector<std::pair<std::string, Value>> entries_;
  std::unordered_map<std::string, std::size_t> places_;
  int depth_ = 1;
};

struct Namespace {
  Dict fields;
};

class Value {
 public:
  using Text = std::shared_ptr<const std::string>;
  using List = std::shared_ptr<Items>;
  using Mapping = std::shared_ptr<const Dict>;
  using Data = std::variant<Undefined, std::nullptr_t, bool, std::int64_t, double, Text, List, Mapping,
                            std::shared_ptr<Namespace>, std::shared_ptr<const Function>, std::shared_ptr<const Loop>>;

  Value() : data_(nullptr) {}
  static Value undefined(std::string why) { return Value(Data(Undefined{std::move(why)})); }
  static Value of(bool value) { return Value(Data(value)); }
  static Value of(std::int64_t value) { return Value(Data(value)); }
  static Value of(double value) { return Value(Data(value)); }
  static Value of(std::string text) { return Value(Data(std::make_shared<const std::string>(std::move(text)))); }
  static Value of(Dict dict) { return Value(Data(std::make_shared<const Dict>(std::move(dict)))); }
  // Throws Error for values that are nested too deep.
  static Value of(std::vector<Value> values, Items::Kind kind = Items::Kind::kList);
  static Value of(std::shared_ptr<Namespace> space) { return Value(Data(std::move(space))); }
  static Value of(std::shared_ptr<const Function> function) { return Value(Data(std::move(function))); }
  static Value of(std::shared_ptr<const Loop> loop) { return Value(Data(std::move(loop))); }
  // Throws Error for numbers that are out of range, and for values that are nested too deep.
  static Value of_json(const nlohmann::ordered_json& json, int depth = 0);

  template <typename T>
  const T* as() const {
    return std::get_if<T>(&data_);
  }
  bool is_undefined() const { return as<Undefined>() != nullptr; }
  bool is_none() const { return as<std::nullptr_t>() != nullptr; }
  const std::string* text() const { return as<Text>() != nullptr ? as<Text>()->get() : nullptr; }
  Items* items() const { return as<List>() != nullptr ? as<List>()->get() : nullptr; }
  const Dict* dict() const { return as<Mapping>() != nullptr ? as<Mapping>()->get() : nullptr; }
  // An integer, or a truth value as 0 or 1.
  std::optional<std::int64_t> integer() const;
  // Any number.
  std::optional<double> number() const;
  int depth() const;
  // Whether lists, dicts and namespaces may hold it: everything but functions, loops and namespaces.
  bool is_plain() const;
  // The name of its type in Python.
  std::string type() const;

 private:
  explicit Value(Data data) : data_(std::move(data)) {}
  Data data_;
};

using Named = std::vector<std::pair<std::string, Value>>;

bool is_true(const Value& value);
bool equal(const Value& left, const Value& right, Budget& budget);
// -1, 0 or 1; throws Error for values without an order.
int compared(const Value& left, const Value& right, Budget& budget);
bool contains(const Value& container, const Value& value, Budget& budget);
// len(value); throws Error for what has none.
std::int64_t length(const Value& value);
// The values that iteration gives, which empties an iterator; throws Error for what cannot be iterated.
std::vector<Value> iterated(const Value& value, Budget& budget);
bool is_iterable(const Value& value);

// str(value) and repr(value).
std::string shown_text(const Value& value, Budget& budget);
std::string represented(const Value& value, Budget& budget);

}  // namespace dynexport::text
