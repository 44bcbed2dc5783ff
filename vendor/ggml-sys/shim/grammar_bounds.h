// Which grammars are refused because of their size.
#pragma once

#include "llama-grammar.h"

#include <stdexcept>
#include <string>

namespace simlayer {

// A grammar that goes beyond a bound.
struct grammar_refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The grammar by llama.cpp's own parser, whose exceptions come through. Throws grammar_refused for one that is nested too
// deeply, too large, or begins in too many ways. To be called on a long stack.
llama_grammar_parser parse_grammar(const llama_vocab * vocab, const char * grammar);

// Why this thread's last grammar was refused for a bound; empty when it was not.
extern thread_local std::string grammar_refusal;

} // namespace simlayer
