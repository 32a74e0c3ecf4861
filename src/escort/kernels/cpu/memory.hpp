// Memory for kernels, on large pages where it is large.
//
// Neighbouring channels of a map lie in pages of their own, so that a tile of a layer touches as many pages as there
// are channels: more than a core keeps track of, and a page that it does not know is dear in a virtual machine, where
// two tables are walked for it. A large page holds a hundred small ones.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace escort {

constexpr std::size_t kLargePage = 2 << 20;

// Starts a cache line, or a page from a quarter of a large one on. Throws std::bad_alloc. To be freed by std::free.
inline void* allocate(std::size_t bytes) {
  const bool is_large = bytes >= kLargePage / 4;
  const std::size_t page = is_large ? kLargePage : 64, size = (bytes + page - 1) / page * page;
  void* memory = std::aligned_alloc(page, size);
  if (!memory && size > 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (is_large) madvise(memory, size, MADV_HUGEPAGE);  // where it is refused, small pages do
#endif
  return memory;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Memory = std::unique_ptr<T[], Free>;

template <class T>
Memory<T> allocate_array(std::size_t count) {
  return Memory<T>(static_cast<T*>(allocate(count * sizeof(T))));
}

// What std::vector takes to lie in such memory.
template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class Other>
  Allocator(const Allocator<Other>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(escort::allocate(count * sizeof(T))); }
  void deallocate(T* memory, std::size_t) { std::free(memory); }
  bool operator==(const Allocator&) const { return true; }
};

template <class T>
using Table = std::vector<T, Allocator<T>>;

}  // namespace escort
