// Reads the author's sampling options from a model's generation_config.json.
#include <algorithm>
#include <map>
#include <string>

#include "bundle/json_text.hpp"
#include "bundle/text.hpp"
#include "dynexport/generator.hpp"
#include "generation/sampling_rules.hpp"

namespace dynexport {
namespace {

constexpr const char* kFile = "generation_config.json";
constexpr std::int64_t kTopK = 50;  // transformers' default with do_sample
constexpr std::size_t kShown = 80, kShownLeftOut = 40;

// Fields that change the generated tokens and that are not supported, with their neutral values in JSON.
const std::map<std::string, std::vector<Json>>& neutral() {
  static const std::map<std::string, std::vector<Json>> values = {
      {"assistant_early_exit", {}},
      {"constraints", {Json::array()}},
      {"diversity_penalty", {0}},
      {"dola_layers", {}},
      {"encoder_no_repeat_ngram_size", {0}},
      {"encoder_repetition_penalty", {1}},
      {"epsilon_cutoff", {0}},
      {"eta_cutoff", {0}},
      {"exponential_decay_length_penalty", {}},
      {"force_words_ids", {Json::array()}},
      {"forced_bos_token_id", {}},
      {"forced_decoder_ids", {Json::array()}},
      {"forced_eos_token_id", {}},
      {"guidance_scale", {1}},
      {"min_length", {0}},
      {"num_beams", {1}},
      {"penalty_alpha", {0}},
      {"sequence_bias", {Json::object(), Json::array()}},
      {"token_healing", {false}},
      {"top_h", {1}},
      {"watermarking_config", {}},
  };
  return values;
}

// A value in an error, as Python's ``shown``.
std::string shown_value(const Json& value) {
  const std::string text = quoted_value(value);
  const std::string_view start = cut(text, kShown);
  return start.size() == text.size() ? text : std::string(start) + "..";
}

// A value in an error, cut without a sign.
std::string cut_value(const Json& value) { return std::string(cut(quoted_value(value), kShown)); }

std::vector<std::int64_t> ids_of(const std::string& name, const Json& value) {
  if (!value.is_array()) refuse_option(name, "a list of token ids", shown_value(value));
  std::vector<std::int64_t> ids;
  for (const Json& id : value) {
    if (!id.is_number_integer() || (id.is_number_unsigned() && id.get<std::uint64_t>() > INT64_MAX)) {
      refuse_option(name, "token ids", shown_value(id));
    }
    ids.push_back(id.get<std::int64_t>());
  }
  return ids;
}

std::vector<std::vector<std::int64_t>> words_of(const std::string& name, const Json& value) {
  if (!value.is_array()) refuse_option(name, "a list of lists of token ids", shown_value(value));
  std::vector<std::vector<std::int64_t>> words;
  for (const Json& word : value) words.push_back(ids_of(name, word));
  return words;
}

// Reads the fields that are there and not null.
class Config {
 public:
  explicit Config(const Json& fields) : fields_(fields) {}

  const Json* find(const std::string& name) const {
    const auto found = fields_.find(name);
    return found == fields_.end() || found->is_null() ? nullptr : &*found;
  }

  bool samples() const {
    const Json* value = find("do_sample");
    if (value == nullptr) return false;
    if (!value->is_boolean()) refuse_option("do_sample", "true or false", cut_value(*value));
    return value->get<bool>();
  }

  Sampling sampling(bool samples) const {
    Sampling sampling;
    for (const NumberRule& rule : number_rules()) {
      if (takes(rule.name, samples)) take(rule, sampling);
    }
    for (const CountRule& rule : count_rules()) take(rule, sampling);
    if (samples && find("temperature") == nullptr) sampling.temperature = 1.0;
    if (samples && find("top_k") == nullptr) sampling.top_k = kTopK;
    if (const Json* value = find("suppress_tokens")) sampling.suppress_tokens = ids_of("suppress_tokens", *value);
    if (const Json* value = find("begin_suppress_tokens")) {
      sampling.begin_suppress_tokens = ids_of("begin_suppress_tokens", *value);
    }
    if (const Json* value = find("bad_words_ids")) sampling.bad_words_ids = words_of("bad_words_ids", *value);
    sampling.check();
    return sampling;
  }

  std::vector<std::string> stop() const {
    const Json* value = find("stop_strings");
    if (value == nullptr) return {};
    const Json texts = value->is_string() ? Json::array({*value}) : *value;
    const auto is_text = [](const Json& text) {
      return text.is_string() && !text.get_ref<const std::string&>().empty();
    };
    if (!texts.is_array() || !std::all_of(texts.begin(), texts.end(), is_text)) {
      refuse_option("stop_strings", "text or several", cut_value(*value));
    }
    return texts.get<std::vector<std::string>>();
  }

  std::vector<std::string> left_out() const {
    std::vector<std::string> found;
    for (const auto& [name, harmless] : neutral()) {
      const Json* value = find(name);
      if (value == nullptr || std::find(harmless.begin(), harmless.end(), *value) != harmless.end()) continue;
      found.push_back(name + " " + std::string(cut(dumped(*value), kShownLeftOut)));
    }
    return found;
  }

 private:
  // Penalties of OpenAI's API are not transformers' fields.
  static bool takes(const std::string& name, bool samples) {
    return name == "temperature" ? samples : name != "frequency_penalty" && name != "presence_penalty";
  }

  void take(const NumberRule& rule, Sampling& sampling) const {
    const Json* value = find(rule.name);
    if (value == nullptr) return;
    const double number = value->is_number() ? value->get<double>() : -1e9;  // outside every range
    if (!rule.holds(number)) refuse_option(rule.name, rule.expected, shown_value(*value));
    sampling.*rule.field = number;
  }

  void take(const CountRule& rule, Sampling& sampling) const {
    const Json* value = find(rule.name);
    if (value == nullptr) return;
    const bool fits = value->is_number_integer() && *value <= rule.most;
    const std::int64_t all = rule.field == &Sampling::top_k ? -1 : 0;  // -1: vLLM's way to say "all"
    if (!fits || *value < all) refuse_option(rule.name, rule.expected, shown_value(*value));
    sampling.*rule.field = std::max<std::int64_t>(0, value->get<std::int64_t>());
  }

  // JSON with spaces, as Python writes it.
  static std::string dumped(const Json& value) {
    std::string text;
    if (!value.is_structured()) return value.dump(-1, ' ', true, Json::error_handler_t::replace);
    for (const auto& [name, item] : value.items()) {
      if (text.size() > kShownLeftOut) break;  // no more is shown
      const std::string key = value.is_object() ? Json(name).dump(-1, ' ', true) + ": " : "";
      text += (text.empty() ? "" : ", ") + key + dumped(item);
    }
    return value.is_object() ? "{" + text + "}" : "[" + text + "]";
  }

  const Json& fields_;
};

}  // namespace

Recommended read_generation_config(std::string_view json) {
  const Json stored = parse_json_object(json, kFile);
  const Config config(stored);
  try {
    const bool samples = config.samples();
    return {config.sampling(samples), config.stop(), config.left_out()};
  } catch (const Error& error) {
    throw Error(std::string(kFile) + ": " + error.what());
  }
}

Recommended recommended_by(const Bundle& bundle) {
  return bundle.has(kFile) ? read_generation_config(bundle.read(kFile)) : Recommended{};
}

}  // namespace dynexport
