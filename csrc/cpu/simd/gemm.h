// The matrix products of this instruction set, for its other kernels and for its table.
#pragma once

#include "cpu/simd/table.h"

namespace tk::TK_ISA {

template <class T>
void gemm(const GemmArgs<T>& args, T* scratch);

template <class T>
void gram(int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, double* out, int64_t out_row,
          double* scratch);

}  // namespace tk::TK_ISA
