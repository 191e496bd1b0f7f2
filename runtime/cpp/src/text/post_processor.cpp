// Post-processors: templates, and the fixed pairs of BERT and RoBERTa.
#include "text/post_processor.hpp"

#include <algorithm>

#include "text/fields.hpp"

namespace dynexport::text {

namespace {

constexpr std::size_t kMost = 256;

TokenId id_of(const nlohmann::json& value, const Fields& part) {
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= static_cast<std::uint64_t>(kMostTokens)) {
    throw Error(part.where() + ": expected token ids below " + std::to_string(kMostTokens));
  }
  return static_cast<TokenId>(value.get<std::uint64_t>());
}

Frame by_template(const Fields& part) {
  part.only({"type", "single", "pair", "special_tokens"});
  const Fields tokens = part.part("special_tokens");
  Frame frame;
  bool text_seen = false;
  for (const Fields& entry : part.parts("single", kMost)) {
    entry.only({"SpecialToken", "Sequence"});
    if (entry.has("Sequence")) {
      if (text_seen || entry.part("Sequence").text("id") != "A") throw part.unknown("a template with several texts");
      text_seen = true;
      continue;
    }
    const std::string& name = entry.part("SpecialToken").text("id");
    auto& ids = text_seen ? frame.after : frame.before;
    const Fields token = tokens.part(name.c_str());
    for (const auto& id : token.list("ids", kMost)) ids.push_back(id_of(id, token));
  }
  if (!text_seen) throw part.unknown("a template without the text");
  return frame;
}

Frame by_pair(const Fields& part) {
  part.only({"type", "sep", "cls", "trim_offsets", "add_prefix_space"});
  const auto id = [&](const char* name) {
    const auto& pair = part.list(name, 2);
    if (pair.size() != 2) throw part.expected(name, "a token and its id");
    return id_of(pair[1], part);
  };
  return {{id("cls")}, {id("sep")}};
}

Frame read(const Fields& part, int depth) {
  const std::string& type = part.text("type");
  if (type == "TemplateProcessing") return by_template(part);
  if (type == "RobertaProcessing" || type == "BertProcessing") return by_pair(part);
  if (type == "ByteLevel") return {};  // changes offsets only
  if (type != "Sequence" || depth > 0) throw part.unknown("the post-processor " + shown(type));
  Frame frame;
  for (const Fields& entry : part.parts("processors", kMost)) {
    const Frame next = read(entry, depth + 1);
    frame.before.insert(frame.before.begin(), next.before.begin(), next.before.end());
    frame.after.insert(frame.after.end(), next.after.begin(), next.after.end());
  }
  return frame;
}

}  // namespace

Frame read_post_processor(const nlohmann::json& description, const std::string& where) {
  return description.is_null() ? Frame{} : read(Fields(description, where + ": post_processor"), 0);
}

}  // namespace dynexport::text
