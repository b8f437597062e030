// Matrix-vector kernels: y = A x,  y −= Aᵀ s,  y = S x for a symmetric S of which the upper triangle is read,
// a plane rotation of two vectors, a sum of squares, and the two sums of a secular equation.
//
// All of them stream over rows of unit stride, four rows at a time so that x and y are read once per four
// rows. Numerics: sums in T (sum_squares in float64), split over the lanes of a vector; the order depends on
// the instruction set only, never on threads.
#include "cpu/simd/matvec.h"

#include <type_traits>

#include "cpu/simd/vector.h"

namespace tk::TK_ISA {
namespace {

// Halves are added until one lane is left. Shuffles by computed indices would not become single instructions.
template <class T, int count = Vector<T>::lanes>
T sum(typename Lanes<T, count>::Type v) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    typename Lanes<T, count / 2>::Type halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    return sum<T, count / 2>(halves[0] + halves[1]);
  }
}

// Ragged ends are masked: they are most of what short rows have.
template <int rows, class T>
void dots(int64_t n, const T* a, int64_t a_row, const T* x, T* y) {
  using L = Vector<T>;
  typename L::Type acc[rows] = {}, more[rows] = {};
  int64_t j = 0;
  for (; j + 2 * L::lanes <= n; j += 2 * L::lanes) {
    const auto x0 = L::load(x + j), x1 = L::load(x + j + L::lanes);
    for (int r = 0; r < rows; ++r) {
      acc[r] += L::load(a + r * a_row + j) * x0;
      more[r] += L::load(a + r * a_row + j + L::lanes) * x1;
    }
  }
  if (j + L::lanes <= n) {
    const auto xj = L::load(x + j);
    for (int r = 0; r < rows; ++r) acc[r] += L::load(a + r * a_row + j) * xj;
    j += L::lanes;
  }
  if (j < n) {
    const typename L::First rest(n - j);
    const auto xj = L::load(x + j, rest);
    for (int r = 0; r < rows; ++r) more[r] += L::load(a + r * a_row + j, rest) * xj;
  }
  for (int r = 0; r < rows; ++r) y[r] = sum<T>(acc[r] + more[r]);
}

template <int rows, class T>
void subtract(int64_t n, const T* a, int64_t a_row, const T* s, T* y) {
  using L = Vector<T>;
  int64_t j = 0;
  for (; j + L::lanes <= n; j += L::lanes) {
    auto v = L::load(y + j);
    for (int r = 0; r < rows; ++r) v -= s[r] * L::load(a + r * a_row + j);
    L::store(y + j, v);
  }
  if (j == n) return;
  const typename L::First rest(n - j);
  auto v = L::load(y + j, rest);
  for (int r = 0; r < rows; ++r) v -= s[r] * L::load(a + r * a_row + j, rest);
  L::store(y + j, v, rest);
}

}  // namespace

template <class T>
double sum_squares(int64_t n, const T* x) {
  using D = Vector<double>;
  constexpr int W = D::lanes, ways = 4;
  D::Type sums[ways] = {};
  const auto add = [&](D::Type& sum, const T* from) {
    const auto v = __builtin_convertvector(Lanes<T, W>::load(from), D::Type);
    sum += v * v;
  };
  int64_t j = 0;
  for (; j + ways * W <= n; j += ways * W)
    for (int k = 0; k < ways; ++k) add(sums[k], x + j + k * W);
  for (; j + W <= n; j += W) add(sums[0], x + j);
  if (j < n) {
    T last[W] = {};
    for (int64_t i = j; i < n; ++i) last[i - j] = x[i];
    add(sums[1], last);
  }
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void gemv(int64_t m, int64_t n, const T* a, int64_t a_row, const T* x, T* y) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) dots<4>(n, a + i * a_row, a_row, x, y + i);
  if (m - i == 3) dots<3>(n, a + i * a_row, a_row, x, y + i);
  if (m - i == 2) dots<2>(n, a + i * a_row, a_row, x, y + i);
  if (m - i == 1) dots<1>(n, a + i * a_row, a_row, x, y + i);
}

template <class T>
void gemv_subtract(int64_t m, int64_t n, const T* a, int64_t a_row, const T* s, T* y) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) subtract<4>(n, a + i * a_row, a_row, s + i, y);
  if (m - i == 3) subtract<3>(n, a + i * a_row, a_row, s + i, y);
  if (m - i == 2) subtract<2>(n, a + i * a_row, a_row, s + i, y);
  if (m - i == 1) subtract<1>(n, a + i * a_row, a_row, s + i, y);
}

// Vectors of y lie on one grid for all rows, and its ends are not masked: a load that overlaps two fresh
// stores, or a masked one, would wait for them to reach the cache.
template <class T>
void symv(int64_t n, const T* a, int64_t a_row, const T* x, T* y) {
  using L = Vector<T>;
  constexpr int W = L::lanes, rows = 4 < W ? 4 : W;
  using Number = std::conditional_t<sizeof(T) == sizeof(int32_t), int32_t, int64_t>;
  typedef Number Index __attribute__((vector_size(vector_bytes)));
  Index lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t j = 0; j < n; ++j) y[j] = 0;
  for (int64_t g = 0; g < n; g += W) {
    const int64_t high = n - g < W ? n - g : W;
    const typename L::First group(high);
    const auto xg = L::load(x + g, group);
    auto yg = L::load(y + g);
    T sums[W] = {};
    for (int64_t i = 0; i < high; i += rows) {
      const T* line[rows];
      T factor[rows];
      typename L::Type acc[rows];
      for (int r = 0; r < rows; ++r) {
        const bool live = i + r < high;
        line[r] = a + (live ? g + i + r : n - 1) * a_row;
        factor[r] = live ? x[g + i + r] : T(0);
        const auto v = L::load(line[r] + g, group);
        const Index own = lane - static_cast<Number>(i + r);
        const typename L::Type zero = {};
        acc[r] = (own >= 0 ? v : zero) * xg;
        yg += factor[r] * (own > 0 ? v : zero);
      }
      int64_t j = g + W;
      for (; j + W <= n; j += W) {
        const auto xj = L::load(x + j);
        auto yj = L::load(y + j);
        for (int r = 0; r < rows; ++r) {
          const auto v = L::load(line[r] + j);
          acc[r] += v * xj;
          yj += factor[r] * v;
        }
        L::store(y + j, yj);
      }
      if (j < n) {
        const typename L::First rest(n - j);
        const auto xj = L::load(x + j, rest);
        auto yj = L::load(y + j);
        for (int r = 0; r < rows; ++r) {
          const auto v = L::load(line[r] + j, rest);
          acc[r] += v * xj;
          yj += factor[r] * v;
        }
        L::store(y + j, yj);
      }
      for (int r = 0; r < rows && i + r < high; ++r) sums[i + r] = sum<T>(acc[r]);
    }
    L::store(y + g, yg + L::load(sums));
  }
}

template <class T>
void secular(int64_t n, const T* poles, const T* weights, T shift, T* sums) {
  using L = Vector<T>;
  typename L::Type value = {}, slope = {};
  int64_t j = 0;
  for (; j + L::lanes <= n; j += L::lanes) {
    const auto inverse = T(1) / (L::load(poles + j) - shift);
    const auto term = L::load(weights + j) * inverse;
    value += term;
    slope += term * inverse;
  }
  sums[0] = sum<T>(value);
  sums[1] = sum<T>(slope);
  for (; j < n; ++j) {
    const T inverse = T(1) / (poles[j] - shift);
    sums[0] += weights[j] * inverse;
    sums[1] += weights[j] * inverse * inverse;
  }
}

template <class T>
void scale_by_ratio(int64_t n, const T* gaps, const T* poles, T pole, T* x) {
  using L = Vector<T>;
  int64_t j = 0;
  for (; j + L::lanes <= n; j += L::lanes)
    L::store(x + j, L::load(x + j) * (L::load(gaps + j) / (L::load(poles + j) - pole)));
  for (; j < n; ++j) x[j] *= gaps[j] / (poles[j] - pole);
}

template <class T>
void rotate(int64_t n, T* x, T* y, T c, T s) {
  using L = Vector<T>;
  int64_t j = 0;
  for (; j + L::lanes <= n; j += L::lanes) {
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
