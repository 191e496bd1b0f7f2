// Arguments, arithmetic, JSON and global functions of chat templates.
#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>
#include <map>

#include "bundle/number_text.hpp"
#include "text/python_text.hpp"
#include "text/template_builtins.hpp"

namespace dynexport::text {

namespace {

constexpr std::int64_t kLongestRange = 100'000;  // as in Jinja's sandbox

Error unsupported(const std::string& operation, const Value& left, const Value& right) {
  return template_failed("unsupported operand type(s) for " + operation + ": '" + left.type() + "' and '" +
                         right.type() + "'");
}

Value whole_result(const std::string& operation, std::int64_t left, std::int64_t right) {
  std::int64_t out = 0;
  bool over = false;
  if (operation == "+") over = __builtin_add_overflow(left, right, &out);
  if (operation == "-") over = __builtin_sub_overflow(left, right, &out);
  if (operation == "*") over = __builtin_mul_overflow(left, right, &out);
  if (operation == "//" || operation == "%") {
    if (right == 0) throw template_failed("integer division or modulo by zero");
    over = right == -1 && left == INT64_MIN;
    if (!over) {
      const std::int64_t rest = left % right;
      const bool down = rest != 0 && (rest < 0) != (right < 0);  // Python rounds down
      out = operation == "%" ? rest + (down ? right : 0) : left / right - (down ? 1 : 0);
    }
  }
  if (over) throw not_known("so large a number");
  return Value::of(out);
}

Value real_result(const std::string& operation, double left, double right) {
  if (operation == "+") return Value::of(left + right);
  if (operation == "-") return Value::of(left - right);
  if (operation == "*") return Value::of(left * right);
  if (right == 0) throw template_failed(operation == "/" ? "division by zero" : "float modulo");
  if (operation == "/") return Value::of(left / right);
  throw not_known(operation + " of floating point numbers");
}

Value repeated(const Value& value, std::int64_t times, Budget& budget) {
  times = std::max<std::int64_t>(0, times);
  const auto count = static_cast<std::size_t>(times);
  const auto bytes = [&](std::size_t size) {
    if (size > 0 && count > (std::size_t{1} << 32) / size) throw template_failed("it takes too much memory");
    budget.bytes(size * count);
  };
  if (const auto* text = value.text()) {
    bytes(text->size());
    std::string out;
    out.reserve(text->size() * count);
    for (std::size_t i = 0; i < count && !text->empty(); ++i) out += *text;
    return Value::of(std::move(out));
  }
  const std::vector<Value> once = iterated(value, budget);
  bytes(once.size() * sizeof(Value));
  std::vector<Value> out;
  for (std::size_t i = 0; i < count && !once.empty(); ++i) out.insert(out.end(), once.begin(), once.end());
  return Value::of(std::move(out), value.items()->kind);
}

// A list, not a view or an iterator.
bool is_list(const Value& value) { return value.items() != nullptr && value.items()->kind <= Items::Kind::kTuple; }

Value added(const Value& left, const Value& right, Budget& budget) {
  if (left.text() != nullptr && right.text() != nullptr) {
    budget.bytes(left.text()->size() + right.text()->size());
    return Value::of(*left.text() + *right.text());
  }
  if (left.text() != nullptr) throw template_failed("can only concatenate str (not \"" + right.type() + "\") to str");
  if (!is_list(left) || !is_list(right) || left.items()->kind != right.items()->kind) {
    throw unsupported("+", left, right);
  }
  std::vector<Value> values = iterated(left, budget);
  const std::vector<Value> more = iterated(right, budget);
  values.insert(values.end(), more.begin(), more.end());
  return Value::of(std::move(values), left.items()->kind);
}

// How to_json writes.
struct Json {
  bool ascii = false, sorted = false;
  std::optional<std::string> indent;
  std::string item = ", ", key = ": ";
  Budget& budget;

  void line(std::string& out, int level) const {
    if (!indent) return;
    out += '\n';
    for (int i = 0; i < level; ++i) out += *indent;
  }

  void write(std::string& out, const Value& value, int level) const {
    budget.step();
    const std::size_t before = out.size();
    if (value.is_none()) {
      out += "null";
    } else if (const auto* flag = value.as<bool>()) {
      out += *flag ? "true" : "false";
    } else if (const auto* real = value.as<double>()) {
      out += std::isnan(*real)   ? "NaN"
             : std::isinf(*real) ? (*real < 0 ? "-Infinity" : "Infinity")
                                 : number_text(*real);
    } else if (value.number()) {
      out += represented(value, budget);
    } else if (const auto* text = value.text()) {
      out += json_string(*text, ascii);
    } else if (is_list(value)) {
      write_list(out, *value.items(), level);
    } else if (const Dict* dict = value.dict()) {
      write_dict(out, *dict, level);
    } else {
      throw template_failed("Object of type " + value.type() + " is not JSON serializable");
    }
    budget.bytes(out.size() - before);
  }

  void write_list(std::string& out, const Items& list, int level) const {
    out += '[';
    for (std::size_t i = 0; i < list.values.size(); ++i) {
      if (i > 0) out += item;
      line(out, level + 1);
      write(out, list.values[i], level + 1);
    }
    if (!list.values.empty()) line(out, level);
    out += ']';
  }

  void write_dict(std::string& out, const Dict& dict, int level) const {
    std::vector<const std::pair<std::string, Value>*> entries;
    for (const auto& entry : dict.entries()) entries.push_back(&entry);
    if (sorted) std::sort(entries.begin(), entries.end(), [](auto* one, auto* two) { return one->first < two->first; });
    out += '{';
    for (std::size_t i = 0; i < entries.size(); ++i) {
      if (i > 0) out += item;
      line(out, level + 1);
      out += json_string(entries[i]->first, ascii) + key;
      write(out, entries[i]->second, level + 1);
    }
    if (!entries.empty()) line(out, level);
    out += '}';
  }
};

Value range(const Arguments& arguments) {
  arguments.check("range", 1, 3);
  std::vector<std::int64_t> numbers;
  for (const Value& given : arguments.given) {
    if (!given.integer()) throw template_failed("'" + given.type() + "' object cannot be interpreted as an integer");
    if (std::abs(*given.integer()) > std::int64_t{1} << 40) throw not_known("so large a number");
    numbers.push_back(*given.integer());
  }
  const std::int64_t from = numbers.size() > 1 ? numbers[0] : 0, to = numbers.size() > 1 ? numbers[1] : numbers[0];
  const std::int64_t step = numbers.size() > 2 ? numbers[2] : 1;
  if (step == 0) throw template_failed("range() arg 3 must not be zero");
  std::vector<Value> values;
  for (std::int64_t at = from; step > 0 ? at < to : at > to; at += step) {
    values.push_back(Value::of(at));
    if (static_cast<std::int64_t>(values.size()) > kLongestRange) {
      throw template_failed("Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).");
    }
  }
  return Value::of(std::move(values));
}

Dict fields_of(const Arguments& arguments) {
  if (!arguments.given.empty()) throw not_known("namespace or dict of an argument without a name");
  Dict fields;
  for (const auto& [name, value] : arguments.named) fields.set(name, value);
  return fields;
}

Value now(const Arguments& arguments) {
  arguments.check("strftime_now", 1, 1, {"format"});
  const std::string& format = arguments.text(0, "strftime_now");
  const std::time_t time = std::time(nullptr);
  std::tm local{};
  std::array<char, 1024> buffer{};
  if (format.size() > 128 || localtime_r(&time, &local) == nullptr) throw not_known("so long a format of dates");
  const std::size_t size = std::strftime(buffer.data(), buffer.size(), format.c_str(), &local);
  return Value::of(std::string(buffer.data(), size));
}

Value raise(const Arguments& arguments) {
  arguments.check("raise_exception", 1, 1);
  Budget budget;
  throw template_failed(shown_text(arguments.given[0], budget));
}

}  // namespace

const Value* Arguments::find(int place, std::string_view name) const {
  if (place >= 0 && static_cast<std::size_t>(place) < given.size()) return &given[static_cast<std::size_t>(place)];
  const auto found = std::find_if(named.begin(), named.end(), [&](const auto& entry) { return entry.first == name; });
  return found == named.end() ? nullptr : &found->second;
}

void Arguments::check(const std::string& callee, std::size_t least, std::size_t most,
                      std::initializer_list<std::string_view> names) const {
  bool good = given.size() >= least && given.size() <= most;
  for (const auto& entry : named) good = good && std::find(names.begin(), names.end(), entry.first) != names.end();
  if (!good) throw not_known(callee + " with such arguments");
}

const std::string& Arguments::text(std::size_t place, const std::string& callee) const {
  const Value* found = find(static_cast<int>(place), "format");
  if (found == nullptr || found->text() == nullptr) throw not_known(callee + " with such arguments");
  return *found->text();
}

Value binary(const std::string& operation, const Value& left, const Value& right, Budget& budget) {
  for (const Value* value : {&left, &right}) {
    if (const auto* missing = value->as<Undefined>()) throw template_failed(missing->why);
  }
  const auto one = left.integer(), two = right.integer();
  if (one && two && operation != "/") return whole_result(operation, *one, *two);
  if (left.number() && right.number()) return real_result(operation, *left.number(), *right.number());
  if (operation == "+") return added(left, right, budget);
  if (operation == "*" && two && (left.text() != nullptr || is_list(left))) return repeated(left, *two, budget);
  if (operation == "*" && one && (right.text() != nullptr || is_list(right))) return repeated(right, *one, budget);
  if (operation == "%" && left.text() != nullptr) throw not_known("% of a text");
  throw unsupported(operation, left, right);
}

Value negative(const Value& value) {
  if (const auto number = value.integer()) return whole_result("-", 0, *number);
  if (const auto number = value.number()) return Value::of(-*number);
  throw template_failed("bad operand type for unary -: '" + value.type() + "'");
}

std::string to_json(const Value& value, const Arguments& arguments, Budget& budget) {
  arguments.check("tojson", 0, 4, {"ensure_ascii", "indent", "separators", "sort_keys"});
  Json json{false, false, std::nullopt, ", ", ": ", budget};
  if (const Value* ascii = arguments.find(0, "ensure_ascii")) json.ascii = is_true(*ascii);
  if (const Value* indent = arguments.find(1, "indent"); indent != nullptr && !indent->is_none()) {
    const auto spaces = indent->integer();
    if (!spaces || *spaces > 64) throw not_known("such an indent of tojson");
    json.indent = std::string(static_cast<std::size_t>(std::max<std::int64_t>(0, *spaces)), ' ');
    json.item = ",";
  }
  if (const Value* given = arguments.find(2, "separators"); given != nullptr && !given->is_none()) {
    const Items* pair = given->items();
    const bool good = pair != nullptr && pair->values.size() == 2 && pair->values[0].text() != nullptr &&
                      pair->values[1].text() != nullptr;
    if (!good) throw not_known("such separators of tojson");
    json.item = *pair->values[0].text();
    json.key = *pair->values[1].text();
  }
  if (const Value* sorted = arguments.find(3, "sort_keys")) json.sorted = is_true(*sorted);
  std::string out;
  json.write(out, value, 0);
  return out;
}

Value global(const std::string& name) {
  static const std::map<std::string, std::function<Value(const Arguments&)>, std::less<>> known = {
      {"range", range},
      {"raise_exception", raise},
      {"strftime_now", now},
      {"dict", [](const Arguments& arguments) { return Value::of(fields_of(arguments)); }},
      {"namespace",
       [](const Arguments& arguments) {
         auto space = std::make_shared<Namespace>();
         space->fields = fields_of(arguments);
         return Value::of(std::move(space));
       }},
  };
  const auto found = known.find(name);
  if (found == known.end()) return Value::undefined(python_repr(name) + " is undefined");
  auto function = std::make_shared<Function>();
  function->call = found->second;
  return Value::of(std::shared_ptr<const Function>(std::move(function)));
}

}  // namespace dynexport::text
