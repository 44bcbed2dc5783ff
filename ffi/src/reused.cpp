// The functions of llama.h that are llama.cpp's own code: vocabulary, samplers, log. They trust their arguments; these
// check them first, and what they throw or assert becomes a line in the log and an error value.
//
// `cargo xtask dist` gives each simlayer_checked_NAME here the name NAME in the library, and llama.cpp's own NAME
// another one. So inside the library, and in this file, NAME is llama.cpp's. A call with a vocabulary or a context of
// unmodified llama.cpp's library goes there, unchecked (upstream.rs).

#include "llama.h"
#include "upstream.h"
#include "vocab.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

// In Rust.
extern "C" bool simlayer_ext_is_vocab(const struct llama_vocab * vocab);
extern "C" void simlayer_ext_failed(const char * function, const char * why);
extern "C" void simlayer_ext_log_set(ggml_log_callback callback, void * data);

namespace {

constexpr const char * NULL_POINTER = "a null pointer";

// The samplers that are chains share one table of functions.
bool is_chain(const llama_sampler * sampler) {
    static const llama_sampler_i * const chain_iface = [] {
        llama_sampler *         chain = llama_sampler_chain_init(llama_sampler_chain_params{ /*.no_perf =*/true });
        const llama_sampler_i * iface = chain->iface;
        llama_sampler_free(chain);
        return iface;
    }();
    return sampler->iface == chain_iface;
}

// What is wrong with an argument, or null. Samplers are pointers that frontends make as well: one that was freed cannot
// be told.
template <typename T> const char * flaw(T argument) {
    if constexpr (std::is_pointer_v<T>) {
        if (argument == nullptr) {
            return NULL_POINTER;
        }
        using Target = std::remove_cv_t<std::remove_pointer_t<T>>;
        if constexpr (std::is_same_v<Target, llama_vocab>) {
            return simlayer_ext_is_vocab(argument) ? nullptr : "the vocabulary is none, or was freed";
        }
        if constexpr (std::is_same_v<Target, llama_sampler>) {
            return argument->iface ? nullptr : "the sampler has no functions";
        }
    }
    return nullptr;
}

const char * chain_flaw(const llama_sampler * chain) {
    if (const char * why = flaw(chain)) {
        return why;
    }
    return is_chain(chain) ? nullptr : "the sampler is no chain";
}

// llama.cpp reads its tables at any token's place. Only whether it ends the text may be asked of one that is none.
const char * token_flaw(const llama_vocab * vocab, llama_token token) {
    if (const char * why = flaw(vocab)) {
        return why;
    }
    return token >= 0 && token < llama_vocab_n_tokens(vocab) ? nullptr : "the token is not in the vocabulary";
}

// `n` elements that are there.
template <typename T, typename N> const char * array_flaw(T * array, N n) {
    return array == nullptr && n > 0 ? NULL_POINTER : nullptr;
}

const char * strings_flaw(const char ** strings, size_t n) {
    const char * why = array_flaw(strings, n);
    for (size_t i = 0; i < n && !why; i++) {
        why = flaw(strings[i]);
    }
    return why;
}

template <typename... Why> const char * first_of(Why... why) {
    const char * first = nullptr;
    ((first = first ? first : why), ...);
    return first;
}

// Runs `body` unless something is wrong with its arguments.
template <typename R, typename Body> R run(const char * name, const char * why, R failed, const Body & body) {
    char error[512];
    R    result = failed;
    if (!why) {
        auto store = [&] { result = body(); };
        auto call  = [](void * data) { (*static_cast<decltype(store) *>(data))(); };
        if (simlayer_guarded(call, &store, error, sizeof(error))) {
            return result;
        }
        why = error;
    }
    simlayer_ext_failed(name, why);
    return failed;
}

template <typename Body> void run(const char * name, const char * why, const Body & body) {
    run(name, why, false, [&] {
        body();
        return true;
    });
}

} // namespace

// Defines the checked function, with its parameters and their names in parentheses.
#define DEFINE(result, name, parameters, arguments)                                     \
    static result checked_##name parameters;                                            \
    extern "C" result simlayer_checked_##name parameters;                               \
    static_assert(std::is_same_v<decltype(simlayer_checked_##name), decltype(name)>);  \
    extern "C" result simlayer_checked_##name parameters {                              \
        if (auto * upstream = simlayer::upstream_of<decltype(name)>(#name) arguments) { \
            return upstream arguments;                                                  \
        }                                                                               \
        return checked_##name arguments;                                                \
    }                                                                                   \
    static result checked_##name parameters

#define OF(type, result, name, failed)                                       \
    DEFINE(result, name, (const type * of), (of)) {                          \
        return run<result>(#name, flaw(of), failed, [&] { return name(of); }); \
    }
#define OF_VOCAB(result, name, failed) OF(llama_vocab, result, name, failed)
#define OF_TOKEN(result, name, failed)                                                                   \
    DEFINE(result, name, (const llama_vocab * vocab, llama_token token), (vocab, token)) {               \
        return run<result>(#name, token_flaw(vocab, token), failed, [&] { return name(vocab, token); }); \
    }

OF_VOCAB(llama_token, llama_vocab_bos, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_eos, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_eot, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_cls, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_sep, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_nl, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_pad, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_mask, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_fim_pre, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_fim_suf, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_fim_mid, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_fim_pad, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_fim_rep, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_vocab_fim_sep, LLAMA_TOKEN_NULL)
OF_VOCAB(bool, llama_vocab_get_add_bos, false)
OF_VOCAB(bool, llama_vocab_get_add_eos, false)
OF_VOCAB(bool, llama_vocab_get_add_sep, false)
OF_VOCAB(enum llama_vocab_type, llama_vocab_type, LLAMA_VOCAB_TYPE_NONE)
OF_VOCAB(int32_t, llama_vocab_n_tokens, 0)
OF_TOKEN(const char *, llama_vocab_get_text, nullptr)
OF_TOKEN(float, llama_vocab_get_score, NAN)
OF_TOKEN(enum llama_token_attr, llama_vocab_get_attr, LLAMA_TOKEN_ATTR_UNDEFINED)
DEFINE(bool, llama_vocab_is_eog, (const llama_vocab * vocab, llama_token token), (vocab, token)) {
    return run("llama_vocab_is_eog", flaw(vocab), false, [&] { return llama_vocab_is_eog(vocab, token); });
}
OF_TOKEN(bool, llama_vocab_is_control, false)

// Their old names.
OF_VOCAB(llama_token, llama_token_bos, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_eos, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_eot, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_cls, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_sep, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_nl, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_pad, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_fim_pre, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_fim_suf, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_fim_mid, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_fim_pad, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_fim_rep, LLAMA_TOKEN_NULL)
OF_VOCAB(llama_token, llama_token_fim_sep, LLAMA_TOKEN_NULL)
OF_VOCAB(bool, llama_add_bos_token, false)
OF_VOCAB(bool, llama_add_eos_token, false)
OF_VOCAB(int32_t, llama_n_vocab, 0)
OF_TOKEN(const char *, llama_token_get_text, nullptr)
OF_TOKEN(float, llama_token_get_score, NAN)
OF_TOKEN(enum llama_token_attr, llama_token_get_attr, LLAMA_TOKEN_ATTR_UNDEFINED)
DEFINE(bool, llama_token_is_eog, (const llama_vocab * vocab, llama_token token), (vocab, token)) {
    return run("llama_token_is_eog", flaw(vocab), false, [&] { return llama_token_is_eog(vocab, token); });
}
OF_TOKEN(bool, llama_token_is_control, false)

DEFINE(const llama_token *, llama_vocab_get_suppress_tokens, (const llama_vocab * vocab, int32_t * n), (vocab, n)) {
    if (n) {
        *n = 0;
    }
    return run<const llama_token *>("llama_vocab_get_suppress_tokens", flaw(vocab), nullptr,
                                    [&] { return llama_vocab_get_suppress_tokens(vocab, n); });
}

DEFINE(int32_t, llama_tokenize,
       (const llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t n_tokens_max,
        bool add_special, bool parse_special),
       (vocab, text, text_len, tokens, n_tokens_max, add_special, parse_special)) {
    const char * why = first_of(flaw(vocab), array_flaw(text, text_len), array_flaw(tokens, n_tokens_max),
                                text_len < 0 ? "a negative length" : nullptr);
    return run("llama_tokenize", why, INT32_MIN, [&] {
        return llama_tokenize(vocab, text ? text : "", text_len, tokens, n_tokens_max, add_special, parse_special);
    });
}

DEFINE(int32_t, llama_token_to_piece,
       (const llama_vocab * vocab, llama_token token, char * buf, int32_t length, int32_t lstrip, bool special),
       (vocab, token, buf, length, lstrip, special)) {
    const char * why = first_of(token_flaw(vocab, token), array_flaw(buf, length));
    return run("llama_token_to_piece", why, INT32_MIN,
               [&] { return llama_token_to_piece(vocab, token, buf, length, lstrip, special); });
}

DEFINE(int32_t, llama_detokenize,
       (const llama_vocab * vocab, const llama_token * tokens, int32_t n_tokens, char * text, int32_t text_len_max,
        bool remove_special, bool unparse_special),
       (vocab, tokens, n_tokens, text, text_len_max, remove_special, unparse_special)) {
    const char * why = first_of(flaw(vocab), array_flaw(tokens, n_tokens), array_flaw(text, text_len_max));
    return run("llama_detokenize", why, INT32_MIN, [&] {
        return llama_detokenize(vocab, tokens, n_tokens, text, text_len_max, remove_special, unparse_special);
    });
}

// Samplers.


DEFINE(llama_sampler *, llama_sampler_init, (llama_sampler_i * iface, llama_sampler_context_t ctx), (iface, ctx)) {
    return run<llama_sampler *>("llama_sampler_init", flaw(iface), nullptr,
                                [&] { return llama_sampler_init(iface, ctx); });
}

OF(llama_sampler, const char *, llama_sampler_name, nullptr)
OF(llama_sampler, uint32_t, llama_sampler_get_seed, LLAMA_DEFAULT_SEED)

// As for llama.cpp, no sampler at all is a sampler that does nothing. What a sampler throws while it runs goes through
// to a frontend in C++: llama-server answers the request with it. llama_sampler_sample, which has an error value, lets
// nothing through.
DEFINE(void, llama_sampler_accept, (llama_sampler * smpl, llama_token token), (smpl, token)) {
    if (const char * why = smpl ? flaw(smpl) : nullptr) {
        return simlayer_ext_failed("llama_sampler_accept", why);
    }
    llama_sampler_accept(smpl, token);
}

DEFINE(void, llama_sampler_apply, (llama_sampler * smpl, llama_token_data_array * cur_p), (smpl, cur_p)) {
    const char * why = smpl ? first_of(flaw(smpl), flaw(cur_p)) : nullptr;
    if (!why && smpl) {
        why = first_of(array_flaw(cur_p->data, cur_p->size), smpl->iface->apply ? nullptr : "it cannot be applied");
    }
    if (why) {
        return simlayer_ext_failed("llama_sampler_apply", why);
    }
    llama_sampler_apply(smpl, cur_p);
}

DEFINE(void, llama_sampler_reset, (llama_sampler * smpl), (smpl)) {
    run("llama_sampler_reset", smpl ? flaw(smpl) : nullptr, [&] { llama_sampler_reset(smpl); });
}

DEFINE(llama_sampler *, llama_sampler_clone, (const llama_sampler * smpl), (smpl)) {
    return run<llama_sampler *>("llama_sampler_clone", smpl ? flaw(smpl) : nullptr, nullptr,
                                [&] { return llama_sampler_clone(smpl); });
}

DEFINE(void, llama_sampler_copy, (const llama_sampler * src, llama_sampler * dst), (src, dst)) {
    run("llama_sampler_copy", first_of(flaw(src), flaw(dst)), [&] { llama_sampler_copy(src, dst); });
}

DEFINE(void, llama_sampler_free, (llama_sampler * smpl), (smpl)) {
    run("llama_sampler_free", smpl ? flaw(smpl) : nullptr, [&] { llama_sampler_free(smpl); });
}

DEFINE(llama_token, llama_sampler_sample, (llama_sampler * smpl, llama_context * ctx, int32_t idx), (smpl, ctx, idx)) {
    const char * why = flaw(smpl);
    if (!why && !flaw(llama_model_get_vocab(llama_get_model(ctx)))) {
        return run("llama_sampler_sample", why, LLAMA_TOKEN_NULL, [&] { return llama_sampler_sample(smpl, ctx, idx); });
    }
    simlayer_ext_failed("llama_sampler_sample", why ? why : "the context, or its model, is none, or was freed");
    return LLAMA_TOKEN_NULL;
}

DEFINE(llama_sampler *, llama_sampler_chain_init, (llama_sampler_chain_params params), (params)) {
    return run<llama_sampler *>("llama_sampler_chain_init", nullptr, nullptr,
                                [&] { return llama_sampler_chain_init(params); });
}

DEFINE(void, llama_sampler_chain_add, (llama_sampler * chain, llama_sampler * smpl), (chain, smpl)) {
    const char * why = first_of(chain_flaw(chain), flaw(smpl), chain == smpl ? "a chain cannot be in itself" : nullptr);
    run("llama_sampler_chain_add", why, [&] { llama_sampler_chain_add(chain, smpl); });
}

DEFINE(llama_sampler *, llama_sampler_chain_get, (llama_sampler * chain, int32_t i), (chain, i)) {
    return run<llama_sampler *>("llama_sampler_chain_get", flaw(chain), nullptr,
                                [&] { return llama_sampler_chain_get(chain, i); });
}

DEFINE(llama_sampler *, llama_sampler_chain_remove, (llama_sampler * chain, int32_t i), (chain, i)) {
    return run<llama_sampler *>("llama_sampler_chain_remove", chain_flaw(chain), nullptr,
                                [&] { return llama_sampler_chain_remove(chain, i); });
}

DEFINE(int32_t, llama_sampler_chain_n, (const llama_sampler * chain), (chain)) {
    return run("llama_sampler_chain_n", chain_flaw(chain), 0, [&] { return llama_sampler_chain_n(chain); });
}

DEFINE(llama_perf_sampler_data, llama_perf_sampler, (const llama_sampler * chain), (chain)) {
    return run("llama_perf_sampler", chain_flaw(chain), llama_perf_sampler_data{},
               [&] { return llama_perf_sampler(chain); });
}

DEFINE(void, llama_perf_sampler_print, (const llama_sampler * chain), (chain)) {
    run("llama_perf_sampler_print", chain_flaw(chain), [&] { llama_perf_sampler_print(chain); });
}

DEFINE(void, llama_perf_sampler_reset, (llama_sampler * chain), (chain)) {
    run("llama_perf_sampler_reset", chain_flaw(chain), [&] { llama_perf_sampler_reset(chain); });
}

// Samplers of numbers alone: too large ones are out of memory.
#define NEW_SAMPLER(name, parameters, ...)                                                       \
    DEFINE(llama_sampler *, name, parameters, (__VA_ARGS__)) {                                   \
        return run<llama_sampler *>(#name, nullptr, nullptr, [&] { return name(__VA_ARGS__); }); \
    }

NEW_SAMPLER(llama_sampler_init_greedy, ())
NEW_SAMPLER(llama_sampler_init_dist, (uint32_t seed), seed)
NEW_SAMPLER(llama_sampler_init_top_k, (int32_t k), k)
NEW_SAMPLER(llama_sampler_init_top_p, (float p, size_t min_keep), p, min_keep)
NEW_SAMPLER(llama_sampler_init_min_p, (float p, size_t min_keep), p, min_keep)
NEW_SAMPLER(llama_sampler_init_typical, (float p, size_t min_keep), p, min_keep)
NEW_SAMPLER(llama_sampler_init_temp, (float t), t)
NEW_SAMPLER(llama_sampler_init_temp_ext, (float t, float delta, float exponent), t, delta, exponent)
NEW_SAMPLER(llama_sampler_init_xtc, (float p, float t, size_t min_keep, uint32_t seed), p, t, min_keep, seed)
NEW_SAMPLER(llama_sampler_init_top_n_sigma, (float n), n)
NEW_SAMPLER(llama_sampler_init_mirostat, (int32_t n_vocab, uint32_t seed, float tau, float eta, int32_t m), n_vocab,
            seed, tau, eta, m)
NEW_SAMPLER(llama_sampler_init_mirostat_v2, (uint32_t seed, float tau, float eta), seed, tau, eta)
NEW_SAMPLER(llama_sampler_init_penalties, (int32_t n_vocab, int32_t last_n, float repeat, float freq, float present),
            n_vocab, last_n, repeat, freq, present)
NEW_SAMPLER(llama_sampler_init_adaptive_p, (float target, float decay, uint32_t seed), target, decay, seed)

DEFINE(llama_sampler *, llama_sampler_init_logit_bias,
       (int32_t n_vocab, int32_t n_logit_bias, const llama_logit_bias * logit_bias),
       (n_vocab, n_logit_bias, logit_bias)) {
    return run<llama_sampler *>("llama_sampler_init_logit_bias", array_flaw(logit_bias, n_logit_bias), nullptr,
                                [&] { return llama_sampler_init_logit_bias(n_vocab, n_logit_bias, logit_bias); });
}

OF_VOCAB(llama_sampler *, llama_sampler_init_infill, nullptr)

// Breakers that are null are skipped by llama.cpp.
DEFINE(llama_sampler *, llama_sampler_init_dry,
       (const llama_vocab * vocab, float multiplier, float base, int32_t allowed_length, int32_t last_n,
        const char ** seq_breakers, size_t num_breakers),
       (vocab, multiplier, base, allowed_length, last_n, seq_breakers, num_breakers)) {
    return run<llama_sampler *>("llama_sampler_init_dry", flaw(vocab), nullptr, [&] {
        return llama_sampler_init_dry(vocab, multiplier, base, allowed_length, last_n, seq_breakers, num_breakers);
    });
}

// Without a grammar the sampler does nothing, and its root does not matter.
static const char * grammar_flaw(const llama_vocab * vocab, const char * grammar, const char * root) {
    return first_of(flaw(vocab), grammar && *grammar ? flaw(root) : nullptr);
}

DEFINE(llama_sampler *, llama_sampler_init_grammar,
       (const llama_vocab * vocab, const char * grammar, const char * root), (vocab, grammar, root)) {
    return run<llama_sampler *>("llama_sampler_init_grammar", grammar_flaw(vocab, grammar, root), nullptr,
                                [&] { return llama_sampler_init_grammar(vocab, grammar, root); });
}

#define LAZY_GRAMMAR(name)                                                                                             \
    DEFINE(llama_sampler *, name,                                                                                      \
           (const llama_vocab * vocab, const char * grammar, const char * root, const char ** triggers,                \
            size_t n_triggers, const llama_token * tokens, size_t n_tokens),                                           \
           (vocab, grammar, root, triggers, n_triggers, tokens, n_tokens)) {                                           \
        const char * why = first_of(grammar_flaw(vocab, grammar, root), strings_flaw(triggers, n_triggers),            \
                                    array_flaw(tokens, n_tokens));                                                     \
        return run<llama_sampler *>(                                                                                   \
            #name, why, nullptr, [&] { return name(vocab, grammar, root, triggers, n_triggers, tokens, n_tokens); });  \
    }

LAZY_GRAMMAR(llama_sampler_init_grammar_lazy)
LAZY_GRAMMAR(llama_sampler_init_grammar_lazy_patterns)

// The rest.

DEFINE(int32_t, llama_chat_builtin_templates, (const char ** output, size_t len), (output, len)) {
    return run("llama_chat_builtin_templates", array_flaw(output, len), -1,
               [&] { return llama_chat_builtin_templates(output, len); });
}

DEFINE(const char *, llama_ftype_name, (enum llama_ftype ftype), (ftype)) {
    return run<const char *>("llama_ftype_name", nullptr, nullptr, [&] { return llama_ftype_name(ftype); });
}

DEFINE(void, llama_log_get, (ggml_log_callback * log_callback, void ** user_data), (log_callback, user_data)) {
    run("llama_log_get", first_of(flaw(log_callback), flaw(user_data)),
        [&] { llama_log_get(log_callback, user_data); });
}

// No callback stands for the standard error.
DEFINE(void, llama_log_set, (ggml_log_callback log_callback, void * user_data), (log_callback, user_data)) {
    llama_log_set(log_callback, user_data);
    simlayer_ext_log_set(log_callback, user_data);
}

DEFINE(int32_t, llama_split_path,
       (char * split_path, size_t maxlen, const char * path_prefix, int32_t split_no, int32_t split_count),
       (split_path, maxlen, path_prefix, split_no, split_count)) {
    return run("llama_split_path", first_of(array_flaw(split_path, maxlen), flaw(path_prefix)), 0,
               [&] { return llama_split_path(split_path, maxlen, path_prefix, split_no, split_count); });
}

DEFINE(int32_t, llama_split_prefix,
       (char * split_prefix, size_t maxlen, const char * split_path, int32_t split_no, int32_t split_count),
       (split_prefix, maxlen, split_path, split_no, split_count)) {
    return run("llama_split_prefix", first_of(array_flaw(split_prefix, maxlen), flaw(split_path)), 0,
               [&] { return llama_split_prefix(split_prefix, maxlen, split_path, split_no, split_count); });
}
