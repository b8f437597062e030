// Matrix-vector kernels: y = A x,  y −= Aᵀ s,  y = S x for a symmetric S of which the upper triangle is read,
// a plane rotation of two vectors, a sum of squares, and the two sums of a secular equation.
//
// All of them stream over rows of unit stride, four rows at a time so that x and y are read once per four
// rows. Numerics: sums in T (sum_squares in float64), split over the lanes of a vector; the order depends on
// the instruction set only, never on threads.
#include "cpu/simd/matvec.h"

#include "cpu/simd/vector.h"

namespace tk::TK_ISA {
namespace {

template <class T>
struct Lanes : Vector<T> {
  static constexpr int W = Vector<T>::lanes;
  using Vec = typename Vector<T>::Type;

  static T sum(Vec v) {
    T lanes[W];
    Vector<T>::store(lanes, v);
    for (int width = W / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
  }
};

template <int rows, class T>
void dots(int64_t n, const T* a, int64_t a_row, const T* x, T* y) {
  using L = Lanes<T>;
  typename L::Vec acc[rows] = {}, more[rows] = {};
  int64_t j = 0;
  for (; j + 2 * L::W <= n; j += 2 * L::W) {
    const auto x0 = L::load(x + j), x1 = L::load(x + j + L::W);
    for (int r = 0; r < rows; ++r) {
      acc[r] += L::load(a + r * a_row + j) * x0;
      more[r] += L::load(a + r * a_row + j + L::W) * x1;
    }
  }
  for (; j + L::W <= n; j += L::W)
    for (int r = 0; r < rows; ++r) acc[r] += L::load(a + r * a_row + j) * L::load(x + j);
  for (int r = 0; r < rows; ++r) y[r] = L::sum(acc[r] + more[r]);
  for (; j < n; ++j)
    for (int r = 0; r < rows; ++r) y[r] += a[r * a_row + j] * x[j];
}

template <int rows, class T>
void subtract(int64_t n, const T* a, int64_t a_row, const T* s, T* y) {
  using L = Lanes<T>;
  int64_t j = 0;
  for (; j + L::W <= n; j += L::W) {
    auto v = L::load(y + j);
    for (int r = 0; r < rows; ++r) v -= s[r] * L::load(a + r * a_row + j);
    L::store(y + j, v);
  }
  for (; j < n; ++j)
    for (int r = 0; r < rows; ++r) y[j] -= s[r] * a[r * a_row + j];
}

}  // namespace

template <class T>
double sum_squares(int64_t n, const T* x) {
  constexpr int W = 8;
  double lanes[W] = {};
  int64_t j = 0;
  for (; j + W <= n; j += W)
    for (int i = 0; i < W; ++i) lanes[i] += static_cast<double>(x[j + i]) * x[j + i];
  for (; j < n; ++j) lanes[0] += static_cast<double>(x[j]) * x[j];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

template <class T>
void gemv(int64_t m, int64_t n, const T* a, int64_t a_row, const T* x, T* y) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) dots<4>(n, a + i * a_row, a_row, x, y + i);
  for (; i < m; ++i) dots<1>(n, a + i * a_row, a_row, x, y + i);
}

template <class T>
void gemv_subtract(int64_t m, int64_t n, const T* a, int64_t a_row, const T* s, T* y) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) subtract<4>(n, a + i * a_row, a_row, s + i, y);
  for (; i < m; ++i) subtract<1>(n, a + i * a_row, a_row, s + i, y);
}

template <class T>
void symv(int64_t n, const T* a, int64_t a_row, const T* x, T* y) {
  using L = Lanes<T>;
  constexpr int rows = 4;
  for (int64_t j = 0; j < n; ++j) y[j] = 0;
  for (int64_t i = 0; i < n; i += rows) {
    const int64_t live = n - i < rows ? n - i : rows;
    const T* block = a + i * a_row;
    for (int64_t r = 0; r < live; ++r)  // the triangle on the diagonal
      for (int64_t c = r; c < live; ++c) {
        y[i + r] += block[r * a_row + i + c] * x[i + c];
        if (c > r) y[i + c] += block[r * a_row + i + c] * x[i + r];
      }
    if (live < rows) break;
    typename L::Vec acc[rows] = {};
    T sum[rows] = {};
    int64_t j = i + rows;
    for (; j + L::W <= n; j += L::W) {
      const auto xj = L::load(x + j);
      auto yj = L::load(y + j);
      for (int r = 0; r < rows; ++r) {
        const auto v = L::load(block + r * a_row + j);
        acc[r] += v * xj;
        yj += x[i + r] * v;
      }
      L::store(y + j, yj);
    }
    for (; j < n; ++j)
      for (int r = 0; r < rows; ++r) {
        sum[r] += block[r * a_row + j] * x[j];
        y[j] += block[r * a_row + j] * x[i + r];
      }
    for (int r = 0; r < rows; ++r) y[i + r] += L::sum(acc[r]) + sum[r];
  }
}

template <class T>
void secular(int64_t n, const T* poles, const T* weights, T shift, T* sums) {
  using L = Lanes<T>;
  typename L::Vec value = {}, slope = {};
  int64_t j = 0;
  for (; j + L::W <= n; j += L::W) {
    const auto inverse = T(1) / (L::load(poles + j) - shift);
    const auto term = L::load(weights + j) * inverse;
    value += term;
    slope += term * inverse;
  }
  sums[0] = L::sum(value);
  sums[1] = L::sum(slope);
  for (; j < n; ++j) {
    const T inverse = T(1) / (poles[j] - shift);
    sums[0] += weights[j] * inverse;
    sums[1] += weights[j] * inverse * inverse;
  }
}

template <class T>
void scale_by_ratio(int64_t n, const T* gaps, const T* poles, T pole, T* x) {
  using L = Lanes<T>;
  int64_t j = 0;
  for (; j + L::W <= n; j += L::W)
    L::store(x + j, L::load(x + j) * (L::load(gaps + j) / (L::load(poles + j) - pole)));
  for (; j < n; ++j) x[j] *= gaps[j] / (poles[j] - pole);
}

template <class T>
void rotate(int64_t n, T* x, T* y, T c, T s) {
  using L = Lanes<T>;
  int64_t j = 0;
  for (; j + L::W <= n; j += L::W) {
    const auto u = L::load(x + j), v = L::load(y + j);
    L::store(x + j, c * u - s * v);
    L::store(y + j, s * u + c * v);
  }
  for (; j < n; ++j) {
    const T u = x[j], v = y[j];
    x[j] = c * u - s * v;
    y[j] = s * u + c * v;
  }
}

#define TK_INSTANTIATE(T)                                                            \
  template double sum_squares<T>(int64_t, const T*);                                 \
  template void gemv<T>(int64_t, int64_t, const T*, int64_t, const T*, T*);          \
  template void gemv_subtract<T>(int64_t, int64_t, const T*, int64_t, const T*, T*); \
  template void symv<T>(int64_t, const T*, int64_t, const T*, T*);                   \
  template void secular<T>(int64_t, const T*, const T*, T, T*);                      \
  template void scale_by_ratio<T>(int64_t, const T*, const T*, T, T*);               \
  template void rotate<T>(int64_t, T*, T*, T, T);
TK_INSTANTIATE(float)
TK_INSTANTIATE(double)
#undef TK_INSTANTIATE

}  // namespace tk::TK_ISA
