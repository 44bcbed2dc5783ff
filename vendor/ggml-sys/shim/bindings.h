// What bindgen reads: ggml, gguf, llama.h (for the vocabulary, sampler and chat parts) and our shim.
#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "gguf.h"
#include "llama.h"
#include "pattern.h"
#include "vocab.h"
#ifdef SIMLAYER_RPC
#include "ggml-rpc.h"
#include "rpc.h"
#endif
#ifdef SIMLAYER_CHAT
#include "chat.h"
#endif
