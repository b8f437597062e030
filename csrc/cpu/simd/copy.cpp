// Copies `count` pieces of `length` adjacent elements from one spacing to another: what gathers short rows of
// a tensor into a matrix and scatters a matrix into short rows. Whole vectors, then one partial vector per
// piece.
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

template void copy<float>(int64_t, int64_t, const float*, int64_t, float*, int64_t);
template void copy<double>(int64_t, int64_t, const double*, int64_t, double*, int64_t);

}  // namespace tk::TK_ISA
