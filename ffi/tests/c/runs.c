// Long runs without a break, from a thread with little stack: tokens or an error, in bounded time and memory.
#include "check.h"

#include <limits.h>
#include <sys/resource.h>
#include <time.h>

// What tests/tokenizer.rs allows, too.
#define MOST_SECONDS 120
#define MOST_KIB (4 << 20)

struct arguments {
    const char * model;
    int          n;
};

static void tokenize(const struct llama_vocab * vocab, const char * kind, char letter, int n) {
    char * text = malloc((size_t) n);
    CHECK(text != NULL);
    memset(text, letter, (size_t) n);
    const clock_t start  = clock();
    const int     tokens = llama_tokenize(vocab, text, n, NULL, 0, false, false);
    const double  took   = (double) (clock() - start) / CLOCKS_PER_SEC;
    free(text);
    CHECK(tokens < 0);
    struct rusage usage;
    CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
    printf("%s %.1f s, at most %ld MiB, ", kind, took, usage.ru_maxrss >> 10);
    if (tokens == INT_MIN) {
        printf("refused; ");
    } else {
        printf("%d tokens; ", -tokens);
    }
    CHECK(took < MOST_SECONDS && usage.ru_maxrss < MOST_KIB);
}

static void * run(void * data) {
    const struct arguments *   arguments = data;
    struct llama_model *       model     = load_model(arguments->model);
    const struct llama_vocab * vocab     = llama_model_get_vocab(model);
    tokenize(vocab, "letters", 'a', arguments->n);
    tokenize(vocab, "dashes", '-', arguments->n);
    tokenize(vocab, "digits", '7', arguments->n);
    llama_model_free(model);
    return NULL;
}

// Arguments: a model, how many characters.
int main(int argc, char ** argv) {
    CHECK(argc == 3);
    struct arguments arguments = { argv[1], atoi(argv[2]) };
    on_a_small_stack(run, &arguments);
    puts("ok");
    return 0;
}
