#include "requests.hpp"

#include <algorithm>

#include "api_error.hpp"
#include "dynexport/work.hpp"

namespace service {
namespace {

constexpr std::size_t kMostPrompts = 128, kMostStops = 16;

std::string too_many(std::size_t most, std::size_t found) {
  return "at most " + std::to_string(most) + " items after validation, not " + std::to_string(found);
}

Fields fields_of(const Json& body) {
  if (!body.is_object()) {
    throw ApiError(400, "body: expected a JSON object, with the header Content-Type: application/json")
        .code("invalid_json");
  }
  return Fields(body);
}

std::optional<std::string> depth_of(Fields& fields) {
  const Json* found = fields.any("depth");
  if (found == nullptr) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  if (!found->is_number()) {
    const std::string shown = found_text(*found);
    throw wrong_field("depth", "expected a valid string" + shown + " or a valid number" + shown);
  }
  return Json(found->get<double>()).dump();
}

void read_stream_options(Fields& fields, Generation& into) {
  const Json* found = fields.object("stream_options", "a valid dictionary or instance of StreamOptions");
  if (found == nullptr) return;
  Fields options(*found, "stream_options");
  into.has_stream_options = true;
  into.include_usage = options.boolean("include_usage", false).value_or(false);
  options.boolean("include_obfuscation");
  options.finish();
}

std::vector<std::string> stops_of(Fields& fields) {
  const Json* found = fields.any("stop");
  if (found == nullptr) return {};
  if (found->is_string()) return {found->get<std::string>()};
  if (!found->is_array()) {
    const std::string shown = found_text(*found);
    throw wrong_field("stop", "expected a valid string" + shown + " or a valid list" + shown);
  }
  if (found->size() > kMostStops) {
    throw wrong_field("stop", "expected a valid string or " + too_many(kMostStops, found->size()));
  }
  std::vector<std::string> stops;
  for (const Json& one : *found) {
    if (!one.is_string()) throw wrong_field("stop", "expected a valid string");
    stops.push_back(one.get<std::string>());
  }
  return stops;
}

std::map<std::string, double> biases_of(Fields& fields) {
  std::map<std::string, double> biases;
  const Json* found = fields.object("logit_bias");
  if (found == nullptr) return biases;
  for (const auto& item : found->items()) {
    if (!item.value().is_number()) refuse("logit_bias." + item.key(), "a valid number", item.value());
    biases.emplace(item.key(), item.value().get<double>());
  }
  return biases;
}

// Checks the form of the answer; nothing here keeps an answer to a grammar.
void check_response_format(Fields& fields) {
  const Json* found = fields.object("response_format", "a valid dictionary or instance of ResponseFormat");
  if (found == nullptr) return;
  Fields form(*found, "response_format");
  form.required("type");
  const auto type = form.one_of("type", {"text", "json_object", "json_schema"});
  if (!type) refuse("response_format.type", "'text', 'json_object' or 'json_schema'", nullptr);
  form.object("json_schema");
  form.finish();
  if (*type != "text") {
    throw ApiError(400, "response_format: expected type text, found " + *type +
                            "; this server has no constraint library: use dynexport serve")
        .param("response_format")
        .code("unsupported_parameter");
  }
}

void read_generation(Fields& fields, Generation& into) {
  into.model = fields.text("model");
  into.depth = depth_of(fields);
  into.n = fields.integer("n", 1, dynexport::kMostChoices).value_or(1);
  into.stream = fields.boolean("stream").value_or(false);
  read_stream_options(fields, into);
  into.stop = stops_of(fields);
  into.temperature = fields.number("temperature", {0.0, std::nullopt, 100.0});
  into.top_p = fields.number("top_p", {std::nullopt, 0.0, 1.0});
  into.seed = fields.seed("seed");
  into.presence_penalty = fields.number("presence_penalty", {-2.0, std::nullopt, 2.0});
  into.frequency_penalty = fields.number("frequency_penalty", {-2.0, std::nullopt, 2.0});
  into.logit_bias = biases_of(fields);
  into.max_tokens = fields.integer("max_tokens", 1);
  check_response_format(fields);
  into.top_k = fields.integer("top_k", -1);
  into.min_p = fields.number("min_p", {0.0, std::nullopt, 1.0});
  into.repetition_penalty = fields.number("repetition_penalty", {1e-6, std::nullopt, 1e6});
  into.min_tokens = fields.integer("min_tokens", 0);
  into.stop_token_ids = fields.ids("stop_token_ids").value_or(Ids());
  // Without effect on the answer here.
  fields.text_or_none("user");
  fields.object("metadata");
  fields.only_false("store");
  fields.one_of("service_tier", {"auto", "default"});
  fields.text_or_none("safety_identifier");
  fields.text_or_none("prompt_cache_key");
}

Ids ids_of(const Json& list) {
  Ids ids;
  ids.reserve(list.size());
  for (const Json& one : list) ids.push_back(bounded(one));
  return ids;
}

// Returns text or token ids, or several of either.
std::vector<Prompt> prompts_of(Fields& fields) {
  const Json& found = fields.required("prompt");
  if (found.is_string()) return {found.get<std::string>()};
  if (!found.is_array()) {
    const std::string shown = found_text(found);
    throw wrong_field("prompt", "expected a valid string" + shown + " or a valid list" + shown);
  }
  if (found.empty()) {
    throw wrong_field("prompt", "expected a valid string or at least 1 item after validation, not 0");
  }
  if (are_ids(found)) return {ids_of(found)};
  const bool texts = std::all_of(found.begin(), found.end(), [](const Json& one) { return one.is_string(); });
  const bool lists =
      std::all_of(found.begin(), found.end(), [](const Json& one) { return are_ids(one) && !one.empty(); });
  if (!texts && !lists) throw wrong_field("prompt", "expected a valid string");
  if (found.size() > kMostPrompts) {
    throw wrong_field("prompt", "expected a valid string or " + too_many(kMostPrompts, found.size()));
  }
  std::vector<Prompt> prompts;
  for (const Json& one : found) {
    if (texts) {
      prompts.emplace_back(one.get<std::string>());
    } else {
      prompts.emplace_back(ids_of(one));
    }
  }
  return prompts;
}

}  // namespace

CompletionBody completion_body(const Json& body) {
  Fields fields = fields_of(body);
  CompletionBody result;
  read_generation(fields, result);
  result.prompts = prompts_of(fields);
  result.logprobs = fields.integer("logprobs", 0, 20);
  fields.only_false("echo");
  result.best_of = fields.integer("best_of", std::nullopt);
  fields.only_null("suffix");
  fields.finish();
  return result;
}

ChatBody chat_body(const Json& body) {
  Fields fields = fields_of(body);
  ChatBody result;
  read_generation(fields, result);
  result.messages = *fields.objects("messages", true);
  if (result.messages.empty()) throw wrong_field("messages", "expected at least 1 item after validation, not 0");
  result.max_completion_tokens = fields.integer("max_completion_tokens", 1);
  result.logprobs = fields.boolean("logprobs").value_or(false);
  result.top_logprobs = fields.integer("top_logprobs", 0, 20);
  const Json* tools = fields.objects("tools", false);
  const bool unused = fields.one_of("tool_choice", {"auto", "none"}) == "none";
  if (tools != nullptr && !unused) result.tools = *tools;
  fields.boolean("parallel_tool_calls");
  const Json* variables = fields.object("chat_template_kwargs");
  result.variables = variables == nullptr ? Json::object() : *variables;
  fields.finish();
  return result;
}

TokenizeBody tokenize_body(const Json& body) {
  Fields fields = fields_of(body);
  TokenizeBody result;
  result.model = fields.text("model");
  result.prompt = fields.text_or_none("prompt");
  const Json* messages = fields.objects("messages", false);
  if (messages != nullptr) result.messages = *messages;
  result.add_special_tokens = fields.boolean("add_special_tokens", false).value_or(true);
  fields.finish();
  return result;
}

DetokenizeBody detokenize_body(const Json& body) {
  Fields fields = fields_of(body);
  DetokenizeBody result;
  result.model = fields.text("model");
  result.tokens = fields.required_ids("tokens");
  fields.finish();
  return result;
}

}  // namespace service
