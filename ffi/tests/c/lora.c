// A LoRA adapter on a model. Arguments: the model, the adapter, a file for rows of logits, and the tokens to read.
#include "check.h"

static void write_rows(struct llama_context * ctx, int argc, char ** argv, FILE * out) {
    const size_t n_vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
    llama_memory_clear(llama_get_memory(ctx), true);
    struct llama_batch batch = llama_batch_init(512, 0, 1);
    for (int i = 4; i < argc; i++) {
        add(&batch, atoi(argv[i]), i - 4, 0, i + 1 == argc);
    }
    CHECK(llama_decode(ctx, batch) == 0);
    CHECK(fwrite(llama_get_logits_ith(ctx, -1), sizeof(float), n_vocab, out) == n_vocab);
    llama_batch_free(batch);
}

static void test_meta(struct llama_adapter_lora * adapter) {
    char text[64];
    CHECK(llama_adapter_meta_val_str(adapter, "adapter.type", text, sizeof(text)) == 4 && strcmp(text, "lora") == 0);
    CHECK(llama_adapter_meta_val_str(adapter, "no.such.key", text, sizeof(text)) == -1 && text[0] == 0);
    const int n = llama_adapter_meta_count(adapter);
    CHECK(n >= 4);
    bool found = false;
    for (int i = 0; i < n; i++) {
        char key[64];
        CHECK(llama_adapter_meta_key_by_index(adapter, i, key, sizeof(key)) > 0);
        CHECK(llama_adapter_meta_val_str_by_index(adapter, i, text, sizeof(text)) > 0);
        found = found || (strcmp(key, "general.type") == 0 && strcmp(text, "adapter") == 0);
    }
    CHECK(found);
    CHECK(llama_adapter_meta_key_by_index(adapter, n, text, sizeof(text)) == -1);
    CHECK(llama_adapter_meta_val_str_by_index(adapter, -1, text, sizeof(text)) == -1);
    CHECK(llama_adapter_get_alora_n_invocation_tokens(adapter) == 0);
}

int main(int argc, char ** argv) {
    CHECK(argc > 5);
    struct llama_model *   model = load_model(argv[1]);
    struct llama_context * ctx   = new_context(model, 512, 1);
    CHECK(llama_adapter_lora_init(model, "/no/such/file") == NULL);
    CHECK(llama_adapter_lora_init(model, argv[1]) == NULL);
    CHECK(llama_adapter_lora_init(model, NULL) == NULL);
    CHECK(llama_adapter_lora_init_from_file_ptr(model, NULL) == NULL);
    struct llama_adapter_lora * adapter = llama_adapter_lora_init(model, argv[2]);
    CHECK(adapter != NULL);
    test_meta(adapter);
    FILE * open_file = fopen(argv[2], "rb");
    CHECK(open_file != NULL);
    struct llama_adapter_lora * same = llama_adapter_lora_init_from_file_ptr(model, open_file);
    CHECK(same != NULL);
    CHECK(fclose(open_file) == 0);

    // Without it, with it, once more by the other handle, with half of it, and without it again.
    FILE * out = fopen(argv[3], "wb");
    CHECK(out != NULL);
    float scale = 1.0f;
    write_rows(ctx, argc, argv, out);
    CHECK(llama_set_adapters_lora(ctx, &adapter, 1, &scale) == 0);
    write_rows(ctx, argc, argv, out);
    CHECK(llama_set_adapters_lora(ctx, &same, 1, &scale) == 0);
    write_rows(ctx, argc, argv, out);
    struct llama_adapter_lora * both[]   = { adapter, same };
    float                       scales[] = { 0.25f, 0.25f };
    CHECK(llama_set_adapters_lora(ctx, both, 2, scales) == 0);
    write_rows(ctx, argc, argv, out);
    CHECK(llama_set_adapters_lora(ctx, NULL, 0, NULL) == 0);
    write_rows(ctx, argc, argv, out);
    CHECK(fclose(out) == 0);

    // Freed while it is set: the context goes on with it. Set once it is freed: refused.
    CHECK(llama_set_adapters_lora(ctx, &same, 1, &scale) == 0);
    llama_adapter_lora_free(same);
    decode_text(ctx, argc - 4, argc - 3, 0);
    CHECK(llama_set_adapters_lora(ctx, &same, 1, &scale) != 0);
    CHECK(llama_adapter_meta_count(same) == 0);
    llama_free(ctx);
    // With the model goes what was not freed.
    llama_model_free(model);
    CHECK(llama_adapter_meta_count(adapter) == 0);
    puts("ok");
    return 0;
}
