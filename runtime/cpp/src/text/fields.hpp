// Objects of a tokenizer.json, read with checks.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "dynexport/error.hpp"

namespace dynexport::text {

// One JSON object and its place, which errors name. The value must outlive it.
class Fields {
 public:
  // Throws Error if the value is not an object.
  Fields(const nlohmann::json& value, std::string where);

  const std::string& where() const { return where_; }
  // Whether a field is there and not null.
  bool has(const char* name) const;
  // Throws Error if there is a field of another name.
  void only(std::initializer_list<std::string_view> names) const;

  // Each throws Error if the field is missing or of another type.
  const std::string& text(const char* name) const;
  // A text that is not empty.
  const std::string& filled(const char* name) const;
  bool flag(const char* name) const;
  bool flag(const char* name, bool otherwise) const;
  std::int64_t number(const char* name, std::int64_t most) const;
  const nlohmann::json& object(const char* name) const;
  const nlohmann::json& list(const char* name, std::size_t most) const;
  Fields part(const char* name) const;
  // The objects of a list.
  std::vector<Fields> parts(const char* name, std::size_t most) const;

  // The error for something that is not known here.
  [[nodiscard]] Error unknown(const std::string& what) const;
  [[nodiscard]] Error expected(const std::string& name, const std::string& what) const;

 private:
  const nlohmann::json& at(const char* name) const;

  const nlohmann::json* value_;
  std::string where_;
};

}  // namespace dynexport::text
