// The C interface: arguments are checked and converted, and every exception becomes a status.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "dynexport/dynexport.h"
#include "dynexport/generator.hpp"

struct dynexport_model {
  std::shared_ptr<dynexport::Generator> generator;
  std::vector<std::string> depths;
};

namespace {

using dynexport::Error;

thread_local std::string last_error;

// Runs a function of the library. Its exceptions become a status, and the thread's last error.
template <typename Function>
dynexport_status guarded(Function function) noexcept {
  dynexport_status status = DYNEXPORT_FAILED;
  try {
    try {
      return function();
    } catch (const dynexport::RouteError& error) {
      status = DYNEXPORT_ROUTE_ERROR;
      last_error = error.what();
    } catch (const Error& error) {
      status = DYNEXPORT_BAD_INPUT;
      last_error = error.what();
    } catch (const std::exception& error) {
      last_error = dynexport::one_line(std::string("dynexport failed: ") + error.what());
    } catch (...) {
      last_error = "dynexport failed for an unknown reason";
    }
  } catch (...) {  // no memory for the message
    last_error.clear();
  }
  return status;
}

template <typename Pointer>
Pointer checked(const char* name, Pointer pointer) {
  if (pointer == nullptr) throw Error(std::string(name) + ": expected an address, found none");
  return pointer;
}

// Checks an array that may have no address if it is empty.
template <typename Item>
std::vector<Item> items(const char* name, const Item* first, size_t count) {
  if (count == 0) return {};
  checked(name, first);
  return {first, first + count};
}

std::string text_or(const char* text, const char* otherwise = "") { return text == nullptr ? otherwise : text; }

// Returns a caller's struct, with ``defaults`` for the fields that the caller was compiled without.
template <typename Struct>
Struct completed(const char* name, const Struct* given, Struct defaults) {
  if (given == nullptr) return defaults;
  if (given->size < sizeof(size_t) || given->size > sizeof(Struct)) {
    throw Error(std::string(name) + ": size: expected at most " + std::to_string(sizeof(Struct)) + ", found " +
                std::to_string(given->size) + "; initialize it with dynexport_" + name +
                "_init, or update the library");
  }
  std::memcpy(&defaults, given, given->size);
  return defaults;
}

dynexport_backend default_backend() {
  dynexport_backend backend = {};
  backend.size = sizeof backend;
  return backend;
}

void set_sampling(dynexport_options& options, const dynexport::Sampling& sampling) {
  options.temperature = sampling.temperature;
  options.top_p = sampling.top_p;
  options.min_p = sampling.min_p;
  options.typical_p = sampling.typical_p;
  options.repetition_penalty = sampling.repetition_penalty;
  options.frequency_penalty = sampling.frequency_penalty;
  options.presence_penalty = sampling.presence_penalty;
  options.top_k = sampling.top_k;
  options.min_new_tokens = sampling.min_new_tokens;
  options.no_repeat_ngram_size = sampling.no_repeat_ngram_size;
}

dynexport_options default_options() {
  dynexport_options options = {};
  options.size = sizeof options;
  options.max_new_tokens = dynexport::Options().max_new_tokens;
  set_sampling(options, dynexport::Sampling());
  return options;
}

// Copies the first ``size`` bytes of a struct to a caller, who may have been compiled with a smaller one.
template <typename Struct>
dynexport_status initialize(const char* name, Struct* target, size_t size, Struct defaults) {
  checked(name, target);
  defaults.size = size;
  completed(name, &defaults, Struct());  // checks the size
  std::memcpy(target, &defaults, size);
  return DYNEXPORT_OK;
}

dynexport::Sampling sampling_of(const dynexport_options& options) {
  dynexport::Sampling sampling;
  sampling.temperature = options.temperature;
  sampling.top_p = options.top_p;
  sampling.min_p = options.min_p;
  sampling.typical_p = options.typical_p;
  sampling.repetition_penalty = options.repetition_penalty;
  sampling.frequency_penalty = options.frequency_penalty;
  sampling.presence_penalty = options.presence_penalty;
  sampling.top_k = options.top_k;
  sampling.min_new_tokens = options.min_new_tokens;
  sampling.no_repeat_ngram_size = options.no_repeat_ngram_size;
  if (options.has_seed != 0) sampling.seed = options.seed;
  if (options.logprobs != 0) sampling.logprobs = 0;
  const std::vector<int64_t> ids = items("bias_ids", options.bias_ids, options.bias_count);
  const std::vector<double> biases = items("biases", options.biases, options.bias_count);
  for (std::size_t i = 0; i < ids.size(); ++i) sampling.logit_bias[ids[i]] = biases[i];
  return sampling;
}

dynexport::Options options_of(const dynexport_options* given, const dynexport::Bundle& bundle) {
  const dynexport_options options = completed("options", given, default_options());
  dynexport::Options result;
  result.max_new_tokens = options.max_new_tokens;
  result.sampling = sampling_of(options);
  if (options.depth != nullptr) result.depth = options.depth;
  result.chat = options.chat != 0;
  for (const char* stop : items("stop", options.stop, options.stop_count)) {
    result.stop.emplace_back(checked("stop", stop));
  }
  result.stop_token_ids = items("stop_ids", options.stop_ids, options.stop_ids_count);
  if (options.speculate != 0) {
    dynexport::Speculation& speculation = result.speculation.emplace();
    speculation.most = options.speculate;
    if (options.draft != nullptr) speculation.depth = bundle.depth(options.draft);
  } else if (options.draft != nullptr) {
    throw Error("draft: expected with speculate, the most drafts of a step, found without");
  }
  return result;
}

// Returns memory for the caller, who frees it.
template <typename Item>
Item* allocated(size_t count) {
  auto* memory = static_cast<Item*>(std::malloc(std::max<size_t>(count, 1) * sizeof(Item)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

dynexport_status give(const std::vector<int64_t>& found, int64_t** ids, size_t* count) {
  checked("ids", ids);
  checked("count", count);
  *ids = allocated<int64_t>(found.size());
  std::copy(found.begin(), found.end(), *ids);
  *count = found.size();
  return DYNEXPORT_OK;
}

dynexport_token token_of(const dynexport::Piece& piece) {
  dynexport_token token = {};
  token.size = sizeof token;
  token.id = piece.token;
  token.text = piece.text.c_str();
  token.text_bytes = piece.text.size();
  token.layers = piece.layers;
  token.logprob = piece.logprobs ? piece.logprobs->logprob : std::numeric_limits<double>::quiet_NaN();
  if (piece.finish) token.finish = *piece.finish == dynexport::Finish::kStop ? DYNEXPORT_STOP : DYNEXPORT_LENGTH;
  return token;
}

const dynexport::Generator& of(const dynexport_model* model) { return *checked("model", model)->generator; }

}  // namespace

const char* dynexport_last_error(void) { return last_error.c_str(); }

dynexport_status dynexport_version(const char** version) {
  return guarded([&] {
    *checked("version", version) = DYNEXPORT_VERSION;
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_abi(int32_t* number) {
  return guarded([&] {
    *checked("number", number) = DYNEXPORT_ABI;
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_free(void* result) {
  std::free(result);
  return DYNEXPORT_OK;
}

dynexport_status dynexport_backend_init(dynexport_backend* backend, size_t size) {
  return guarded([&] { return initialize("backend", backend, size, default_backend()); });
}

dynexport_status dynexport_options_init(dynexport_options* options, size_t size) {
  return guarded([&] { return initialize("options", options, size, default_options()); });
}

dynexport_status dynexport_open(const char* bundle, const dynexport_backend* backend, dynexport_model** model) {
  return guarded([&] {
    checked("bundle", bundle);
    checked("model", model);
    const dynexport_backend given = completed("backend", backend, default_backend());
    dynexport::BackendOptions options;
    options.kind = text_or(given.kind, "onnxruntime");
    options.library = text_or(given.library);
    options.plugins = text_or(given.plugins);
    options.weights = text_or(given.weights, "packed");
    options.threads = given.threads;
    options.trust_engines = given.trust_engines != 0;
    auto opened = std::make_unique<dynexport_model>();
    opened->generator = dynexport::Generator::load(bundle, options);
    opened->depths.emplace_back(opened->generator->manifest().full().name);
    for (const dynexport::Depth& depth : opened->generator->manifest().depths) opened->depths.push_back(depth.name);
    *model = opened.release();
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_close(dynexport_model* model) {
  return guarded([&] {
    delete model;
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_vocab_size(const dynexport_model* model, int64_t* count) {
  return guarded([&] {
    *checked("count", count) = of(model).manifest().model.vocab_size;
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_max_length(const dynexport_model* model, int64_t* count) {
  return guarded([&] {
    *checked("count", count) = of(model).manifest().model.max_length;
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_depth_name(const dynexport_model* model, size_t index, const char** name) {
  return guarded([&] {
    const std::vector<std::string>& depths = checked("model", model)->depths;
    *checked("name", name) = index < depths.size() ? depths[index].c_str() : nullptr;
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_recommend(const dynexport_model* model, dynexport_options* options) {
  return guarded([&] {
    dynexport_options changed = completed("options", checked("options", options), default_options());
    set_sampling(changed, dynexport::recommended_by(of(model).bundle()).sampling);
    std::memcpy(options, &changed, changed.size);
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_encode(const dynexport_model* model, const char* text, size_t bytes, int64_t** ids,
                                  size_t* count) {
  return guarded([&] {
    const std::string_view content(bytes == 0 ? "" : checked("text", text), bytes);
    return give(of(model).encode(content), ids, count);
  });
}

dynexport_status dynexport_chat(const dynexport_model* model, const char* messages, const char* variables,
                                int64_t** ids, size_t* count) {
  return guarded(
      [&] { return give(of(model).chat(checked("messages", messages), text_or(variables, "{}")), ids, count); });
}

dynexport_status dynexport_decode(const dynexport_model* model, const int64_t* ids, size_t count, char** text,
                                  size_t* bytes) {
  return guarded([&] {
    checked("text", text);
    checked("bytes", bytes);
    const auto& tokenizer = of(model).tokenizer();
    if (tokenizer == nullptr) throw Error("tokenizer.json: the bundle has no tokenizer");
    const std::string found = tokenizer->decode(items("ids", ids, count));
    *text = allocated<char>(found.size() + 1);
    std::memcpy(*text, found.c_str(), found.size() + 1);
    *bytes = found.size();
    return DYNEXPORT_OK;
  });
}

dynexport_status dynexport_generate(dynexport_model* model, const int64_t* prompt, size_t count,
                                    const dynexport_options* options, dynexport_on_token on_token, void* user) {
  return guarded([&] {
    checked("on_token", on_token);
    dynexport::Generator& generator = *checked("model", model)->generator;
    const auto on_piece = [&](const dynexport::Piece& piece) {
      const dynexport_token token = token_of(piece);
      return on_token(user, &token) == 0;
    };
    const dynexport::Options wanted = options_of(options, generator.bundle());
    const bool finished = generator.stream({items("prompt", prompt, count)}, {wanted}, on_piece);
    if (!finished) last_error = "the callback cancelled the generation";
    return finished ? DYNEXPORT_OK : DYNEXPORT_CANCELLED;
  });
}
