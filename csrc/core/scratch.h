// 64-byte aligned, uninitialised buffers that free themselves: Scratch is false when memory ran out, Buffer
// throws.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace tk {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t elements)
      : data_(static_cast<T*>(std::aligned_alloc(64, (elements * sizeof(T) + 127) / 64 * 64))) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  explicit operator bool() const { return data_ != nullptr; }
  T* data() const { return data_; }

 private:
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

}  // namespace tk
