// Continues a text with llama.h alone: this program runs on llama.cpp as well as on simlayer. What it knows nothing of
// can be asked for from outside:
//
//   SIMLAYER_LAZY=budget:0.5 ./simple model.gguf "The sea is"

#include "llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void only_errors(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level >= GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s model.gguf text\n", argv[0]);
        return 2;
    }
    llama_log_set(only_errors, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    const struct llama_vocab * vocab = llama_model_get_vocab(model);

    const int     length   = (int) strlen(argv[2]);
    const int     n_prompt = -llama_tokenize(vocab, argv[2], length, NULL, 0, true, true);
    llama_token * tokens   = malloc((n_prompt + 1) * sizeof(llama_token));
    if (!tokens || llama_tokenize(vocab, argv[2], length, tokens, n_prompt, true, true) != n_prompt || n_prompt < 1) {
        fprintf(stderr, "the text cannot be tokenized\n");
        return 1;
    }

    struct llama_context_params params = llama_context_default_params();
    params.n_ctx   = n_prompt + 64;
    params.n_batch = n_prompt;
    struct llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return 1;
    }
    struct llama_sampler * sampler = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(sampler, llama_sampler_init_greedy());

    struct llama_batch batch = llama_batch_get_one(tokens, n_prompt);
    for (int i = 0; i < 32; i++) {
        if (llama_decode(ctx, batch) != 0) {
            return 1;
        }
        llama_token token = llama_sampler_sample(sampler, ctx, -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        char      piece[256];
        const int n = llama_token_to_piece(vocab, token, piece, sizeof(piece), 0, true);
        if (n > 0) {
            fwrite(piece, 1, n, stdout);
        }
        tokens[0] = token;
        batch     = llama_batch_get_one(tokens, 1);
    }
    puts("");

    llama_sampler_free(sampler);
    llama_free(ctx);
    llama_model_free(model);
    llama_backend_free();
    free(tokens);
    return 0;
}
