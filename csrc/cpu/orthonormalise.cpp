// Block Gram-Schmidt with reorthogonalisation, and completion of an orthonormal basis.
//
// Rows are taken in panels of `width`. A panel is projected against the fixed rows and all rows kept before
// (two products per projection), then orthonormalised inside by Gram-Schmidt in float64, each row twice. A
// row that lost more than `safe` of its length carries rounding noise magnified by the loss, so its panel is
// normalised and projected once more against everything ("twice is enough"); a row that is mostly noise is
// dropped there. Blocking: a panel of 16 rows in float64, 64 KiB at n = 512, stays in the second-level cache.
// Numerics: products between panels in T; inside a panel and for norms float64. Deterministic: one thread,
// fixed order. Rounding noise is of order u per projection, far below the dependence tolerance 16 √n u.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr int64_t width = 16;
constexpr double safe = 0.3;

// w (rows×n) −= (w Fᵀ) F for the r orthonormal rows F.
template <class T>
void project(int64_t n, const T* f, int64_t r, int64_t f_row, int64_t f_col, T* w, int64_t rows,
             T* coefficients) {
  if (r == 0 || rows == 0) return;
  multiply<T>(rows, r, n, 1, w, n, 1, f, f_col, f_row, 0, coefficients, r);
  multiply<T>(rows, n, r, -1, coefficients, r, 1, f, f_row, f_col, 1, w, n);
}

// Gram-Schmidt inside a panel. Keeps rows with a remainder above `tolerance`, moved to the front; returns
// their number and the smallest remainder among them.
int64_t inside_panel(int64_t n, double* panel, int64_t rows, double tolerance, double& smallest) {
  double s[width];
  int64_t kept = 0;
  const SimdTable<double>& v = simd<double>();
  for (int64_t j = 0; j < rows; ++j) {
    double* w = panel + kept * n;
    if (kept != j) std::copy_n(panel + j * n, n, w);
    for (int pass = 0; pass < 2 && kept > 0; ++pass) {
      v.gemv(kept, n, panel, n, w, s);
      v.gemv_subtract(kept, n, panel, n, s, w);
    }
    const double length = norm(n, w);
    if (!(length > tolerance)) continue;
    for (int64_t i = 0; i < n; ++i) w[i] /= length;
    if (length < 0.5) {  // what two passes left along the rows before is of order u, now magnified
      v.gemv(kept, n, panel, n, w, s);
      v.gemv_subtract(kept, n, panel, n, s, w);
      const double again = norm(n, w);
      for (int64_t i = 0; i < n; ++i) w[i] /= again;
    }
    smallest = std::min(smallest, length);
    ++kept;
  }
  return kept;
}

}  // namespace

template <class T>
int64_t orthonormalise_rows(int64_t n, const T* fixed, int64_t r, int64_t f_row, int64_t f_col, T* w,
                            int64_t count, double tolerance) {
  Buffer<T> coefficients(std::max(count, width) * std::max<int64_t>({r, count, 1}));
  Buffer<double> panel(width * n);
  project(n, fixed, r, f_row, f_col, w, count, coefficients.data());
  project(n, fixed, r, f_row, f_col, w, count, coefficients.data());
  int64_t kept = 0;
  for (int64_t begin = 0; begin < count; begin += width) {
    int64_t rows = std::min(width, count - begin);
    T* block = w + kept * n;
    if (kept != begin) std::copy_n(w + begin * n, rows * n, block);
    project(n, w, kept, n, int64_t(1), block, rows, coefficients.data());
    project(n, w, kept, n, int64_t(1), block, rows, coefficients.data());
    std::copy_n(block, rows * n, panel.data());
    double smallest = 1;
    rows = inside_panel(n, panel, rows, tolerance, smallest);
    std::copy_n(panel.data(), rows * n, block);
    if (smallest < safe) {
      project(n, fixed, r, f_row, f_col, block, rows, coefficients.data());
      project(n, w, kept, n, int64_t(1), block, rows, coefficients.data());
      std::copy_n(block, rows * n, panel.data());
      rows = inside_panel(n, panel, rows, 0.5, smallest);
      std::copy_n(panel.data(), rows * n, block);
    }
    kept += rows;
  }
  return kept;
}

template <class T>
void complete_rows(int64_t n, T* q, int64_t kept, int64_t wanted) {
  if (kept >= wanted) return;
  // missing[i] = ‖(I − QᵀQ) e_i‖²; its sum is n − kept ≥ 1, so the largest is at least 1/n and far above
  // noise.
  std::vector<double> missing(n, 1.0);
  for (int64_t k = 0; k < kept; ++k)
    for (int64_t i = 0; i < n; ++i) missing[i] -= static_cast<double>(q[k * n + i]) * q[k * n + i];
  std::vector<T> s(wanted);
  for (; kept < wanted; ++kept) {
    const int64_t best = std::max_element(missing.begin(), missing.end()) - missing.begin();
    T* w = q + kept * n;
    std::fill_n(w, n, T(0));
    w[best] = 1;
    for (int pass = 0; pass < 3; ++pass) {
      simd<T>().gemv(kept, n, q, n, w, s.data());
      simd<T>().gemv_subtract(kept, n, q, n, s.data(), w);
      const double length = norm(n, w);
      for (int64_t i = 0; i < n; ++i) w[i] = static_cast<T>(w[i] / length);
    }
    for (int64_t i = 0; i < n; ++i) missing[i] -= static_cast<double>(w[i]) * w[i];
    missing[best] = -1;
  }
}

#define TK_INSTANTIATE(T)                                                                            \
  template int64_t orthonormalise_rows<T>(int64_t, const T*, int64_t, int64_t, int64_t, T*, int64_t, \
                                          double);                                                   \
  template void complete_rows<T>(int64_t, T*, int64_t, int64_t);
TK_INSTANTIATE(float)
TK_INSTANTIATE(double)
#undef TK_INSTANTIATE

}  // namespace tk
