/* dynexport for C, and for every language that calls C.
 *
 * - Every function but dynexport_last_error returns a status. Where it is not DYNEXPORT_OK, that function says why, in one
 *   line.
 * - Results are written to the last arguments, and only if the status is DYNEXPORT_OK.
 * - Texts are UTF-8. Texts that go in end with a zero byte, or come with their number of bytes.
 * - Ids and texts that come out belong to the caller, who passes them to dynexport_free().
 * - No C++ exception leaves a function. A callback must not throw, nor jump out of it.
 * - Threads may share a model; generations may run at the same time. Close it after the last of them.
 *
 * The binary interface: a struct begins with its size, as the caller was compiled, and grows only at its end; the
 * library fills in what an older caller does not have, and refuses a struct that is larger than its own. Functions and
 * numbers are not removed or changed while dynexport_abi() returns the same number, which is the N of
 * libdynexport.so.N. The C++ interface (the .hpp files) has no such promise: compile against the library that you use.
 */
#ifndef DYNEXPORT_DYNEXPORT_H
#define DYNEXPORT_DYNEXPORT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DYNEXPORT_ABI 0

typedef int32_t dynexport_status;
enum {
  DYNEXPORT_OK = 0,
  DYNEXPORT_FAILED = 1,      /* no memory, or a fault of the library */
  DYNEXPORT_BAD_INPUT = 2,   /* an argument, bundle or option that is refused */
  DYNEXPORT_ROUTE_ERROR = 3, /* a route that the model's contract defines as an error, such as a full cache */
  DYNEXPORT_CANCELLED = 4    /* the callback ended the generation */
};

/* A loaded bundle. */
typedef struct dynexport_model dynexport_model;

/* Where a model runs. dynexport_backend_init sets the defaults; text fields may be NULL. */
typedef struct dynexport_backend {
  size_t size;
  const char* kind;      /* "onnxruntime" (the default), "onnxruntime-cuda", "tensorrt", "tensorrt-rtx" */
  const char* library;   /* path of the engine's shared library; NULL: looked for by its usual name */
  const char* plugins;   /* path of the library of dynexport's TensorRT plugins, or of its CPU operators */
  int32_t threads;       /* of one operator; 0 lets the engine choose */
  int32_t trust_engines; /* whether TensorRT may load engines that were not built on this machine */
  const char* weights;   /* "packed" (the default), or "mapped": fp32 weights as they lie in the file, shared */
} dynexport_backend;

/* A generation. dynexport_options_init sets the defaults, which are greedy. */
typedef struct dynexport_options {
  size_t size;
  int64_t max_new_tokens; /* 128 */
  const char* depth;      /* name or ratio, such as "full" or "2"; NULL: the bundle's default */
  int32_t chat;           /* whether the answer is one in a chat, and ends at its ends of turns too */
  int32_t has_seed;       /* whether seed is used; without it, sampled tokens differ each time */
  uint64_t seed;
  double temperature; /* 0: greedy */
  double top_p, min_p, typical_p;
  double repetition_penalty, frequency_penalty, presence_penalty;
  int64_t top_k, min_new_tokens, no_repeat_ngram_size;
  const char* const* stop; /* texts that end the answer and are not part of it */
  size_t stop_count;
  const int64_t* stop_ids; /* further ids that end the answer */
  size_t stop_ids_count;
  const int64_t* bias_ids; /* ids whose logits are changed by biases */
  const double* biases;
  size_t bias_count;
  int32_t logprobs;  /* whether tokens come with their log probability */
  int64_t speculate; /* most drafts of a step, which the full model verifies in one call; 0: none */
  const char* draft; /* the depth that drafts; NULL: the last tokens are looked up in prompt and answer */
} dynexport_options;

enum { DYNEXPORT_GOES_ON = 0, DYNEXPORT_STOP = 1, DYNEXPORT_LENGTH = 2 };

/* A generated token; it is valid during the callback. */
typedef struct dynexport_token {
  size_t size;
  int64_t id;
  const char* text; /* the text that is final now, often none while a character is incomplete; ends with a zero byte */
  size_t text_bytes;
  int64_t layers; /* that the token before it ran in, whose hidden state it was chosen from */
  double logprob; /* NaN unless asked for */
  int32_t finish; /* DYNEXPORT_GOES_ON, or why the answer ends with this token */
} dynexport_token;

/* Receives each token of a generation. Returns 0 to go on, anything else to cancel it. */
typedef int (*dynexport_on_token)(void* user, const dynexport_token* token);

/* The version, such as "0.1.0", and the number of the binary interface. */
dynexport_status dynexport_version(const char** version);
dynexport_status dynexport_abi(int32_t* number);

/* The last error of this thread, "" before the first; valid until its next one. */
const char* dynexport_last_error(void);

/* Frees what another function returned; NULL is allowed. */
dynexport_status dynexport_free(void* result);

/* ``size`` is the size of the struct, as the caller was compiled. */
dynexport_status dynexport_backend_init(dynexport_backend* backend, size_t size);
dynexport_status dynexport_options_init(dynexport_options* options, size_t size);

/* Opens a bundle and loads it; ``backend`` may be NULL. */
dynexport_status dynexport_open(const char* bundle, const dynexport_backend* backend, dynexport_model** model);
/* Closes a model; NULL is allowed. */
dynexport_status dynexport_close(dynexport_model* model);

dynexport_status dynexport_vocab_size(const dynexport_model* model, int64_t* count);
/* The most tokens of a prompt and its answer together. */
dynexport_status dynexport_max_length(const dynexport_model* model, int64_t* count);
/* The name of a depth: 0 is "full", then those that the bundle declares; NULL past the last. It belongs to the model.
 */
dynexport_status dynexport_depth_name(const dynexport_model* model, size_t index, const char** name);
/* Sets the sampling options that the model's author recommends; other fields stay. */
dynexport_status dynexport_recommend(const dynexport_model* model, dynexport_options* options);

/* Token ids of a text, and of a conversation: ``messages`` is JSON, a list of {"role", "content"}; ``variables``, a
 * JSON object of further variables of the chat template, may be NULL. */
dynexport_status dynexport_encode(const dynexport_model* model, const char* text, size_t bytes, int64_t** ids,
                                  size_t* count);
dynexport_status dynexport_chat(const dynexport_model* model, const char* messages, const char* variables,
                                int64_t** ids, size_t* count);
/* Text of token ids, without special tokens; it ends with a zero byte, which ``bytes`` does not count. */
dynexport_status dynexport_decode(const dynexport_model* model, const int64_t* ids, size_t count, char** text,
                                  size_t* bytes);

/* Generates from a prompt; ``options`` may be NULL. The callback is called in this thread, token by token. */
dynexport_status dynexport_generate(dynexport_model* model, const int64_t* prompt, size_t count,
                                    const dynexport_options* options, dynexport_on_token on_token, void* user);

#ifdef __cplusplus
}
#endif

#endif
