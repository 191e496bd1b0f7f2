// Text to token ids and back: the parts of a tokenizer.json in their order.
#include "dynexport/tokenizer.hpp"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "dynexport/error.hpp"
#include "text/added_tokens.hpp"
#include "text/decoders.hpp"
#include "text/fields.hpp"
#include "text/model.hpp"
#include "text/normalizers.hpp"
#include "text/post_processor.hpp"
#include "text/pre_tokenizers.hpp"
#include "text/text_checks.hpp"
#include "text/utf8.hpp"

namespace dynexport {

using nlohmann::json;

namespace {

constexpr std::size_t kLargestFile = std::size_t{256} << 20, kLongestText = std::size_t{64} << 20;
constexpr const char* kFile = "tokenizer.json";

json parsed(std::string_view text, const std::string& where) {
  if (text.size() > kLargestFile) throw Error(where + ": expected at most 256 MiB");
  json value = json::parse(text, nullptr, false);
  if (value.is_discarded()) throw Error(where + ": expected JSON, found something else");
  return value;
}

const json& part_of(const json& file, const char* name) {
  static const json kNone;
  const auto found = file.find(name);
  return found == file.end() ? kNone : *found;
}

}  // namespace

struct Tokenizer::State {
  State(const json& file, const text::Fields& fields)
      : normalizer(text::read_normalizer(part_of(file, "normalizer"), fields.where())),
        pre_tokenizer(text::read_pre_tokenizer(part_of(file, "pre_tokenizer"), fields.where())),
        model(text::read_model(fields.part("model"))),
        added(fields, model->vocabulary(), normalizer),
        frame(text::read_post_processor(part_of(file, "post_processor"), fields.where())),
        decoding(text::read_decoder(part_of(file, "decoder"), fields.where())) {
    fields.only({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
                 "decoder", "model"});
  }

  // Encodes text between added tokens that are found as written; ``first`` is whether it begins the whole text.
  void encode(std::string_view part, bool first, std::vector<text::TokenId>& ids) const {
    const std::string normal = normalizer(std::string(part));
    for (const text::Segment& segment : added.normalized().cut(normal)) {
      if (segment.id >= 0) {
        ids.push_back(segment.id);
        continue;
      }
      text::Words words{{normal.substr(segment.begin, segment.end - segment.begin), first && segment.begin == 0}};
      for (const text::Word& word : pre_tokenizer(std::move(words))) model->encode(word.text, ids);
    }
  }

  const std::string* text_of(std::int64_t id) const {
    const std::string* found = added.text(id);
    return found != nullptr ? found : model->vocabulary().text(id);
  }

  text::Normalizer normalizer;
  text::PreTokenizer pre_tokenizer;
  std::unique_ptr<const text::Model> model;
  text::AddedTokens added;
  text::Frame frame;
  text::Decoding decoding;
};

Tokenizer::Tokenizer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Tokenizer::~Tokenizer() = default;

std::shared_ptr<const Tokenizer> Tokenizer::parse(std::string_view text, const std::string& where) {
  const json file = parsed(text, where);
  return std::shared_ptr<const Tokenizer>(new Tokenizer(std::make_unique<State>(file, text::Fields(file, where))));
}

std::shared_ptr<const Tokenizer> Tokenizer::open(const Bundle& bundle) {
  if (!bundle.has(kFile)) {
    throw Error(std::string(kFile) + ": the bundle has no tokenizer; use token ids instead of text");
  }
  auto tokenizer = parse(bundle.read(kFile), kFile);
  text::check_strings(bundle, *tokenizer);
  return tokenizer;
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  if (text.size() > kLongestText) throw Error("text: expected at most 64 MiB, found " + std::to_string(text.size()));
  if (const std::size_t good = text::valid_length(text); good < text.size()) {
    throw Error("text: expected UTF-8, found a broken sequence after " + std::to_string(good) + " bytes");
  }
  std::vector<text::TokenId> ids;
  for (const text::Segment& segment : state_->added.as_written().cut(text)) {
    if (segment.id >= 0) {
      ids.push_back(segment.id);
    } else {
      state_->encode(text.substr(segment.begin, segment.end - segment.begin), segment.begin == 0, ids);
    }
  }
  std::vector<std::int64_t> out;
  const text::Frame& frame = state_->frame;
  out.reserve(ids.size() + frame.before.size() + frame.after.size());
  if (add_special_tokens) out.insert(out.end(), frame.before.begin(), frame.before.end());
  out.insert(out.end(), ids.begin(), ids.end());
  if (add_special_tokens) out.insert(out.end(), frame.after.begin(), frame.after.end());
  return out;
}

std::string Tokenizer::decode(const std::vector<std::int64_t>& ids, bool skip_special_tokens) const {
  text::Pieces pieces;
  for (const std::int64_t id : ids) {
    const std::string* text = state_->text_of(id);
    if (text != nullptr && !(skip_special_tokens && state_->added.is_special(*text))) pieces.push_back(*text);
  }
  std::string text;
  for (const std::string& piece : state_->decoding.decode(std::move(pieces))) text += piece;
  return text;
}

bool Tokenizer::is_silent(std::int64_t id, bool skip_special_tokens) const {
  return state_->text_of(id) == nullptr || (skip_special_tokens && state_->added.is_special(id));
}

bool Tokenizer::cleans_up() const { return state_->decoding.cleans_up; }

}  // namespace dynexport
