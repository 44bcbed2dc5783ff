#include "rpc.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <atomic>

#ifndef _WIN32
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

extern "C" int simlayer_rpc_socket(int domain, int type, int protocol) {
    const int fd = socket(domain, type, protocol);
    if (fd < 0) {
        return fd;
    }
    // Where the system refuses, the connection is as it would be without: nothing to do about it.
    const auto set = [fd](int level, int name, int value) { (void) setsockopt(fd, level, name, &value, sizeof(value)); };
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef __linux__
    set(IPPROTO_TCP, TCP_KEEPIDLE, 3);
    set(IPPROTO_TCP, TCP_KEEPINTVL, 2);
    set(IPPROTO_TCP, TCP_KEEPCNT, 2);
    // The same bound for data that is sent and not confirmed.
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, SIMLAYER_RPC_DEAD_SECONDS * 1000);
#endif
    return fd;
}
#endif

namespace {

struct limited;

// ggml hands these out by pointer to their first member, which leads back to the whole.
struct limited_type {
    ggml_backend_buffer_type type;
    limited * owner;
};

struct limited {
    ggml_backend_device device;
    ggml_backend_dev_t inner;
    limited_type buffers;
    ggml_backend_buffer_type_t inner_buffers;
    size_t limit;
    // Free memory of the device at the beginning.
    size_t free_at_start;
    // Bytes of the buffers there are, where this can count them.
    std::atomic<size_t> lent;
    // How the device frees a buffer, where lent bytes are counted.
    void (*free_buffer)(ggml_backend_buffer_t);

    // Other backends tell their own buffers by the function that frees them, so that it must stay.
    bool counts() const { return ggml_backend_dev_type(inner) == GGML_BACKEND_DEVICE_TYPE_CPU; }

    size_t used() const {
        if (counts()) {
            return lent.load();
        }
        size_t free = 0, total = 0;
        ggml_backend_dev_memory(inner, &free, &total);
        return free_at_start - std::min(free, free_at_start);
    }

    size_t left() const { return limit - std::min(limit, used()); }
};

limited * of(ggml_backend_dev_t device) { return reinterpret_cast<limited *>(device); }
limited * of(ggml_backend_buffer_type_t type) { return reinterpret_cast<limited_type *>(type)->owner; }

void get_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    ggml_backend_dev_memory(of(device)->inner, free, total);
    *free = std::min(*free, of(device)->left());
    *total = std::min(*total, of(device)->limit);
}

void get_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(of(device)->inner, props);
    get_memory(device, &props->memory_free, &props->memory_total);
}

ggml_backend_t init_backend(ggml_backend_dev_t device, const char * params) {
    ggml_backend_t backend = ggml_backend_dev_init(of(device)->inner, params);
    if (backend) {
        backend->device = device;
    }
    return backend;
}

ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t device) { return &of(device)->buffers.type; }

void free_buffer(ggml_backend_buffer_t buffer) {
    limited * owner = of(buffer->buft);
    owner->lent -= buffer->size;
    owner->free_buffer(buffer);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    limited * owner = of(type);
    if (size > owner->left()) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer = owner->inner_buffers->iface.alloc_buffer(owner->inner_buffers, size);
    if (buffer && owner->counts()) {
        owner->lent += buffer->size;
        owner->free_buffer = buffer->iface.free_buffer;
        buffer->iface.free_buffer = free_buffer;
        buffer->buft = type;
    }
    return buffer;
}

} // namespace

extern "C" ggml_backend_dev_t simlayer_rpc_limited_device(ggml_backend_dev_t inner, size_t limit) {
    limited * owner = new limited{};
    owner->inner = inner;
    owner->limit = limit;
    size_t total = 0;
    ggml_backend_dev_memory(inner, &owner->free_at_start, &total);
    owner->device = *inner;
    owner->device.iface.get_memory = get_memory;
    owner->device.iface.get_props = get_props;
    owner->device.iface.init_backend = init_backend;
    owner->device.iface.get_buffer_type = get_buffer_type;
    owner->inner_buffers = ggml_backend_dev_buffer_type(inner);
    owner->buffers = { *owner->inner_buffers, owner };
    owner->buffers.type.device = &owner->device;
    owner->buffers.type.iface.alloc_buffer = alloc_buffer;
    return &owner->device;
}
