// Which layers become lazy at a prompt's end. Arguments: the model, "environment" or "header", the rule, "auto" or "-" for
// the keys, and the prompt's tokens.
//
// Prints a line: each layer's kind, what the cache takes, what the look foretold, and the tokens that follow.
#include "check.h"

int main(int argc, char ** argv) {
    CHECK(argc > 5);
    const bool  by_header = strcmp(argv[2], "header") == 0;
    const char *rule = argv[3], *keys = strcmp(argv[4], "auto") == 0 ? "auto" : "";
    struct llama_model * model = load_model(argv[1]);
    // A context that is made with a rule has this library's own attention, whatever the rule becomes.
    setenv("SIMLAYER_LAZY", by_header ? "layers:0" : rule, 1);
    setenv("SIMLAYER_KEYS", keys, 1);
    setenv("SIMLAYER_WINDOW", by_header ? "777" : "256", 1);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx                       = 4096;
    params.n_batch                     = 4096;
    params.n_threads                   = 2;
    params.n_threads_batch             = 2;
    params.flash_attn_type             = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_v                      = *keys ? GGML_TYPE_Q4_0 : GGML_TYPE_F16;
    struct llama_context * ctx         = llama_init_from_model(model, params);
    CHECK(ctx != NULL);
    if (by_header) {
        struct simlayer_params lazy;
        lazy.size = sizeof(lazy);
        CHECK(simlayer_get_params(ctx, &lazy) == 0 && strcmp(lazy.lazy, "layers:0") == 0 && lazy.n_window == 777);
        snprintf(lazy.lazy, sizeof(lazy.lazy), "%s", rule);
        lazy.n_window = 256;
        CHECK(simlayer_set_params(ctx, &lazy) == 0);
    }

    double             foretold = -1.0;
    struct llama_batch batch    = llama_batch_init(4096, 0, 1);
    CHECK(simlayer_foretold(ctx, 0, &foretold) == 0 && foretold == -1.0);
    for (int i = 5; i < argc; i++) {
        add(&batch, atoi(argv[i]), i - 5, 0, i + 1 == argc);
    }
    CHECK(llama_decode(ctx, batch) == 0);
    const int looked = simlayer_foretold(ctx, 0, &foretold);
    CHECK(looked == 0 || looked == 1);

    struct simlayer_layer layers[256];
    const int             n = simlayer_get_layers(ctx, 0, layers, 256, sizeof(layers[0]));
    CHECK(n > 0 && n == simlayer_n_layers(ctx));
    for (int i = 0; i < n; i++) {
        putchar(layers[i].kind == SIMLAYER_KIND_LAZY ? 'l' : '-');
    }
    struct simlayer_memory memory;
    memory.size = sizeof(memory);
    CHECK(simlayer_get_memory(ctx, &memory) == 0);
    printf(" %llu %.6f", (unsigned long long) memory.allocated_bytes, looked ? foretold : -1.0);
    int pos = argc - 5;
    for (int i = 0; i < 8; i++) {
        const llama_token token = greedy(ctx, -1);
        printf(" %d", token);
        batch.n_tokens = 0;
        add(&batch, token, pos++, 0, true);
        CHECK(llama_decode(ctx, batch) == 0);
    }
    puts("");
    llama_batch_free(batch);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
