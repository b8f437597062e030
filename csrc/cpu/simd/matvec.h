// Matrix-vector kernels of this instruction set, for its table; table.h says what they do.
#pragma once

#include "cpu/simd/table.h"

namespace tk::TK_ISA {

template <class T>
double sum_squares(int64_t n, const T* x);
template <class T>
void gemv(int64_t m, int64_t n, const T* a, int64_t a_row, const T* x, T* y);
template <class T>
void gemv_subtract(int64_t m, int64_t n, const T* a, int64_t a_row, const T* s, T* y);
template <class T>
void symv(int64_t n, const T* a, int64_t a_row, const T* x, T* y);
template <class T>
void secular(int64_t n, const T* poles, const T* weights, T shift, T* sums);
template <class T>
void scale_by_ratio(int64_t n, const T* gaps, const T* poles, T pole, T* x);
template <class T>
void rotate(int64_t n, T* x, T* y, T c, T s);

}  // namespace tk::TK_ISA
