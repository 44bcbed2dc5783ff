#include "vocab.h"

#include "grammar_bounds.h"
#include "stack.h"

#include "ggml-cpp.h"
#include "ggml-impl.h"
#include "gguf.h"
#include "llama-chat.h"
#include "llama-grammar.h"
#include "llama-model-loader.h"
#include "llama-vocab.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using simlayer::guard_depth;

// What a bad file or grammar trips over in llama.cpp is often an assertion. Inside a guarded call it becomes an
// exception; anywhere else it prints what ggml itself would print, and ggml then ends the process.
static void on_ggml_abort(const char * message) {
    if (guard_depth > 0) {
        throw std::runtime_error(message);
    }
    std::fprintf(stderr, "%s\n", message);
    ggml_print_backtrace();
}

static const bool abort_callback_set = (ggml_set_abort_callback(on_ggml_abort), true);

// Runs `body`; an exception becomes `failed` and a message.
template <typename T, typename F> static T guarded(char * error, size_t error_size, T failed, F && body) {
    struct depth {
        depth() { guard_depth++; }
        ~depth() { guard_depth--; }
    } in_guard;

    if (error_size > 0) {
        error[0] = '\0';
    }
    try {
        return body();
    } catch (const std::exception & e) {
        std::snprintf(error, error_size, "%s", e.what());
    } catch (...) {
        std::snprintf(error, error_size, "unknown C++ exception");
    }
    return failed;
}

extern "C" bool simlayer_guarded(void (*body)(void * data), void * data, char * error, size_t error_size) {
    return guarded<bool>(error, error_size, false, [&] {
        body(data);
        return true;
    });
}

extern "C" struct llama_vocab * simlayer_vocab_load(const char * path,
                                                    const struct llama_model_kv_override * overrides,
                                                    char * error, size_t error_size) {
    return guarded<llama_vocab *>(error, error_size, nullptr, [&] {
        // The loader is given the key-value pairs only: with no file name it opens no tensors and no splits.
        gguf_init_params params = { /*.no_alloc =*/ true, /*.ctx =*/ nullptr };
        gguf_context_ptr metadata(gguf_init_from_file(path, params));
        if (!metadata) {
            throw std::runtime_error("not a readable GGUF file");
        }
        std::vector<std::string> splits;
        llama_model_loader loader(metadata.get(), nullptr, nullptr, "", splits, nullptr, LLAMA_LOAD_MODE_NONE,
                                  /*check_tensors =*/ false, /*no_alloc =*/ true, /*load_mtp =*/ false,
                                  overrides, nullptr);
        auto vocab = std::make_unique<llama_vocab>();
        vocab->load(loader, loader.llm_kv);
        return vocab.release();
    });
}

extern "C" void simlayer_vocab_free(struct llama_vocab * vocab) {
    delete vocab;
}

extern "C" const char * simlayer_vocab_model(const struct llama_vocab * vocab) {
    static thread_local std::string name;
    name = vocab->get_tokenizer_model();
    return name.c_str();
}

extern "C" int32_t simlayer_tokenize(const struct llama_vocab * vocab, const char * text, int32_t text_len,
                                     llama_token * tokens, int32_t n_tokens_max, bool add_special,
                                     bool parse_special, char * error, size_t error_size) {
    return guarded<int32_t>(error, error_size, INT32_MIN, [&] {
        return llama_tokenize(vocab, text, text_len, tokens, n_tokens_max, add_special, parse_special);
    });
}

extern "C" int32_t simlayer_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * buf,
                                           int32_t length, bool special, char * error, size_t error_size) {
    return guarded<int32_t>(error, error_size, INT32_MIN, [&] {
        return llama_token_to_piece(vocab, token, buf, length, 0, special);
    });
}

extern "C" int32_t simlayer_detokenize(const struct llama_vocab * vocab, const llama_token * tokens,
                                       int32_t n_tokens, char * text, int32_t text_len_max, bool remove_special,
                                       bool unparse_special, char * error, size_t error_size) {
    return guarded<int32_t>(error, error_size, INT32_MIN, [&] {
        return llama_detokenize(vocab, tokens, n_tokens, text, text_len_max, remove_special, unparse_special);
    });
}

// llama_grammar_parser::parse prints what is wrong to stderr and keeps no message. Going through the rules first
// by the parser's own steps tells the caller.
static void check_grammar(const struct llama_vocab * vocab, const char * grammar, const char * root) {
    const llama_grammar_parser parser = simlayer::parse_grammar(vocab, grammar);
    if (parser.symbol_ids.count(root) == 0) {
        throw std::runtime_error("it has no rule named '" + std::string(root) + "'");
    }
    for (const auto & symbol : parser.symbol_ids) {
        if (symbol.second >= parser.rules.size() || parser.rules[symbol.second].empty()) {
            throw std::runtime_error("it has no rule named '" + symbol.first + "'");
        }
    }
}

// Checks the grammar, and makes a sampler of it with `init`.
template <typename Init> static struct llama_sampler * grammar_sampler(const struct llama_vocab * vocab,
                                                                       const char * grammar, const char * root,
                                                                       const Init & init) {
    simlayer::on_long_stack([&] {
        check_grammar(vocab, grammar, root);
    });
    llama_sampler * sampler = init();
    if (!sampler) {
        const std::string & refusal = simlayer::grammar_refusal;
        throw std::runtime_error(refusal.empty() ? "llama.cpp refuses it" : refusal);
    }
    return sampler;
}

extern "C" struct llama_sampler * simlayer_sampler_init_grammar(const struct llama_vocab * vocab,
                                                                const char * grammar, const char * root,
                                                                char * error, size_t error_size) {
    return guarded<llama_sampler *>(error, error_size, nullptr, [&] {
        return grammar_sampler(vocab, grammar, root, [&] { return llama_sampler_init_grammar(vocab, grammar, root); });
    });
}

extern "C" struct llama_sampler * simlayer_sampler_init_lazy_grammar(const struct llama_vocab * vocab,
                                                                     const char * grammar, const char * root,
                                                                     const char ** patterns, size_t n_patterns,
                                                                     const llama_token * tokens, size_t n_tokens,
                                                                     char * error, size_t error_size) {
    return guarded<llama_sampler *>(error, error_size, nullptr, [&] {
        return grammar_sampler(vocab, grammar, root, [&] {
            return llama_sampler_init_grammar_lazy_patterns(vocab, grammar, root, patterns, n_patterns, tokens,
                                                            n_tokens);
        });
    });
}

extern "C" struct llama_sampler * simlayer_sampler_init_dry(const struct llama_vocab * vocab, float multiplier,
                                                            float base, int32_t allowed_length,
                                                            int32_t penalty_last_n, const char ** seq_breakers,
                                                            size_t num_breakers, char * error,
                                                            size_t error_size) {
    return guarded<llama_sampler *>(error, error_size, nullptr, [&] {
        return llama_sampler_init_dry(vocab, multiplier, base, allowed_length, penalty_last_n, seq_breakers,
                                      num_breakers);
    });
}

extern "C" bool simlayer_sampler_apply(struct llama_sampler * sampler, llama_token_data_array * candidates,
                                       char * error, size_t error_size) {
    return guarded<bool>(error, error_size, false, [&] {
        llama_sampler_apply(sampler, candidates);
        return true;
    });
}

extern "C" bool simlayer_sampler_accept(struct llama_sampler * sampler, llama_token token, char * error,
                                        size_t error_size) {
    return guarded<bool>(error, error_size, false, [&] {
        llama_sampler_accept(sampler, token);
        return true;
    });
}

extern "C" bool simlayer_sampler_reset(struct llama_sampler * sampler, char * error, size_t error_size) {
    return guarded<bool>(error, error_size, false, [&] {
        llama_sampler_reset(sampler);
        return true;
    });
}

extern "C" struct llama_sampler * simlayer_sampler_clone(const struct llama_sampler * sampler, char * error,
                                                         size_t error_size) {
    return guarded<llama_sampler *>(error, error_size, nullptr, [&] { return llama_sampler_clone(sampler); });
}

extern "C" int32_t simlayer_chat_apply_template(const char * tmpl, const struct llama_chat_message * chat,
                                                size_t n_msg, bool add_assistant, char * buf, int32_t length,
                                                char * error, size_t error_size) {
    return guarded<int32_t>(error, error_size, INT32_MIN, [&]() -> int32_t {
        std::vector<const llama_chat_message *> messages;
        for (size_t i = 0; i < n_msg; i++) {
            messages.push_back(&chat[i]);
        }
        const llm_chat_template known = llm_chat_detect_template(tmpl);
        std::string text;
        if (known == LLM_CHAT_TEMPLATE_UNKNOWN || llm_chat_apply_template(known, messages, text, add_assistant) < 0) {
            return -1;
        }
        if (text.size() > (size_t) INT32_MAX) {
            throw std::runtime_error("the conversation is too long");
        }
        if (length > 0) {
            std::memcpy(buf, text.data(), std::min(text.size(), (size_t) length));
        }
        return (int32_t) text.size();
    });
}

// llama.cpp's sampler file reaches into a llama_context in functions that our Rust code never calls. The symbols
// must exist for the linker; they are weak, so that a library which has a real llama_context can define them.
#define SIMLAYER_WEAK extern "C" __attribute__((weak))

SIMLAYER_WEAK const struct llama_model * llama_get_model(const struct llama_context *) { return nullptr; }
SIMLAYER_WEAK const struct llama_vocab * llama_model_get_vocab(const struct llama_model *) { return nullptr; }
SIMLAYER_WEAK float *       llama_get_logits_ith(struct llama_context *, int32_t) { return nullptr; }
SIMLAYER_WEAK llama_token   llama_get_sampled_token_ith(struct llama_context *, int32_t) { return LLAMA_TOKEN_NULL; }
SIMLAYER_WEAK float *       llama_get_sampled_probs_ith(struct llama_context *, int32_t) { return nullptr; }
SIMLAYER_WEAK uint32_t      llama_get_sampled_probs_count_ith(struct llama_context *, int32_t) { return 0; }
SIMLAYER_WEAK float *       llama_get_sampled_logits_ith(struct llama_context *, int32_t) { return nullptr; }
SIMLAYER_WEAK uint32_t      llama_get_sampled_logits_count_ith(struct llama_context *, int32_t) { return 0; }
SIMLAYER_WEAK llama_token * llama_get_sampled_candidates_ith(struct llama_context *, int32_t) { return nullptr; }
SIMLAYER_WEAK uint32_t      llama_get_sampled_candidates_count_ith(struct llama_context *, int32_t) { return 0; }

// The naming scheme of split files: <prefix>-00002-of-00004.gguf, counted from 1 in the name and from 0 here.
static std::string split_suffix(int32_t split_no, int32_t split_count) {
    char suffix[32];
    std::snprintf(suffix, sizeof(suffix), "-%05d-of-%05d.gguf", split_no + 1, split_count);
    return suffix;
}

SIMLAYER_WEAK int32_t llama_split_path(char * split_path, size_t maxlen, const char * path_prefix, int32_t split_no,
                                       int32_t split_count) {
    const std::string path = path_prefix + split_suffix(split_no, split_count);
    const int written = std::snprintf(split_path, maxlen, "%s", path.c_str());
    return written >= 0 && (size_t) written < maxlen ? written : 0;
}

SIMLAYER_WEAK int32_t llama_split_prefix(char * split_prefix, size_t maxlen, const char * split_path,
                                         int32_t split_no, int32_t split_count) {
    const std::string path   = split_path;
    const std::string suffix = split_suffix(split_no, split_count);
    if (path.size() <= suffix.size() || path.compare(path.size() - suffix.size(), suffix.size(), suffix) != 0) {
        return 0;
    }
    const std::string prefix = path.substr(0, path.size() - suffix.size());
    const int written = std::snprintf(split_prefix, maxlen, "%s", prefix.c_str());
    return written >= 0 && (size_t) written < maxlen ? written : 0;
}
