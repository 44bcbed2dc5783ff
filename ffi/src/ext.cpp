// The functions of llama.cpp's staging header llama-ext.h that its own tools import. They have C++ names, and one of
// them returns a C++ type. What they ask about (other devices, multi-token prediction, distillation) is not here, and
// they say so.

#include "llama-ext.h"

// In Rust: bytes of weights, cache and intermediate results; the last argument of the other one is a message.
extern "C" bool    simlayer_ext_memory(const struct llama_context * ctx, size_t bytes[3]);
extern "C" int32_t simlayer_ext_n_expert(const struct llama_model * model);
extern "C" void    simlayer_ext_unsupported(const char * function);

int32_t llama_model_n_expert(const struct llama_model * model) { return simlayer_ext_n_expert(model); }
int32_t llama_model_n_devices(const struct llama_model *) { return 0; }

ggml_backend_dev_t llama_model_get_device(const struct llama_model *, int) { return nullptr; }

llama_memory_breakdown llama_get_memory_breakdown(const struct llama_context * ctx) {
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

void llama_set_embeddings_nextn(struct llama_context *, bool value, bool) {
    if (value) {
        simlayer_ext_unsupported("llama_set_embeddings_nextn");
    }
}

void llama_set_nextn_layer_offset(struct llama_context *, int32_t offset) {
    if (offset != 0) {
        simlayer_ext_unsupported("llama_set_nextn_layer_offset");
    }
}

float * llama_get_embeddings_nextn(struct llama_context *) { return nullptr; }
float * llama_get_embeddings_nextn_ith(struct llama_context *, int32_t) { return nullptr; }

void llama_set_embeddings_layer_inp(struct llama_context *, uint32_t, bool value) {
    if (value) {
        simlayer_ext_unsupported("llama_set_embeddings_layer_inp");
    }
}

float * llama_get_embeddings_layer_inp(struct llama_context *, uint32_t) { return nullptr; }

llama_context * llama_get_ctx_other(struct llama_context *) { return nullptr; }

int32_t         llama_model_dflash_selector_top_k(const struct llama_model *) { return 0; }
const int32_t * llama_model_target_layer_ids(const struct llama_model *) { return nullptr; }
uint32_t        llama_model_target_layer_ids_n(const struct llama_model *) { return 0; }
