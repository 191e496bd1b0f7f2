// The checks that a bundle brings.
#include "text/text_checks.hpp"

#include <string>
#include <vector>

#include "bundle/json_text.hpp"
#include "dynexport/error.hpp"

namespace dynexport::text {

namespace {

constexpr const char* kChecks = "text_checks.json";
constexpr int kVersion = 1;

Error damaged(const char* what) { return Error(std::string(kChecks) + ": expected " + what + "; convert again"); }

// The checks of a bundle; empty for one without, or of another version.
Json read_checks(const Bundle& bundle) {
  if (!bundle.has(kChecks)) return Json::object();
  Json checks = parse_json_object(bundle.read(kChecks), kChecks);
  const auto version = checks.find("version");
  const bool known = version != checks.end() && version->is_number_integer() && *version == kVersion;
  return known ? checks : Json::object();
}

const Json& field(const Json& object, const char* name) {
  static const Json kNone;
  if (!object.is_object()) return kNone;
  const auto found = object.find(name);
  return found == object.end() ? kNone : *found;
}

std::string text_field(const Json& object, const char* name) {
  const Json& value = field(object, name);
  if (!value.is_string()) throw damaged("texts");
  return value.get<std::string>();
}

std::vector<std::int64_t> id_list(const Json& value) {
  std::vector<std::int64_t> ids;
  if (!value.is_array()) throw damaged("lists of ids");
  for (const Json& id : value) {
    if (!id.is_number_integer()) throw damaged("ids");
    ids.push_back(id.get<std::int64_t>());
  }
  return ids;
}

}  // namespace

void check_strings(const Bundle& bundle, const Tokenizer& tokenizer) {
  const Json checks = read_checks(bundle);
  for (const Json& string : field(checks, "strings")) {
    const std::string text = text_field(string, "text");
    const std::vector<std::int64_t> ids = id_list(field(string, "ids"));
    const std::string decoded = field(string, "decoded").is_null() ? text : text_field(string, "decoded");
    if (tokenizer.encode(text) == ids && tokenizer.decode(ids) == decoded) continue;
    throw Error("tokenizer.json: " + shown(text) + " gets other ids, or another text, than the bundle's " + kChecks +
                " says; encode texts with the Python runtime");
  }
}

void check_covered(const Bundle& bundle) {
  const Json checks = read_checks(bundle);
  const Json& chat = field(checks, "chat");
  const Json& covered = field(chat, "covered");
  if (covered.is_boolean() && covered.get<bool>()) return;
  const Json& reason = field(chat, "reason");
  throw Error("chat_template.jinja: expected a template that the bundle's " + std::string(kChecks) +
              " says is covered, found " + (reason.is_string() ? reason.get<std::string>() : "none") +
              "; render conversations yourself");
}

void check_conversations(const Bundle& bundle, const ChatTemplate& chat) {
  const Json checks = read_checks(bundle);
  for (const Json& conversation : field(field(checks, "chat"), "conversations")) {
    const Json& prompt = field(conversation, "add_generation_prompt");
    if (!prompt.is_boolean()) throw damaged("conversations");
    const std::string found = chat.render(field(conversation, "messages").dump(), prompt.get<bool>(),
                                          field(conversation, "variables").dump());
    if (found == text_field(conversation, "text")) continue;
    throw Error("chat_template.jinja: a conversation gets another text than the bundle's " + std::string(kChecks) +
                " says; render conversations yourself");
  }
}

}  // namespace dynexport::text
