// Divides by the Gram matrices of unfoldings, for many tensors in one call:
//     X = B (M Mᵀ + ρ I)⁻¹,   M = Mat_n(C),   ρ = 4ε tr(M Mᵀ),   ε that of T.
//
// ρ is what rounding does to the Gram matrix: a deficient C stays solvable, and ‖(M Mᵀ + ρ I)⁻¹ M‖ is
// bounded; C = 0 gives X = 0. Layout: C in C order as (outer, n, inner); B and X (rows×n) row-major. One
// problem per thread, the dearest first. Cholesky and the two substitutions go through blocks of 32 columns,
// a product each and the rest inside. Numerics: the Gram matrix of a float32 C in float32 sums of 256 terms
// added up in float64, all else in float64.
#include <algorithm>
#include <limits>

#include "core/scratch.h"
#include "cpu/core_tensor.h"
#include "cpu/linalg.h"
#include "cpu/problems.h"

namespace tk {
namespace {

constexpr int64_t nb = 32;

// x (rows×n) ← x (L Lᵀ)⁻¹; row j of lt is column j of L.
void substitute(int64_t rows, int64_t n, const double* lt, double* x) {
  const int64_t step = padded<double>(n);
  for (int64_t begin = 0; begin < n; begin += nb) {  // Z Lᵀ = X, in place
    const int64_t end = std::min(n, begin + nb);
    multiply<double>(rows, end - begin, begin, -1, x, n, 1, lt + begin, step, 1, 1, x + begin, n);
    for (int64_t r = 0; r < rows; ++r) {
      double* row = x + r * n;
      for (int64_t k = begin; k < end; ++k) {
        const double* column = lt + k * step;
        row[k] /= column[k];
        for (int64_t j = k + 1; j < end; ++j) row[j] -= row[k] * column[j];
      }
    }
  }
  for (int64_t begin = (n - 1) / nb * nb; begin >= 0; begin -= nb) {  // X L = Z
    const int64_t end = std::min(n, begin + nb);
    multiply<double>(rows, end - begin, n - end, -1, x + end, n, 1, lt + begin * step + end, 1, step, 1,
                     x + begin, n);
    for (int64_t r = 0; r < rows; ++r) {
      double* row = x + r * n;
      for (int64_t k = end - 1; k >= begin; --k) {
        const double* column = lt + k * step;
        double sum = row[k];
        for (int64_t j = k + 1; j < end; ++j) sum -= row[j] * column[j];
        row[k] = sum / column[k];
      }
    }
  }
}

template <class T>
void solve(const tk_gram_solve_problem& p) {
  const int64_t n = p.n;
  if (n == 0 || p.rows == 0) return;
  Buffer<double> gram(n * n), lt(n * padded<double>(n)), x(p.rows * n);
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
  std::copy_n(static_cast<const T*>(p.right_side), p.rows * n, x.data());
  substitute(p.rows, n, lt, x);
  std::copy_n(x.data(), p.rows * n, static_cast<T*>(p.solution));
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
