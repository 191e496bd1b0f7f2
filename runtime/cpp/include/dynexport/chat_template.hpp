// Conversations to text, by the bundle's chat template.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "dynexport/bundle.hpp"

namespace dynexport {

// The subset of Jinja that chat templates use. Immutable; threads may share it.
class ChatTemplate {
 public:
  // None if the bundle has no chat template. Throws Error for one that the bundle does not declare as covered
  // (docs/bundle.md): then the caller renders conversations.
  static std::shared_ptr<const ChatTemplate> open(const Bundle& bundle);
  // From a template's text and JSON of its global variables, such as bos_token.
  static std::shared_ptr<const ChatTemplate> parse(const std::string& text, const std::string& globals_json,
                                                   const std::string& where);
  ~ChatTemplate();

  // Renders messages, JSON text of a list of {"role", "content", ..}; ``variables_json`` is a JSON object of further
  // variables, such as tools. Throws Error where the template raises one, or uses what is not known.
  std::string render(const std::string& messages_json, bool add_generation_prompt = true,
                     const std::string& variables_json = "{}") const;

 private:
  struct State;
  explicit ChatTemplate(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
