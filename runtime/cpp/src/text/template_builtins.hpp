// Filters, tests, methods, operators and functions of chat templates.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "text/template_value.hpp"

namespace dynexport::text {

// The arguments of a call; parameters may be given by place or by name.
struct Arguments {
  std::vector<Value> given;
  Named named;

  // The argument for a parameter, or null. ``place`` counts from 0; a parameter without a place has -1.
  const Value* find(int place, std::string_view name) const;
  // Throws Error for more arguments than ``most``, or a name that is not among ``names``.
  void check(const std::string& callee, std::size_t least, std::size_t most,
             std::initializer_list<std::string_view> names = {}) const;
  const std::string& text(std::size_t place, const std::string& callee) const;
};

// A macro, or a global function.
struct Function {
  std::function<Value(const Arguments&)> call;
};

// The state of a loop in one of its turns.
struct Loop {
  std::shared_ptr<const std::vector<Value>> values;
  std::size_t at = 0;
  std::int64_t depth = 1;
};

Value call_filter(const std::string& name, const Value& value, const Arguments& arguments, Budget& budget);
bool call_test(const std::string& name, const Value& value, const Arguments& arguments, Budget& budget);
Value call_method(const Value& value, const std::string& name, const Arguments& arguments, Budget& budget);

// Whether Python's str, list or dict, whichever the value is, has a method of this name.
bool has_method(const Value& value, const std::string& name);

// value.name and value[key], as Jinja looks them up: what is not there is undefined.
Value attribute(const Value& value, const std::string& name);
Value item(const Value& value, const Value& key);
// value[begin:end:step]; null stands for what is left out.
Value slice(const Value& value, const Value* begin, const Value* end, const Value* step, Budget& budget);

Value binary(const std::string& operation, const Value& left, const Value& right, Budget& budget);
Value negative(const Value& value);

// As json.dumps.
std::string to_json(const Value& value, const Arguments& arguments, Budget& budget);

// range, namespace, raise_exception, strftime_now and dict, by name; undefined for others.
Value global(const std::string& name);

}  // namespace dynexport::text
