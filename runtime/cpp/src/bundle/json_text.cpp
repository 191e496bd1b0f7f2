// Untrusted JSON, parsed strictly: the library's parser, and a builder that enforces the bounds.
#include "bundle/json_text.hpp"

#include <cmath>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "bundle/text.hpp"
#include "dynexport/error.hpp"

namespace dynexport {
namespace {

// Deeper nesting could end the stack of code that walks through the value.
constexpr std::size_t kDeepest = 64;
// 10^30 is a common model_max_length.
constexpr std::size_t kMostDigits = 40;

bool is_whole(std::string_view digits) { return digits.find_first_of(".eE") == std::string_view::npos; }

// Receives the parser's events, and builds the value. The first problem ends parsing.
class Builder {
 public:
  Json value;
  std::string problem;

  // The names that the parser requires.
  bool null() { return add(nullptr); }
  bool boolean(bool found) { return add(found); }
  bool number_integer(std::int64_t found) { return add(found); }
  bool number_unsigned(std::uint64_t found) { return add(found); }
  bool number_float(double found, const std::string& digits) {
    if (is_whole(digits) && digits.size() > kMostDigits) return refuse(many_digits(digits));
    return add(found);
  }
  bool string(std::string& found) { return add(std::move(found)); }
  bool binary(std::vector<std::uint8_t>& /*found*/) { return refuse("binary data"); }
  bool start_object(std::size_t /*count*/) { return open(Json::object()); }
  bool end_object() { return close(); }
  bool start_array(std::size_t /*count*/) { return open(Json::array()); }
  bool end_array() { return close(); }
  bool key(std::string& name) {
    if (!open_.back().names.insert(name).second) {
      return refuse(std::string(cut(in_quotes(std::string_view(name)), 80)) + " is there twice");
    }
    name_ = std::move(name);
    return true;
  }
  template <typename Exception>
  bool parse_error(std::size_t /*place*/, const std::string& token, const Exception& error) {
    constexpr int kOutOfRange = 406;
    if (error.id != kOutOfRange) return refuse(error.what());
    return refuse(is_whole(token) ? many_digits(token) : std::string(cut(token, 40)) + " is too large a number");
  }

 private:
  struct Open {
    Json* value;
    std::unordered_set<std::string> names;
  };

  static std::string many_digits(const std::string& digits) {
    return "a number of " + std::to_string(digits.size()) + " digits";
  }

  bool refuse(std::string why) {
    problem = std::move(why);
    return false;
  }

  bool add(Json found) { return place(std::move(found)) != nullptr; }

  bool open(Json empty) {
    Json* placed = place(std::move(empty));
    if (placed == nullptr) return false;
    open_.push_back({placed, {}});
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }

  // Puts a value where the text has it, and returns its address; null if it is too deep.
  Json* place(Json found) {
    if (open_.size() > kDeepest) {
      refuse("more than " + std::to_string(kDeepest) + " levels of objects or lists");
      return nullptr;
    }
    if (open_.empty()) {
      value = std::move(found);
      return &value;
    }
    Json& parent = *open_.back().value;
    if (parent.is_array()) {
      parent.push_back(std::move(found));
      return &parent.back();
    }
    // The base's function: that of the map compares the name with all others, which key() did faster.
    using Items = std::vector<std::pair<const std::string, Json>>;
    Items& items = parent.get_ref<Json::object_t&>();
    items.emplace_back(std::move(name_), std::move(found));
    return &items.back().second;
  }

  std::vector<Open> open_;
  std::string name_;
};

std::string ending(const std::string& advice) { return advice.empty() ? "" : "; " + advice; }

std::string kind(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return "NoneType";
    case Json::value_t::boolean:
      return "bool";
    case Json::value_t::string:
      return "str";
    case Json::value_t::array:
      return "list";
    case Json::value_t::number_float:
      return "float";
    default:
      return "int";
  }
}

std::string quoted_number(double value) {
  std::string text = Json(value).dump();
  if (std::isfinite(value) && is_whole(text)) text += ".0";
  return text;
}

}  // namespace

Json parse_json(std::string_view text, const std::string& where, const std::string& advice) {
  Builder builder;
  if (!Json::sax_parse(text.begin(), text.end(), &builder)) {
    throw Error(where + ": expected JSON, found something else (" + builder.problem + ")" + ending(advice));
  }
  return std::move(builder.value);
}

Json parse_json_object(std::string_view text, const std::string& where, const std::string& advice) {
  Json value = parse_json(text, where, advice);
  if (!value.is_object()) {
    throw Error(where + ": expected a JSON object, found " + kind(value) + ending(advice));
  }
  return value;
}

std::string quoted_value(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return "None";
    case Json::value_t::boolean:
      return value.get<bool>() ? "True" : "False";
    case Json::value_t::string:
      return in_quotes(std::string_view(value.get_ref<const std::string&>()));
    case Json::value_t::number_float:
      return quoted_number(value.get<double>());
    case Json::value_t::array: {
      std::string text = "[";
      for (const Json& item : value) text += (text.size() > 1 ? ", " : "") + quoted_value(item);
      return text + "]";
    }
    case Json::value_t::object: {
      std::string text = "{";
      for (const auto& [name, item] : value.items()) {
        text += (text.size() > 1 ? ", " : "") + in_quotes(std::string_view(name)) + ": " + quoted_value(item);
      }
      return text + "}";
    }
    default:
      return value.dump();
  }
}

}  // namespace dynexport
