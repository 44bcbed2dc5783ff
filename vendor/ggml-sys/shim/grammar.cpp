// llama.cpp's grammars with bounds. grammar.h gives its functions other names; these call them.
//
// Its parser recurses for each nested group, its check for left recursion for each rule, and its filter for each
// character of a token. So the first two run on a long stack, and the last where the longest token does not fit; what no
// such stack holds is refused.

#include "grammar.h"

#undef llama_grammar_init_impl
#undef llama_grammar_apply_impl
#undef llama_grammar_accept_impl

#include "vocab.h"

#include <cstring>

llama_grammar * simlayer_unbounded_grammar_init(const llama_vocab * vocab, const char * grammar, const char * root,
                                                bool lazy, const char ** patterns, size_t n_patterns,
                                                const llama_token * tokens, size_t n_tokens);
void simlayer_unbounded_grammar_apply(const llama_grammar & grammar, llama_token_data_array * candidates);
void simlayer_unbounded_grammar_accept(llama_grammar & grammar, llama_token token);

namespace simlayer {

thread_local uint64_t *  grammar_work = nullptr;
thread_local std::string grammar_refusal;

namespace {

// Groups inside groups.
constexpr size_t MAX_NESTING = 10000;
// Elements of rules, with those that repetitions make. Some hundred bytes each.
constexpr uint64_t MAX_ELEMENTS = 5000000;
// The C++ library's compiler of regular expressions recurses for each of their elements.
constexpr size_t MAX_PATTERN = 50000;
// llama.cpp's own bound for one repetition; an upper end above it is none.
constexpr uint64_t MAX_REPETITIONS = 2000;
// Some seconds, once, and half a second a token: llama.cpp compares each of the ways on with all others. Its own examples
// of grammars take up to 90000 a token on Qwen2.5's vocabulary.
constexpr uint64_t MAX_WORK       = 8000000;
constexpr uint64_t MAX_TOKEN_WORK = 1000000;
// Rules that begin with rules, in one row; and calls of the check for left recursion, which follows each of them anew
// wherever it is named.
constexpr size_t   MAX_CHAIN = 500000;
constexpr uint64_t MAX_CALLS = 20000000;
// What the filter needs for each character of a token, and the rest of a call.
constexpr size_t STACK_PER_CHAR = 1024;
constexpr size_t STACK_OF_CALL  = 32 << 10;

template <typename Body> void with_work(uint64_t work, const Body & body) {
    struct scope {
        explicit scope(uint64_t * work) { grammar_work = work; }
        ~scope() { grammar_work = nullptr; }
    } in_scope(&work);
    body();
}

// After one character inside a literal or a set, read as llama.cpp's parser does: a first byte says how many belong to it.
const char * after_char(const char * at) {
    if (*at == '\\' && at[1]) {
        return at + 2;
    }
    static const int lengths[] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4 };
    const char *     end       = at + lengths[uint8_t(*at) >> 4];
    while (at < end && *at) {
        at++;
    }
    return at;
}

bool is_word(char c) {
    return ('a' <= c && c <= 'z') || ('A' <= c && c <= 'Z') || c == '-' || ('0' <= c && c <= '9');
}

const char * after_space(const char * at) {
    while (true) {
        at += std::strspn(at, " \t\r\n");
        if (*at != '#') {
            return at;
        }
        at += std::strcspn(at, "\r\n");
    }
}

uint64_t number(const char *& at) {
    uint64_t value = 0;
    for (; '0' <= *at && *at <= '9'; at++) {
        value = std::min<uint64_t>(10 * value + uint64_t(*at - '0'), UINT32_MAX);
    }
    return value;
}

} // namespace

// Throws grammar_refused for a grammar that is nested too deeply or too large. Walks over it as its parser does, counting what that will recurse for and allocate. The parser stops at the
// first error, so that after one it does not matter how the rest is read.
static void check_grammar_size(const char * at) {
    size_t   nesting = 0;
    uint64_t total   = 0;
    // Elements of the item before a repetition.
    uint64_t item = 0;
    while (true) {
        if (total > MAX_ELEMENTS) {
            throw grammar_refused("it is too large: with its repetitions it has more than 5000000 elements");
        }
        const char c = *at;
        if (c == '\0') {
            return;
        }
        if (c == '#') {
            at += std::strcspn(at, "\r\n");
            continue;
        }
        if (c == '"' || c == '[') {
            const char close = c == '"' ? '"' : ']';
            item             = 0;
            for (at++; *at && *at != close; item++) {
                at = after_char(at);
            }
            total += item;
        } else if (c == '<') {
            at += std::strcspn(at, ">");
            total += item = 1;
        } else if (c == '(') {
            if (++nesting > MAX_NESTING) {
                throw grammar_refused("its parentheses are nested more than 10000 deep");
            }
            total += 2;
        } else if (c == ')') {
            nesting -= nesting > 0;
            total += item = 1;
        } else if (is_word(c)) {
            while (is_word(*at)) {
                at++;
            }
            total += item = 1;
            continue;
        } else if (c == '{') {
            at                   = after_space(at + 1);
            const uint64_t least = std::min(number(at), MAX_REPETITIONS);
            at                   = after_space(at);
            uint64_t most        = least;
            if (*at == ',') {
                at = after_space(at + 1);
                if ('0' <= *at && *at <= '9') {
                    most = number(at);
                    // llama.cpp's parser would subtract, and repeat some 2^64 times.
                    if (most < least) {
                        throw grammar_refused("a repetition's second number is below its first");
                    }
                }
            }
            // Each optional repetition is a rule: the item, a reference, an alternative, an end.
            const uint64_t optional = most > MAX_REPETITIONS ? 1 : std::max(most - least, uint64_t(1));
            total += item * least + (item + 3) * optional;
            continue;
        } else if (c == '*' || c == '+' || c == '?' || c == '|') {
            total += item + 3;
        } else if (c == '.') {
            total += item = 1;
        }
        at += *at != '\0';
    }
}

namespace {

// The rules that a rule can begin with, as llama.cpp's check for left recursion follows them.
std::vector<size_t> first_rules(const llama_grammar_rules & rules, size_t of, const std::vector<bool> & may_be_empty) {
    std::vector<size_t> first;
    bool                at_begin = true;
    for (const llama_grammar_element & element : rules[of]) {
        if (element.type == LLAMA_GRETYPE_ALT || element.type == LLAMA_GRETYPE_END) {
            at_begin = true;
        } else if (element.type == LLAMA_GRETYPE_RULE_REF && at_begin && element.value < rules.size()) {
            first.push_back(element.value);
            at_begin = may_be_empty[element.value];
        } else {
            at_begin = false;
        }
    }
    return first;
}

// Refuses what llama.cpp's check for left recursion finds, and what it would not come to an end with.
void check_first_rules(const llama_grammar_rules & rules) {
    std::vector<bool> may_be_empty(rules.size());
    for (size_t rule = 0; rule < rules.size(); rule++) {
        bool at_begin = true;
        for (const llama_grammar_element & element : rules[rule]) {
            const bool at_end = element.type == LLAMA_GRETYPE_ALT || element.type == LLAMA_GRETYPE_END;
            if (at_end && at_begin) {
                may_be_empty[rule] = true;
            }
            at_begin = at_end;
        }
    }

    struct visit {
        size_t              rule;
        std::vector<size_t> first;
        size_t              next;
    };
    std::vector<visit> path;
    // 0 calls: not seen yet. UINT64_MAX: on the path.
    std::vector<uint64_t> calls(rules.size());
    std::vector<size_t>   chain(rules.size());
    uint64_t              total = 0;
    for (size_t rule = 0; rule < rules.size(); rule++) {
        const auto enter = [&](size_t of) {
            calls[of] = UINT64_MAX;
            path.push_back({ of, first_rules(rules, of, may_be_empty), 0 });
        };
        if (calls[rule] == 0) {
            enter(rule);
            while (!path.empty()) {
                visit & at = path.back();
                if (at.next < at.first.size()) {
                    const size_t next = at.first[at.next++];
                    if (calls[next] == UINT64_MAX) {
                        throw grammar_refused("a rule begins with itself (left recursion)");
                    }
                    if (calls[next] == 0) {
                        enter(next);
                    }
                    continue;
                }
                uint64_t sum  = 1;
                size_t   most = 0;
                for (const size_t next : at.first) {
                    sum += calls[next];
                    most = std::max(most, chain[next]);
                }
                calls[at.rule] = sum;
                chain[at.rule] = most + 1;
                if (chain[at.rule] > MAX_CHAIN) {
                    throw grammar_refused("more than 500000 of its rules begin with one another in a row");
                }
                if (sum > MAX_CALLS) {
                    throw grammar_refused("it has too many ways to begin: let its rules name the same rule less often "
                                          "at their beginning");
                }
                path.pop_back();
            }
            total += calls[rule];
        }
        if (total > MAX_CALLS) {
            throw grammar_refused("it has too many ways to begin: let its rules name the same rule less often at their "
                                  "beginning");
        }
    }
}

} // namespace

llama_grammar_parser parse_grammar(const llama_vocab * vocab, const char * grammar) {
    check_grammar_size(grammar);
    llama_grammar_parser parser(vocab);
    for (const char * at = after_space(grammar); *at;) {
        at = parser.parse_rule(at);
    }
    check_first_rules(parser.rules);
    return parser;
}

} // namespace simlayer

// A grammar that is refused is a line in the log and no exception, as for llama.cpp's own reasons.
llama_grammar * llama_grammar_init_impl(const llama_vocab * vocab, const char * grammar, const char * root, bool lazy,
                                        const char ** patterns, size_t n_patterns, const llama_token * tokens,
                                        size_t n_tokens) {
    using namespace simlayer;
    llama_grammar * made = nullptr;
    std::string     why;
    on_long_stack([&] {
        try {
            try {
                parse_grammar(vocab, grammar);
            } catch (const grammar_refused &) {
                throw;
            } catch (const std::exception &) {
                // llama.cpp says so itself.
            }
            for (size_t i = 0; i < n_patterns; i++) {
                if (std::strlen(patterns[i]) > MAX_PATTERN) {
                    throw grammar_refused("a trigger pattern is longer than 50000 bytes");
                }
            }
            with_work(MAX_WORK, [&] {
                made = simlayer_unbounded_grammar_init(vocab, grammar, root, lazy, patterns, n_patterns, tokens,
                                                       n_tokens);
            });
        } catch (const grammar_refused & error) {
            why = error.what();
        }
    });
    grammar_refusal = why;
    if (!why.empty()) {
        LLAMA_LOG_ERROR("%s: the grammar is refused: %s\n", __func__, why.c_str());
    }
    return made;
}

void llama_grammar_apply_impl(const llama_grammar & grammar, llama_token_data_array * candidates) {
    using namespace simlayer;
    const size_t bytes = STACK_OF_CALL + STACK_PER_CHAR * size_t(grammar.vocab ? grammar.vocab->max_token_len() : 0);
    if (bytes > LONG_STACK) {
        throw std::runtime_error("the vocabulary has a token that is too long for grammars");
    }
    with_stack(bytes, [&] { with_work(MAX_TOKEN_WORK, [&] { simlayer_unbounded_grammar_apply(grammar, candidates); }); });
}

void llama_grammar_accept_impl(llama_grammar & grammar, llama_token token) {
    simlayer::with_work(simlayer::MAX_TOKEN_WORK, [&] { simlayer_unbounded_grammar_accept(grammar, token); });
}
