// Memory that a thread keeps between calls: new pages at every call would cost as much as writing
// to them.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace FASTDIFF_ISA {

// Its use: pixels, weights or sums, transformed or copied.
enum Kept { kKeptPixels, kKeptWeights, kKeptSums };

// Room for `count` elements, aligned to pages of 2 MiB, which the system is asked to use. Growing
// loses the contents.
template <typename T, Kept which>
static T* kept(int64_t count) {
  struct Memory {
    void* at = nullptr;
    size_t size = 0;
    ~Memory() { std::free(at); }
  };
  static thread_local Memory memory;
  constexpr size_t kPage = 2 << 20;
  const size_t size = (count * sizeof(T) + kPage - 1) / kPage * kPage;
  if (size > memory.size) {
    std::free(memory.at);
    memory.size = 0;
    memory.at = std::aligned_alloc(kPage, size);
    if (memory.at == nullptr) throw std::bad_alloc();
    memory.size = size;
#if defined(MADV_HUGEPAGE)
    madvise(memory.at, size, MADV_HUGEPAGE);
#endif
  }
  return static_cast<T*>(memory.at);
}

}  // namespace FASTDIFF_ISA
