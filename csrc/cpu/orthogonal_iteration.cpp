// One step of orthogonal iteration:  P = orth(G[:, :r]) = [I; X] R⁻¹,  X = B A⁻¹,  RᵀR = I + XᵀX,
// for a Gram matrix G = [A Bᵀ; B D] whose leading subspace lies near the first r axes (after a small step).
//
// Work: Cholesky factors and triangular inverses of A and of I + XᵀX, everything else by products; D is never
// needed. Numerics: T. X is as exact as cond(A) u allows relative to B, and B is small where D is: what
// rounding adds to the discarded energy is of second order in that, and relative to it, not to |G|.
#include "cpu/orthogonal_iteration.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

// out = R⁻¹ for an upper triangular R (padded rows, as `out`, which is zero below the diagonal on entry).
template <class T>
void invert_upper(int64_t n, const T* r, T* out, T* work) {
  constexpr int64_t leaf = 32;
  const int64_t step = padded<T>(n);
  const auto invert = [&](auto&& self, int64_t begin, int64_t end) -> void {
    if (end - begin <= leaf) {
      for (int64_t i = end - 1; i >= begin; --i) {
        T* row = out + i * step;
        simd<T>().gemv_subtract(end - i - 1, end - i - 1, row + step + i + 1, step, r + i * step + i + 1,
                                row + i + 1);
        const T scale = 1 / r[i * step + i];
        for (int64_t j = i + 1; j < end; ++j) row[j] *= scale;
        row[i] = scale;
      }
      return;
    }
    const int64_t middle = begin + (end - begin) / 2, upper = middle - begin, lower = end - middle;
    self(self, begin, middle);
    self(self, middle, end);
    multiply<T>(upper, lower, lower, 1, r + begin * step + middle, step, 1, out + middle * step + middle,
                step, 1, 0, work, lower);
    multiply<T>(upper, lower, upper, -1, out + begin * step + begin, step, 1, work, lower, 1, 0,
                out + begin * step + middle, step);
  };
  invert(invert, 0, n);
}

// G = RᵀR and R⁻¹, both with padded rows; false where G is not definite to rounding.
template <class T>
bool factor_and_invert(int64_t n, const T* g, T* r, T* inverse) {
  const int64_t step = padded<T>(n);
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, g[i * n + i]);
  semidefinite_cholesky<T>(n, g, n * std::numeric_limits<T>::epsilon() * largest, r);
  for (int64_t i = 0; i < n; ++i)
    if (!(r[i * step + i] > 0)) return false;
  Buffer<T> work(n * n);
  std::fill_n(inverse, n * step, T(0));
  invert_upper<T>(n, r, inverse, work);
  return true;
}

}  // namespace

template <class T>
bool orthogonal_iteration(int64_t n, int64_t r, const double* strip, T* x, T* rows,
                          OrthogonalIteration& found) {
  const int64_t step = padded<T>(r), rest = n - r;
  Buffer<T> a(r * r), b(rest * r), w(rest * r), triangle(r * step), inverse(r * step);
  double scale = 0;
  for (int64_t i = 0; i < r; ++i) scale = std::max(scale, strip[i * r + i]);
  if (!(scale > 0)) return false;
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) a[i * r + j] = a[j * r + i] = static_cast<T>(strip[i * r + j] / scale);
  for (int64_t i = 0; i < rest * r; ++i) b[i] = static_cast<T>(strip[r * r + i] / scale);
  const double length = norm(r * r, a.data());
  if (!factor_and_invert<T>(r, a, triangle, inverse)) return false;
  multiply<T>(rest, r, r, 1, b, r, 1, inverse, step, 1, 0, w, r);
  multiply<T>(rest, r, r, 1, w, r, 1, inverse, 1, step, 0, x, r);
  multiply<T>(r, r, r, 1, inverse, step, 1, inverse, 1, step, 0, a, r);
  const double explained = norm(rest * r, w.data()), largest_inverse = norm(r * r, a.data());
  multiply<T>(r, r, rest, 1, x, 1, r, x, r, 1, 0, a, r);
  const double tangent = std::sqrt(norm(r * r, a.data()));
  found = {explained * explained * scale, tangent, largest_inverse / scale,
           4 * std::numeric_limits<T>::epsilon() * length * largest_inverse};
  for (int64_t i = 0; i < r; ++i) a[i * r + i] += 1;
  if (!factor_and_invert<T>(r, a, triangle, inverse)) return false;
  transpose(r, r, inverse.data(), step, rows, n);
  multiply<T>(r, rest, r, 1, inverse, 1, step, x, 1, r, 0, rows + r, n);
  return true;
}

template bool orthogonal_iteration<float>(int64_t, int64_t, const double*, float*, float*,
                                          OrthogonalIteration&);
template bool orthogonal_iteration<double>(int64_t, int64_t, const double*, double*, double*,
                                           OrthogonalIteration&);

}  // namespace tk
