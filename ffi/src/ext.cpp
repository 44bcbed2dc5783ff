// The functions of llama.cpp's staging header llama-ext.h that its own tools import. They have C++ names, and one of
// them returns a C++ type. What they ask about (other devices, multi-token prediction, distillation) is not here, and
// they say so. Of a model that unmodified llama.cpp runs they ask there.

#include "llama-ext.h"
#include "upstream.h"

#include <dlfcn.h>

// In Rust: bytes of weights, cache and intermediate results; the last argument of the other one is a message.
extern "C" bool    simlayer_ext_memory(const struct llama_context * ctx, size_t bytes[3]);
extern "C" int32_t simlayer_ext_n_expert(const struct llama_model * model);
extern "C" void    simlayer_ext_unsupported(const char * function);

using simlayer::is_upstreams;

template <typename T, typename... Rest> static T first(T argument, Rest...) { return argument; }

// Goes on in the function of the same C++ name there, which the dynamic linker knows from the address of ours.
#define OR_UPSTREAM(function, ...)                                                                               \
    Dl_info info;                                                                                                \
    if (is_upstreams(first(__VA_ARGS__)) && dladdr((void *) function, &info) != 0 &&         \
        info.dli_sname != nullptr) {                                                                             \
        if (auto * upstream = reinterpret_cast<decltype(&function)>(simlayer_ext_upstream(info.dli_sname))) {    \
            return upstream(__VA_ARGS__);                                                                        \
        }                                                                                                        \
    }

int32_t llama_model_n_expert(const struct llama_model * model) {
    OR_UPSTREAM(llama_model_n_expert, model)
    return simlayer_ext_n_expert(model);
}

int32_t llama_model_n_devices(const struct llama_model * model) {
    OR_UPSTREAM(llama_model_n_devices, model)
    return 0;
}

ggml_backend_dev_t llama_model_get_device(const struct llama_model * model, int i) {
    OR_UPSTREAM(llama_model_get_device, model, i)
    return nullptr;
}

llama_memory_breakdown llama_get_memory_breakdown(const struct llama_context * ctx) {
    OR_UPSTREAM(llama_get_memory_breakdown, ctx)
    llama_memory_breakdown breakdown;
    size_t                 bytes[3] = { 0, 0, 0 };
    if (simlayer_ext_memory(ctx, bytes)) {
        llama_memory_breakdown_data & cpu = breakdown[ggml_backend_cpu_buffer_type()];
        cpu.model   = bytes[0];
        cpu.context = bytes[1];
        cpu.compute = bytes[2];
    }
    return breakdown;
}

void llama_set_embeddings_nextn(struct llama_context * ctx, bool value, bool masked) {
    OR_UPSTREAM(llama_set_embeddings_nextn, ctx, value, masked)
    if (value) {
        simlayer_ext_unsupported("llama_set_embeddings_nextn");
    }
}

void llama_set_nextn_layer_offset(struct llama_context * ctx, int32_t offset) {
    OR_UPSTREAM(llama_set_nextn_layer_offset, ctx, offset)
    if (offset != 0) {
        simlayer_ext_unsupported("llama_set_nextn_layer_offset");
    }
}

float * llama_get_embeddings_nextn(struct llama_context * ctx) {
    OR_UPSTREAM(llama_get_embeddings_nextn, ctx)
    return nullptr;
}

float * llama_get_embeddings_nextn_ith(struct llama_context * ctx, int32_t i) {
    OR_UPSTREAM(llama_get_embeddings_nextn_ith, ctx, i)
    return nullptr;
}

void llama_set_embeddings_layer_inp(struct llama_context * ctx, uint32_t layer, bool value) {
    OR_UPSTREAM(llama_set_embeddings_layer_inp, ctx, layer, value)
    if (value) {
        simlayer_ext_unsupported("llama_set_embeddings_layer_inp");
    }
}

float * llama_get_embeddings_layer_inp(struct llama_context * ctx, uint32_t layer) {
    OR_UPSTREAM(llama_get_embeddings_layer_inp, ctx, layer)
    return nullptr;
}

llama_context * llama_get_ctx_other(struct llama_context * ctx) {
    OR_UPSTREAM(llama_get_ctx_other, ctx)
    return nullptr;
}

int32_t llama_model_dflash_selector_top_k(const struct llama_model * model) {
    OR_UPSTREAM(llama_model_dflash_selector_top_k, model)
    return 0;
}

const int32_t * llama_model_target_layer_ids(const struct llama_model * model) {
    OR_UPSTREAM(llama_model_target_layer_ids, model)
    return nullptr;
}

uint32_t llama_model_target_layer_ids_n(const struct llama_model * model) {
    OR_UPSTREAM(llama_model_target_layer_ids_n, model)
    return 0;
}
