// Copies of many short pieces.
#pragma once

#include <cstdint>

namespace tk::TK_ISA {

template <class T>
void copy(int64_t count, int64_t length, const T* from, int64_t from_step, T* to, int64_t to_step);

}  // namespace tk::TK_ISA
