// What llama.cpp's chat files are compiled with (-include).
#pragma once

// All that has one of the names below.
#include <cstdio>
#include <ctime>

namespace std {

// Threads share what localtime answers.
inline tm * simlayer_localtime(const time_t * time) {
    static thread_local tm local;
    return localtime_r(time, &local);
}

} // namespace std

#define localtime simlayer_localtime

// They print what a schema has that grammars cannot say, once for each request.
#define fprintf(...) ((void) 0)
