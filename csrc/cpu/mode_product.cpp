// n-mode product on the host:  y[o,r,i] = Σ_k M[r,k] x[o,k,i].
//
// inner = 1: one product, x (outer×n) times Mᵀ. Otherwise, for every o, M (rows×n) times x_o (n×inner), read
// and written in place. Where inner is short and not a multiple of the vector length, the columns (o, i) of
// as many o as fill 256 columns are gathered into one n×256 matrix in scratch, multiplied, and scattered: a
// window mode of size 3 then costs three columns and not a whole vector. Threads split the columns; each sum
// runs over k in one order, so the cut changes no bit.
#include "cpu/mode_product.h"

#include "core/scratch.h"
#include "cpu/isa.h"

namespace tk {
namespace {

constexpr int64_t gathered_columns = 256;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t multiple(int64_t a, int64_t of) { return (a + of - 1) / of * of; }

}  // namespace

template <class T>
bool ModeProduct<T>::gathers() const {
  const int64_t lanes = simd<T>().lanes;
  return inner > 1 && outer > 1 && rows >= 2 && 5 * inner < 4 * multiple(inner, lanes);
}

template <class T>
int64_t ModeProduct<T>::grain() const {
  if (inner == 1) return 48;
  return gathers() || (outer > 1 && inner <= 1024) ? inner : 64;
}

template <class T>
int64_t ModeProduct<T>::scratch() const {
  if (!gathers()) return gemm_scratch;
  const int64_t most = multiple(least(columns(), gathered_columns + inner), 16);
  return gemm_scratch + multiple((n + rows) * most, 16);
}

template <class T>
void ModeProduct<T>::run(const T* x, T* y, Range columns, T* scratch) const {
  const SimdTable<T>& table = simd<T>();
  if (inner == 1) {
    table.gemm({columns.end - columns.begin, rows, n, T(1), x + columns.begin * n, n, 1, matrix, col, row,
                T(0), y + columns.begin * rows, rows},
               scratch);
    return;
  }
  if (gathers()) {
    const int64_t group = least(outer, (gathered_columns + inner - 1) / inner), last = columns.end / inner;
    T *gathered = scratch + gemm_scratch, *product = gathered + n * multiple(group * inner, 16);
    for (int64_t o = columns.begin / inner; o < last; o += group) {
      const int64_t count = least(group, last - o), width = count * inner;
      for (int64_t k = 0; k < n; ++k)
        table.copy(count, inner, x + (o * n + k) * inner, n * inner, gathered + k * width, inner);
      table.gemm({rows, width, n, T(1), matrix, row, col, gathered, width, 1, T(0), product, width}, scratch);
      for (int64_t r = 0; r < rows; ++r)
        table.copy(count, inner, product + r * width, inner, y + (o * rows + r) * inner, rows * inner);
    }
    return;
  }
  for (int64_t begin = columns.begin; begin < columns.end;) {
    const int64_t o = begin / inner, i = begin % inner, size = least(inner - i, columns.end - begin);
    table.gemm({rows, size, n, T(1), matrix, row, col, x + o * n * inner + i, inner, 1, T(0),
                y + o * rows * inner + i, inner},
               scratch);
    begin += size;
  }
}

template <class T>
bool ModeProduct<T>::run(const T* x, T* y, int threads) const {
  return parallel_for(columns(), grain(), work() < parallel_work ? 1 : threads, [&](Range range) {
    Scratch<T> buffer(scratch());
    if (buffer) run(x, y, range, buffer.data());
    return bool(buffer);
  });
}

template struct ModeProduct<float>;
template struct ModeProduct<double>;

}  // namespace tk
