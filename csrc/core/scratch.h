// 64-byte aligned, uninitialised buffers that free themselves: Scratch is false when memory ran out, Buffer
// throws.
//
// Fresh memory costs a page fault every 4 kB, a quarter of the time of a large operator. So each calling
// thread keeps the largest buffer it has given back, up to 64 MB, for its next one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

namespace tk {

class KeptMemory {
 public:
  static constexpr size_t most = size_t(64) << 20, least = size_t(64) << 10;

  ~KeptMemory() { std::free(data_); }
  // The kept memory if it is large enough, and its size; else null.
  void* take(size_t* bytes) {
    if (bytes_ < *bytes || *bytes < least) return nullptr;
    *bytes = std::exchange(bytes_, 0);
    return std::exchange(data_, nullptr);
  }
  // What is to be freed: the smaller of two, or what is too large to keep.
  void* give(void* data, size_t bytes) {
    if (bytes < least || bytes > most || bytes <= bytes_) return data;
    bytes_ = bytes;
    return std::exchange(data_, data);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

inline KeptMemory& kept_memory() {
  static thread_local KeptMemory memory;
  return memory;
}

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t elements) : bytes_((elements * sizeof(T) + 127) / 64 * 64) {
    data_ = static_cast<T*>(kept_memory().take(&bytes_));
    if (!data_) data_ = static_cast<T*>(std::aligned_alloc(64, bytes_));
  }
  ~Scratch() { std::free(kept_memory().give(data_, data_ ? bytes_ : 0)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  T* data() const { return data_; }

 private:
  size_t bytes_;
  T* data_;
};

template <class T>
class Buffer : public Scratch<T> {
 public:
  explicit Buffer(int64_t elements) : Scratch<T>(elements) {
    if (!*this) throw std::bad_alloc();
  }
  operator T*() const { return this->data(); }
};

// std::vector<T, Uninitialised<T>> leaves new elements as they are in memory.
template <class T>
struct Uninitialised : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = Uninitialised<U>;
  };
  template <class U>
  void construct(U*) noexcept {}
  template <class U, class... Arguments>
  void construct(U* at, Arguments&&... arguments) {
    ::new (static_cast<void*>(at)) U(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace tk
