// A model on a server of ggml's RPC backend, in the ways that llama_model_params can say it. `remote serve HOST:PORT`
// lends the processor; `remote MODEL HOST:PORT` compares with a model of this process.

#include "check.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#define N_PROMPT 40
#define N_TOKENS 24

// ggml keeps what it knows of a server for as long as the process lives.
const char * __lsan_default_suppressions(void);
const char * __lsan_default_suppressions(void) {
    return "leak:ggml_backend_rpc_add_server\nleak:ggml_backend_rpc_buffer_type\n";
}

// Matrix products by where their weights are.
static int n_here, n_there;

static bool count_products(struct ggml_tensor * tensor, bool ask, void * data) {
    (void) data;
    // On the processor some are simlayer's own.
    const bool is_product = tensor->op == GGML_OP_MUL_MAT || tensor->op == GGML_OP_CUSTOM;
    if (ask && is_product && tensor->src[0]->buffer != NULL) {
        const char * name = ggml_backend_buft_name(ggml_backend_buffer_get_type(tensor->src[0]->buffer));
        *(strncmp(name, "RPC", 3) == 0 ? &n_there : &n_here) += 1;
    }
    // Not to be given the result.
    return !ask;
}

static void generate(struct llama_model_params params, const char * path, llama_token tokens[N_TOKENS]) {
    struct llama_model * model = llama_model_load_from_file(path, params);
    CHECK(model != NULL);
    struct llama_context_params context = llama_context_default_params();
    context.n_ctx           = 256;
    context.n_threads       = 1;
    context.n_threads_batch = 1;
    context.cb_eval         = count_products;
    struct llama_context * ctx = llama_init_from_model(model, context);
    CHECK(ctx != NULL);
    n_here = n_there = 0;
    llama_token prompt[N_PROMPT];
    for (int i = 0; i < N_PROMPT; i++) {
        prompt[i] = token_at(model, i);
    }
    struct llama_batch batch = llama_batch_get_one(prompt, N_PROMPT);
    for (int i = 0; i < N_TOKENS; i++) {
        CHECK(llama_decode(ctx, batch) == 0);
        tokens[i] = greedy(ctx, -1);
        batch = llama_batch_get_one(&tokens[i], 1);
    }
    llama_free(ctx);
    llama_model_free(model);
}

static int serve(const char * endpoint) {
    ggml_backend_dev_t processor = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_rpc_start_server(endpoint, NULL, 1, 1, &processor);
    return 1;
}

int main(int argc, char ** argv) {
    CHECK(argc == 3);
    if (strcmp(argv[1], "serve") == 0) {
        return serve(argv[2]);
    }
    llama_log_set(count_lines, NULL);
    llama_backend_init();
    llama_token expected[N_TOKENS], tokens[N_TOKENS];
    generate(llama_model_default_params(), argv[1], expected);
    CHECK(n_there == 0 && n_here > 0);

    // As llama.cpp's own programs do for `--rpc`.
    CHECK(llama_supports_rpc() && llama_supports_gpu_offload());
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    CHECK(rpc != NULL);
    typedef ggml_backend_reg_t (*add_server_t)(const char *);
    add_server_t add_server = (add_server_t) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server");
    CHECK(add_server != NULL);
    ggml_backend_reg_t server = add_server(argv[2]);
    CHECK(server != NULL);
    ggml_backend_dev_t device = ggml_backend_reg_dev_get(server, 0);

    // Not registered: ggml does not know it, and nor do we.
    ggml_backend_dev_t   list[]    = { device, NULL };
    struct llama_model_params listed = llama_model_default_params();
    listed.devices = list;
    CHECK(llama_model_load_from_file(argv[1], listed) == NULL);
    ggml_backend_register(server);

    // All layers go to all devices. The logits' product counts as a layer.
    generate(llama_model_default_params(), argv[1], tokens);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    CHECK(n_here == 0 && n_there > 0);
    const int n_all = n_there;

    generate(listed, argv[1], tokens);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    CHECK(n_here == 0 && n_there == n_all);

    // The output and one of two layers.
    listed.n_gpu_layers = 2;
    generate(listed, argv[1], tokens);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    CHECK(n_here > 0 && n_there > n_here && n_here + n_there == n_all);

    listed.n_gpu_layers = 0;
    generate(listed, argv[1], tokens);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    CHECK(n_there == 0);

    ggml_backend_dev_t none[] = { NULL };
    struct llama_model_params params = llama_model_default_params();
    params.devices = none;
    generate(params, argv[1], tokens);
    CHECK(n_there == 0);

    // One device alone, by its number; a negative one is the processor.
    params            = llama_model_default_params();
    params.split_mode = LLAMA_SPLIT_MODE_NONE;
    generate(params, argv[1], tokens);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    CHECK(n_here == 0);
    params.main_gpu = -1;
    generate(params, argv[1], tokens);
    CHECK(n_there == 0);
    params.main_gpu = 1;
    CHECK(llama_model_load_from_file(argv[1], params) == NULL);
    CHECK(strstr(simlayer_last_error(), "main_gpu") != NULL);

    // Shares of the same device named twice, and shares that are none.
    ggml_backend_dev_t twice[] = { device, device, NULL };
    float shares[16] = { 1.0f, 2.0f };
    params              = llama_model_default_params();
    params.devices      = twice;
    params.tensor_split = shares;
    generate(params, argv[1], tokens);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    CHECK(n_here == 0);
    shares[1] = -1.0f;
    CHECK(llama_model_load_from_file(argv[1], params) == NULL);
    CHECK(strstr(simlayer_last_error(), "tensor_split") != NULL);

    ggml_backend_dev_t wild[] = { (ggml_backend_dev_t) (size_t) 0x1234, NULL };
    params         = llama_model_default_params();
    params.devices = wild;
    CHECK(llama_model_load_from_file(argv[1], params) == NULL);
    params            = llama_model_default_params();
    params.split_mode = LLAMA_SPLIT_MODE_TENSOR;
    CHECK(llama_model_load_from_file(argv[1], params) == NULL);

    printf("ok\n");
    return 0;
}
