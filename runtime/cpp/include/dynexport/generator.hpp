// A loaded bundle that generates text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dynexport/bundle.hpp"
#include "dynexport/chat_template.hpp"
#include "dynexport/executor.hpp"
#include "dynexport/request.hpp"
#include "dynexport/sampler.hpp"
#include "dynexport/speculation.hpp"
#include "dynexport/tokenizer.hpp"

namespace dynexport {

// The options of a generation.
struct Options {
  std::int64_t max_new_tokens = 128;         // the end of the context may come first
  Sampling sampling;                         // greedy by default
  std::optional<std::string> depth;          // a name or a ratio, as for Bundle::depth
  std::vector<std::string> stop;             // strings that end an answer; they are not part of its text
  bool chat = false;                         // an answer in a chat also ends at the manifest's turn_end tokens
  std::vector<std::int64_t> stop_token_ids;  // ids that end an answer, in addition to the model's
  Chunks chunk;                              // how prompts are cut; a server has even ones
  std::optional<Speculation> speculation;    // how tokens are drafted; none for one token of a row in each step
};

// The author's sampling options in generation_config.json.
struct Recommended {
  Sampling sampling;              // greedy unless the file sets do_sample
  std::vector<std::string> stop;  // strings that end an answer
  std::vector<std::string>
      left_out;  // fields that change the generated tokens and are not supported, with their values
};

// Reads the text of a generation_config.json; absent fields get transformers' defaults. Throws Error, which names the
// field.
Recommended read_generation_config(std::string_view json);

// Reads a bundle's; greedy without a generation_config.json.
Recommended recommended_by(const Bundle& bundle);

// Receives each generated token; returns false to cancel the generation.
using OnPiece = std::function<bool(const Piece&)>;

// Threads may share a generator; several generations may run at a time, and do not change each other's results.
class Generator {
 public:
  using Prompt = std::vector<std::int64_t>;

  // Opens a bundle and loads it. Throws Error when it is not a bundle, was changed, or cannot run here.
  static std::shared_ptr<Generator> load(const std::filesystem::path& bundle, const BackendOptions& options = {});

  Generator(std::shared_ptr<const Bundle> bundle, const BackendOptions& options);
  ~Generator();
  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;

  const Bundle& bundle() const;
  const Manifest& manifest() const;
  Executor& executor();
  const std::shared_ptr<const Tokenizer>& tokenizer() const;         // null if the bundle has none
  const std::shared_ptr<const ChatTemplate>& chat_template() const;  // null if the bundle has none that is covered

  // Token ids of a text. Throws Error without a tokenizer.
  Prompt encode(std::string_view text) const;
  // Token ids of a conversation; arguments as for ChatTemplate::render. Throws Error without a covered chat template.
  Prompt chat(const std::string& messages_json, const std::string& variables_json = "{}") const;

  // Generates from one prompt.
  Generation generate(const Prompt& prompt, const Options& options = {});
  // Generates from several prompts in one batch. ``options``: one for all, or one per prompt (with the same chunk and
  // speculation).
  std::vector<Generation> generate(const std::vector<Prompt>& prompts, const std::vector<Options>& options);
  // Generates n answers to one prompt, 1 to 128, each with its own random draws.
  std::vector<Generation> choices(const Prompt& prompt, std::int64_t n, const Options& options = {});
  // Generates token by token; the pieces of a step come row by row. Returns false if ``on_piece`` did.
  bool stream(const std::vector<Prompt>& prompts, const std::vector<Options>& options, const OnPiece& on_piece,
              std::int64_t n = 1);

  // Checks a prompt and options, and returns the state of request ``index``, which also selects one of a seed's
  // independent random sequences; for schedulers.
  Request request(const Prompt& prompt, const Options& options, const Depth& depth, std::int64_t index) const;
  // Throws Error for an id outside the vocabulary, or none.
  void check_prompt(const Prompt& prompt) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dynexport
