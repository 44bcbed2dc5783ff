// What ggml's RPC backend lacks: sockets that notice a dead machine, and a bound on what a server lends.
#pragma once

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// As socket(2), for the transport's sockets: with keep-alive, so that a connection to a machine that does not answer
// any more ends within SIMLAYER_RPC_DEAD_SECONDS.
#define SIMLAYER_RPC_DEAD_SECONDS 7
int simlayer_rpc_socket(int domain, int type, int protocol);

// A device that computes on `device` and has at most `limit` bytes of its memory to give. It is never freed.
ggml_backend_dev_t simlayer_rpc_limited_device(ggml_backend_dev_t device, size_t limit);

#ifdef __cplusplus
}
#endif
