// Objects of a tokenizer.json, read with checks.
#include "text/fields.hpp"

#include <algorithm>
#include <utility>

namespace dynexport::text {

using nlohmann::json;

Fields::Fields(const json& value, std::string where) : value_(&value), where_(std::move(where)) {
  if (!value.is_object()) throw Error(where_ + ": expected an object, found " + value.type_name());
}

bool Fields::has(const char* name) const {
  const auto found = value_->find(name);
  return found != value_->end() && !found->is_null();
}

void Fields::only(std::initializer_list<std::string_view> names) const {
  for (const auto& [name, value] : value_->items()) {
    const std::string_view field = name;
    if (std::find(names.begin(), names.end(), field) == names.end()) throw unknown("the field " + shown(field));
  }
}

const json& Fields::at(const char* name) const {
  const auto found = value_->find(name);
  if (found == value_->end()) throw Error(where_ + ": expected a field " + name + ", found none");
  return *found;
}

const std::string& Fields::text(const char* name) const {
  const json& value = at(name);
  if (!value.is_string()) throw expected(name, "text");
  return value.get_ref<const std::string&>();
}

const std::string& Fields::filled(const char* name) const {
  const std::string& found = text(name);
  if (found.empty()) throw expected(name, "text that is not empty");
  return found;
}

bool Fields::flag(const char* name) const {
  const json& value = at(name);
  if (!value.is_boolean()) throw expected(name, "true or false");
  return value.get<bool>();
}

bool Fields::flag(const char* name, bool otherwise) const { return has(name) ? flag(name) : otherwise; }

std::int64_t Fields::number(const char* name, std::int64_t most) const {
  const json& value = at(name);
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > static_cast<std::uint64_t>(most)) {
    throw expected(name, "an integer of at most " + std::to_string(most));
  }
  return value.get<std::int64_t>();
}

const json& Fields::object(const char* name) const {
  const json& value = at(name);
  if (!value.is_object()) throw expected(name, "an object");
  return value;
}

const json& Fields::list(const char* name, std::size_t most) const {
  const json& value = at(name);
  if (!value.is_array() || value.size() > most) {
    throw expected(name, "a list of at most " + std::to_string(most) + " entries");
  }
  return value;
}

Fields Fields::part(const char* name) const { return {at(name), where_ + ": " + name}; }

std::vector<Fields> Fields::parts(const char* name, std::size_t most) const {
  std::vector<Fields> found;
  const json& values = list(name, most);
  found.reserve(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    found.emplace_back(values[i], where_ + ": " + name + "[" + std::to_string(i) + "]");
  }
  return found;
}

Error Fields::unknown(const std::string& what) const {
  return Error(where_ + ": " + what + " is not known to this runtime; encode texts with the Python runtime");
}

Error Fields::expected(const std::string& name, const std::string& what) const {
  const auto found = value_->find(name);
  const std::string text = found == value_->end() ? "none" : found->dump(-1, ' ', true, json::error_handler_t::replace);
  return Error(where_ + ": " + name + ": expected " + what + ", found " + text.substr(0, 60));
}

}  // namespace dynexport::text
