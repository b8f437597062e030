// Thin SVD of matrices of different sizes in one call:  A = U diag(s) Vh,  s descending, U (m×k) and Vh (k×n)
// orthonormal also where singular values are zero, k = min(m, n).
//
// Layout: row-major. One problem per thread, the dearest first. Numerics: QR and one-sided Jacobi in float64
// (jacobi_svd.cpp), rounded once. A matrix with a NaN or Inf gives NaN everywhere.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/scratch.h"
#include "cpu/linalg.h"
#include "cpu/problems.h"

namespace tk {
namespace {

template <class T>
void svd_of(const tk_batched_svd_problem& p) {
  const T* a = static_cast<const T*>(p.matrix);
  T *u = static_cast<T*>(p.u), *s = static_cast<T*>(p.s), *vh = static_cast<T*>(p.vh);
  const int64_t k = std::min(p.m, p.n);
  if (!std::isfinite(norm(p.m * p.n, a))) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    std::fill_n(u, p.m * k, nan);
    std::fill_n(s, k, nan);
    std::fill_n(vh, k * p.n, nan);
    return;
  }
  Buffer<double> wide(p.m * p.n), ut(k * p.m), sigma(k), vt(k * p.n);
  std::copy_n(a, p.m * p.n, wide.data());
  // Off-diagonal products a hundred times below the unit roundoff of T change nothing in it.
  svd(p.m, p.n, wide, std::is_same_v<T, float> ? 1e-9 : 3e-16 * std::sqrt(std::max(1.0, double(k))), ut,
      sigma, vt);
  transpose(k, p.m, ut.data(), p.m, u, k);
  std::copy_n(sigma.data(), k, s);
  std::copy_n(vt.data(), k * p.n, vh);
}

}  // namespace
}  // namespace tk

tk_status tk_batched_svd_cpu(tk_dtype dtype, const tk_batched_svd_problem* problems, int64_t count,
                             int threads) {
  const auto cost = [](const tk_batched_svd_problem& p) {
    const double k = std::min(p.m, p.n);
    return 4.0 * p.m * p.n * k + 60 * k * k * k;
  };
  return tk::run_problems(
      dtype, problems, count, threads, [](const tk_batched_svd_problem& p) { return p.m >= 0 && p.n >= 0; },
      cost, [&](auto zero, int64_t i) { tk::svd_of<decltype(zero)>(problems[i]); });
}
