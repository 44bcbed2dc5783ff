// C entry points to llama.cpp's chat files (common/chat.h and what it needs): JSON schemas to grammars, templates with
// tools, and the parsers of what models answer.
//
// Errors are told as in vocab.h. What goes in and out besides is JSON text, and never has to end with NUL.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// A text that the caller frees.
struct simlayer_text;
const char * simlayer_text_data(const struct simlayer_text * text);
size_t       simlayer_text_size(const struct simlayer_text * text);
void         simlayer_text_free(struct simlayer_text * text);

// The GBNF grammar of a JSON schema. NULL on failure.
struct simlayer_text * simlayer_json_schema_to_grammar(const char * schema, size_t size, char * error,
                                                       size_t error_size);

// A chat template, with the texts of BOS and EOS. NULL on failure. Any number of threads may use it at once.
struct simlayer_chat;
struct simlayer_chat * simlayer_chat_new(const char * source, size_t source_size, const char * bos, size_t bos_size,
                                         const char * eos, size_t eos_size, char * error, size_t error_size);
void                   simlayer_chat_free(struct simlayer_chat * chat);

// What the template can do, as an object of booleans: llama.cpp's capabilities, and
// `supports_thinking`. NULL on failure.
struct simlayer_text * simlayer_chat_capabilities(const struct simlayer_chat * chat, char * error, size_t error_size);

// A request (see chat.cpp for its fields) by the template. NULL on failure. Any number of threads may use it at once.
struct simlayer_chat_prepared;
struct simlayer_chat_prepared * simlayer_chat_apply(const struct simlayer_chat * chat, const char * request,
                                                    size_t size, char * error, size_t error_size);
void                            simlayer_chat_prepared_free(struct simlayer_chat_prepared * prepared);

// What became of the request: prompt, grammar and so on, as JSON. NULL on failure.
struct simlayer_text * simlayer_chat_prepared_json(const struct simlayer_chat_prepared * prepared, char * error,
                                                   size_t error_size);

// The message in what the model has answered so far, as JSON. NULL on failure.
struct simlayer_text * simlayer_chat_parse(const struct simlayer_chat_prepared * prepared, const char * text,
                                           size_t size, bool is_partial, char * error, size_t error_size);

// What a message has more than an earlier state of it, as a JSON array. NULL on failure.
struct simlayer_text * simlayer_chat_diff(const char * before, size_t before_size, const char * after,
                                          size_t after_size, char * error, size_t error_size);

#ifdef __cplusplus
}
#endif
