// simlayer.h: what llama.h cannot say.
//
// libllama.so.0 of simlayer is used through llama.h; these functions are exported by it besides (libsimlayer.so is
// another name of the same file). They find out and change which layers of a context are lazy, that is, keep only the
// first tokens and the recent ones (SimLayerKV).
//
// Without anything set no layer is lazy, and the answers are llama.cpp's. A frontend that is not to be changed is set
// up by environment variables, which are read when a context is made:
//
//   SIMLAYER_LAZY       auto, kl[:X], threshold[:t], budget[:r], output[:r], profile[:r|:kl=X|:12x], layers:1,2,9-12, off
//   SIMLAYER_PROFILE    the model's profile, which simlayer-run calibrate makes; else MODEL.simlayer.toml beside it, else
//                       the one in the folder that SIMLAYER_PROFILES names (~/.local/share/simlayer/profiles), else the
//                       one built in
//   SIMLAYER_SINK       first tokens that a lazy layer keeps
//   SIMLAYER_WINDOW     recent tokens that a lazy layer keeps
//   SIMLAYER_WINDOWS    other windows for single layers, such as 3=256,9-12=2048
//   SIMLAYER_QUERIES    last prompt tokens whose attention is scored
//   SIMLAYER_LAZY_TYPE  type of the lazy layers, T or K/V, such as q4_0; else q8_0/q4_0, and keys as in the active layers
//                       where those are smaller
//   SIMLAYER_KEYS       auto: keys of active layers are q8_0, whatever the program asks for, and become q4_0 at a prompt's
//                       end in layers that lose nothing by it which the prompt would miss
//   SIMLAYER_AT         prefill or decode
//   SIMLAYER_PREFILL    full or window
//
// Where a function returns int32_t, a negative number is a failure: the reason is in llama.cpp's log and in
// simlayer_last_error. Null pointers and freed contexts are such failures. A context is used by one thread at a time,
// or waits for the other one; different contexts are independent.
#ifndef SIMLAYER_H
#define SIMLAYER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

// The version, and that of llama.cpp: "simlayer 0.1.0, llama.cpp 0.6.0 (llama-cpp-sys-2-0.1.161)".
const char * simlayer_version(void);

// Why the last function of llama.h or simlayer.h that failed on this thread did so; empty when none has. Valid until
// the next failure on this thread.
const char * simlayer_last_error(void);

enum simlayer_at {
    SIMLAYER_AT_PREFILL = 0, // the last tokens of the prompt are scored
    SIMLAYER_AT_DECODE  = 1, // the first generated token is scored
};

enum simlayer_prefill {
    SIMLAYER_PREFILL_DEFAULT = 0, // what a profile says; window for layers that are named; else full
    SIMLAYER_PREFILL_FULL    = 1, // lazy layers read the prompt with full attention, then shrink
    SIMLAYER_PREFILL_WINDOW  = 2, // known lazy layers see only first and recent tokens from the start
};

// How lazy layers are found and what they keep. Set `size` before every call; it tells the library which members the
// program knows, so that members can be added at the end.
struct simlayer_params {
    size_t   size;          // sizeof(struct simlayer_params)
    char     lazy[2048];    // the rule, as SIMLAYER_LAZY
    char     lazy_type[64]; // type of the lazy layers, as SIMLAYER_LAZY_TYPE; empty for the default
    uint32_t n_sink;        // first tokens that a lazy layer keeps
    uint32_t n_window;      // recent tokens that a lazy layer keeps, the query's own included
    uint32_t n_queries;     // last prompt tokens whose attention is scored
    int32_t  at;            // enum simlayer_at
    int32_t  prefill;       // enum simlayer_prefill
    int32_t  narrow_keys;   // 1: as SIMLAYER_KEYS=auto, for keys of the context's type
};

// What a context without settings has: rule "off", and the paper's sink, window and queries. 0, or negative.
int32_t simlayer_default_params(struct simlayer_params * params);

// A context's settings. 0, or negative.
int32_t simlayer_get_params(struct llama_context * ctx, struct simlayer_params * params);

// Changes a context's settings, for decisions to come: layers that are lazy stay so. 0, or negative with nothing
// changed when a value makes no sense or does not fit the model. A context that was made without SIMLAYER_LAZY keeps
// ggml's attention, which is slower at depth and has no newest tokens in f16 beside a quantised cache.
int32_t simlayer_set_params(struct llama_context * ctx, const struct simlayer_params * params);

enum simlayer_kind {
    SIMLAYER_KIND_FULL   = 0, // keeps every token
    SIMLAYER_KIND_LAZY   = 1, // keeps first and recent tokens: the policy's decision
    SIMLAYER_KIND_WINDOW = 2, // sliding-window by the model's own design
    SIMLAYER_KIND_RECURRENT   = 3, // a recurrent state of fixed size, and no keys and values
    SIMLAYER_KIND_CONVOLUTION = 4, // a convolution's last columns
    SIMLAYER_KIND_NOTHING     = 5, // a feed-forward alone
    SIMLAYER_KIND_SHARED      = 6, // reads the keys and values of another layer, and is as lazy as that one
    SIMLAYER_KIND_PRUNED      = 7, // keeps recent tokens, and of older ones what each KV head will need
};

struct simlayer_layer {
    int32_t  index;
    int32_t  kind;      // enum simlayer_kind
    int32_t  has_score; // whether the layer was scored
    float    score;     // share of attention on first and recent tokens, 0 to 1; 0 when it was not scored
    uint64_t bytes;     // of its key and value buffers and its recurrent state
};

// Layers of the model, or negative.
int32_t simlayer_n_layers(struct llama_context * ctx);

// The layers of a sequence, at most `n`, each `layer_size` = sizeof(struct simlayer_layer) bytes. Returns how many were
// written: 0 for a sequence without tokens. Negative on failure.
int32_t simlayer_get_layers(struct llama_context * ctx, int32_t seq_id, struct simlayer_layer * layers, size_t n,
                            size_t layer_size);

// What the caches of all sequences take. Set `size` before every call.
struct simlayer_memory {
    size_t   size;            // sizeof(struct simlayer_memory)
    uint64_t tokens;          // in all sequences
    uint64_t f16_bytes;       // what an uncompressed f16 cache of these tokens takes; what sequences share counts once
    uint64_t allocated_bytes; // what the buffers hold now, likewise
    uint64_t peak_bytes;      // the highest sum of all buffers so far
    uint32_t lazy_layers;     // of the longest sequence
    uint32_t active_layers;
};

// 0, or negative.
int32_t simlayer_get_memory(struct llama_context * ctx, struct simlayer_memory * memory);

// Decides now which layers of a sequence are lazy: by the scores that were taken last, or as a fixed set says. Without
// scores the next batch of the sequence that asks for the logits of its last token takes them, however short it is.
// Returns how many layers are lazy now, or negative.
int32_t simlayer_decide(struct llama_context * ctx, int32_t seq_id);

// How far the last tokens' logits moved when a prompt's end was looked at before layers of a sequence became lazy, or their
// keys narrow, with the layers that then did: a divergence in nats (rules auto and kl, SIMLAYER_KEYS=auto). 1 when it was
// looked at; 0, with `kl` unchanged, when it was not; negative on failure.
int32_t simlayer_foretold(struct llama_context * ctx, int32_t seq_id, double * kl);

#ifdef __cplusplus
}
#endif

#endif
