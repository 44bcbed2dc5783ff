// Whatever a caller does wrong is an error return and a line in the log, never the end of the process.
//   hostile MODEL N    makes N calls in four threads, each with a context of its own, all with what was freed
#include "check.h"

static struct llama_model *     model;
static struct llama_context *   freed_context;
static struct llama_model *     freed_model;
static const struct llama_vocab * freed_vocab;
static struct llama_batch_ext * freed_batch;
static int                      n_calls;

static uint32_t next_random(uint32_t * state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static int32_t odd_number(uint32_t * random) {
    static const int32_t numbers[] = { 0, 1, 2, 3, -1, -2, 7, 63, 64, 255, 256, 1000, INT32_MAX, INT32_MIN };
    return numbers[next_random(random) % (sizeof(numbers) / sizeof(numbers[0]))];
}

// A call that answers with its error value, and with a line in the log.
#define FAILS(call, value)                \
    do {                                  \
        const int n_lines = n_log_lines;  \
        CHECK((call) == (value));         \
        CHECK(n_log_lines > n_lines);     \
    } while (0)
// A function without a result.
#define REFUSED(call) FAILS(((call), 0), 0)

// The functions that are llama.cpp's own code, with a vocabulary that is none.
static void call_with(const struct llama_vocab * none) {
    FAILS(llama_vocab_bos(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_eos(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_eot(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_sep(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_nl(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_pad(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_mask(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_fim_pre(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_fim_suf(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_fim_mid(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_fim_pad(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_fim_rep(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_fim_sep(none), LLAMA_TOKEN_NULL);
    FAILS(llama_vocab_get_add_bos(none), false);
    FAILS(llama_vocab_get_add_eos(none), false);
    FAILS(llama_vocab_get_add_sep(none), false);
    FAILS(llama_vocab_type(none), LLAMA_VOCAB_TYPE_NONE);
    FAILS(llama_vocab_n_tokens(none), 0);
    FAILS(llama_vocab_get_text(none, 1), NULL);
    FAILS(isnan(llama_vocab_get_score(none, 1)), true);
    FAILS(llama_vocab_get_attr(none, 1), LLAMA_TOKEN_ATTR_UNDEFINED);
    FAILS(llama_vocab_is_eog(none, 1), false);
    FAILS(llama_vocab_is_control(none, 1), false);
    FAILS(llama_vocab_get_suppress_tokens(none, NULL), NULL);
    char        text[8];
    llama_token token = 1;
    FAILS(llama_tokenize(none, "a", 1, &token, 1, true, true), INT32_MIN);
    FAILS(llama_token_to_piece(none, 1, text, sizeof(text), 0, true), INT32_MIN);
    FAILS(llama_detokenize(none, &token, 1, text, sizeof(text), true, true), INT32_MIN);
    FAILS(llama_sampler_init_infill(none), NULL);
    FAILS(llama_sampler_init_dry(none, 1, 2, 2, 8, NULL, 0), NULL);
    FAILS(llama_sampler_init_grammar(none, "root ::= \"a\"", "root"), NULL);
    FAILS(llama_sampler_init_grammar_lazy_patterns(none, "root ::= \"a\"", "root", NULL, 0, NULL, 0), NULL);
}

static void call_with_nulls(const struct llama_vocab * vocab, struct llama_context * ctx) {
    char        text[8];
    llama_token token = 1;
    FAILS(llama_tokenize(vocab, NULL, 1, &token, 1, true, true), INT32_MIN);
    FAILS(llama_tokenize(vocab, "a", -1, &token, 1, true, true), INT32_MIN);
    FAILS(llama_tokenize(vocab, "a", 1, NULL, 1, true, true), INT32_MIN);
    FAILS(llama_token_to_piece(vocab, 1, NULL, 8, 0, true), INT32_MIN);
    FAILS(llama_token_to_piece(vocab, INT32_MAX, text, sizeof(text), 0, true), INT32_MIN);
    FAILS(llama_detokenize(vocab, NULL, 1, text, sizeof(text), true, true), INT32_MIN);
    FAILS(llama_detokenize(vocab, &token, 1, NULL, 8, true, true), INT32_MIN);
    FAILS(llama_vocab_get_text(vocab, -5), NULL);
    FAILS(llama_vocab_get_text(vocab, INT32_MAX), NULL);
    FAILS(isnan(llama_vocab_get_score(vocab, -5)), true);

    FAILS(llama_sampler_init(NULL, NULL), NULL);
    FAILS(llama_sampler_name(NULL), NULL);
    FAILS(llama_sampler_get_seed(NULL), LLAMA_DEFAULT_SEED);
    FAILS(llama_sampler_sample(NULL, ctx, 0), LLAMA_TOKEN_NULL);
    FAILS(llama_sampler_chain_get(NULL, 0), NULL);
    FAILS(llama_sampler_chain_remove(NULL, 0), NULL);
    FAILS(llama_sampler_chain_n(NULL), 0);
    FAILS(llama_perf_sampler(NULL).n_sample, 0);
    REFUSED(llama_perf_sampler_print(NULL));
    REFUSED(llama_perf_sampler_reset(NULL));
    REFUSED(llama_log_get(NULL, NULL));
    FAILS(llama_sampler_init_logit_bias(10, 2, NULL), NULL);
    FAILS(llama_sampler_init_grammar(vocab, "root ::= \"a\"", NULL), NULL);
    FAILS(llama_chat_builtin_templates(NULL, 2), -1);
    FAILS(llama_split_path(NULL, 8, "a", 0, 2), 0);
    FAILS(llama_split_path(text, 8, NULL, 0, 2), 0);
    FAILS(llama_split_prefix(text, 8, NULL, 0, 2), 0);

    // A sampler that is no chain, in itself, applied to nothing, and used where there are no logits.
    struct llama_sampler * greedy = llama_sampler_init_greedy();
    struct llama_sampler * chain  = llama_sampler_chain_init(llama_sampler_chain_default_params());
    CHECK(greedy != NULL && chain != NULL);
    FAILS(llama_sampler_chain_n(greedy), 0);
    REFUSED(llama_sampler_chain_add(greedy, chain));
    REFUSED(llama_sampler_chain_add(chain, chain));
    REFUSED(llama_sampler_chain_add(chain, NULL));
    REFUSED(llama_sampler_chain_add(NULL, greedy));
    REFUSED(llama_sampler_apply(greedy, NULL));
    REFUSED(llama_sampler_copy(greedy, NULL));
    REFUSED(llama_sampler_copy(greedy, chain));
    FAILS(llama_sampler_sample(greedy, NULL, 0), LLAMA_TOKEN_NULL);
    FAILS(llama_sampler_sample(greedy, freed_context, 0), LLAMA_TOKEN_NULL);
    FAILS(llama_sampler_sample(greedy, ctx, 12345), LLAMA_TOKEN_NULL);

    // No sampler is one that does nothing, as in llama.cpp.
    llama_sampler_accept(NULL, 1);
    llama_sampler_apply(NULL, NULL);
    llama_sampler_reset(NULL);
    CHECK(llama_sampler_clone(NULL) == NULL);
    llama_sampler_free(NULL);

    // What is right still is.
    llama_sampler_chain_add(chain, greedy);
    CHECK(llama_sampler_chain_n(chain) == 1 && llama_sampler_chain_get(chain, 0) == greedy);
    CHECK(llama_tokenize(vocab, "a b", 3, NULL, 0, true, true) < 0);
    CHECK(llama_vocab_get_text(vocab, 1) != NULL && llama_vocab_n_tokens(vocab) > 0);
    llama_sampler_free(chain);
}

// Vocabulary and samplers with whatever comes.
static void use_vocab(const struct llama_vocab * vocab, struct llama_sampler * chain, struct llama_context * ctx, int32_t a,
                      int32_t b) {
    char        text[64];
    llama_token tokens[4] = { a, b, 1, 2 };
    llama_token_data       data[4] = { { a, 1, 0 }, { b, 2, 0 }, { 1, 3, 0 }, { 2, 4, 0 } };
    llama_token_data_array array   = { data, 4, -1, false };
    llama_vocab_get_text(vocab, a), llama_vocab_get_score(vocab, b), llama_vocab_get_attr(vocab, a);
    llama_vocab_is_eog(vocab, b), llama_vocab_is_control(vocab, a), llama_vocab_bos(vocab);
    llama_token_to_piece(vocab, a, b & 1 ? text : NULL, b & 63, b, a & 1);
    llama_detokenize(vocab, tokens, 4, text, b & 63, a & 1, b & 1);
    llama_tokenize(vocab, "one two", a & 7, a & 1 ? tokens : NULL, b & 3, a & 2, b & 2);
    llama_sampler_apply(chain, b & 1 ? &array : NULL);
    llama_sampler_sample(chain, ctx, a);
    llama_sampler_free(llama_sampler_chain_remove(chain, a < 0 || a > 100 ? a : 100));
    llama_sampler_free(llama_sampler_init_grammar(vocab, a & 1 ? "root ::= [" : "root ::= \"a\"", b & 1 ? "root" : NULL));
}

static void * caller(void * argument) {
    uint32_t               random  = (uint32_t) (size_t) argument * 7919u + 1;
    struct llama_context * own     = new_context(model, 256, 2);
    struct llama_batch     batch   = llama_batch_init(600, 0, 3);
    struct llama_batch_ext * ext   = llama_batch_ext_init(own);
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    struct llama_sampler *     chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(chain, llama_sampler_init_top_k(2));
    llama_sampler_chain_add(chain, llama_sampler_init_greedy());
    uint8_t                bytes[256];
    char                   text[64];

    for (int call = 0; call < n_calls; call++) {
        // Mostly the living context, else none, one that was freed, or one that never was.
        struct llama_context * contexts[] = { own, own, own, own, NULL, freed_context, (struct llama_context *) &random };
        struct llama_context * ctx        = contexts[next_random(&random) % 7];
        llama_memory_t         mem        = next_random(&random) % 4 ? llama_get_memory(own) : (llama_memory_t) ctx;
        const int32_t          a = odd_number(&random), b = odd_number(&random), c = odd_number(&random);
        for (size_t i = 0; i < sizeof(bytes); i++) {
            bytes[i] = next_random(&random);
        }
        switch (next_random(&random) % 25) {
            case 0: {
                const int n    = next_random(&random) % 8;
                batch.n_tokens = 0;
                for (int i = 0; i < n; i++) {
                    add(&batch, odd_number(&random), odd_number(&random), odd_number(&random), a & 1);
                }
                batch.n_seq_id[0] = n ? 1 + next_random(&random) % 3 : 1;
                for (int s = 0; s < 3; s++) {
                    batch.seq_id[0][s] = odd_number(&random);
                }
                llama_decode(ctx, batch);
                break;
            }
            case 1: { // a correct one now and then, so that there is something to spoil
                const int next = llama_memory_seq_pos_max(llama_get_memory(own), 0) + 1;
                batch.n_tokens = 0;
                for (int i = 0; i < 3 && next + i < 250; i++) {
                    add(&batch, token_at(model, next + i), next + i, 0, true);
                }
                llama_decode(own, batch);
                break;
            }
            case 2: {
                struct llama_batch holes = batch;
                holes.n_tokens           = a;
                if (b & 1) { holes.token = NULL; }
                if (b & 2) { holes.pos = NULL; }
                if (c & 1) { holes.seq_id = NULL; }
                if (c & 2) { holes.logits = NULL; }
                if (a > 600 || a < 0 || (b & 1)) { llama_decode(ctx, holes); }
                break;
            }
            case 3: llama_get_logits_ith(ctx, a); llama_get_logits(ctx); break;
            case 4: llama_get_embeddings_ith(ctx, a); llama_get_embeddings_seq(ctx, b); llama_get_embeddings(ctx); break;
            case 5: llama_memory_seq_rm(mem, a, b, c); break;
            case 6: llama_memory_seq_cp(mem, a, b, c, odd_number(&random)); break;
            case 7: llama_memory_seq_add(mem, a, b, c, 1); llama_memory_seq_div(mem, a, b, c, 2); break;
            case 8: llama_memory_seq_pos_min(mem, a); llama_memory_seq_pos_max(mem, b); llama_memory_can_shift(mem); break;
            case 9: if (call % 50 == 0) { llama_memory_clear(mem, true); } else { llama_memory_seq_keep(mem, a & 1); } break;
            case 10: llama_state_set_data(ctx, bytes, next_random(&random) % sizeof(bytes)); break;
            case 11: llama_state_seq_set_data(ctx, bytes, next_random(&random) % sizeof(bytes), a); break;
            case 12: llama_state_set_data(ctx, NULL, a & 255); llama_state_get_data(ctx, bytes, a & 15); break;
            case 13: llama_state_seq_get_data(ctx, bytes, sizeof(bytes), a); llama_state_seq_get_size(ctx, b); break;
            case 14: llama_state_load_file(ctx, c & 1 ? NULL : "/nonexistent/file", NULL, 0, NULL); break;
            case 15: llama_state_save_file(ctx, c & 1 ? NULL : "/nonexistent/file", NULL, a & 3); break;
            case 16: llama_model_meta_val_str(c & 1 ? model : freed_model, b & 1 ? NULL : "general.name", text, a & 63); break;
            case 17: llama_model_desc(freed_model, text, sizeof(text)); llama_model_n_embd(NULL); llama_model_get_vocab(freed_model); break;
            case 18: llama_set_n_threads(ctx, a & 1, b & 1); llama_n_ctx(ctx); llama_get_model(ctx); llama_n_batch(ctx); break;
            case 19: {
                struct llama_batch_ext * batches[] = { ext, ext, NULL, freed_batch };
                struct llama_batch_ext * some      = batches[next_random(&random) % 4];
                llama_pos                pos       = b;
                llama_batch_ext_add_token(some, a, b);
                llama_batch_ext_add_seq(some, c, a);
                llama_batch_ext_set_pos(some, c & 3, a & 1 ? NULL : &pos);
                llama_batch_ext_set_output_logits(some, a, true);
                llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE + (a == 7), some);
                if (call % 7 == 0) { llama_batch_ext_clear(some); }
                break;
            }
            case 20: {
                struct simlayer_params params;
                memcpy(&params, bytes, sizeof(bytes));
                params.size = c & 1 ? sizeof(params) : (size_t) a;
                memset(params.lazy, 'x', sizeof(params.lazy));
                simlayer_set_params(ctx, c & 2 ? NULL : &params);
                simlayer_get_params(ctx, NULL);
                break;
            }
            case 21: {
                struct simlayer_layer layer;
                simlayer_get_layers(ctx, a, &layer, 1, sizeof(layer));
                simlayer_decide(ctx, b);
                simlayer_n_layers(ctx);
                break;
            }
            case 23: {
                const struct llama_vocab * vocabs[] = { vocab, vocab, NULL, freed_vocab, (const struct llama_vocab *) &random };
                use_vocab(vocabs[next_random(&random) % 5], c & 1 ? chain : NULL, ctx, a, b);
                break;
            }
            case 22: llama_free(freed_context); llama_model_free(freed_model); llama_batch_ext_free(freed_batch); llama_free(NULL); break;
            default: {
                struct llama_context_params params = llama_context_default_params();
                params.n_ctx       = a & 1 ? 0 : 1u << 31;
                params.type_k      = a;
                params.n_batch     = b & 3;
                params.n_ubatch    = c & 1;
                params.n_seq_max   = b;
                params.pooling_type = c;
                if (params.type_k != GGML_TYPE_F16 || params.n_seq_max > 256) {
                    llama_free(llama_init_from_model(c & 4 ? model : freed_model, params));
                }
                break;
            }
        }
    }
    llama_sampler_free(chain);
    llama_batch_free(batch);
    llama_batch_ext_free(ext);
    llama_free(own);
    return NULL;
}

int main(int argc, char ** argv) {
    CHECK(argc == 3);
    model   = load_model(argv[1]);
    n_calls = atoi(argv[2]) / 4;

    freed_model = llama_model_load_from_file(argv[1], llama_model_default_params());
    CHECK(freed_model != NULL);
    freed_context = new_context(freed_model, 256, 1);
    freed_vocab   = llama_model_get_vocab(freed_model);
    freed_batch   = llama_batch_ext_init(freed_context);
    llama_batch_ext_free(freed_batch);
    // A context outlives its model's handle: the weights stay until it goes.
    llama_model_free(freed_model);
    llama_token tokens[] = { 1, 2, 3 };
    CHECK(llama_decode(freed_context, llama_batch_get_one(tokens, 3)) == 0);
    llama_free(freed_context);
    CHECK(llama_decode(freed_context, llama_batch_get_one(tokens, 3)) == -1);

    call_with(NULL);
    call_with(freed_vocab);
    call_with((const struct llama_vocab *) tokens);
    struct llama_context * one = new_context(model, 256, 1);
    call_with_nulls(llama_model_get_vocab(model), one);
    llama_free(one);

    CHECK(llama_model_load_from_file(NULL, llama_model_default_params()) == NULL);
    CHECK(llama_model_load_from_file("/nonexistent/model.gguf", llama_model_default_params()) == NULL);
    CHECK(llama_model_load_from_file("/dev/null", llama_model_default_params()) == NULL);
    CHECK(llama_adapter_lora_init(model, "x") == NULL && llama_model_quantize("a", "b", NULL) != 0);

    pthread_t threads[4];
    for (size_t i = 0; i < 4; i++) {
        CHECK(pthread_create(&threads[i], NULL, caller, (void *) (i + 1)) == 0);
    }
    for (size_t i = 0; i < 4; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK(n_log_lines > n_calls / 4);

    // After all that the library works.
    struct llama_context * ctx = new_context(model, 256, 1);
    decode_text(ctx, 0, 30, 0);
    CHECK(llama_get_logits_ith(ctx, -1) != NULL);
    llama_free(ctx);
    llama_model_free(model);
    puts("ok");
    return 0;
}
