// What llama-server does with conversations whose layers may become lazy: it goes on from a position when
// llama_memory_seq_pos_min and llama_model_n_swa say that it can, from a checkpoint otherwise, and from the beginning
// without one. It aborts where llama_memory_seq_rm or a checkpoint then fails.
//   turns MODEL N    N requests in four sequences
#include "check.h"

enum { N_SEQ = 4, N_CTX = 1024, MAX_CHECKPOINTS = 8, N_ANSWER = 40 };

struct checkpoint {
    int       n_tokens;
    llama_pos pos_min, pos_max;
    size_t    size;
    uint8_t * data;
};

struct slot {
    llama_token       held[N_CTX];  // what the sequence holds
    int               n_held;
    llama_token       talk[N_CTX];  // the conversation: prompts and answers
    int               n_talk;
    int               asked[64];    // where each turn's prompt ends
    int               begun[64];    // and where it begins
    int               n_turns;
    struct checkpoint checkpoints[MAX_CHECKPOINTS];
    int               n_checkpoints;
};

static struct slot slots[N_SEQ];
static int         n_cut, n_restored, n_reset;

static unsigned random_state = 1;

static int below(int n) {
    random_state = random_state * 1664525u + 1013904223u;
    return (int) ((random_state >> 8) % (unsigned) n);
}

static void drop_checkpoint(struct slot * slot, int i) {
    free(slot->checkpoints[i].data);
    slot->n_checkpoints--;
    memmove(&slot->checkpoints[i], &slot->checkpoints[i + 1],
            (slot->n_checkpoints - i) * sizeof(slot->checkpoints[0]));
}

static void make_checkpoint(struct llama_context * ctx, struct slot * slot, int seq) {
    llama_memory_t memory = llama_get_memory(ctx);
    if (slot->n_checkpoints == MAX_CHECKPOINTS) {
        drop_checkpoint(slot, 0);
    }
    struct checkpoint * made = &slot->checkpoints[slot->n_checkpoints++];
    made->n_tokens           = slot->n_held;
    made->pos_min            = llama_memory_seq_pos_min(memory, seq);
    made->pos_max            = llama_memory_seq_pos_max(memory, seq);
    made->size = llama_state_seq_get_size_ext(ctx, seq, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    made->data = malloc(made->size);
    CHECK(llama_state_seq_get_data_ext(ctx, made->data, made->size, seq, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) ==
          made->size);
    CHECK(made->size < llama_state_seq_get_size(ctx, seq));
}

static void decode_to(struct llama_context * ctx, struct slot * slot, int seq, const llama_token * tokens, int to,
                      bool logits) {
    struct llama_batch batch = llama_batch_init(N_CTX, 0, 1);
    while (slot->n_held < to) {
        const int i = slot->n_held;
        add(&batch, tokens[i], i, seq, logits && i + 1 == to);
        slot->held[slot->n_held++] = tokens[i];
    }
    if (batch.n_tokens > 0) {
        CHECK(llama_decode(ctx, batch) == 0);
    }
    llama_batch_free(batch);
}

// Answers the conversation as it stands; the answer is appended.
static void answer(struct llama_context * ctx, int seq, int n_answer) {
    struct slot *  slot   = &slots[seq];
    llama_memory_t memory = llama_get_memory(ctx);
    const int      n_swa  = llama_model_n_swa(llama_get_model(ctx));
    const int      n      = slot->n_talk;

    int n_past = 0;
    while (n_past < n && n_past < slot->n_held && slot->talk[n_past] == slot->held[n_past]) {
        n_past++;
    }
    int       pos_next  = n_past;
    const int threshold = pos_next - n_swa - (n_past < n ? 0 : 1);
    if (n_past > 0) {
        const llama_pos pos_min = llama_memory_seq_pos_min(memory, seq);
        CHECK(pos_min >= 0);
        if (pos_min >= (threshold > 0 ? threshold : 0)) {
            int i = slot->n_checkpoints - 1;
            while (i >= 0 && (slot->checkpoints[i].pos_max > pos_next ||
                              (slot->checkpoints[i].pos_min >= threshold && slot->checkpoints[i].pos_min != 0))) {
                i--;
            }
            if (i >= 0) {
                const struct checkpoint * found = &slot->checkpoints[i];
                CHECK(llama_state_seq_set_data_ext(ctx, found->data, found->size, seq,
                                                   LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == found->size);
                const int behind = found->pos_min + 1 > found->pos_max ? found->pos_min + 1 : found->pos_max;
                pos_next         = pos_next < behind ? pos_next : behind;
                n_past           = pos_next < found->n_tokens ? pos_next : found->n_tokens;
                n_restored++;
            } else {
                pos_next = n_past = 0;
                n_reset++;
            }
        } else {
            n_cut++;
        }
    }
    for (int i = 0; i < slot->n_checkpoints;) {
        if (slot->checkpoints[i].pos_max > pos_next) {
            drop_checkpoint(slot, i);
        } else {
            i++;
        }
    }
    if (n_past == n) {
        n_past--;
    }
    CHECK(llama_memory_seq_rm(memory, seq, n_past, -1));
    slot->n_held = n_past;

    // The prompt's beginning, and its last four tokens, are read apart: a checkpoint lies before each.
    const int user = slot->begun[slot->n_turns - 1];
    if (user > slot->n_held) {
        decode_to(ctx, slot, seq, slot->talk, user, false);
        make_checkpoint(ctx, slot, seq);
    }
    if (n - 4 > slot->n_held) {
        decode_to(ctx, slot, seq, slot->talk, n - 4, false);
        make_checkpoint(ctx, slot, seq);
    }
    decode_to(ctx, slot, seq, slot->talk, n, true);
    for (int i = 0; i < n_answer; i++) {
        slot->talk[slot->n_talk++] = (llama_token) greedy(ctx, -1);
        if (i + 1 < n_answer) {
            decode_to(ctx, slot, seq, slot->talk, slot->n_talk, true);
        }
    }
}

static void say(struct llama_context * ctx, int seq, int n_prompt) {
    struct slot * slot = &slots[seq];
    slot->begun[slot->n_turns++] = slot->n_talk;
    for (int i = 0; i < n_prompt; i++) {
        slot->talk[slot->n_talk++] = token_at(llama_get_model(ctx), below(100000));
    }
    slot->asked[slot->n_turns - 1] = slot->n_talk;
    answer(ctx, seq, 2 + below(N_ANSWER));
}

static void regenerate(struct llama_context * ctx, int seq) {
    struct slot * slot  = &slots[seq];
    const int     start = slot->asked[slot->n_turns - 1], n = slot->n_talk - start;
    llama_token   before[N_ANSWER + 2];
    memcpy(before, &slot->talk[start], n * sizeof(before[0]));
    slot->n_talk = start;
    answer(ctx, seq, n);
    for (int i = 0; i < n; i++) {
        if (before[i] != slot->talk[start + i]) {
            fprintf(stderr, "sequence %d: token %d of %d of the answer at %d is another one\n", seq, i, n, start);
            exit(1);
        }
    }
}

// What seq_rm answers about every end, against what the other functions say of it.
static void check_ends(struct llama_context * ctx, int seq) {
    llama_memory_t  memory  = llama_get_memory(ctx);
    const llama_pos pos_min = llama_memory_seq_pos_min(memory, seq), end = llama_memory_seq_pos_max(memory, seq) + 1;
    const int       n_swa   = llama_model_n_swa(llama_get_model(ctx));
    const int       to      = pos_min + n_swa + 1 + below(end - pos_min - n_swa);
    llama_memory_seq_cp(memory, seq, N_SEQ, -1, -1);
    CHECK(llama_memory_seq_pos_max(memory, N_SEQ) == end - 1);
    CHECK(llama_memory_seq_rm(memory, N_SEQ, to, -1));
    CHECK(llama_memory_seq_pos_max(memory, N_SEQ) == (to < end ? to : end) - 1);
    CHECK(llama_memory_seq_rm(memory, N_SEQ, -1, -1));
}

static void damaged_checkpoints(struct llama_context * ctx, int seq) {
    struct slot * slot = &slots[seq];
    make_checkpoint(ctx, slot, seq);
    struct checkpoint * made = &slot->checkpoints[slot->n_checkpoints - 1];
    uint8_t *           copy = malloc(made->size);
    for (int i = 0; i < 200; i++) {
        memcpy(copy, made->data, made->size);
        copy[below((int) made->size)] ^= (uint8_t) (1 + below(255));
        CHECK(llama_state_seq_set_data_ext(ctx, copy, made->size, seq, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0);
        CHECK(llama_state_seq_set_data_ext(ctx, made->data, (size_t) below((int) made->size), seq,
                                           LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0);
        CHECK(llama_memory_seq_pos_max(llama_get_memory(ctx), seq) == slot->n_held - 1);
    }
    free(copy);
    // As a whole state it is none, and the other way round.
    CHECK(llama_state_seq_set_data(ctx, made->data, made->size, seq) == 0);
    drop_checkpoint(slot, slot->n_checkpoints - 1);
}

int main(int argc, char ** argv) {
    CHECK(argc == 3);
    struct llama_model * model = load_model(argv[1]);
    CHECK(llama_model_n_swa(model) == 0);
    setenv("SIMLAYER_WINDOW", "64", 1);
    setenv("SIMLAYER_SLACK", "24", 1);
    for (int rule = 0; rule < 2; rule++) {
        setenv("SIMLAYER_LAZY", rule == 0 ? "budget:0.5" : "layers:1", 1);
        CHECK(llama_model_n_swa(model) > 0);
        struct llama_context_params params = llama_context_default_params();
        params.n_ctx     = N_CTX * (N_SEQ + 1);
        params.n_seq_max = N_SEQ + 1;
        params.n_batch   = N_CTX;
        params.n_ubatch  = 64;
        params.swa_full  = false;
        params.n_threads = params.n_threads_batch = 1;
        struct llama_context * ctx = llama_init_from_model(model, params);
        CHECK(ctx != NULL);
        for (int i = 0; i < atoi(argv[2]); i++) {
            const int     seq  = below(N_SEQ);
            struct slot * slot = &slots[seq];
            const int     kind = below(10);
            if (slot->n_turns == 0 || slot->n_turns > 10 || slot->n_talk > N_CTX - 260) {
                while (slot->n_checkpoints > 0) {
                    drop_checkpoint(slot, 0);
                }
                slot->n_talk = slot->n_turns = 0;
                say(ctx, seq, 60 + below(150));
            } else if (kind < 3) {
                regenerate(ctx, seq);
            } else if (kind < 5 && slot->n_turns > 1) {
                // An earlier turn is asked otherwise.
                slot->n_turns = 1 + below(slot->n_turns - 1);
                slot->n_talk  = slot->begun[slot->n_turns];
                say(ctx, seq, 5 + below(30));
            } else {
                say(ctx, seq, 5 + below(30));
            }
            check_ends(ctx, seq);
        }
        damaged_checkpoints(ctx, 0);
        for (int seq = 0; seq < N_SEQ; seq++) {
            while (slots[seq].n_checkpoints > 0) {
                drop_checkpoint(&slots[seq], 0);
            }
        }
        memset(slots, 0, sizeof(slots));
        llama_free(ctx);
    }
    // Each way was taken.
    CHECK(n_cut > 10 && n_restored > 10);
    llama_model_free(model);
    puts("ok");
    return 0;
}
