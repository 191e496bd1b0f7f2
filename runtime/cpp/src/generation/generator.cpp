// Loads a bundle and generates with it.
#include "dynexport/generator.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "dynexport/work.hpp"
#include "execution/checks.hpp"
#include "generation/stream.hpp"

namespace dynexport {
namespace {

constexpr const char* kTokenizerFile = "tokenizer.json";
// Tokens per row to allocate first in a long context, where the final number is unknown.
constexpr std::int64_t kRoom = 1024;

std::shared_ptr<const Tokenizer> opened_tokenizer(const Bundle& bundle) {
  return bundle.has(kTokenizerFile) ? Tokenizer::open(bundle) : nullptr;
}

const Options& option_of(const std::vector<Options>& options, std::size_t place) {
  return options[options.size() == 1 ? 0 : place];
}

}  // namespace

struct Generator::State {
  State(std::shared_ptr<const Bundle> of, const BackendOptions& options)
      : bundle(std::move(of)), tokenizer(opened_tokenizer(*bundle)), executor(bundle, options) {
    try {
      chat_template = ChatTemplate::open(*bundle);
      if (chat_template == nullptr) {
        no_template = "chat_template.jinja: the bundle has no chat template; give a plain prompt instead";
      }
    } catch (const Error& error) {  // one that is not covered: the caller renders conversations
      no_template = error.what();
    }
  }

  std::shared_ptr<const Bundle> bundle;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;
  std::string no_template;  // why there is none
  Executor executor;
  Speculators speculators;
};

std::shared_ptr<Generator> Generator::load(const std::filesystem::path& bundle, const BackendOptions& options) {
  return std::make_shared<Generator>(Bundle::open(bundle), options);
}

Generator::Generator(std::shared_ptr<const Bundle> bundle, const BackendOptions& options)
    : state_(std::make_unique<State>(std::move(bundle), options)) {}

Generator::~Generator() = default;

const Bundle& Generator::bundle() const { return *state_->bundle; }
const Manifest& Generator::manifest() const { return state_->bundle->manifest(); }
Executor& Generator::executor() { return state_->executor; }
const std::shared_ptr<const Tokenizer>& Generator::tokenizer() const { return state_->tokenizer; }
const std::shared_ptr<const ChatTemplate>& Generator::chat_template() const { return state_->chat_template; }

Generator::Prompt Generator::encode(std::string_view text) const {
  if (state_->tokenizer == nullptr) {
    throw Error("tokenizer.json: the bundle has no tokenizer; use token ids instead of text");
  }
  return state_->tokenizer->encode(text);
}

Generator::Prompt Generator::chat(const std::string& messages_json, const std::string& variables_json) const {
  if (state_->chat_template == nullptr) throw Error(state_->no_template);
  const std::string text = state_->chat_template->render(messages_json, true, variables_json);
  if (state_->tokenizer == nullptr) return encode(text);  // refuses it
  return state_->tokenizer->encode(text, false);
}

Generation Generator::generate(const Prompt& prompt, const Options& options) {
  return std::move(generate(std::vector<Prompt>{prompt}, {options}).front());
}

std::vector<Generation> Generator::generate(const std::vector<Prompt>& prompts, const std::vector<Options>& options) {
  std::vector<Generation> done;
  for (const Prompt& prompt : prompts) done.emplace_back().prompt_tokens = static_cast<std::int64_t>(prompt.size());
  stream(prompts, options, [&done](const Piece& piece) {
    done[static_cast<std::size_t>(piece.row)].push(piece);
    return true;
  });
  return done;
}

std::vector<Generation> Generator::choices(const Prompt& prompt, std::int64_t n, const Options& options) {
  checked_count("n", n, 1, kMostChoices);
  std::vector<Generation> done(static_cast<std::size_t>(n));
  for (Generation& each : done) each.prompt_tokens = static_cast<std::int64_t>(prompt.size());
  const auto push = [&done](const Piece& piece) {
    done[static_cast<std::size_t>(piece.row)].push(piece);
    return true;
  };
  stream({prompt}, {options}, push, n);
  return done;
}

bool Generator::stream(const std::vector<Prompt>& prompts, const std::vector<Options>& options, const OnPiece& on_piece,
                       std::int64_t n) {
  checked_count("n", n, 1, kMostChoices);
  if (prompts.empty()) throw Error("prompts: expected at least one, found none");
  if (options.size() != 1 && options.size() != prompts.size()) {
    throw Error("options: expected one, or " + std::to_string(prompts.size()) + ", one for each prompt, found " +
                std::to_string(options.size()));
  }
  std::vector<Group> groups;
  std::int64_t longest = 0, most = 0, index = 0;
  for (std::size_t place = 0; place < prompts.size(); ++place) {
    const Options& its = option_of(options, place);
    check_prompt(prompts[place]);
    const Depth depth = bundle().depth(its.depth);
    Group& group = groups.emplace_back(Group{prompts[place], {}});
    for (std::int64_t answer = 0; answer < n; ++answer) {
      group.requests.push_back(request(prompts[place], its, depth, index++));
    }
    longest = std::max(longest, static_cast<std::int64_t>(prompts[place].size()));
    most = std::max(most, std::min(its.max_new_tokens, manifest().model.max_length));
  }
  const std::unique_ptr<KvCache> cache =
      state_->executor.cache(index, longest + most, state_->executor.decision_rows() > 0, longest + kRoom);
  cache->acquire(index);
  Speculators::Lent speculator;
  if (const auto& wanted = options.front().speculation)
    speculator = state_->speculators.lend(state_->executor, *wanted);
  return run_requests(state_->executor, *cache, groups, options.front().chunk, speculator.get(), on_piece);
}

Request Generator::request(const Prompt& prompt, const Options& options, const Depth& depth, std::int64_t index) const {
  checked_count("max_new_tokens", options.max_new_tokens);
  if (!options.stop.empty() && state_->tokenizer == nullptr) {
    throw Error("stop: expected a bundle with a tokenizer, found none in " + bundle().path().string());
  }
  const Tokens& tokens = manifest().tokens;
  const Model& model = manifest().model;
  check_ids("stop_token_ids", options.stop_token_ids, model.vocab_size);
  RequestLimits limits;
  limits.stop = options.stop;
  limits.eos = tokens.eos;
  if (options.chat) limits.eos.insert(limits.eos.end(), tokens.turn_end.begin(), tokens.turn_end.end());
  limits.eos.insert(limits.eos.end(), options.stop_token_ids.begin(), options.stop_token_ids.end());
  limits.new_tokens = options.max_new_tokens;
  limits.room = model.max_length - static_cast<std::int64_t>(prompt.size());
  Sampler sampler(options.sampling, prompt, limits.eos, model.vocab_size, static_cast<std::uint32_t>(index));
  return {index, depth, std::move(sampler), state_->tokenizer, std::move(limits)};
}

void Generator::check_prompt(const Prompt& prompt) const {
  check_ids("prompt", prompt, manifest().model.vocab_size);
  if (prompt.empty()) throw Error("prompt: expected at least one token, found none");
}

}  // namespace dynexport
