// Block Gram-Schmidt with reorthogonalisation, and completion of an orthonormal basis.
//
// Rows are first projected against the fixed ones and normalised. Then panels of 16 rows are projected
// against all rows kept before (two products) and orthonormalised inside, row by row, in float64. A
// projection that leaves less than 0.3 of some row is repeated ("twice is enough", Giraud, Langou, Rozložník
// & van den Eshof 2005). What is left of the fixed rows in a new one, noise²_j = (1 + Σ_k c_jk² noise²_k) /
// length_j² in units of rounding, grows with every loss and along chains of them; a panel where it passes 16
// is projected once more against everything, and a row that proves to be mostly noise is dropped there.
// Blocking: a panel of 16 rows in float64, 64 KiB at n = 512, stays in the second-level cache.
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
constexpr double safe = 0.3, noisy = 16;

// w (rows×n) −= (w Fᵀ) F for the r orthonormal rows F, again if a row lost much. lengths[j] = ‖w_j‖ before
// and after; where noise is given, inherited[j] = Σ_k c_jk² noise[k] for the coefficients c = w Fᵀ.
template <class T>
void project(int64_t n, const T* f, int64_t r, int64_t f_row, int64_t f_col, T* w, int64_t rows,
             T* coefficients, double* lengths, const double* noise = nullptr, double* inherited = nullptr) {
  if (r == 0 || rows == 0) return;
  const int64_t row = padded<T>(n);
  bool again = true;
  for (int pass = 0; pass < 2 && again; ++pass) {
    multiply<T>(rows, r, n, 1, w, row, 1, f, f_col, f_row, 0, coefficients, r);
    multiply<T>(rows, n, r, -1, coefficients, r, 1, f, f_row, f_col, 1, w, row);
    again = false;
    for (int64_t j = 0; j < rows; ++j) {
      const double length = norm(n, w + j * row);
      again |= length < safe * lengths[j];
      lengths[j] = length;
      if (!noise || pass > 0) continue;
      inherited[j] = 0;
      for (int64_t k = 0; k < r; ++k)
        inherited[j] += static_cast<double>(coefficients[j * r + k]) * coefficients[j * r + k] * noise[k];
    }
  }
}

// One panel of rows on its way through Gram-Schmidt.
struct Panel {
  double length[width];     // of each row; 1 when it entered
  double inherited[width];  // noise² taken over from the rows it was projected against
};

// Gram-Schmidt inside a panel. Keeps rows with a remainder of more than floor[j], moved to the front together
// with their floors; noise[k] becomes the noise² of kept row k, and their number is returned.
int64_t inside_panel(int64_t n, double* rows_of, int64_t rows, const Panel& panel, double* floor,
                     double* noise) {
  const int64_t row = padded<double>(n);
  double s[width];
  int64_t kept = 0;
  const SimdTable<double>& v = simd<double>();
  for (int64_t j = 0; j < rows; ++j) {
    double* w = rows_of + kept * row;
    if (kept != j) std::copy_n(rows_of + j * row, n, w);
    double length = panel.length[j], inherited = panel.inherited[j];
    for (int pass = 0; pass < 3 && kept > 0; ++pass) {
      v.gemv(kept, n, rows_of, row, w, s);
      v.gemv_subtract(kept, n, rows_of, row, s, w);
      if (pass == 0)
        for (int64_t k = 0; k < kept; ++k) inherited += s[k] * s[k] * noise[k];
      const double before = length;
      length = norm(n, w);
      if (length > 0.5 * before) break;
    }
    if (!(length > floor[j])) continue;
    v.scale(n, 1 / length, w, w);
    noise[kept] = (1 + inherited) / (length * length);
    floor[kept++] = floor[j];
  }
  return kept;
}

}  // namespace

template <class T>
int64_t orthonormalise_rows(int64_t n, const T* fixed, int64_t r, int64_t f_row, int64_t f_col, T* w,
                            int64_t count, double tolerance) {
  const int64_t row = padded<T>(n), panel_row = padded<double>(n);
  Buffer<T> coefficients(std::max(count, width) * std::max<int64_t>({r, count, 1}));
  Buffer<double> rows_of(width * panel_row), lengths(count + 1), floors(count + 1), noise(count + width);
  std::fill_n(lengths.data(), count, 1.0);
  project(n, fixed, r, f_row, f_col, w, count, coefficients.data(), lengths.data());
  int64_t live =
      0;  // rows outside the span of the fixed ones, scaled to length one; their floors scale with them
  for (int64_t j = 0; j < count; ++j) {
    if (!(lengths[j] > tolerance)) continue;
    simd<T>().scale(n, 1 / lengths[j], w + j * row, w + live * row);
    floors[live++] = tolerance / lengths[j];
  }
  int64_t kept = 0;
  for (int64_t begin = 0; begin < live; begin += width) {
    int64_t rows = std::min(width, live - begin);
    double* floor = floors + begin;
    T* block = w + kept * row;
    if (kept != begin) std::copy_n(w + begin * row, rows * row, block);
    Panel panel;
    const auto against_kept = [&] {
      project(n, w, kept, row, int64_t(1), block, rows, coefficients.data(), panel.length, noise.data(),
              panel.inherited);
      for (int64_t j = 0; j < rows; ++j) simd<T>().widen(n, 1, block + j * row, rows_of + j * panel_row);
      rows = inside_panel(n, rows_of, rows, panel, floor, noise + kept);
      for (int64_t j = 0; j < rows; ++j) simd<T>().narrow(n, 1, rows_of + j * panel_row, block + j * row);
    };
    std::fill_n(panel.length, width, 1.0);
    std::fill_n(panel.inherited, width, 0.0);
    against_kept();
    if (std::any_of(noise + kept, noise + kept + rows, [](double x) { return x > noisy; })) {
      std::fill_n(panel.length, width, 1.0);
      std::fill_n(panel.inherited, width, 0.0);
      project(n, fixed, r, f_row, f_col, block, rows, coefficients.data(), panel.length);
      std::fill_n(floor, rows, 0.5);
      against_kept();
    }
    kept += rows;
  }
  return kept;
}

template <class T>
void complete_rows(int64_t n, T* q, int64_t row, int64_t kept, int64_t wanted) {
  if (kept >= wanted) return;
  // missing[i] = ‖(I − QᵀQ) e_i‖²; its sum is n − kept ≥ 1, so the largest is at least 1/n and far above
  // noise.
  std::vector<double> missing(n, 1.0);
  for (int64_t k = 0; k < kept; ++k)
    for (int64_t i = 0; i < n; ++i) missing[i] -= static_cast<double>(q[k * row + i]) * q[k * row + i];
  std::vector<T> s(wanted);
  for (; kept < wanted; ++kept) {
    const int64_t best = std::max_element(missing.begin(), missing.end()) - missing.begin();
    T* w = q + kept * row;
    std::fill_n(w, n, T(0));
    w[best] = 1;
    for (int pass = 0; pass < 3; ++pass) {
      simd<T>().gemv(kept, n, q, row, w, s.data());
      simd<T>().gemv_subtract(kept, n, q, row, s.data(), w);
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
  template void complete_rows<T>(int64_t, T*, int64_t, int64_t, int64_t);
TK_INSTANTIATE(float)
TK_INSTANTIATE(double)
#undef TK_INSTANTIATE

}  // namespace tk
