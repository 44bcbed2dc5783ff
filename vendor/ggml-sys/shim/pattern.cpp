#include "pattern.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <regex>
#include <stdexcept>

// The C++ library recurses for each bracket of a pattern and each character of a name: names of tensors are short
// (GGML_MAX_NAME), and so is a pattern that anybody writes.
static constexpr size_t LONGEST = 1024;

struct simlayer_pattern {
    std::regex regex;
};

extern "C" struct simlayer_pattern * simlayer_pattern_new(const char * text, char * error, size_t error_size) {
    if (error_size > 0) {
        error[0] = '\0';
    }
    try {
        if (std::strlen(text) > LONGEST) {
            throw std::runtime_error("it has more than 1024 bytes");
        }
        return new simlayer_pattern{ std::regex(text) };
    } catch (const std::exception & e) {
        std::snprintf(error, error_size, "%s", e.what());
    } catch (...) {
        std::snprintf(error, error_size, "unknown C++ exception");
    }
    return nullptr;
}

extern "C" void simlayer_pattern_free(struct simlayer_pattern * pattern) {
    delete pattern;
}

extern "C" bool simlayer_pattern_matches(const struct simlayer_pattern * pattern, const char * name) {
    try {
        return std::strlen(name) <= LONGEST && std::regex_search(name, pattern->regex);
    } catch (...) {
        return false;
    }
}
