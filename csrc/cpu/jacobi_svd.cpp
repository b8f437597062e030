// One-sided Jacobi: plane rotations that make vectors orthogonal to each other, and the SVD made of it.
//     x_i, x_j ← c x_i − s x_j, s x_i + c x_j   until |x_i·x_j| ≤ tolerance ‖x_i‖‖x_j‖ for every pair.
//
// Layout: one vector per row. Order: cyclic by rows, largest vectors first. Numerics: float64; squared norms
// are updated by the rotations and computed anew at every sweep and after cancellation. Small singular values
// are accurate relative to themselves (Demmel & Veselić 1992), because no vector is ever mixed with rounding
// noise of a larger one.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr int most_sweeps = 40;
constexpr double negligible = 1e-290;  // squared norm below which a vector is zero

// Puts the rows of x (and of `also`) in descending order of their norms.
void sort_rows(int64_t count, int64_t m, double* x, int64_t a, double* also, double* sigma) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return sigma[i] > sigma[j]; });
  if (std::is_sorted(order.begin(), order.end())) return;
  Buffer<double> copy(count * std::max(m, a));
  const auto permute = [&](int64_t width, double* rows) {
    std::copy_n(rows, count * width, copy.data());
    for (int64_t i = 0; i < count; ++i) std::copy_n(copy.data() + order[i] * width, width, rows + i * width);
  };
  permute(m, x);
  if (also) permute(a, also);
  permute(1, sigma);
}

}  // namespace

void jacobi_svd(int64_t count, int64_t m, double* x, int64_t a, double* also, double tolerance,
                double* sigma) {
  const SimdTable<double>& v = simd<double>();
  const auto norms = [&] {
    for (int64_t i = 0; i < count; ++i) {
      sigma[i] = v.sum_squares(m, x + i * m);
      if (sigma[i] < negligible) std::fill_n(x + i * m, m, sigma[i] = 0.0);
    }
  };
  norms();
  sort_rows(count, m, x, a, also, sigma);
  for (int sweep = 0; sweep < most_sweeps; ++sweep) {
    bool rotated = false;
    for (int64_t i = 0; i + 1 < count; ++i)
      for (int64_t j = i + 1; j < count; ++j) {
        double *xi = x + i * m, *xj = x + j * m, product;
        if (sigma[i] == 0 || sigma[j] == 0) continue;
        v.gemv(1, m, xi, m, xj, &product);
        if (!(std::fabs(product) > tolerance * std::sqrt(sigma[i]) * std::sqrt(sigma[j]))) continue;
        rotated = true;
        const double zeta = (sigma[j] - sigma[i]) / (2 * product);
        const double t = std::copysign(1 / (std::fabs(zeta) + std::hypot(1.0, zeta)), zeta);
        const double c = 1 / std::sqrt(1 + t * t), s = c * t;
        v.rotate(m, xi, xj, c, s);
        if (also) v.rotate(a, also + i * a, also + j * a, c, s);
        const double before_i = sigma[i], before_j = sigma[j];
        sigma[i] -= t * product;
        sigma[j] += t * product;
        if (!(sigma[i] > 0.01 * before_i)) sigma[i] = v.sum_squares(m, xi);
        if (!(sigma[j] > 0.01 * before_j)) sigma[j] = v.sum_squares(m, xj);
      }
    norms();
    if (!rotated) break;
    sort_rows(count, m, x, a, also, sigma);
  }
  for (int64_t i = 0; i < count; ++i) sigma[i] = std::sqrt(sigma[i]);
  sort_rows(count, m, x, a, also, sigma);
}

// A Π = Q R with the columns sorted by norm, then Jacobi on the rows of R: Jᵀ R = S Wᵀ, so U = Q J and V = Π
// W.
void svd(int64_t m, int64_t n, const double* a, double tolerance, double* ut, double* s, double* vt) {
  if (m < n) {
    Buffer<double> other(m * n);
    transpose(m, n, a, n, other.data(), m);
    return svd(n, m, other, tolerance, vt, s, ut);
  }
  if (n == 0) return;
  double largest = 0;
  for (int64_t i = 0; i < m * n; ++i) largest = std::max(largest, std::fabs(a[i]));
  int exponent = 0;
  if (largest > 0) std::frexp(largest, &exponent);
  Buffer<double> at(n * m), qt(n * m), r(n * n), j(n * n), length(n);
  transpose(m, n, a, n, at.data(), m);
  for (int64_t i = 0; i < m * n; ++i) at[i] = std::ldexp(at[i], -exponent);
  for (int64_t i = 0; i < n; ++i) length[i] = norm(m, at.data() + i * m);
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t k) { return length[i] > length[k]; });
  for (int64_t i = 0; i < n; ++i) std::copy_n(at.data() + order[i] * m, m, qt.data() + i * m);
  std::copy_n(qt.data(), n * m, at.data());
  householder_qr(m, n, at, qt, r);
  std::fill_n(j.data(), n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) j[i * n + i] = 1;
  jacobi_svd(n, n, r, n, j, tolerance, s);
  multiply<double>(n, m, n, 1, j, n, 1, qt, m, 1, 0, ut, m);
  int64_t kept = 0;
  for (; kept < n && s[kept] > 0; ++kept)
    for (int64_t i = 0; i < n; ++i) r[kept * n + i] /= s[kept];
  complete_rows<double>(n, r, n, kept, n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) vt[i * n + order[k]] = r[i * n + k];
    s[i] = std::ldexp(s[i], exponent);
  }
}

}  // namespace tk
