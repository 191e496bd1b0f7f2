#include "json.hpp"

#include <cstring>
#include <vector>

#include "api_error.hpp"

namespace service {
namespace {

constexpr int kDeepest = 64;
// Looking a name up takes time in proportion to the number of names.
constexpr std::size_t kMostNames = 2048;

// Refuses a text, while it is parsed, that is nested too deep or has an object of too many names.
class Bounds {
 public:
  bool operator()(int depth, Json::parse_event_t event) {
    if (event == Json::parse_event_t::object_start) {
      names_.push_back(0);
    } else if (event == Json::parse_event_t::object_end) {
      names_.pop_back();
    } else if (event == Json::parse_event_t::key && ++names_.back() > kMostNames) {
      throw ApiError(400, "body: expected at most " + std::to_string(kMostNames) + " names in an object, found more")
          .code("invalid_json");
    }
    if (depth > kDeepest) {
      throw ApiError(400, "body: expected JSON of at most " + std::to_string(kDeepest) + " levels, found more")
          .code("invalid_json");
    }
    return true;
  }

 private:
  std::vector<std::size_t> names_;
};

}  // namespace

Json parse_body(std::string_view text) {
  Bounds bounds;
  try {
    return Json::parse(text,
                       [&bounds](int depth, Json::parse_event_t event, const Json&) { return bounds(depth, event); });
  } catch (const Json::exception& error) {
    // The parser's message quotes the text, so it is not repeated.
    if (std::strstr(error.what(), "surrogate") != nullptr) {
      throw ApiError(400, "body: expected text of whole characters, found half of a surrogate pair")
          .code("invalid_json");
    }
    throw ApiError(400, "body: expected JSON, found something else").code("invalid_json");
  }
}

std::string written(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string beginning(const std::string& text, std::size_t characters) {
  std::size_t at = 0;
  for (; at < text.size(); ++at) {
    const bool starts = (static_cast<unsigned char>(text[at]) & 0xC0U) != 0x80U;
    if (starts && characters-- == 0) break;
  }
  return text.substr(0, at);
}

}  // namespace service
