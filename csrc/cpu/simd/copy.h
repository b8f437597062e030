// Copies of many short pieces, transposed, and scaled; table.h says what they do.
#pragma once

#include <cstdint>

namespace tk::TK_ISA {

template <class T>
void copy(int64_t count, int64_t length, const T* from, int64_t from_step, T* to, int64_t to_step);
template <class T>
void transpose(int64_t rows, int64_t cols, const T* in, int64_t in_row, T* out, int64_t out_row);
template <class From, class To>
void scale(int64_t n, double factor, const From* x, To* y);

}  // namespace tk::TK_ISA
