// The stack for code of llama.cpp and of the C++ library that recurses once per character: std::regex, grammars.
#pragma once

#include <cstddef>
#include <functional>
#include <stdexcept>

namespace simlayer {

// What a call that recurses deeply gets at most. What is not used of it is never touched.
constexpr size_t LONG_STACK = size_t(512) << 20;

// There is not enough stack left to go on.
struct stack_exhausted : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The address above which a recursion that begins here has to stay: something is left below it for the functions that
// are called at its deepest place.
const char * stack_floor();

// How many guarded calls (see vocab.h) this thread is in.
extern thread_local int guard_depth;

// Runs `body` on a thread with LONG_STACK bytes of stack and waits for it. What it throws is thrown here.
void on_long_stack(const std::function<void()> & body);

// Runs `body` here when `bytes` of stack are left, otherwise as above.
void with_stack(size_t bytes, const std::function<void()> & body);

} // namespace simlayer
