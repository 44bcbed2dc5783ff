// Calls with handles of another library (`SIMLAYER_UPSTREAM_LIB`), whose functions note that they were called. The headers
// that are included below are written by the test, from llama.h.
#include "check.h"

#include <dlfcn.h>

static const char * (*fake_called)(void);
static void (*fake_clear)(void);
static void * objects[6];

#include "extensions.h"

#define REACHES(name, call)                             \
    do {                                                \
        fake_clear();                                   \
        (void) call;                                    \
        if (strcmp(fake_called(), #name) != 0) {        \
            fprintf(stderr, "%s: not reached\n", #name); \
            exit(1);                                    \
        }                                               \
    } while (0)

#define DOES_NOT_REACH(call)          \
    do {                              \
        fake_clear();                 \
        (void) call;                  \
        CHECK(fake_called()[0] == 0); \
    } while (0)

static const char * path;

// One handle of each kind, in the order of their names.
static void get(void) {
    struct llama_model * model = llama_model_load_from_file(path, llama_model_default_params());
    CHECK(model != NULL);
    struct llama_context * ctx = llama_init_from_model(model, llama_context_default_params());
    CHECK(ctx != NULL);
    objects[0] = llama_adapter_lora_init(model, "adapter");
    objects[1] = llama_batch_ext_init(ctx);
    objects[2] = ctx;
    objects[3] = llama_get_memory(ctx);
    objects[4] = model;
    objects[5] = (void *) llama_model_get_vocab(model);
    for (int i = 0; i < 6; i++) {
        CHECK(objects[i] != NULL);
    }
}

static void calls(void) {
    char room[256];
#include "calls.h"
}

static void ends(void) {
#include "ends.h"
}

// Arguments: a model that simlayer does not run, one that it runs, and "calls", or "refused" where no model is given.
int main(int argc, char ** argv) {
    CHECK(argc == 4);
    path                     = argv[1];
    struct llama_model * own = load_model(argv[2]);
    if (strcmp(argv[3], "refused") == 0) {
        CHECK(llama_model_load_from_file(path, llama_model_default_params()) == NULL);
        puts(simlayer_last_error());
        llama_model_free(own);
        return 0;
    }
    struct llama_context * own_ctx = new_context(own, 256, 1);
    get();
    void * library = dlopen(getenv("SIMLAYER_UPSTREAM_LIB"), RTLD_NOW | RTLD_NOLOAD);
    CHECK(library != NULL);
    fake_called = (const char * (*) (void) ) dlsym(library, "fake_called");
    fake_clear  = (void (*)(void)) dlsym(library, "fake_clear");
    CHECK(fake_called != NULL && fake_clear != NULL);
    calls();
    ends();

    // What belonged to a model or a context is gone with it.
    get();
    llama_free(objects[2]);
    DOES_NOT_REACH(llama_memory_clear(objects[3], true));
    llama_model_free(objects[4]);
    DOES_NOT_REACH(llama_vocab_bos(objects[5]));
    DOES_NOT_REACH(llama_adapter_meta_count(objects[0]));

    // Ours stay ours, and do not go together with theirs; samplers are ours.
    get();
    struct llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    llama_sampler_chain_add(chain, llama_sampler_init_greedy());
    DOES_NOT_REACH(llama_process(own_ctx, LLAMA_PROCESS_TYPE_DECODE, objects[1]));
    DOES_NOT_REACH(llama_set_sampler(objects[2], 0, chain));
    DOES_NOT_REACH(llama_vocab_bos(llama_model_get_vocab(own)));
    DOES_NOT_REACH(decode_text(own_ctx, 0, 10, 0));
    DOES_NOT_REACH(llama_sampler_sample(chain, own_ctx, -1));
    struct simlayer_params params = { .size = sizeof(params) };
    CHECK(simlayer_get_params(objects[2], &params) != 0);
    CHECK(strstr(simlayer_last_error(), "runs in unmodified llama.cpp") != NULL);
    llama_log_set(count_lines, NULL);
    CHECK(strcmp(fake_called(), "llama_log_set") == 0);

    llama_sampler_free(chain);
    llama_free(own_ctx);
    llama_model_free(own);
    puts("ok");
    return 0;
}
