// Rows of embeddings among a text's tokens, given in each of llama.h's ways; the logits of the last row, and of each token
// behind them.
#include "check.h"

static FILE * input;

static int number(void) {
    int value;
    CHECK(fread(&value, sizeof(value), 1, input) == 1);
    return value;
}

static int * numbers(int n) {
    int * list = calloc((size_t) n + 1, sizeof(int));
    CHECK(list != NULL && fread(list, sizeof(int), (size_t) n, input) == (size_t) n);
    return list;
}

static struct {
    int     n_before, n_rows, n_pos, non_causal, next, n_after;
    int *   before;
    int *   positions;
    int *   after;
    float * rows;
    int     width;
} given;

static void read_input(const char * path, const struct llama_model * model) {
    input = fopen(path, "rb");
    CHECK(input != NULL);
    given.n_before   = number();
    given.n_rows     = number();
    given.n_pos      = number();
    given.non_causal = number();
    given.next       = number();
    given.n_after    = number();
    given.before     = numbers(given.n_before);
    given.positions  = numbers(given.n_rows * given.n_pos);
    given.after      = numbers(given.n_after);
    given.width      = llama_model_n_embd_inp(model);
    const size_t n   = (size_t) given.n_rows * (size_t) given.width;
    given.rows       = calloc(n, sizeof(float));
    CHECK(given.rows != NULL && fread(given.rows, sizeof(float), n, input) == n);
    fclose(input);
}

static void write_row(struct llama_context * ctx, int i, FILE * out) {
    const size_t n_vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    const float * row    = llama_get_logits_ith(ctx, i);
    CHECK(row != NULL && fwrite(row, sizeof(float), n_vocab, out) == n_vocab);
}

static void decode_tokens(struct llama_context * ctx, const int * tokens, int n, int pos, bool all, FILE * out) {
    struct llama_batch batch = llama_batch_init(512, 0, 1);
    for (int i = 0; i < n; i++) {
        add(&batch, tokens[i], pos + i, 0, all);
    }
    CHECK(llama_decode(ctx, batch) == 0);
    for (int i = 0; all && i < n; i++) {
        write_row(ctx, i, out);
    }
    llama_batch_free(batch);
}

// The plain struct.
static void rows_by_batch(struct llama_context * ctx, FILE * out) {
    struct llama_batch batch = llama_batch_init(given.n_rows * given.n_pos, given.width, 1);
    batch.n_tokens           = given.n_rows;
    memcpy(batch.embd, given.rows, sizeof(float) * (size_t) (given.n_rows * given.width));
    memcpy(batch.pos, given.positions, sizeof(int) * (size_t) (given.n_rows * given.n_pos));
    for (int i = 0; i < given.n_rows; i++) {
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = i + 1 == given.n_rows;
    }
    CHECK(llama_decode(ctx, batch) == 0);
    write_row(ctx, -1, out);
    llama_batch_free(batch);
}

// The opaque one, in as many calls as said, as mtmd does it.
static void rows_by_entries(struct llama_context * ctx, int n_calls, FILE * out) {
    struct llama_batch_ext * batch = llama_batch_ext_init(ctx);
    CHECK(batch != NULL);
    for (int call = 0; call < n_calls; call++) {
        llama_batch_ext_clear(batch);
        const int first = given.n_rows * call / n_calls, end = given.n_rows * (call + 1) / n_calls;
        for (int i = first; i < end; i++) {
            const struct llama_embd wrong = { given.rows, 1, (size_t) given.width - 1 };
            CHECK(llama_batch_ext_add_embd(batch, 0, wrong) == -2);
            const struct llama_embd row = { given.rows + (size_t) i * (size_t) given.width, 1, (size_t) given.width };
            const int               at  = llama_batch_ext_add_embd(batch, 0, row);
            CHECK(at == i - first);
            llama_pos pos[4] = { 0 };
            for (int d = 0; d < given.n_pos; d++) {
                pos[d] = given.positions[d * given.n_rows + i];
            }
            CHECK(llama_batch_ext_set_pos(batch, at, pos));
            CHECK(llama_batch_ext_set_output_logits(batch, at, i + 1 == given.n_rows));
        }
        CHECK(llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, batch) == 0);
    }
    write_row(ctx, -1, out);
    llama_batch_ext_free(batch);
}

// Arguments: the model, the input, a file for the rows of logits.
int main(int argc, char ** argv) {
    CHECK(argc == 4);
    struct llama_model * model = load_model(argv[1]);
    read_input(argv[2], model);
    FILE * out = fopen(argv[3], "wb");
    CHECK(out != NULL);
    for (int way = 0; way < 3; way++) {
        if (way == 2 && given.non_causal) {
            continue;
        }
        struct llama_context * ctx    = new_context(model, 512, 1);
        llama_memory_t         memory = llama_get_memory(ctx);
        decode_tokens(ctx, given.before, given.n_before, 0, false, out);
        // Tokens cannot see those behind them here.
        llama_set_causal_attn(ctx, !given.non_causal);
        CHECK(llama_get_causal_attn(ctx) == !given.non_causal);
        if (way == 0) {
            rows_by_batch(ctx, out);
        } else {
            rows_by_entries(ctx, way, out);
        }
        llama_set_causal_attn(ctx, true);
        CHECK(llama_memory_seq_pos_max(memory, 0) == given.positions[given.n_rows - 1]);
        decode_tokens(ctx, given.after, given.n_after, given.next, true, out);
        CHECK(llama_memory_seq_pos_max(memory, 0) == given.next + given.n_after - 1);
        // The text behind is taken back, and then the picture.
        CHECK(llama_memory_seq_rm(memory, 0, given.next, -1));
        CHECK(llama_memory_seq_pos_max(memory, 0) == given.positions[given.n_rows - 1]);
        CHECK(llama_memory_seq_rm(memory, 0, given.n_before, -1));
        CHECK(llama_memory_seq_pos_max(memory, 0) == given.n_before - 1);
        decode_tokens(ctx, given.after, given.n_after, given.n_before, false, out);
        llama_free(ctx);
    }
    CHECK(fclose(out) == 0);
    llama_model_free(model);
    puts("ok");
    return 0;
}
