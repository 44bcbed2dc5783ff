// Reads a text with half of the layers lazy, and tells which they are and what the cache takes: simlayer.h at work.
//
//   ./layers model.gguf text.txt [rule [window]]

#include "llama.h"
#include "simlayer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void silent(enum ggml_log_level level, const char * text, void * data) {
    (void) level, (void) text, (void) data;
}

static int failed(const char * what) {
    fprintf(stderr, "%s: %s\n", what, simlayer_last_error());
    return 1;
}

// The file's bytes with a NUL behind them, or NULL.
static char * read_file(const char * path) {
    FILE * file = fopen(path, "rb");
    if (!file) {
        return NULL;
    }
    fseek(file, 0, SEEK_END);
    const long size = ftell(file);
    rewind(file);
    char * text = size < 0 ? NULL : calloc(1, size + 1);
    if (text && fread(text, 1, size, file) != (size_t) size) {
        free(text);
        text = NULL;
    }
    fclose(file);
    return text;
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s model.gguf text.txt [rule [window]]\n", argv[0]);
        return 2;
    }
    llama_log_set(silent, NULL);
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return failed(argv[1]);
    }
    char * text = read_file(argv[2]);
    if (!text) {
        fprintf(stderr, "%s cannot be read\n", argv[2]);
        return 1;
    }
    const struct llama_vocab * vocab  = llama_model_get_vocab(model);
    const int                  length = (int) strlen(text);
    const int                  n      = -llama_tokenize(vocab, text, length, NULL, 0, true, false);
    llama_token *              tokens = malloc((n + 1) * sizeof(llama_token));
    if (!tokens || n < 1 || llama_tokenize(vocab, text, length, tokens, n, true, false) != n) {
        return failed("llama_tokenize");
    }

    // The whole prompt in one batch: it is then read layer by layer, and the cache is never whole.
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = n;
    struct llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) {
        return failed("llama_init_from_model");
    }
    struct simlayer_params lazy;
    lazy.size = sizeof(lazy);
    if (simlayer_get_params(ctx, &lazy) < 0) {
        return failed("simlayer_get_params");
    }
    snprintf(lazy.lazy, sizeof(lazy.lazy), "%s", argc > 3 ? argv[3] : "budget:0.5");
    lazy.n_window = argc > 4 ? (uint32_t) atoi(argv[4]) : lazy.n_window;
    if (simlayer_set_params(ctx, &lazy) < 0) {
        return failed("simlayer_set_params");
    }
    if (llama_decode(ctx, llama_batch_get_one(tokens, n)) != 0) {
        return failed("llama_decode");
    }

    const int               n_layers = simlayer_n_layers(ctx);
    struct simlayer_layer * layers   = calloc(n_layers, sizeof(*layers));
    if (!layers || simlayer_get_layers(ctx, 0, layers, n_layers, sizeof(*layers)) != n_layers) {
        return failed("simlayer_get_layers");
    }
    for (int i = 0; i < n_layers; i++) {
        printf("layer %2d  %-4s  score %.3f  %8llu bytes\n", layers[i].index,
               layers[i].kind == SIMLAYER_KIND_LAZY ? "lazy" : "full", layers[i].score,
               (unsigned long long) layers[i].bytes);
    }
    struct simlayer_memory memory;
    memory.size = sizeof(memory);
    if (simlayer_get_memory(ctx, &memory) < 0) {
        return failed("simlayer_get_memory");
    }
    printf("%s: %d tokens, %u lazy layers, cache %.1f MB, uncompressed %.1f MB\n", simlayer_version(), n,
           memory.lazy_layers, memory.allocated_bytes / 1e6, memory.f16_bytes / 1e6);

    free(layers);
    llama_free(ctx);
    llama_model_free(model);
    free(tokens);
    free(text);
    return 0;
}
