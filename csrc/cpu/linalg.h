// The dense building blocks of the rank-space operators, one thread each. Vectors are stored as rows of unit
// stride ("transposed storage"): a matrix whose columns are worked on is kept with one column per row.
#pragma once

#include <cstdint>
#include <functional>

namespace tk {

// C (m×n, row stride c_row) = alpha A B + beta C with element strides; allocates its own packing buffer per
// thread.
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_col, const T* b,
              int64_t b_row, int64_t b_col, T beta, T* c, int64_t c_row);

// out (cols×rows) = inᵀ for a rows×cols matrix, both with unit column stride; converts between types.
template <class From, class To>
void transpose(int64_t rows, int64_t cols, const From* in, int64_t in_row, To* out, int64_t out_row);

// A row stride for rows of n elements: whole cache lines, and never a multiple of 512 bytes, because rows
// that far apart fall into the same few sets of the first-level cache.
template <class T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t lines = (n + line - 1) / line;
  return (lines % 8 == 0 ? lines + 1 : lines) * line;
}

// Euclidean norm without overflow or underflow; NaN or Inf only where x has one.
template <class T>
double norm(int64_t n, const T* x);

// orthonormalise.cpp: block Gram-Schmidt of the `count` rows of w (unit rows, length n, padded) against the r
// rows of `fixed` (element strides f_row, f_col) and each other. A row whose remainder is at most `tolerance`
// is dropped. The kept ones come first in w, in order; returns how many.
template <class T>
int64_t orthonormalise_rows(int64_t n, const T* fixed, int64_t r, int64_t f_row, int64_t f_col, T* w,
                            int64_t count, double tolerance);

// Appends unit vectors, orthogonalised, to the `kept` orthonormal rows of q until there are `wanted` (≤ n).
template <class T>
void complete_rows(int64_t n, T* q, int64_t row, int64_t kept, int64_t wanted);

// householder.cpp. Turns x (length n) into v with v[0] = 1 and (I − tau v vᵀ) x = beta e_0; returns beta.
template <class T>
double reflector(int64_t n, T* x, T& tau);

constexpr int64_t block_size = 32;  // reflectors in one block; T is block_size × block_size

// T of H_0 H_1 … = I − Vᵀ T V for the w rows of V (length m).
void block_factor(int64_t m, int64_t w, const double* v, int64_t v_row, const double* tau, double* t);

// rows (count×m) −= (rows Vᵀ) T V: applies (H_0 H_1 …)ᵀ to the columns that `rows` holds; with Tᵀ, H_0 H_1 …
// itself.
void apply_block(int64_t count, int64_t m, int64_t w, const double* v, int64_t v_row, const double* t,
                 bool transposed, double* rows, int64_t row);

// A = Q R with R's diagonal ≥ 0. at: n rows of length m (Aᵀ), destroyed; qt: k rows of
// length m (Qᵀ), r: k×n row-major, k = min(m, n).
void householder_qr(int64_t m, int64_t n, double* at, double* qt, double* r);

// tridiagonal.cpp: A = Q T Qᵀ, T tridiagonal with diagonal d (n) and off-diagonal e (n−1 entries, room for
// n). a (upper triangle, padded rows) is destroyed; row j of v (padded, zero up to j) and tau[j] are the
// reflectors of Q.
template <class T>
void tridiagonalise(int64_t n, T* a, double* d, double* e, T* v, T* tau);

// rows (count×n) ← rows Qᵀ: eigenvectors of T, as rows, become those of A.
void back_transform(int64_t count, int64_t n, const double* v, const double* tau, double* rows);

// divide_and_conquer.cpp: eigenvalues (descending, into `values`) of the tridiagonal matrix d, e, which are
// destroyed, and the leading eigenvectors, as rows of q (room for n×n): as many as choose(values) says.
// Returns that number.
int64_t tridiagonal_eigen(int64_t n, double* d, double* e, const std::function<int64_t(double*)>& choose,
                          double* values, double* q);

// semidefinite_cholesky.cpp: G = L Lᵀ for a positive semidefinite n×n matrix; lt holds Lᵀ in padded rows (row
// j is column j of L, zero before j). A pivot of at most `tolerance` is skipped (zero row); returns the sum
// of those pivots.
template <class T>
double semidefinite_cholesky(int64_t n, const T* g, double tolerance, T* lt);

// jacobi_svd.cpp: one-sided Jacobi on the `count` rows of x (length m); rotations are applied to the rows of
// `also` (length a) too if it is not null. On return the rows are orthogonal to `tolerance` and sorted by
// norm, which is written to sigma.
void jacobi_svd(int64_t count, int64_t m, double* x, int64_t a, double* also, double tolerance,
                double* sigma);

// A = U diag(s) Vᵀ, A m×n row-major. ut: k rows of length m, vt: k rows of length n, s: k, k = min(m, n).
void svd(int64_t m, int64_t n, const double* a, double tolerance, double* ut, double* s, double* vt);

}  // namespace tk
