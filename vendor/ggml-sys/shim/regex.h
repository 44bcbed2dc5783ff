// std::regex for llama.cpp's files, with bounds. The compiler reads this file before each of theirs (-include).
//
// The C++ library's matcher recurses for every character that it goes over, and starts again at every place of the text:
// a long run without a break overflows the stack, or takes time without end. Here it walks over the text with iterators
// that look at the stack and count its steps. Where the stack of the thread ends, it begins again on a longer one; where
// that ends, or after too many steps, it throws. The matcher itself is the library's, so that what it finds is the same.
#pragma once

#include "stack.h"

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>

namespace simlayer {

// Some seconds: all that 8 MiB of stack can hold, in quadratic time. What is nearly linear in the text needs some tens of
// steps for each character. Steps on a long stack, whose pages are new each time, count more.
constexpr uint64_t REGEX_STEPS          = 400000000;
constexpr uint64_t REGEX_STEPS_PER_CHAR = 200;
constexpr uint64_t LONG_STACK_COST      = 4;

// What one search may use up.
struct search_bounds {
    const char * floor;
    uint64_t *   steps;
    uint64_t     cost;

    void step() {
        if (__builtin_expect(static_cast<const char *>(__builtin_frame_address(0)) < floor, false)) {
            throw stack_exhausted("it has a run of characters without a break that is too long: put spaces or line "
                                  "ends into it");
        }
        if (__builtin_expect(*steps < cost, false)) {
            throw std::runtime_error("its longest run of one kind of characters takes a regular expression too many "
                                     "steps: put other characters or line ends into it");
        }
        *steps -= cost;
    }
};

// A pointer to a character that looks at the bounds whenever it is read.
template <typename CharT> class bounded_iterator {
  public:
    using iterator_category = std::random_access_iterator_tag;
    using value_type        = CharT;
    using difference_type   = std::ptrdiff_t;
    using pointer           = const CharT *;
    using reference         = const CharT &;

    bounded_iterator() = default;
    bounded_iterator(pointer at, search_bounds * bounds) : at(at), bounds(bounds) {}

    pointer base() const { return at; }

    reference operator*() const {
        bounds->step();
        return *at;
    }
    reference operator[](difference_type n) const { return *(*this + n); }

    bounded_iterator & operator++() { ++at; return *this; }
    bounded_iterator & operator--() { --at; return *this; }
    bounded_iterator   operator++(int) { auto old = *this; ++at; return old; }
    bounded_iterator   operator--(int) { auto old = *this; --at; return old; }
    bounded_iterator & operator+=(difference_type n) { at += n; return *this; }
    bounded_iterator & operator-=(difference_type n) { at -= n; return *this; }
    bounded_iterator   operator+(difference_type n) const { return { at + n, bounds }; }
    bounded_iterator   operator-(difference_type n) const { return { at - n, bounds }; }
    difference_type    operator-(const bounded_iterator & other) const { return at - other.at; }
    bool operator==(const bounded_iterator & other) const { return at == other.at; }
    bool operator!=(const bounded_iterator & other) const { return at != other.at; }
    bool operator<(const bounded_iterator & other) const { return at < other.at; }
    bool operator>(const bounded_iterator & other) const { return at > other.at; }
    bool operator<=(const bounded_iterator & other) const { return at <= other.at; }
    bool operator>=(const bounded_iterator & other) const { return at >= other.at; }

  private:
    pointer         at     = nullptr;
    search_bounds * bounds = nullptr;
};

template <typename CharT> using bounded_results = std::match_results<bounded_iterator<CharT>>;

// Runs `search` with bounds, a second time on a longer stack when this thread's is not enough.
template <typename Search> bool bounded_search(uint64_t & steps, const Search & search) {
    try {
        search_bounds bounds{ stack_floor(), &steps, 1 };
        return search(&bounds);
    } catch (const stack_exhausted &) {
        // Not from here: an exception in flight would lie on a stack that is left for long.
    }
    bool found = false;
    on_long_stack([&] {
        search_bounds bounds{ stack_floor(), &steps, LONG_STACK_COST };
        found = search(&bounds);
    });
    return found;
}

// A regular expression and the steps that are left to the search with it.
template <typename CharT> class bounded_regex : public std::basic_regex<CharT> {
    using regex = std::basic_regex<CharT>;

  public:
    using regex::basic_regex;

    // A pre-tokenizer's, which llama.cpp compiles for each piece of a text between special tokens.
    bounded_regex(const std::basic_string<CharT> & pattern, std::regex_constants::syntax_option_type flags) :
        regex(compiled(pattern, flags)) {}

    mutable uint64_t steps = REGEX_STEPS;

  private:
    // Compiled once on each thread. The patterns are those in llama.cpp's source.
    static const regex & compiled(const std::basic_string<CharT> & pattern,
                                  std::regex_constants::syntax_option_type flags) {
        static thread_local std::map<std::basic_string<CharT>, regex> known;
        const auto at = known.find(pattern);
        return at != known.end() ? at->second : known.emplace(pattern, regex(pattern, flags)).first->second;
    }
};

// Where a match lies, counted from the begin of the text.
struct match_place {
    std::ptrdiff_t at;
    std::ptrdiff_t size;

    std::ptrdiff_t position() const { return at; }
    std::ptrdiff_t length() const { return size; }
};

// As std::regex_iterator of a string's iterator: one match after the other.
template <typename StringIt> class bounded_regex_iterator {
    using CharT = typename std::iterator_traits<StringIt>::value_type;

  public:
    bounded_regex_iterator() = default;

    bounded_regex_iterator(StringIt first, StringIt last, const bounded_regex<CharT> & regex) :
        regex(&regex),
        text(first == last ? nullptr : &*first),
        size(last - first) {
        regex.steps += REGEX_STEPS_PER_CHAR * uint64_t(size);
        search(0, flags);
    }

    // Only whether one of both is at its end is ever asked.
    bool operator!=(const bounded_regex_iterator & other) const { return regex != other.regex; }

    const match_place & operator*() const { return place; }

    bounded_regex_iterator & operator++() {
        std::ptrdiff_t from = place.at + place.size;
        if (place.size == 0) {
            if (from == size) {
                regex = nullptr;
                return *this;
            }
            // After an empty match there may be another one at the same place that is not.
            const auto * of = regex;
            search(from, flags | std::regex_constants::match_not_null | std::regex_constants::match_continuous);
            if (regex) {
                return *this;
            }
            regex = of;
            from++;
        }
        flags |= std::regex_constants::match_prev_avail;
        search(from, flags);
        return *this;
    }

  private:
    using flag_type = std::regex_constants::match_flag_type;

    void search(std::ptrdiff_t from, flag_type flags) {
        const bool found = bounded_search(regex->steps, [&](search_bounds * bounds) {
            using iterator = bounded_iterator<CharT>;
            bounded_results<CharT> match;
            const bool             found =
                std::regex_search(iterator(text + from, bounds), iterator(text + size, bounds), match, *regex, flags);
            if (found) {
                place = { match[0].first.base() - text, match.length() };
            }
            return found;
        });
        if (!found) {
            regex = nullptr;
        }
    }

    const bounded_regex<CharT> * regex = nullptr;
    const CharT *                text  = nullptr;
    std::ptrdiff_t               size  = 0;
    match_place                  place = { 0, 0 };
    flag_type                    flags = std::regex_constants::match_default;
};

// The groups of a match in a string, which has to live as long.
struct string_match {
    bounded_results<char> groups;

    size_t         size() const { return groups.size(); }
    std::ptrdiff_t length(size_t i = 0) const { return groups.length(i); }
    std::ptrdiff_t position(size_t i = 0) const { return groups.position(i); }
};

template <typename Find> bool search_string(const std::string & text, string_match & match, const Find & find) {
    uint64_t steps = REGEX_STEPS + REGEX_STEPS_PER_CHAR * text.size();
    return bounded_search(steps, [&](search_bounds * bounds) {
        const bounded_iterator<char> first(text.data(), bounds);
        return find(first, first + std::ptrdiff_t(text.size()), match.groups);
    });
}

inline bool search_all(const std::string & text, string_match & match, const std::regex & regex) {
    return search_string(text, match, [&](auto first, auto last, auto & groups) {
        return std::regex_match(first, last, groups, regex);
    });
}

inline bool search_any(const std::string & text, string_match & match, const std::regex & regex) {
    return search_string(text, match, [&](auto first, auto last, auto & groups) {
        return std::regex_search(first, last, groups, regex);
    });
}

} // namespace simlayer

// llama.cpp's files name all of these with `std::` before them.
namespace std {
template <typename CharT> using simlayer_basic_regex = ::simlayer::bounded_regex<CharT>;
template <typename StringIt> using simlayer_regex_iterator = ::simlayer::bounded_regex_iterator<StringIt>;
template <typename StringIt> using simlayer_match_results = ::simlayer::match_place;
using simlayer_smatch = ::simlayer::string_match;
using ::simlayer::search_all;
using ::simlayer::search_any;
} // namespace std

#define basic_regex    simlayer_basic_regex
#define regex_iterator simlayer_regex_iterator
#define match_results  simlayer_match_results
#define smatch         simlayer_smatch
#define regex_match    search_all
#define regex_search   search_any
