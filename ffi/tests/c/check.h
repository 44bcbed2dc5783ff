// What the C tests share: a check that ends the test, a model, and contexts.
#pragma once

#include "llama.h"
#include "simlayer.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Not there where a program is linked with unmodified llama.cpp.
#pragma weak simlayer_last_error
#define LAST_ERROR() (simlayer_last_error != NULL ? simlayer_last_error() : "of another library")

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "%s:%d: not true: %s (last error: %s)\n", __FILE__, __LINE__,     \
                    #condition, LAST_ERROR());                                                \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

static int n_log_lines = 0;

static void count_lines(enum ggml_log_level level, const char * text, void * data) {
    (void) level, (void) text, (void) data;
    __atomic_add_fetch(&n_log_lines, 1, __ATOMIC_RELAXED);
}

static inline struct llama_model * load_model(const char * path) {
    llama_log_set(count_lines, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(path, llama_model_default_params());
    CHECK(model != NULL);
    return model;
}

static inline struct llama_context * new_context(struct llama_model * model, uint32_t n_ctx, uint32_t n_seq_max) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx           = n_ctx * n_seq_max;
    params.n_seq_max       = n_seq_max;
    params.n_batch         = 512;
    params.n_ubatch        = 64;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    struct llama_context * ctx = llama_init_from_model(model, params);
    CHECK(ctx != NULL);
    return ctx;
}

// Calls `run` in a thread with little stack, as a frontend's may be, and waits for its end.
static inline void on_a_small_stack(void * (*run)(void *), void * data) {
    pthread_attr_t attributes;
    pthread_t      thread;
    CHECK(pthread_attr_init(&attributes) == 0);
    CHECK(pthread_attr_setstacksize(&attributes, 256 << 10) == 0);
    CHECK(pthread_create(&thread, &attributes, run, data) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    pthread_attr_destroy(&attributes);
}

// Tokens of a text that is the same in every run.
static llama_token token_at(const struct llama_model * model, int i) {
    const int n = llama_vocab_n_tokens(llama_model_get_vocab(model));
    return (llama_token) ((i * 7919u + 13u) % (unsigned) n);
}

static inline void add(struct llama_batch * batch, llama_token token, llama_pos pos, llama_seq_id seq, bool logits) {
    const int i          = batch->n_tokens++;
    batch->token[i]      = token;
    batch->pos[i]        = pos;
    batch->n_seq_id[i]   = 1;
    batch->seq_id[i][0]  = seq;
    batch->logits[i]     = logits;
}

// Decodes tokens `from..to` of the text in a sequence, with logits of the last one.
static inline void decode_text(struct llama_context * ctx, int from, int to, llama_seq_id seq) {
    const struct llama_model * model = llama_get_model(ctx);
    struct llama_batch         batch = llama_batch_init(512, 0, 1);
    while (from < to) {
        batch.n_tokens = 0;
        const int end  = to - from > 512 ? from + 512 : to;
        for (int i = from; i < end; i++) {
            add(&batch, token_at(model, i), i, seq, i + 1 == to);
        }
        CHECK(llama_decode(ctx, batch) == 0);
        from = end;
    }
    llama_batch_free(batch);
}

static inline int greedy(struct llama_context * ctx, int i) {
    const float * logits = llama_get_logits_ith(ctx, i);
    CHECK(logits != NULL);
    const int n    = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    int       best = 0;
    for (int token = 1; token < n; token++) {
        if (logits[token] > logits[best]) {
            best = token;
        }
    }
    return best;
}
