// Rotates bases of different sizes in one call and keeps them orthonormal:
//     Q = B P,   U' = Q (3I − QᵀQ) / 2,
// one Newton step towards the nearest orthonormal matrix, which takes away what rounding adds in every
// product.
//
// Layout: row-major; the columns of P in use may be part of a larger matrix. One problem per thread, the
// dearest first. Numerics: products in T; QᵀQ in sums of 256 terms that are added in float64 (half of it, by
// symmetry).
#include <algorithm>

#include "core/scratch.h"
#include "cpu/core_tensor.h"
#include "cpu/linalg.h"
#include "cpu/problems.h"

namespace tk {
namespace {

template <class T>
void rotate(const tk_rotate_bases_problem& p) {
  const int64_t n = p.n, r = p.rank;
  Buffer<T> q(n * r), newton(r * r);
  Buffer<double> gram(r * r);
  multiply<T>(n, r, p.size, 1, static_cast<const T*>(p.basis), p.size, 1, static_cast<const T*>(p.rotation),
              p.rotation_row, 1, 0, q, r);
  gram_strip<T>(r, r, n, q, 1, r, false, gram);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < i; ++j)
      newton[i * r + j] = newton[j * r + i] = static_cast<T>(-0.5 * gram[i * r + j]);
    newton[i * r + i] = static_cast<T>(1.5 - 0.5 * gram[i * r + i]);
  }
  multiply<T>(n, r, r, 1, q, r, 1, newton, r, 1, 0, static_cast<T*>(p.rotated), r);
}

}  // namespace
}  // namespace tk

tk_status tk_rotate_bases_cpu(tk_dtype dtype, const tk_rotate_bases_problem* problems, int64_t count,
                              int threads) {
  using Problem = tk_rotate_bases_problem;
  return tk::run_problems(
      dtype, problems, count, threads,
      [](const Problem& p) { return p.n >= 0 && p.size >= 0 && p.rank >= 0 && p.rotation_row >= p.rank; },
      [](const Problem& p) { return double(p.n) * p.rank * (2 * p.size + 3 * p.rank); },
      [&](auto zero, int64_t i) { tk::rotate<decltype(zero)>(problems[i]); });
}
