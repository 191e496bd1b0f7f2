// Chat templates, for Python tests: a JSON list of tasks in on standard input, a list of texts or errors out.
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "dynexport/chat_template.hpp"
#include "dynexport/error.hpp"

using Json = nlohmann::ordered_json;

namespace {

// The texts of a task's conversations, each [messages, add_generation_prompt, variables].
Json texts(const Json& task) {
  const auto chat = dynexport::ChatTemplate::parse(task.at("template").get<std::string>(), task.at("globals").dump(),
                                                   "chat_template.jinja");
  Json out = Json::array();
  for (const auto& conversation : task.at("conversations")) {
    try {
      out.push_back(chat->render(conversation[0].dump(), conversation[1].get<bool>(), conversation[2].dump()));
    } catch (const dynexport::Error& error) {
      out.push_back({{"error", error.what()}});
    }
  }
  return out;
}

}  // namespace

int main() {
  const std::string text{std::istreambuf_iterator<char>(std::cin), {}};
  Json results = Json::array();
  const Json tasks = Json::parse(text);
  for (const auto& task : tasks) {
    try {
      results.push_back(texts(task));
    } catch (const dynexport::Error& error) {
      results.push_back({{"error", error.what()}});
    }
  }
  std::cout << results.dump() << "\n";
}
