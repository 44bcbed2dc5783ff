#include "stack.h"

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <exception>

namespace simlayer {

// For malloc, for throwing, for a signal's handler.
static constexpr size_t RESERVE = 32 << 10;

// A fiber's stack has a size that only its maker knows.
static constexpr size_t UNKNOWN_ROOM = 16 << 10;

thread_local int guard_depth = 0;

namespace {

struct range {
    uintptr_t low;
    uintptr_t high;
};

// Where the system says that this thread's stack lies.
range thread_stack() {
    void * low  = nullptr;
    size_t size = 0;
#if defined(__linux__)
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
        if (pthread_attr_getstack(&attributes, &low, &size) != 0) {
            size = 0;
        }
        pthread_attr_destroy(&attributes);
    }
#elif defined(__APPLE__)
    size = pthread_get_stacksize_np(pthread_self());
    low  = static_cast<char *>(pthread_get_stackaddr_np(pthread_self())) - size;
#endif
    return { uintptr_t(low), uintptr_t(low) + size };
}

} // namespace

const char * stack_floor() {
    // For a main thread the system reads a file to answer.
    static thread_local const range stack = thread_stack();
    const char *                    here  = static_cast<const char *>(__builtin_frame_address(0));
    const uintptr_t                 at    = uintptr_t(here);
    if (at < stack.low || at >= stack.high) {
        return here - UNKNOWN_ROOM;
    }
    const size_t left = at - stack.low;
    return here - std::min(left > RESERVE ? left - RESERVE : 0, LONG_STACK);
}

void on_long_stack(const std::function<void()> & body) {
    struct job {
        const std::function<void()> & body;
        const int                     guard_depth;
        std::exception_ptr            thrown;
    } job{ body, guard_depth, nullptr };

    auto run = [](void * data) -> void * {
        struct job & job = *static_cast<struct job *>(data);
        guard_depth      = job.guard_depth;
        try {
            job.body();
        } catch (...) {
            job.thrown = std::current_exception();
        }
        return nullptr;
    };

    pthread_attr_t attributes;
    pthread_t      thread;
    bool           started = false;
    if (pthread_attr_init(&attributes) == 0) {
        started = pthread_attr_setstacksize(&attributes, LONG_STACK) == 0 &&
                  pthread_create(&thread, &attributes, run, &job) == 0;
        pthread_attr_destroy(&attributes);
    }
    if (!started) {
        throw std::runtime_error("no thread with 512 MiB of stack could be started: is address space limited?");
    }
    pthread_join(thread, nullptr);
    if (job.thrown) {
        std::rethrow_exception(job.thrown);
    }
}

void with_stack(size_t bytes, const std::function<void()> & body) {
    const char * here  = static_cast<const char *>(__builtin_frame_address(0));
    const char * floor = stack_floor();
    if (here > floor && size_t(here - floor) >= bytes) {
        body();
    } else {
        on_long_stack(body);
    }
}

} // namespace simlayer
