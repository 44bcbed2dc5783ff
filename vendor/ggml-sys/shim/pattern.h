// std::regex for names of tensors, as llama.cpp's tensor_buft_overrides mean it, behind functions that let no exception out.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct simlayer_pattern;

// Reads a pattern (ECMAScript, as std::regex takes it by default). NULL on failure, with the reason in `error`, a buffer of
// `error_size` bytes. Free with simlayer_pattern_free.
struct simlayer_pattern * simlayer_pattern_new(const char * text, char * error, size_t error_size);
void                      simlayer_pattern_free(struct simlayer_pattern * pattern);

// std::regex_search: whether any part of `name` matches. False also where the search itself fails.
bool simlayer_pattern_matches(const struct simlayer_pattern * pattern, const char * name);

#ifdef __cplusplus
}
#endif
