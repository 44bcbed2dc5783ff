// The logits of a text, read in one batch and then token by token, for given types of keys and values.
#include "check.h"

static enum ggml_type type_named(const char * name) {
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        const char * its = ggml_type_name((enum ggml_type) type);
        if (its != NULL && strcmp(its, name) == 0) {
            return (enum ggml_type) type;
        }
    }
    return GGML_TYPE_COUNT;
}

// Arguments: the model, "on" or "off" for flash attention, the types of keys and values, a file for the rows of logits,
// the tokens to read, and then those to feed one by one after "--". Says "refused" where there is no such context.
int main(int argc, char ** argv) {
    CHECK(argc > 7);
    struct llama_model *        model  = load_model(argv[1]);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx                       = 512;
    params.n_batch                     = 512;
    params.n_ubatch                    = 512;
    params.n_threads                   = 1;
    params.n_threads_batch             = 1;
    params.type_k                      = type_named(argv[3]);
    params.type_v                      = type_named(argv[4]);
    const bool flash_attn              = strcmp(argv[2], "on") == 0;
    params.flash_attn_type = flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context * ctx = llama_init_from_model(model, params);
    if (ctx == NULL) {
        puts("refused");
        return 0;
    }
    FILE * out = fopen(argv[5], "wb");
    CHECK(out != NULL);
    const size_t n_vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(model));

    struct llama_batch batch  = llama_batch_init(512, 0, 1);
    bool               prompt = true;
    int                pos    = 0;
    for (int i = 6; i < argc; i++) {
        const bool end = strcmp(argv[i], "--") == 0;
        if (!end) {
            add(&batch, atoi(argv[i]), pos++, 0, false);
        }
        if (end || !prompt) {
            batch.logits[batch.n_tokens - 1] = true;
            CHECK(llama_decode(ctx, batch) == 0);
            // llama-server takes a token's probability from so many.
            CHECK(llama_get_sampled_logits_count_ith(ctx, -1) == n_vocab);
            CHECK(fwrite(llama_get_logits_ith(ctx, -1), sizeof(float), n_vocab, out) == n_vocab);
            batch.n_tokens = 0;
            prompt         = false;
        }
    }
    CHECK(fclose(out) == 0);
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    puts("ok");
    return 0;
}
