// Divides by the Gram matrices of unfoldings, for many tensors in one call:
//     X = B (M Mᵀ + ρ I)⁻¹,   M = Mat_n(C),   ρ = 4ε tr(M Mᵀ),   ε that of T.
//
// ρ is what rounding does to the Gram matrix: a deficient C stays solvable, and ‖(M Mᵀ + ρ I)⁻¹ M‖ is
// bounded; C = 0 gives X = 0. Layout: C in C order as (outer, n, inner); B and X (rows×n) row-major, inside
// with one right side per column. One problem per thread, the dearest first. Cholesky and the two
// substitutions go through blocks of 32 rows, a product each and vectors along the right sides inside.
// Numerics: the Gram matrix of a float32 C in float32 sums of 256 terms added up in float64, all else in
// float64.
#include <algorithm>
#include <limits>

#include "core/scratch.h"
#include "cpu/core_tensor.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"
#include "cpu/problems.h"

namespace tk {
namespace {

constexpr int64_t nb = 32;

// x (n×rows, row stride `row`) ← (L Lᵀ)⁻¹ x; row j of lt is column j of L. One right side per column, so that
// the steps inside a block run along all right sides.
void substitute(int64_t rows, int64_t n, const double* lt, double* x, int64_t row) {
  const int64_t step = padded<double>(n);
  const SimdTable<double>& v = simd<double>();
  double s[nb];
  for (int64_t begin = 0; begin < n; begin += nb) {  // L Z = X, in place
    const int64_t end = std::min(n, begin + nb);
    multiply<double>(end - begin, rows, begin, -1, lt + begin, 1, step, x, row, 1, 1, x + begin * row, row);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t j = begin; j < k; ++j) s[j - begin] = lt[j * step + k];
      v.gemv_subtract(k - begin, rows, x + begin * row, row, s, x + k * row);
      v.scale(rows, 1 / lt[k * step + k], x + k * row, x + k * row);
    }
  }
  for (int64_t begin = (n - 1) / nb * nb; begin >= 0; begin -= nb) {  // Lᵀ X = Z
    const int64_t end = std::min(n, begin + nb);
    multiply<double>(end - begin, rows, n - end, -1, lt + begin * step + end, step, 1, x + end * row, row, 1,
                     1, x + begin * row, row);
    for (int64_t k = end - 1; k >= begin; --k) {
      v.gemv_subtract(end - k - 1, rows, x + (k + 1) * row, row, lt + k * step + k + 1, x + k * row);
      v.scale(rows, 1 / lt[k * step + k], x + k * row, x + k * row);
    }
  }
}

template <class T>
void solve(const tk_gram_solve_problem& p) {
  const int64_t n = p.n;
  if (n == 0 || p.rows == 0) return;
  const int64_t row = padded<double>(p.rows);
  Buffer<double> gram(n * n), lt(n * padded<double>(n)), x(n * row);
  mode_gram(static_cast<const T*>(p.tensor), p.outer, n, p.inner, false, gram.data());
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += gram[i * n + i];
  if (trace == 0) {
    std::fill_n(static_cast<T*>(p.solution), p.rows * n, T(0));
    return;
  }
  const double ridge = 4 * std::numeric_limits<T>::epsilon() * trace;
  for (int64_t i = 0; i < n; ++i) gram[i * n + i] += ridge;
  // A matrix that is not finite has no such pivot; dividing by the zero diagonal, the result is not finite
  // either.
  semidefinite_cholesky<double>(n, gram, 0, lt);
  transpose(p.rows, n, static_cast<const T*>(p.right_side), n, x.data(), row);
  substitute(p.rows, n, lt, x, row);
  transpose(n, p.rows, x.data(), row, static_cast<T*>(p.solution), n);
}

}  // namespace
}  // namespace tk

tk_status tk_gram_solve_cpu(tk_dtype dtype, const tk_gram_solve_problem* problems, int64_t count,
                            int threads) {
  using Problem = tk_gram_solve_problem;
  return tk::run_problems(
      dtype, problems, count, threads,
      [](const Problem& p) { return p.outer >= 0 && p.n >= 0 && p.inner >= 0 && p.rows >= 0; },
      [](const Problem& p) { return double(p.n) * p.n * (p.outer * p.inner + 4 * p.rows + p.n); },
      [&](auto zero, int64_t i) { tk::solve<decltype(zero)>(problems[i]); });
}
