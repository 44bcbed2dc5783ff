// std::forward_list for llama.cpp's vocabulary file. The compiler reads this file before it (-include).
//
// Where a text has special tokens it is divided into a list of fragments. For each token found, llama.cpp asks how many
// fragments lie before the one that it divides, and later walks over as many to remove that one: quadratic in the number
// of tokens. Here the answer is a place instead of a number, which leads back at once; the list is linked both ways. All
// else is done as there, so that the fragments are the same.
#pragma once

#include <forward_list>
#include <iterator>
#include <list>
#include <utility>

namespace simlayer {

template <typename T> class fragment_list;

template <typename T> class fragment_iterator {
  public:
    T & operator*() const { return *at; }

    fragment_iterator & operator++() { return *this = next(); }
    fragment_iterator   operator++(int) { return std::exchange(*this, next()); }

    bool operator!=(const fragment_iterator & other) const { return at != other.at || is_before != other.is_before; }

  private:
    friend class fragment_list<T>;
    template <typename U> friend class fragment_place;

    using node = typename std::list<T>::iterator;

    fragment_iterator(std::list<T> & list, node at, bool is_before) : list(&list), at(at), is_before(is_before) {}

    fragment_iterator next() const { return { *list, is_before ? list->begin() : std::next(at), false }; }
    fragment_iterator previous() const {
        const bool first = at == list->begin();
        return { *list, first ? list->end() : std::prev(at), first };
    }

    std::list<T> * list;
    node           at;
    // Before the first one, where `at` is the end.
    bool is_before;
};

// Where an iterator stood: as good as its distance from the begin for what is asked of that.
template <typename T> class fragment_place {
  public:
    explicit fragment_place(fragment_iterator<T> at) : at(at) {}

    // Whether it is the first one's. There is no other number to compare with.
    bool operator==(int) const { return at.at == at.list->begin(); }
    // The one before. There is no other number to subtract.
    fragment_iterator<T> operator-(int) const { return at.previous(); }

  private:
    fragment_iterator<T> at;
};

template <typename T> class fragment_list {
  public:
    using iterator = fragment_iterator<T>;

    iterator before_begin() { return { list, list.end(), true }; }
    iterator begin() { return { list, list.begin(), false }; }
    iterator end() { return { list, list.end(), false }; }

    template <typename... Args> void emplace_front(Args &&... args) { list.emplace_front(std::forward<Args>(args)...); }
    template <typename... Args> void emplace_after(iterator it, Args &&... args) {
        list.emplace(it.next().at, std::forward<Args>(args)...);
    }
    void erase_after(iterator it) { list.erase(it.next().at); }

  private:
    std::list<T> list;
};

} // namespace simlayer

namespace std {
template <typename T> using simlayer_forward_list = ::simlayer::fragment_list<T>;

template <typename T>
simlayer::fragment_place<T> distance(simlayer::fragment_iterator<T>, simlayer::fragment_iterator<T> it) {
    return simlayer::fragment_place<T>(it);
}

template <typename T>
simlayer::fragment_iterator<T> next(simlayer::fragment_iterator<T>, simlayer::fragment_iterator<T> there) {
    return there;
}
} // namespace std

#define forward_list simlayer_forward_list
