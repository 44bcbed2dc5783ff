// What a model that simlayer does not run gives, through whichever library the program is linked with: ours, which has
// unmodified llama.cpp run it, or that library itself. All that is answered goes to a file, to be compared.
#include "check.h"

#include "ggml-backend.h"
#include "gguf.h"

static FILE * out;
static int    n_notes = 0;

static void note_lines(enum ggml_log_level level, const char * text, void * data) {
    (void) level, (void) data;
    n_notes += strstr(text, "runs in unmodified llama.cpp") != NULL;
}

static void put(const char * what, long long number) { CHECK(fprintf(out, "%s %lld\n", what, number) > 0); }

static void put_floats(const char * what, const float * values, int n) {
    CHECK(values != NULL);
    put(what, n);
    CHECK(fwrite(values, sizeof(float), (size_t) n, out) == (size_t) n);
}

static struct llama_model * load(const char * path) {
    llama_log_set(note_lines, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(path, llama_model_default_params());
    CHECK(model != NULL);
    return model;
}

static struct llama_context_params settings(void) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx                       = 1024;
    params.n_seq_max                   = 4;
    params.n_batch                     = 512;
    params.n_ubatch                    = 512;
    params.n_threads                   = 1;
    params.n_threads_batch             = 1;
    params.flash_attn_type             = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return params;
}

static void describe(const struct llama_model * model) {
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    char                       text[256];
    put("n_embd", llama_model_n_embd(model));
    put("n_embd_out", llama_model_n_embd_out(model));
    put("n_layer", llama_model_n_layer(model));
    put("n_head", llama_model_n_head(model));
    put("n_ctx_train", llama_model_n_ctx_train(model));
    put("rope type", llama_model_rope_type(model));
    put("size", (long long) llama_model_size(model));
    put("parameters", (long long) llama_model_n_params(model));
    put("decoder", llama_model_has_decoder(model));
    put("encoder", llama_model_has_encoder(model));
    put("keys", llama_model_meta_count(model));
    CHECK(llama_model_desc(model, text, sizeof(text)) > 0);
    CHECK(fprintf(out, "%s\n", text) > 0);
    CHECK(llama_model_meta_val_str(model, "general.architecture", text, sizeof(text)) > 0);
    CHECK(fprintf(out, "%s\n", text) > 0);

    put("tokens", llama_vocab_n_tokens(vocab));
    put("bos", llama_vocab_bos(vocab));
    put("eog", llama_vocab_is_eog(vocab, llama_vocab_eos(vocab)));
    const char * words = "some people made the first water of the world";
    llama_token  tokens[128];
    const int    n = llama_tokenize(vocab, words, (int) strlen(words), tokens, 128, true, false);
    CHECK(n > 4);
    for (int i = 0; i < n; i++) {
        const int length = llama_token_to_piece(vocab, tokens[i], text, sizeof(text), 0, true);
        CHECK(length >= 0);
        CHECK(fprintf(out, "%d %.*s\n", tokens[i], length, text) > 0);
    }
    const int length = llama_detokenize(vocab, tokens, n, text, sizeof(text), true, false);
    CHECK(length > 0);
    CHECK(fprintf(out, "%.*s\n", length, text) > 0);
}

static void decode_one(struct llama_context * ctx, llama_token token, llama_pos pos, llama_seq_id seq) {
    struct llama_batch batch = llama_batch_init(1, 0, 1);
    add(&batch, token, pos, seq, true);
    CHECK(llama_decode(ctx, batch) == 0);
    llama_batch_free(batch);
}

// The logits of a few tokens that follow in sequence `seq`.
static float * go_on(struct llama_context * ctx, llama_seq_id seq, int n) {
    const struct llama_model * model   = llama_get_model(ctx);
    const size_t               n_vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(model));
    const llama_pos            first   = llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
    float *                    logits  = malloc((size_t) n * n_vocab * sizeof(float));
    CHECK(logits != NULL);
    for (int i = 0; i < n; i++) {
        decode_one(ctx, token_at(model, 900 + i), first + i, seq);
        memcpy(logits + (size_t) i * n_vocab, llama_get_logits_ith(ctx, -1), n_vocab * sizeof(float));
    }
    return logits;
}

// A prompt of 40 tokens, 20 sampled ones, whose numbers are printed with the logits in `rows`, and then states and
// sequences.
static void decode(struct llama_model * model, const char * rows_path, const char * state_path) {
    const struct llama_vocab * vocab   = llama_model_get_vocab(model);
    const size_t               n_vocab = (size_t) llama_vocab_n_tokens(vocab);
    struct llama_context *     ctx     = llama_init_from_model(model, settings());
    CHECK(ctx != NULL);
    CHECK(llama_get_model(ctx) == model);
    llama_memory_t memory = llama_get_memory(ctx);
    CHECK(memory != NULL);
    FILE * rows = fopen(rows_path, "wb");
    CHECK(rows != NULL);

    struct llama_sampler * chain    = llama_sampler_chain_init(llama_sampler_chain_default_params());
    const char *           breaks[] = { "\n", "." };
    llama_sampler_chain_add(chain, llama_sampler_init_penalties((int) n_vocab, 64, 1.1f, 0, 0));
    llama_sampler_chain_add(chain, llama_sampler_init_dry(vocab, 0.8f, 1.75f, 2, 64, breaks, 2));
    llama_sampler_chain_add(chain, llama_sampler_init_top_k(40));
    llama_sampler_chain_add(chain, llama_sampler_init_top_p(0.95f, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_temp(0.8f));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(7));
    CHECK(llama_sampler_chain_n(chain) == 6);

    decode_text(ctx, 0, 40, 0);
    for (int i = 0; i < 20; i++) {
        CHECK(fwrite(llama_get_logits_ith(ctx, -1), sizeof(float), n_vocab, rows) == n_vocab);
        const llama_token token = llama_sampler_sample(chain, ctx, -1);
        CHECK(token >= 0 && (size_t) token < n_vocab);
        printf("%d ", token);
        put("sampled", token);
        decode_one(ctx, token, 40 + i, 0);
    }
    puts("");
    CHECK(fwrite(llama_get_logits_ith(ctx, -1), sizeof(float), n_vocab, rows) == n_vocab);
    CHECK(fclose(rows) == 0);
    put_floats("logits", llama_get_logits_ith(ctx, -1), (int) n_vocab);

    // A grammar of this vocabulary in a chain.
    struct llama_sampler * letters = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(letters, llama_sampler_init_grammar(vocab, "root ::= [a-z ]+", "root"));
    llama_sampler_chain_add(letters, llama_sampler_init_greedy());
    for (int i = 0; i < 4; i++) {
        put("letter", llama_sampler_sample(letters, ctx, -1));
    }
    llama_sampler_free(letters);

    // What follows is the same from a state, in memory and in a file, and in another sequence.
    const size_t size  = llama_state_get_size(ctx);
    uint8_t *    state = malloc(size);
    CHECK(state != NULL && llama_state_get_data(ctx, state, size) == size);
    put("state", (long long) size);
    llama_token told[] = { 1, 2, 3 };
    CHECK(llama_state_save_file(ctx, state_path, told, 3));
    const size_t seq_size  = llama_state_seq_get_size(ctx, 0);
    uint8_t *    seq_state = malloc(seq_size);
    CHECK(seq_state != NULL && llama_state_seq_get_data(ctx, seq_state, seq_size, 0) == seq_size);
    const size_t row    = 3 * n_vocab * sizeof(float);
    float *      first  = go_on(ctx, 0, 3);
    put_floats("follows", first, (int) (3 * n_vocab));
    for (int way = 0; way < 3; way++) {
        llama_memory_clear(memory, true);
        CHECK(llama_memory_seq_pos_max(memory, 0) == -1);
        llama_token found[8];
        size_t      n_found = 0;
        switch (way) {
            case 0: CHECK(llama_state_set_data(ctx, state, size) == size); break;
            case 1:
                CHECK(llama_state_load_file(ctx, state_path, found, 8, &n_found));
                CHECK(n_found == 3 && found[2] == 3);
                break;
            case 2: CHECK(llama_state_seq_set_data(ctx, seq_state, seq_size, 2) == seq_size); break;
        }
        float * again = go_on(ctx, way == 2 ? 2 : 0, 3);
        CHECK(memcmp(first, again, row) == 0);
        free(again);
    }
    llama_memory_seq_rm(memory, 2, -1, -1);
    CHECK(llama_state_set_data(ctx, state, size) == size);
    free(seq_state);
    free(state);

    // A copied sequence, cut and shifted.
    put("shifts", llama_memory_can_shift(memory));
    llama_memory_seq_cp(memory, 0, 1, -1, -1);
    put("last", llama_memory_seq_pos_max(memory, 1));
    CHECK(llama_memory_seq_rm(memory, 1, 10, 20));
    llama_memory_seq_add(memory, 1, 20, -1, -10);
    put("last", llama_memory_seq_pos_max(memory, 1));
    float * shifted = go_on(ctx, 1, 2);
    put_floats("shifted", shifted, (int) (2 * n_vocab));
    llama_memory_seq_keep(memory, 1);
    put("first", llama_memory_seq_pos_min(memory, 1));
    put("gone", llama_memory_seq_pos_max(memory, 0));
    free(shifted);
    free(first);

    // The other kind of batch.
    struct llama_batch_ext * batch = llama_batch_ext_init(ctx);
    CHECK(batch != NULL);
    for (int i = 0; i < 5; i++) {
        const int32_t index = llama_batch_ext_add_token(batch, 3, token_at(model, i));
        CHECK(index == i);
        CHECK(llama_batch_ext_set_output_logits(batch, index, i == 4));
    }
    CHECK(llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch) == 0);
    put_floats("batch", llama_get_logits_ith(ctx, -1), (int) n_vocab);
    llama_batch_ext_free(batch);

    llama_sampler_free(chain);
    llama_free(ctx);
}

// Embeddings of three texts in one batch, whole or token by token.
static void embed(struct llama_model * model, enum llama_pooling_type pooling) {
    struct llama_context_params params = settings();
    params.embeddings                  = true;
    params.pooling_type                = pooling;
    params.flash_attn_type             = LLAMA_FLASH_ATTN_TYPE_AUTO;
    struct llama_context * ctx         = llama_init_from_model(model, params);
    CHECK(ctx != NULL);
    put("pooling", llama_pooling_type(ctx));
    // An encoder has no memory, and frontends clear it all the same.
    llama_memory_clear(llama_get_memory(ctx), true);
    put("removed", llama_memory_seq_rm(llama_get_memory(ctx), 0, -1, -1));
    llama_set_embeddings(ctx, true);

    const int          lengths[] = { 5, 12, 1 };
    struct llama_batch batch     = llama_batch_init(64, 0, 1);
    for (int seq = 0; seq < 3; seq++) {
        for (int i = 0; i < lengths[seq]; i++) {
            add(&batch, token_at(model, 100 * seq + i), i, seq, true);
        }
    }
    CHECK((llama_get_memory(ctx) == NULL ? llama_encode(ctx, batch) : llama_decode(ctx, batch)) == 0);
    const int n_embd = llama_model_n_embd_out(model);
    pooling          = llama_pooling_type(ctx);
    for (int seq = 0; seq < 3 && pooling != LLAMA_POOLING_TYPE_NONE; seq++) {
        put_floats("pooled", llama_get_embeddings_seq(ctx, seq), n_embd);
    }
    for (int i = 0; i < batch.n_tokens && pooling == LLAMA_POOLING_TYPE_NONE; i++) {
        put_floats("token", llama_get_embeddings_ith(ctx, i), n_embd);
    }
    llama_batch_free(batch);
    llama_free(ctx);
}

// A few tokens of a model, which is freed.
static void glance(struct llama_model * model) {
    CHECK(model != NULL);
    put("parameters", (long long) llama_model_n_params(model));
    struct llama_context * ctx = llama_init_from_model(model, settings());
    CHECK(ctx != NULL);
    decode_text(ctx, 0, 5, 0);
    put_floats("logits", llama_get_logits_ith(ctx, -1), llama_vocab_n_tokens(llama_model_get_vocab(model)));
    llama_free(ctx);
    llama_model_free(model);
}

// Weights of no file.
static void set_tensor(struct ggml_tensor * tensor, void * data) {
    (void) data;
    const int64_t n      = ggml_nelements(tensor);
    float *       values = malloc((size_t) n * sizeof(float));
    CHECK(values != NULL && ggml_nbytes(tensor) == (size_t) n * sizeof(float));
    for (int64_t i = 0; i < n; i++) {
        values[i] = (float) (i * 37 % 101 - 50) / 200;
    }
    ggml_backend_tensor_set(tensor, values, 0, ggml_nbytes(tensor));
    free(values);
}

// A model's other ways in, and quantised.
static void other_ways(const char * path, const char * parts, const char * quantised) {
    FILE * file = fopen(path, "rb");
    CHECK(file != NULL);
    glance(llama_model_load_from_file_ptr(file, llama_model_default_params()));
    fclose(file);

    char         names[3][512];
    const char * paths[3];
    for (int i = 0; i < 3; i++) {
        CHECK(llama_split_path(names[i], sizeof(names[i]), parts, i, 3) > 0);
        paths[i] = names[i];
    }
    glance(llama_model_load_from_splits(paths, 3, llama_model_default_params()));
    glance(llama_model_load_from_file(paths[0], llama_model_default_params()));

    struct gguf_context * metadata = gguf_init_from_file(path, (struct gguf_init_params) { true, NULL });
    CHECK(metadata != NULL);
    glance(llama_model_init_from_user(metadata, set_tensor, NULL, llama_model_default_params()));
    gguf_free(metadata);

    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype                              = LLAMA_FTYPE_MOSTLY_Q8_0;
    params.nthread                            = 1;
    CHECK(llama_model_quantize(path, quantised, &params) == 0);
    glance(llama_model_load_from_file(quantised, llama_model_default_params()));
}

// The vocabulary alone, which simlayer reads of any model.
static void vocabulary(const char * path) {
    struct llama_model_params params = llama_model_default_params();
    params.vocab_only                = true;
    struct llama_model * model       = llama_model_load_from_file(path, params);
    CHECK(model != NULL);
    llama_token tokens[64];
    const int   n = llama_tokenize(llama_model_get_vocab(model), "of the world", 12, tokens, 64, true, false);
    put("vocabulary", n);
    for (int i = 0; i < n; i++) {
        put("token", tokens[i]);
    }
    llama_model_free(model);
}

// Arguments: "decode", the model, another that simlayer runs, files for the answers, the rows of logits and a state, the
// beginning of the names of the model's parts, and a file for it quantised; or "embed", the model and the file for the answers. The last line says how often it was said that a model runs in
// unmodified llama.cpp.
int main(int argc, char ** argv) {
    CHECK(argc > 3);
    if (strcmp(argv[1], "decode") == 0) {
        CHECK(argc == 9);
        out = fopen(argv[4], "wb");
        CHECK(out != NULL);
        struct llama_model * model = load(argv[2]);
        struct llama_model * other = load(argv[3]);
        describe(model);
        struct llama_context * between = llama_init_from_model(other, settings());
        CHECK(between != NULL);
        decode_text(between, 0, 30, 0);
        decode(model, argv[5], argv[6]);
        float * logits = go_on(between, 0, 3);
        put_floats("the other's", logits, 3 * llama_vocab_n_tokens(llama_model_get_vocab(other)));
        free(logits);
        llama_free(between);
        llama_model_free(other);
        llama_model_free(model);
        other_ways(argv[2], argv[7], argv[8]);
    } else {
        out = fopen(argv[3], "wb");
        CHECK(out != NULL);
        struct llama_model * model = load(argv[2]);
        vocabulary(argv[2]);
        describe(model);
        embed(model, LLAMA_POOLING_TYPE_UNSPECIFIED);
        embed(model, LLAMA_POOLING_TYPE_MEAN);
        embed(model, LLAMA_POOLING_TYPE_CLS);
        embed(model, LLAMA_POOLING_TYPE_NONE);
        llama_model_free(model);
    }
    CHECK(fclose(out) == 0);
    printf("%d\n", n_notes);
    return 0;
}
