// Orthonormal bases of directions outside given bases, all problems in one call:
//     V = orth((I − U Uᵀ) D),   columns that depend on U or on columns before them dropped.
//
// Layout: U (n×r), D and V (n×p) row-major; inside, one direction per row. One problem per thread, the
// dearest first. Each direction is normalised first, so that its size never decides; then block Gram-Schmidt
// with reorthogonalisation (orthonormalise.cpp has the blocking and the numerics).
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"
#include "cpu/problems.h"

namespace tk {
namespace {

constexpr double smallest_direction = 1e-30;

template <class T>
bool all_finite(int64_t n, const T* x) {
  return std::isfinite(norm(n, x));
}

template <class T>
int64_t tangent_basis(const tk_tangent_basis_problem& p) {
  const T* basis = static_cast<const T*>(p.basis);
  const T* directions = static_cast<const T*>(p.directions);
  T* found = static_cast<T*>(p.found);
  std::fill_n(found, p.n * p.count, T(0));
  if (!all_finite(p.n * p.rank, basis) || !all_finite(p.n * p.count, directions)) return -1;
  const int64_t row = padded<T>(p.n);
  Buffer<T> w(row * p.count);
  transpose(p.n, p.count, directions, p.count, w.data(), row);
  int64_t live = 0;
  for (int64_t j = 0; j < p.count; ++j) {
    const T* d = w.data() + j * row;
    const double length = norm(p.n, d);
    if (!(length >= smallest_direction)) continue;
    simd<T>().scale(p.n, 1 / length, d, w.data() + live++ * row);
  }
  const double tolerance = 8 * std::sqrt(static_cast<double>(p.n)) * std::numeric_limits<T>::epsilon();
  live = orthonormalise_rows<T>(p.n, basis, p.rank, 1, p.rank, w.data(), live, tolerance);
  transpose(live, p.n, w.data(), row, found, p.count);
  return live;
}

}  // namespace
}  // namespace tk

tk_status tk_tangent_basis_cpu(tk_dtype dtype, const tk_tangent_basis_problem* problems, int64_t count,
                               int64_t* counts, int threads) {
  using Problem = tk_tangent_basis_problem;
  return tk::run_problems(
      dtype, problems, count, threads,
      [](const Problem& p) { return p.n >= 0 && p.rank >= 0 && p.count >= 0; },
      [](const Problem& p) { return 8.0 * p.n * p.count * (p.rank + p.count + 1); },
      [&](auto zero, int64_t i) { counts[i] = tk::tangent_basis<decltype(zero)>(problems[i]); });
}
