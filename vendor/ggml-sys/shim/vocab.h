// C entry points to llama.cpp's vocabulary, samplers and grammars that let no C++ exception out.
//
// Each call that can fail takes `error`, a buffer of `error_size` bytes that receives a NUL-terminated
// message; it is left empty when the call succeeds. A failed assertion (GGML_ASSERT, GGML_ABORT) inside such a
// call is a failure like any other and does not end the process, unless the program has set an abort callback
// of its own (ggml_set_abort_callback).
#pragma once

#include "llama.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Calls `body` with `data`, as above: nothing that it throws or asserts gets out. False on failure.
bool simlayer_guarded(void (*body)(void * data), void * data, char * error, size_t error_size);

// Reads the vocabulary of a GGUF file. NULL on failure. Free with simlayer_vocab_free.
// `overrides` take the place of the file's keys: a list that ends with an empty key, or NULL.
struct llama_vocab * simlayer_vocab_load(const char * path, const struct llama_model_kv_override * overrides,
                                         char * error, size_t error_size);
void                 simlayer_vocab_free(struct llama_vocab * vocab);

// The tokenizer's name as the file gives it ("llama", "gpt2", …); lives as long as the vocabulary's next call
// on the same thread.
const char * simlayer_vocab_model(const struct llama_vocab * vocab);

// As llama_tokenize: the number of tokens, or minus the number that did not fit. INT32_MIN on failure.
int32_t simlayer_tokenize(const struct llama_vocab * vocab, const char * text, int32_t text_len,
                          llama_token * tokens, int32_t n_tokens_max, bool add_special, bool parse_special,
                          char * error, size_t error_size);

// As llama_token_to_piece: bytes written, or minus the bytes needed. INT32_MIN on failure.
int32_t simlayer_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * buf, int32_t length,
                                bool special, char * error, size_t error_size);

// As llama_detokenize: bytes written, or minus the bytes needed. INT32_MIN on failure.
int32_t simlayer_detokenize(const struct llama_vocab * vocab, const llama_token * tokens, int32_t n_tokens,
                            char * text, int32_t text_len_max, bool remove_special, bool unparse_special,
                            char * error, size_t error_size);

// As llama_sampler_init_grammar, with the reason when the grammar is refused. NULL on failure.
struct llama_sampler * simlayer_sampler_init_grammar(const struct llama_vocab * vocab, const char * grammar,
                                                     const char * root, char * error, size_t error_size);

// As llama_sampler_init_grammar_lazy_patterns, with the reason when the grammar or a pattern is refused. NULL on failure.
struct llama_sampler * simlayer_sampler_init_lazy_grammar(const struct llama_vocab * vocab, const char * grammar,
                                                          const char * root, const char ** patterns,
                                                          size_t n_patterns, const llama_token * tokens,
                                                          size_t n_tokens, char * error, size_t error_size);

// As llama_sampler_init_dry. NULL on failure.
struct llama_sampler * simlayer_sampler_init_dry(const struct llama_vocab * vocab, float multiplier, float base,
                                                 int32_t allowed_length, int32_t penalty_last_n,
                                                 const char ** seq_breakers, size_t num_breakers, char * error,
                                                 size_t error_size);

// As llama_sampler_apply: filters, sorts and selects among the candidates. False on failure.
bool simlayer_sampler_apply(struct llama_sampler * sampler, llama_token_data_array * candidates, char * error,
                            size_t error_size);

// As llama_sampler_accept. False on failure; a grammar is then in no usable state until it is reset.
bool simlayer_sampler_accept(struct llama_sampler * sampler, llama_token token, char * error, size_t error_size);

// As llama_sampler_reset. False on failure.
bool simlayer_sampler_reset(struct llama_sampler * sampler, char * error, size_t error_size);

// As llama_sampler_clone. NULL on failure.
struct llama_sampler * simlayer_sampler_clone(const struct llama_sampler * sampler, char * error, size_t error_size);

// Formats a conversation by a built-in template: `tmpl` is its name, or a Jinja text that it is recognised by.
// Returns the bytes of the whole result, of which at most `length` are written, without a NUL.
// -1 when no built-in template fits, INT32_MIN on failure.
int32_t simlayer_chat_apply_template(const char * tmpl, const struct llama_chat_message * chat, size_t n_msg,
                                     bool add_assistant, char * buf, int32_t length, char * error,
                                     size_t error_size);

#ifdef __cplusplus
}
#endif
