// Batches of several sequences, and editing what sequences hold. Argument: a small model.
#include "check.h"

static float * copy_logits(struct llama_context * ctx, int i) {
    const int     n      = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    const float * logits = llama_get_logits_ith(ctx, i);
    CHECK(logits != NULL);
    float * copy = malloc(n * sizeof(float));
    memcpy(copy, logits, n * sizeof(float));
    return copy;
}

static void check_same(struct llama_context * ctx, int i, const float * expected) {
    const int     n      = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    const float * logits = llama_get_logits_ith(ctx, i);
    CHECK(logits != NULL);
    for (int token = 0; token < n; token++) {
        CHECK(fabsf(logits[token] - expected[token]) <= 1e-3f * (1.0f + fabsf(expected[token])));
    }
}

static void test_batches(struct llama_model * model) {
    struct llama_context * ctx = new_context(model, 256, 4);
    llama_memory_t         mem = llama_get_memory(ctx);
    CHECK(llama_n_ctx(ctx) == 1024 && llama_n_ctx_seq(ctx) == 256 && llama_n_seq_max(ctx) == 4);
    CHECK(llama_memory_seq_pos_max(mem, 0) == -1 && llama_memory_seq_pos_min(mem, 0) == -1);

    // A prompt at once.
    decode_text(ctx, 0, 20, 0);
    float * at_20 = copy_logits(ctx, -1);
    CHECK(llama_memory_seq_pos_min(mem, 0) == 0 && llama_memory_seq_pos_max(mem, 0) == 19);
    // Only the last token had logits asked for.
    CHECK(llama_get_logits_ith(ctx, 19) == llama_get_logits_ith(ctx, -1));
    CHECK(llama_get_logits_ith(ctx, 0) == NULL && llama_get_logits_ith(ctx, 20) == NULL);
    CHECK(llama_get_logits_ith(ctx, -2) == NULL);

    // Token by token.
    for (int i = 0; i < 20; i++) {
        decode_text(ctx, i, i + 1, 1);
    }
    check_same(ctx, 0, at_20);

    // Two sequences, their tokens mixed, some with logits.
    struct llama_batch batch = llama_batch_init(64, 0, 4);
    for (int i = 0; i < 20; i++) {
        add(&batch, token_at(model, i), i, 2, i % 3 == 0 || i == 19);
        add(&batch, token_at(model, i + 5), i, 3, i == 19);
    }
    CHECK(llama_decode(ctx, batch) == 0);
    check_same(ctx, 38, at_20);
    CHECK(llama_get_logits_ith(ctx, 0) == llama_get_logits(ctx));
    CHECK(llama_get_logits_ith(ctx, 1) == NULL);
    CHECK(llama_get_logits_ith(ctx, 39) == llama_get_logits_ith(ctx, -1));
    float * other = copy_logits(ctx, 39);

    // The same in one batch with a prefix that all four share.
    llama_memory_clear(mem, true);
    CHECK(llama_memory_seq_pos_max(mem, 2) == -1);
    batch.n_tokens = 0;
    for (int i = 0; i < 20; i++) {
        const bool shared = i < 10;
        for (int s = 0; s < (shared ? 1 : 4); s++) {
            add(&batch, token_at(model, i + (!shared && s % 2 ? 3 : 0)), i, s, i == 19);
        }
        if (shared) {
            batch.n_seq_id[batch.n_tokens - 1] = 4;
            for (int s = 0; s < 4; s++) {
                batch.seq_id[batch.n_tokens - 1][s] = s;
            }
        }
    }
    CHECK(llama_decode(ctx, batch) == 0);
    check_same(ctx, batch.n_tokens - 4, at_20);
    check_same(ctx, batch.n_tokens - 2, at_20);
    for (int s = 0; s < 4; s++) {
        CHECK(llama_memory_seq_pos_max(mem, s) == 19);
    }

    // A batch that is wrong changes nothing.
    struct { llama_token token; llama_pos pos; llama_seq_id seq; } wrong[] = {
        { 1, 5, 0 }, { 1, 21, 0 }, { 1, -1, 0 }, { -1, 20, 0 }, { 1 << 30, 20, 0 }, { 1, 20, 4 }, { 1, 20, -1 },
    };
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        batch.n_tokens = 0;
        add(&batch, wrong[i].token, wrong[i].pos, wrong[i].seq, true);
        CHECK(llama_decode(ctx, batch) == -1);
        CHECK(llama_memory_seq_pos_max(mem, 0) == 19);
    }
    batch.n_tokens = 0;
    CHECK(llama_decode(ctx, batch) == -1);
    batch.n_tokens = 513;
    CHECK(llama_decode(ctx, batch) == -1);

    // The context is full.
    decode_text(ctx, 20, 256, 0);
    batch.n_tokens = 0;
    add(&batch, 1, 256, 0, true);
    CHECK(llama_decode(ctx, batch) == 1);
    CHECK(llama_memory_seq_pos_max(mem, 0) == 255);

    llama_batch_free(batch);
    free(at_20);
    free(other);
    llama_free(ctx);
}

static void test_editing(struct llama_model * model) {
    struct llama_context * ctx = new_context(model, 256, 3);
    llama_memory_t         mem = llama_get_memory(ctx);
    CHECK(!llama_memory_can_shift(mem));
    decode_text(ctx, 0, 40, 0);
    float * at_40 = copy_logits(ctx, -1);

    // The end goes and comes again; the middle stays.
    CHECK(llama_memory_seq_rm(mem, 0, 30, -1));
    CHECK(llama_memory_seq_pos_max(mem, 0) == 29);
    CHECK(!llama_memory_seq_rm(mem, 0, 5, 10));
    CHECK(llama_memory_seq_rm(mem, 0, 100, 200) && llama_memory_seq_rm(mem, 2, -1, -1));
    CHECK(llama_memory_seq_pos_max(mem, 0) == 29);
    decode_text(ctx, 30, 40, 0);
    check_same(ctx, -1, at_40);

    // Copies, whole and in part, are sequences of their own.
    llama_memory_seq_cp(mem, 0, 1, -1, -1);
    llama_memory_seq_cp(mem, 0, 2, 0, 20);
    CHECK(llama_memory_seq_pos_max(mem, 1) == 39 && llama_memory_seq_pos_max(mem, 2) == 19);
    CHECK(llama_memory_seq_rm(mem, 0, -1, -1));
    CHECK(llama_memory_seq_pos_max(mem, 0) == -1);
    decode_text(ctx, 20, 40, 2);
    check_same(ctx, -1, at_40);
    llama_memory_seq_cp(mem, 1, 0, 10, -1); // not from its beginning: refused
    CHECK(llama_memory_seq_pos_max(mem, 0) == -1);
    llama_memory_seq_add(mem, 1, 0, -1, 5);
    llama_memory_seq_div(mem, 1, 0, -1, 2);
    CHECK(llama_memory_seq_pos_max(mem, 1) == 39);

    llama_memory_seq_keep(mem, 2);
    CHECK(llama_memory_seq_pos_max(mem, 1) == -1 && llama_memory_seq_pos_max(mem, 2) == 39);
    CHECK(llama_memory_seq_rm(mem, -1, 10, -1));
    CHECK(llama_memory_seq_pos_max(mem, 2) == 9);
    free(at_40);
    llama_free(ctx);
}

static void test_lazy(struct llama_model * model) {
    // No token beyond the window.
    setenv("SIMLAYER_SLACK", "0", 1);
    struct llama_context * ctx = new_context(model, 256, 1);
    unsetenv("SIMLAYER_SLACK");
    llama_memory_t         mem = llama_get_memory(ctx);
    struct simlayer_params params;
    params.size = sizeof(params);
    CHECK(simlayer_get_params(ctx, &params) == 0);
    CHECK(strcmp(params.lazy, "off") == 0 && params.n_sink == 4 && params.n_window == 1024);

    strcpy(params.lazy, "nonsense");
    CHECK(simlayer_set_params(ctx, &params) < 0 && strlen(simlayer_last_error()) > 0);
    strcpy(params.lazy, "layers:99");
    CHECK(simlayer_set_params(ctx, &params) < 0);
    strcpy(params.lazy, "budget:1");
    params.n_window = 32;
    CHECK(simlayer_set_params(ctx, &params) == 0);
    memset(&params, 0, sizeof(params));
    params.size = sizeof(params);
    CHECK(simlayer_get_params(ctx, &params) == 0 && strcmp(params.lazy, "budget:1") == 0 && params.n_window == 32);

    const int n_layers = simlayer_n_layers(ctx);
    CHECK(n_layers == llama_model_n_layer(model));
    struct simlayer_layer * layers = calloc(n_layers, sizeof(*layers));
    CHECK(simlayer_get_layers(ctx, 0, layers, n_layers, sizeof(*layers)) == 0);

    // Not longer than sink and window: nothing is decided.
    decode_text(ctx, 0, 30, 0);
    CHECK(simlayer_get_layers(ctx, 0, layers, n_layers, sizeof(*layers)) == n_layers);
    CHECK(layers[0].kind == SIMLAYER_KIND_FULL && !layers[0].has_score);
    decode_text(ctx, 30, 100, 0);
    CHECK(simlayer_get_layers(ctx, 0, layers, n_layers, sizeof(*layers)) == n_layers);
    for (int i = 0; i < n_layers; i++) {
        CHECK(layers[i].index == i && layers[i].kind == SIMLAYER_KIND_LAZY && layers[i].has_score);
        CHECK(layers[i].score > 0.0f && layers[i].score <= 1.001f && layers[i].bytes > 0);
    }
    struct simlayer_memory memory;
    memory.size = sizeof(memory);
    CHECK(simlayer_get_memory(ctx, &memory) == 0);
    CHECK(memory.tokens == 100 && (int) memory.lazy_layers == n_layers && memory.active_layers == 0);
    CHECK(memory.allocated_bytes < memory.f16_bytes && memory.peak_bytes >= memory.allocated_bytes);

    // What was dropped cannot come back; the whole sequence can go.
    // The 32 newest positions are there, so that the last one can be gone on from.
    CHECK(llama_memory_seq_pos_min(mem, 0) == 99 && llama_memory_seq_pos_max(mem, 0) == 99);
    CHECK(!llama_memory_seq_rm(mem, 0, 50, -1) && !llama_memory_seq_rm(mem, 0, 98, -1));
    CHECK(llama_memory_seq_pos_max(mem, 0) == 99);
    decode_text(ctx, 100, 110, 0);
    CHECK(llama_memory_seq_rm(mem, 0, 0, -1));
    CHECK(llama_memory_seq_pos_max(mem, 0) == -1);

    // A decision on demand: at once for a fixed set, with the next token's scores else.
    strcpy(params.lazy, "off");
    CHECK(simlayer_set_params(ctx, &params) == 0);
    decode_text(ctx, 0, 100, 0);
    strcpy(params.lazy, "layers:1");
    CHECK(simlayer_set_params(ctx, &params) == 0 && simlayer_decide(ctx, 0) == 1);
    strcpy(params.lazy, "budget:1");
    CHECK(simlayer_set_params(ctx, &params) == 0 && simlayer_decide(ctx, 0) == 0);
    decode_text(ctx, 100, 101, 0);
    CHECK(simlayer_get_layers(ctx, 0, layers, n_layers, sizeof(*layers)) == n_layers);
    for (int i = 0; i < n_layers; i++) {
        CHECK(layers[i].kind == SIMLAYER_KIND_LAZY);
    }
    CHECK(simlayer_decide(ctx, 0) == n_layers && simlayer_decide(ctx, 5) < 0 && simlayer_decide(NULL, 0) < 0);
    free(layers);
    llama_free(ctx);
}

// SIMLAYER_KEYS is for whatever type the program asks for; a value that makes no sense is as none.
static void test_keys(struct llama_model * model) {
    uint64_t     bytes[3];
    const char * values[3] = { "", "never", "auto" };
    for (int i = 0; i < 3; i++) {
        setenv("SIMLAYER_KEYS", values[i], 1);
        struct llama_context * ctx = new_context(model, 1024, 1);
        unsetenv("SIMLAYER_KEYS");
        struct simlayer_params params;
        params.size = sizeof(params);
        CHECK(simlayer_get_params(ctx, &params) == 0 && params.narrow_keys == (i == 2));
        // Below sink and window nothing is looked at.
        params.n_window = 32;
        CHECK(simlayer_set_params(ctx, &params) == 0);
        // As many as f16 rows of the newest ones are few beside.
        decode_text(ctx, 0, 900, 0);
        struct simlayer_memory memory;
        memory.size = sizeof(memory);
        CHECK(simlayer_get_memory(ctx, &memory) == 0 && memory.lazy_layers == 0 && memory.tokens == 900);
        bytes[i] = memory.allocated_bytes;
        params.narrow_keys = 0;
        CHECK(simlayer_set_params(ctx, &params) == 0 && simlayer_get_params(ctx, &params) == 0);
        CHECK(params.narrow_keys == 0);
        decode_text(ctx, 900, 910, 0);
        llama_free(ctx);
    }
    CHECK(bytes[0] == bytes[1] && bytes[2] < bytes[0]);
}

static void test_embeddings(struct llama_model * model) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 256;
    params.n_threads = params.n_threads_batch = 1;
    params.embeddings = true;
    const int n_embd = llama_model_n_embd(model);
    float *   sum    = calloc(n_embd, sizeof(float));
    float *   last   = calloc(n_embd, sizeof(float));

    struct llama_context * ctx = llama_init_from_model(model, params);
    CHECK(llama_pooling_type(ctx) == LLAMA_POOLING_TYPE_NONE);
    decode_text(ctx, 0, 10, 0);
    for (int i = 0; i < 10; i++) {
        const float * row = llama_get_embeddings_ith(ctx, i); // of all tokens, whatever was asked for
        CHECK(row != NULL && row == llama_get_embeddings(ctx) + i * n_embd);
        for (int j = 0; j < n_embd; j++) {
            sum[j] += row[j];
            last[j] = row[j];
        }
    }
    CHECK(llama_get_embeddings_seq(ctx, 0) == NULL && llama_get_logits_ith(ctx, 9) != NULL);
    llama_free(ctx);

    enum llama_pooling_type types[] = { LLAMA_POOLING_TYPE_MEAN, LLAMA_POOLING_TYPE_LAST };
    for (int t = 0; t < 2; t++) {
        params.pooling_type = types[t];
        ctx                 = llama_init_from_model(model, params);
        decode_text(ctx, 0, 10, 0);
        const float * pooled = llama_get_embeddings_seq(ctx, 0);
        CHECK(pooled != NULL && llama_get_embeddings_seq(ctx, 1) == NULL && llama_get_embeddings(ctx) == NULL);
        for (int j = 0; j < n_embd; j++) {
            const float expected = t == 0 ? sum[j] / 10 : last[j];
            CHECK(fabsf(pooled[j] - expected) <= 1e-3f * (1.0f + fabsf(expected)));
        }
        llama_free(ctx);
    }
    params.pooling_type = LLAMA_POOLING_TYPE_RANK;
    CHECK(llama_init_from_model(model, params) == NULL);
    free(sum);
    free(last);
}

static bool stop(void * data) { return ++*(int *) data > 3; }
static bool see(struct ggml_tensor * tensor, bool ask, void * data) {
    (void) tensor, (void) ask;
    ++*(int *) data;
    return true;
}
static bool progress(float share, void * data) {
    *(float *) data = share;
    return share < 0.5f;
}

static void test_callbacks(struct llama_model * model, const char * path) {
    struct llama_context * ctx   = new_context(model, 256, 1);
    int                    count = 0;
    llama_set_abort_callback(ctx, stop, &count);
    struct llama_batch batch = llama_batch_init(200, 0, 1);
    for (int i = 0; i < 200; i++) {
        add(&batch, token_at(model, i), i, 0, i == 199);
    }
    CHECK(llama_decode(ctx, batch) == 2 && count > 3);
    llama_set_abort_callback(ctx, NULL, NULL);
    const int held = llama_memory_seq_pos_max(llama_get_memory(ctx), 0) + 1;
    decode_text(ctx, held, 200, 0);
    llama_batch_free(batch);
    llama_free(ctx);

    struct llama_context_params params = llama_context_default_params();
    count                    = 0;
    params.cb_eval           = see;
    params.cb_eval_user_data = &count;
    params.n_threads = params.n_threads_batch = 1;
    ctx = llama_init_from_model(model, params);
    decode_text(ctx, 0, 5, 0);
    CHECK(count > 10);
    llama_free(ctx);

    float                     share  = 0;
    struct llama_model_params mparams = llama_model_default_params();
    mparams.progress_callback           = progress;
    mparams.progress_callback_user_data = &share;
    CHECK(llama_model_load_from_file(path, mparams) == NULL && share >= 0.5f);

    struct llama_model_kv_override overrides[2] = { { 0 } };
    overrides[0].tag = LLAMA_KV_OVERRIDE_TYPE_INT;
    strcpy(overrides[0].key, "llama.context_length");
    overrides[0].val_i64 = 77;
    mparams              = llama_model_default_params();
    mparams.kv_overrides = overrides;
    struct llama_model * other = llama_model_load_from_file(path, mparams);
    CHECK(other != NULL && llama_model_n_ctx_train(other) == 77);
    llama_model_free(other);

    mparams            = llama_model_default_params();
    mparams.vocab_only = true;
    other              = llama_model_load_from_file(path, mparams);
    CHECK(other != NULL && llama_vocab_n_tokens(llama_model_get_vocab(other)) > 0);
    ctx = llama_init_from_model(other, llama_context_default_params());
    CHECK(ctx != NULL && llama_decode(ctx, llama_batch_get_one(NULL, 0)) == -1);
    llama_free(ctx);
    llama_model_free(other);
}

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    struct llama_model * model = load_model(argv[1]);
    test_batches(model);
    test_editing(model);
    test_lazy(model);
    test_keys(model);
    test_embeddings(model);
    test_callbacks(model, argv[1]);
    llama_model_free(model);
    llama_backend_free();
    puts("ok");
    return 0;
}
