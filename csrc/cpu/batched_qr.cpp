// Reduced QR of matrices of different sizes in one call:  A = Q R,  Q (m×k) orthonormal, R (k×n) upper
// triangular with a non-negative diagonal, k = min(m, n).
//
// Layout: row-major outside, one column per row inside. One problem per thread, the dearest first. Blocking
// and numerics: householder.cpp. A matrix with a NaN or Inf gives NaN everywhere.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/scratch.h"
#include "cpu/linalg.h"
#include "cpu/problems.h"

namespace tk {
namespace {

template <class T>
void qr(const tk_batched_qr_problem& p) {
  const T* a = static_cast<const T*>(p.matrix);
  T *q = static_cast<T*>(p.q), *r = static_cast<T*>(p.r);
  const int64_t k = std::min(p.m, p.n);
  if (!std::isfinite(norm(p.m * p.n, a))) {
    std::fill_n(q, p.m * k, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(r, k * p.n, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  Buffer<double> at(p.n * p.m), qt(k * p.m), triangle(k * p.n);
  transpose(p.m, p.n, a, p.n, at.data(), p.m);
  householder_qr(p.m, p.n, at, qt, triangle);
  std::copy_n(triangle.data(), k * p.n, r);
  transpose(k, p.m, qt.data(), p.m, q, k);
}

}  // namespace
}  // namespace tk

tk_status tk_batched_qr_cpu(tk_dtype dtype, const tk_batched_qr_problem* problems, int64_t count,
                            int threads) {
  return tk::run_problems(
      dtype, problems, count, threads, [](const tk_batched_qr_problem& p) { return p.m >= 0 && p.n >= 0; },
      [](const tk_batched_qr_problem& p) { return 4.0 * p.m * p.n * std::min(p.m, p.n); },
      [&](auto zero, int64_t i) { tk::qr<decltype(zero)>(problems[i]); });
}
