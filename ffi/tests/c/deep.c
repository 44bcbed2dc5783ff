// What recurses in llama.cpp's own code, from a thread with little stack: texts without a break, deep grammars, patterns
// that trigger them.
#include "check.h"

#include <limits.h>
#include <stdbool.h>

#define N 10000000

static char * repeat(const char * before, const char * part, size_t n, const char * after) {
    const size_t size = strlen(part);
    char *       text = malloc(strlen(before) + n * size + strlen(after) + 1);
    CHECK(text != NULL);
    char * at = text + sprintf(text, "%s", before);
    for (size_t i = 0; i < n; i++, at += size) {
        memcpy(at, part, size);
    }
    strcpy(at, after);
    return text;
}

static int tokenize(const struct llama_vocab * vocab, char * text) {
    const int n = llama_tokenize(vocab, text, (int) strlen(text), NULL, 0, false, false);
    free(text);
    return n;
}

static struct llama_sampler * grammar(const struct llama_vocab * vocab, char * text) {
    struct llama_sampler * sampler = llama_sampler_init_grammar(vocab, text, "root");
    free(text);
    return sampler;
}

// The program's arguments: models with pre-tokenizers that use regular expressions.
struct arguments {
    int     n;
    char ** models;
};

static void * run(void * data) {
    struct arguments * arguments = data;
    for (int i = 0; i < arguments->n; i++) {
        struct llama_model *       model = load_model(arguments->models[i]);
        const struct llama_vocab * vocab = llama_model_get_vocab(model);
        // In one piece where a longer stack holds it, refused where none does.
        CHECK(tokenize(vocab, repeat("", "z", 100000, "")) == -100000);
        CHECK(tokenize(vocab, repeat("", " ", 100000, "x")) < 0);
        CHECK(tokenize(vocab, repeat("", "-", N, "")) == INT_MIN);
        CHECK(tokenize(vocab, repeat("", "z z, ", N / 100, "")) < -N / 100);

        struct llama_sampler * sampler = grammar(vocab, repeat("root ::= ((((((\"a\" ", ")", 6, ""));
        CHECK(sampler != NULL);
        llama_sampler_reset(sampler);
        llama_sampler_free(sampler);
        const int depths[] = { 20000, 1000000, N };
        for (int d = 0; d < 3; d++) {
            const int before = n_log_lines;
            CHECK(grammar(vocab, repeat("root ::= ", "(", (size_t) depths[d], "\"a\"")) == NULL);
            CHECK(n_log_lines > before);
        }

        // The pattern is looked for in all that was said, after every token.
        const char * pattern = "[\\s\\S]*?(go)[\\s\\S]*";
        sampler = llama_sampler_init_grammar_lazy_patterns(vocab, "root ::= \"go\"", "root", &pattern, 1, NULL, 0);
        CHECK(sampler != NULL);
        llama_token z;
        CHECK(llama_tokenize(vocab, "z", 1, &z, 1, false, false) == 1);
        for (int said = 0; said < 1000; said++) {
            llama_sampler_accept(sampler, z);
        }
        llama_sampler_free(sampler);
        char * deep = repeat("", "(", N, "");
        pattern     = deep;
        CHECK(llama_sampler_init_grammar_lazy_patterns(vocab, "root ::= \"go\"", "root", &pattern, 1, NULL, 0) == NULL);
        free(deep);
        llama_model_free(model);
    }
    return NULL;
}

int main(int argc, char ** argv) {
    struct arguments arguments = { argc - 1, argv + 1 };
    on_a_small_stack(run, &arguments);
    puts("ok");
    return 0;
}
