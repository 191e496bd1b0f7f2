// Conversations to text: messages and variables are checked and completed as in Python (runtime/text/chat_template.py).
#include "dynexport/chat_template.hpp"

#include <nlohmann/json.hpp>
#include <utility>

#include "bundle/json_text.hpp"
#include "dynexport/error.hpp"
#include "text/template_evaluator.hpp"
#include "text/template_parser.hpp"
#include "text/text_checks.hpp"
#include "text/utf8.hpp"

namespace dynexport {

namespace {

constexpr const char* kConfig = "tokenizer_config.json";
constexpr const char* kTemplate = "chat_template.jinja";
// Names of a message's reasoning field; most templates read the first, gpt-oss's reads the second.
constexpr const char* kReasoning[] = {"reasoning_content", "thinking", "reasoning"};
constexpr const char* kSpecial[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                    "pad_token", "cls_token", "mask_token"};

void check_message(const Json& message, const std::string& where) {
  if (!message.is_object()) throw Error(where + ": expected a mapping with \"role\" and \"content\"");
  const auto role = message.find("role");
  if (role == message.end() || !role->is_string()) throw Error(where + ": expected text under \"role\"");
  const auto content = message.find("content");
  const bool none = content == message.end() || content->is_null();
  if (!(none ? message.contains("tool_calls") : content->is_string() || content->is_array())) {
    throw Error(where + ": expected text, or a list of parts, under \"content\"");
  }
}

// A message without nulls, with its reasoning under both names.
Json plain_message(const Json& message) {
  Json fields = Json::object();
  const Json* reasoning = nullptr;
  for (const char* name : kReasoning) {
    const auto found = message.find(name);
    if (reasoning == nullptr && found != message.end() && !found->is_null()) reasoning = &*found;
  }
  if (reasoning != nullptr) fields["thinking"] = *reasoning;
  for (const auto& [name, value] : message.items()) {
    if (!value.is_null()) fields[name] = value;
  }
  if (reasoning != nullptr) fields["reasoning_content"] = *reasoning;
  return fields;
}

Json plain_messages(const Json& messages) {
  if (!messages.is_array()) throw Error("messages: expected a list of messages");
  if (messages.empty()) throw Error("messages: expected at least one, found none");
  Json plain = Json::array();
  for (std::size_t i = 0; i < messages.size(); ++i) {
    check_message(messages[i], "messages[" + std::to_string(i) + "]");
    plain.push_back(plain_message(messages[i]));
  }
  return plain;
}

// The special tokens of a tokenizer_config.json, each given as text or as an object with "content".
Json special_tokens(const Json& config) {
  Json tokens = Json::object();
  for (const char* name : kSpecial) {
    const auto found = config.find(name);
    if (found == config.end() || found->is_null()) continue;
    const Json& value = *found;
    const Json text = value.is_object() ? value.value("content", Json()) : value;
    if (!text.is_string()) {
      throw Error(std::string(kConfig) + ": " + name + ": expected text or an object with \"content\"");
    }
    tokens[name] = text;
  }
  return tokens;
}

}  // namespace

struct ChatTemplate::State {
  text::NodePtr root;
  Json globals;
};

ChatTemplate::ChatTemplate(std::unique_ptr<State> state) : state_(std::move(state)) {}
ChatTemplate::~ChatTemplate() = default;

std::shared_ptr<const ChatTemplate> ChatTemplate::parse(const std::string& text, const std::string& globals_json,
                                                        const std::string& where) {
  if (text::valid_length(text) != text.size()) throw Error(where + ": expected UTF-8 text");
  auto state = std::make_unique<State>();
  state->globals = parse_json_object(globals_json, where);
  state->root = text::parse_template(text);
  return std::shared_ptr<const ChatTemplate>(new ChatTemplate(std::move(state)));
}

std::shared_ptr<const ChatTemplate> ChatTemplate::open(const Bundle& bundle) {
  if (!bundle.has(kTemplate)) return nullptr;
  const Json config = bundle.has(kConfig) ? parse_json_object(bundle.read(kConfig), kConfig) : Json::object();
  text::check_covered(bundle);
  auto chat = parse(bundle.read(kTemplate), special_tokens(config).dump(), kTemplate);
  text::check_conversations(bundle, *chat);
  return chat;
}

std::string ChatTemplate::render(const std::string& messages_json, bool add_generation_prompt,
                                 const std::string& variables_json) const {
  const Json variables = parse_json_object(variables_json, "template variables");
  for (const char* name : {"messages", "add_generation_prompt"}) {
    if (!variables.contains(name)) continue;
    throw Error(std::string("template variable ") + name + ": expected another name; dynexport sets this one itself");
  }
  Json values = {{"tools", nullptr}, {"documents", nullptr}};
  values.update(state_->globals);
  values.update(variables);
  values["messages"] = plain_messages(parse_json(messages_json, "messages"));
  values["add_generation_prompt"] = add_generation_prompt;
  text::Dict dict;
  for (const auto& [name, value] : values.items()) dict.set(name, text::Value::of_json(value, 1));
  return text::rendered(*state_->root, dict);
}

}  // namespace dynexport
