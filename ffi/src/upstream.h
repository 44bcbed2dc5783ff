// Where calls go from C++: to the library of unmodified llama.cpp where an argument is of one of its models.
#pragma once

#include "llama.h"

#include <type_traits>

// In Rust (upstream.rs): whether the handle is of that library's, and its function of a name, or null.
extern "C" bool   simlayer_ext_is_upstreams(const void * handle);
extern "C" void * simlayer_ext_upstream(const char * function);

namespace simlayer {

// Samplers are not: whatever they sample from, they are ours.
template <typename T> bool is_upstreams([[maybe_unused]] T argument) {
    if constexpr (std::is_pointer_v<T>) {
        using Target = std::remove_cv_t<std::remove_pointer_t<T>>;
        if constexpr (std::is_same_v<Target, llama_model> || std::is_same_v<Target, llama_context> ||
                      std::is_same_v<Target, llama_vocab>) {
            return simlayer_ext_is_upstreams(argument);
        }
    }
    return false;
}

// Called with a function's arguments it answers with that library's function, or null if the call is ours.
template <typename Function> struct upstream_of {
    const char * name;

    explicit upstream_of(const char * name) : name(name) {}

    template <typename... Arguments> Function * operator()(Arguments... arguments) const {
        if (!(is_upstreams(arguments) || ... || false)) {
            return nullptr;
        }
        return reinterpret_cast<Function *>(simlayer_ext_upstream(name));
    }
};

} // namespace simlayer
