// What llama.cpp's grammar file is compiled with (-include): bounds for its regular expressions, and for its search for
// the ways on.
#pragma once

// All that it includes, and what those include: the names below are macros from here on.
#include "llama-grammar.h"
#include "llama-impl.h"
#include "llama-sampler.h"
#include "llama-vocab.h"

#include "grammar_bounds.h"
#include "regex.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <set>
#include <stdexcept>
#include <unordered_map>

namespace simlayer {

// What may still be compared in this call, or none: then nothing is counted.
extern thread_local uint64_t * grammar_work;

// The search keeps all stacks that it has seen in an ordered set. One that does not end compares ever more of them.
template <typename A, typename B, typename Less> bool compare_counted(A a, A a_end, B b, B b_end, Less less) {
    if (grammar_work) {
        const uint64_t cost = 1 + uint64_t(std::min(a_end - a, b_end - b));
        if (*grammar_work < cost) {
            throw grammar_refused("it has too many ways to go on at once: let fewer rules be empty, and fewer begin "
                                     "alike");
        }
        *grammar_work -= cost;
    }
    return std::lexicographical_compare(a, a_end, b, b_end, less);
}

} // namespace simlayer

namespace std {
using ::simlayer::compare_counted;
} // namespace std

#define lexicographical_compare compare_counted

// grammar.cpp has these names, and calls the functions.
#define llama_grammar_init_impl   simlayer_unbounded_grammar_init
#define llama_grammar_apply_impl  simlayer_unbounded_grammar_apply
#define llama_grammar_accept_impl simlayer_unbounded_grammar_accept
