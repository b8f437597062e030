// The kernels that are compiled once per instruction set, as one table of function pointers per set.
//
// Rules for the files in this folder: everything lives in namespace tk::TK_ISA or an anonymous namespace, and
// no standard-library template is instantiated here. A weak symbol compiled with AVX-512 could otherwise be
// the copy the linker keeps, and crash a machine without it.
#pragma once

#include <cstdint>

namespace tk {

template <class T>
struct TuckerConvKernels;  // tucker_conv.h

// C (m×n) = alpha A B + beta C. A is m×k with element strides (a_row, a_col), B is k×n with (b_row, b_col), C
// has row stride c_row and unit column stride. beta = 0 means C is not read. One thread; scratch must hold
// gemm_scratch elements and be 64-byte aligned.
template <class T>
struct GemmArgs {
  int64_t m, n, k;
  T alpha;
  const T* a;
  int64_t a_row, a_col;
  const T* b;
  int64_t b_row, b_col;
  T beta;
  T* c;
  int64_t c_row;
};

template <class T>
struct SimdTable {
  const char* isa;
  void (*gemm)(const GemmArgs<T>& args, T* scratch);
  // out (n×columns, row stride out_row) = the first columns of A Aᵀ, in float64; A is n×k with element
  // strides (a_row, a_col). Above the diagonal only the first `columns` rows are written. Products and sums
  // are float64 whatever T is, or, gram_in_t, sums of up to 256 terms in T. One thread; scratch must hold
  // gram_scratch doubles.
  void (*gram)(int64_t n, int64_t columns, int64_t k, const T* a, int64_t a_row, int64_t a_col, double* out,
               int64_t out_row, double* scratch);
  void (*gram_in_t)(int64_t n, int64_t columns, int64_t k, const T* a, int64_t a_row, int64_t a_col,
                    double* out, int64_t out_row, double* scratch);
  // Copies `count` pieces of `length` adjacent elements, from_step and to_step elements apart.
  void (*copy)(int64_t count, int64_t length, const T* from, int64_t from_step, T* to, int64_t to_step);
  // out (cols×rows) = inᵀ, both with unit column stride.
  void (*transpose)(int64_t rows, int64_t cols, const T* in, int64_t in_row, T* out, int64_t out_row);
  // y = factor x, multiplied in float64; y may be x.
  void (*scale)(int64_t n, double factor, const T* x, T* y);
  void (*widen)(int64_t n, double factor, const T* x, double* y);
  void (*narrow)(int64_t n, double factor, const double* x, T* y);
  int lanes;  // elements of one vector
  // Matrix-vector kernels; rows of a have unit stride and start a_row elements apart (simd/matvec.cpp).
  double (*sum_squares)(int64_t n, const T* x);
  void (*gemv)(int64_t m, int64_t n, const T* a, int64_t a_row, const T* x, T* y);           // y = A x
  void (*gemv_subtract)(int64_t m, int64_t n, const T* a, int64_t a_row, const T* s, T* y);  // y −= Aᵀ s
  // y = A x, A symmetric, upper triangle read; y is read and written up to whole vectors, unchanged behind n.
  void (*symv)(int64_t n, const T* a, int64_t a_row, const T* x, T* y);
  // sums[0] = Σ weights[j] / (poles[j] − shift), sums[1] = its derivative by shift.
  void (*secular)(int64_t n, const T* poles, const T* weights, T shift, T* sums);
  // x[j] *= gaps[j] / (poles[j] − pole)
  void (*scale_by_ratio)(int64_t n, const T* gaps, const T* poles, T pole, T* x);
  void (*rotate)(int64_t n, T* x, T* y, T c, T s);  // x, y = cx − sy, sx + cy
  const TuckerConvKernels<T>* tucker_conv;
};

// Elements of scratch one thread needs for any gemm or gram call.
constexpr int64_t gemm_scratch = 16 * 1024, gram_scratch = 64 * 1024;

namespace baseline {
extern const SimdTable<float> table_f32;
extern const SimdTable<double> table_f64;
}  // namespace baseline
namespace avx2 {
extern const SimdTable<float> table_f32;
extern const SimdTable<double> table_f64;
}  // namespace avx2
namespace avx512 {
extern const SimdTable<float> table_f32;
extern const SimdTable<double> table_f64;
}  // namespace avx512

}  // namespace tk
