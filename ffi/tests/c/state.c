// Saving and restoring.
//   state save MODEL FILE N LAZY    reads N tokens and saves; prints greedy tokens
//   state load MODEL FILE N LAZY    loads and prints greedy tokens
//   state mutate MODEL N            loads N damaged states, in memory and from files
#include "check.h"

static void set_lazy(struct llama_context * ctx, const char * rule, uint32_t n_window) {
    struct simlayer_params params;
    params.size = sizeof(params);
    CHECK(simlayer_get_params(ctx, &params) == 0);
    strcpy(params.lazy, rule);
    params.n_window = n_window;
    CHECK(simlayer_set_params(ctx, &params) == 0);
}

static struct llama_context * big_context(struct llama_model * model, const char * rule) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx   = 8192;
    params.n_batch = 8192;
    struct llama_context * ctx = llama_init_from_model(model, params);
    CHECK(ctx != NULL);
    set_lazy(ctx, rule, 1024);
    return ctx;
}

static void print_greedy(struct llama_context * ctx, int n_past) {
    llama_token token = token_at(llama_get_model(ctx), n_past);
    for (int i = 0; i < 16; i++) {
        struct llama_batch batch = llama_batch_get_one(&token, 1);
        CHECK(llama_decode(ctx, batch) == 0);
        token = greedy(ctx, -1);
        printf("%d ", token);
    }
    puts("");
}

static void save(struct llama_model * model, const char * path, int n, const char * rule) {
    struct llama_context * ctx    = big_context(model, rule);
    llama_token *          tokens = malloc(n * sizeof(llama_token));
    for (int i = 0; i < n; i++) {
        tokens[i] = token_at(model, i);
    }
    CHECK(llama_decode(ctx, llama_batch_get_one(tokens, n)) == 0);
    CHECK(llama_state_save_file(ctx, path, tokens, n));
    print_greedy(ctx, n);
    free(tokens);
    llama_free(ctx);
}

static void load(struct llama_model * model, const char * path, int n, const char * rule) {
    struct llama_context * ctx    = big_context(model, rule);
    llama_token *          tokens = calloc(n, sizeof(llama_token));
    size_t                 count  = 0;
    CHECK(!llama_state_load_file(ctx, path, tokens, n - 1, &count) && count == 0);
    CHECK(llama_state_load_file(ctx, path, tokens, n, &count) && count == (size_t) n);
    for (int i = 0; i < n; i++) {
        CHECK(tokens[i] == token_at(model, i));
    }
    CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx), 0) == n - 1);
    print_greedy(ctx, n);
    free(tokens);
    llama_free(ctx);
}

static uint32_t random_state = 1;

static uint32_t next_random(void) {
    random_state = random_state * 1664525u + 1013904223u;
    return random_state >> 8;
}

// Changes, shortens or lengthens `size` bytes of `data`, which has room for more. Returns the new size.
static size_t damage(uint8_t * data, size_t size) {
    switch (next_random() % 4) {
        case 0: return next_random() % size;
        case 1:
            for (int i = 0; i < 8; i++) {
                data[next_random() % size] ^= 1 + next_random() % 255;
            }
            return size;
        case 2: // within the headers
            data[next_random() % (size < 200 ? size : 200)] ^= 1 + next_random() % 255;
            return size;
        default:
            data[next_random() % size] ^= 1 << next_random() % 8;
            return size;
    }
}

static void mutate(struct llama_model * model, const char * folder, int n) {
    struct llama_context * ctx = new_context(model, 256, 2);
    llama_memory_t         mem = llama_get_memory(ctx);
    set_lazy(ctx, "layers:1", 16);
    decode_text(ctx, 0, 60, 0);
    decode_text(ctx, 0, 10, 1);

    const size_t size = llama_state_get_size(ctx), seq_size = llama_state_seq_get_size(ctx, 0);
    uint8_t *    good = malloc(size), *bad = malloc(size), *seq_good = malloc(seq_size), *seq_bad = malloc(seq_size);
    CHECK(llama_state_get_data(ctx, good, size - 1) == 0);
    CHECK(llama_state_get_data(ctx, good, size) == size);
    CHECK(llama_state_seq_get_data(ctx, seq_good, seq_size, 0) == seq_size);
    llama_token tokens[60];
    for (int i = 0; i < 60; i++) {
        tokens[i] = token_at(model, i);
    }
    char path[4096], bad_path[4096];
    snprintf(path, sizeof(path), "%s/good.state", folder);
    snprintf(bad_path, sizeof(bad_path), "%s/bad.state", folder);
    const size_t file_size = llama_state_seq_save_file(ctx, path, 0, tokens, 60);
    CHECK(file_size > seq_size);
    uint8_t * file_good = malloc(file_size), *file_bad = malloc(file_size);
    FILE *    file      = fopen(path, "rb");
    CHECK(file && fread(file_good, 1, file_size, file) == file_size);
    fclose(file);

    decode_text(ctx, 60, 61, 0);
    const int token = greedy(ctx, -1);
    CHECK(llama_state_set_data(ctx, good, size) == size);

    for (int i = 0; i < n; i++) {
        switch (i % 3) {
            case 0:
                memcpy(bad, good, size);
                CHECK(llama_state_set_data(ctx, bad, damage(bad, size)) == 0);
                break;
            case 1:
                memcpy(seq_bad, seq_good, seq_size);
                CHECK(llama_state_seq_set_data(ctx, seq_bad, damage(seq_bad, seq_size), 0) == 0);
                break;
            default: {
                memcpy(file_bad, file_good, file_size);
                const size_t changed = damage(file_bad, file_size);
                file                 = fopen(bad_path, "wb");
                CHECK(file && fwrite(file_bad, 1, changed, file) == changed);
                fclose(file);
                llama_token out[60];
                size_t      count = 12345;
                memset(out, 0x55, sizeof(out));
                CHECK(llama_state_seq_load_file(ctx, bad_path, 0, out, 60, &count) == 0);
                CHECK(count == 12345 && out[0] == 0x55555555 && out[59] == 0x55555555);
            }
        }
        CHECK(llama_memory_seq_pos_max(mem, 0) == 59 && llama_memory_seq_pos_max(mem, 1) == 9);
    }
    // All is as it was, and the whole states do load.
    decode_text(ctx, 60, 61, 0);
    CHECK(greedy(ctx, -1) == token);
    CHECK(llama_state_seq_set_data(ctx, seq_good, seq_size, 1) == seq_size);
    decode_text(ctx, 60, 61, 1);
    CHECK(greedy(ctx, -1) == token);
    size_t count = 0;
    CHECK(llama_state_seq_load_file(ctx, path, 0, NULL, 0, &count) > 0 && count == 60);
    CHECK(llama_state_seq_load_file(ctx, path, 0, tokens, 60, &count) == file_size);
    decode_text(ctx, 60, 61, 0);
    CHECK(greedy(ctx, -1) == token);

    // A state of other cache types, or longer than the context, does not fit.
    struct llama_context_params params = llama_context_default_params();
    params.type_k                      = GGML_TYPE_F32;
    struct llama_context * other       = llama_init_from_model(model, params);
    CHECK(other != NULL && llama_state_seq_set_data(other, seq_good, seq_size, 0) == 0);
    llama_free(other);

    free(good), free(bad), free(seq_good), free(seq_bad), free(file_good), free(file_bad);
    llama_free(ctx);
    puts("ok");
}

int main(int argc, char ** argv) {
    CHECK(argc >= 4);
    struct llama_model * model = load_model(argv[2]);
    if (strcmp(argv[1], "mutate") == 0) {
        CHECK(argc == 5);
        mutate(model, argv[3], atoi(argv[4]));
    } else {
        CHECK(argc == 6);
        (strcmp(argv[1], "save") == 0 ? save : load)(model, argv[3], atoi(argv[4]), argv[5]);
    }
    llama_model_free(model);
    return 0;
}
