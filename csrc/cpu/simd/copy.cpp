// Copies: pieces of `length` adjacent elements from one spacing to another (what gathers short rows of a
// tensor into a matrix and scatters a matrix into short rows), the transposition of a matrix in squares of
// one vector, and copies that scale or change the type. Whole vectors, then one partial vector.
#include "cpu/simd/copy.h"

#include "cpu/simd/vector.h"

namespace tk::TK_ISA {

template <class T>
void copy(int64_t count, int64_t length, const T* from, int64_t from_step, T* to, int64_t to_step) {
  using S = Vector<T>;
  const int64_t whole = length / S::lanes * S::lanes;
  const typename S::First tail(length - whole);
  for (int64_t piece = 0; piece < count; ++piece, from += from_step, to += to_step) {
    for (int64_t i = 0; i < whole; i += S::lanes) S::store(to + i, S::load(from + i));
    if (whole < length) S::store(to + whole, S::load(from + whole, tail), tail);
  }
}

template <class T>
void transpose(int64_t rows, int64_t cols, const T* in, int64_t in_row, T* out, int64_t out_row) {
  using S = Vector<T>;
  constexpr int W = S::lanes;
  for (int64_t i = 0; i < rows; i += W) {
    const int64_t high = rows - i < W ? rows - i : W;
    const typename S::First column(high);
    for (int64_t j = 0; j < cols; j += W) {
      const int64_t wide = cols - j < W ? cols - j : W;
      const typename S::First row(wide);
      typename S::Type lines[W] = {};
      const T* from = in + i * in_row + j;
      T* to = out + j * out_row + i;
      if (high == W && wide == W) {
        for (int r = 0; r < W; ++r) lines[r] = S::load(from + r * in_row);
        transpose<T>(lines);
        for (int r = 0; r < W; ++r) S::store(to + r * out_row, lines[r]);
      } else {
        for (int r = 0; r < W; ++r)
          if (r < high) lines[r] = S::load(from + r * in_row, row);
        transpose<T>(lines);
        for (int r = 0; r < W; ++r)
          if (r < wide) S::store(to + r * out_row, lines[r], column);
      }
    }
  }
}

template <class From, class To>
void scale(int64_t n, double factor, const From* x, To* y) {
  constexpr int W = Vector<double>::lanes;
  using Source = Lanes<From, W>;
  using Target = Lanes<To, W>;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const auto wide = __builtin_convertvector(Source::load(x + i), Vector<double>::Type);
    Target::store(y + i, __builtin_convertvector(wide * factor, typename Target::Type));
  }
  for (; i < n; ++i) y[i] = static_cast<To>(x[i] * factor);
}

template void copy<float>(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void copy<double>(int64_t, int64_t, const double*, int64_t, double*, int64_t);
template void transpose<float>(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void transpose<double>(int64_t, int64_t, const double*, int64_t, double*, int64_t);
template void scale<float, float>(int64_t, double, const float*, float*);
template void scale<float, double>(int64_t, double, const float*, double*);
template void scale<double, float>(int64_t, double, const double*, float*);
template void scale<double, double>(int64_t, double, const double*, double*);

}  // namespace tk::TK_ISA
