// Contraction of two tensors over every index but one:  C[p,q] = Σ_{o,i} a[o,p,i] b[o,q,i].
//
// One matrix product per o with depth inner, or, where inner is short, one per group of o that is gathered to
// a depth of 256; inner = 1 is one product aᵀ b. The longer operand is the one that is read in place, so that
// C may come out transposed. Small results (to 32,768 numbers) over a long (o, i) are summed in up to eight
// chunks, whose number depends on the sizes only and which are added in order; otherwise threads split rows
// or columns of C. Either way no bit depends on the number of threads. Sums are in T.
#include "cpu/cross_gram.h"

#include "core/dispatch.h"
#include "core/scratch.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/problems.h"
#include "tucker_kernels.h"

namespace tk {
namespace {

constexpr int64_t gathered_depth = 256, shortest_direct = 64, shortest_chunk = 1024, most_chunks = 8,
                  largest_chunked = 1 << 15;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct CrossGram {
  int64_t outer, m, n, inner;
  const T *a, *b;

  bool gathers() const { return inner > 1 && outer > 1 && inner < shortest_direct; }
  int64_t group() const { return least(outer, (gathered_depth + inner - 1) / inner); }
  int64_t scratch() const { return gemm_scratch + (gathers() ? (m + n) * group() * inner : 0); }

  // c (rows × cols of C, row stride c_row) = the sum over the pairs (o, i) numbered begin to end.
  void run(Range rows, Range cols, Range pairs, T* c, int64_t c_row, T* scratch) const {
    const SimdTable<T>& table = simd<T>();
    const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
    const T *left = a + rows.begin * inner, *right = b + cols.begin * inner;
    T beta = 0;
    const auto add = [&](int64_t depth, const T* x, int64_t x_row, int64_t x_col, const T* y, int64_t y_row,
                         int64_t y_col) {
      table.gemm({height, width, depth, T(1), x, x_row, x_col, y, y_row, y_col, beta, c, c_row}, scratch);
      beta = 1;
    };
    if (inner == 1) {
      add(pairs.end - pairs.begin, left + pairs.begin * m, 1, m, right + pairs.begin * n, n, 1);
      return;
    }
    if (!gathers()) {
      for (int64_t begin = pairs.begin; begin < pairs.end;) {
        const int64_t o = begin / inner, i = begin % inner, depth = least(inner - i, pairs.end - begin);
        add(depth, left + o * m * inner + i, inner, 1, right + o * n * inner + i, 1, inner);
        begin += depth;
      }
      return;
    }
    T *x = scratch + gemm_scratch, *y = x + m * group() * inner;
    const int64_t last = pairs.end / inner;
    for (int64_t o = pairs.begin / inner; o < last; o += group()) {
      const int64_t count = least(group(), last - o), depth = count * inner;
      for (int64_t r = 0; r < height; ++r)
        table.copy(count, inner, left + (o * m + r) * inner, m * inner, x + r * depth, inner);
      for (int64_t r = 0; r < width; ++r)
        table.copy(count, inner, right + (o * n + r) * inner, n * inner, y + r * depth, inner);
      add(depth, x, depth, 1, y, 1, depth);
    }
  }
};

}  // namespace

template <class T>
bool cross_gram(const T* a, int64_t p, const T* b, int64_t q, int64_t outer, int64_t inner, T* out,
                int threads) {
  if (p == 0 || q == 0) return true;
  if (outer == 0 || inner == 0) {
    for (int64_t i = 0; i < p * q; ++i) out[i] = 0;
    return true;
  }
  // Rows of C cost a broadcast, columns fill vectors (inner = 1) or are transposed while packing (inner > 1).
  const bool flip = inner > 1 ? p < q : q < p && q % simd<T>().lanes != 0;
  const CrossGram<T> g =
      flip ? CrossGram<T>{outer, q, p, inner, b, a} : CrossGram<T>{outer, p, q, inner, a, b};
  const int64_t pairs = outer * inner, grain = g.gathers() ? inner : 1;
  const bool small = p * q <= largest_chunked;
  const int64_t fitting =
      small ? least(most_chunks, least(pairs / shortest_chunk, (pairs + grain - 1) / grain)) : 1;
  const int64_t chunks = fitting > 1 ? fitting : 1;
  const bool direct = chunks == 1 && !flip;
  Scratch<T> sums(direct ? 0 : chunks * p * q);
  if (!sums) return false;
  T* c = direct ? out : sums.data();
  const bool by_chunk = chunks > 1, by_row = !by_chunk && g.m >= g.n;
  const int64_t size = by_chunk ? chunks : by_row ? g.m : g.n, step = by_chunk ? 1 : by_row ? 6 : 64;
  const int used = pairs * p * q < parallel_work ? 1 : threads;
  const bool good = parallel_for(size, step, used, [&](Range range) {
    Scratch<T> buffer(g.scratch());
    if (!buffer) return false;
    const Range rows = by_row ? range : Range{0, g.m}, cols = by_chunk || by_row ? Range{0, g.n} : range;
    if (!by_chunk) {
      g.run(rows, cols, {0, pairs}, c + rows.begin * g.n + cols.begin, g.n, buffer.data());
      return true;
    }
    for (int64_t i = range.begin; i < range.end; ++i)
      g.run(rows, cols, part_of(pairs, grain, i, chunks), c + i * p * q, g.n, buffer.data());
    return true;
  });
  if (!good || direct) return good;
  for (int64_t i = 0; i < g.m; ++i)
    for (int64_t j = 0; j < g.n; ++j) {
      T sum = c[i * g.n + j];
      for (int64_t k = 1; k < chunks; ++k) sum += c[k * p * q + i * g.n + j];
      out[flip ? j * g.m + i : i * g.n + j] = sum;
    }
  return true;
}

template bool cross_gram<float>(const float*, int64_t, const float*, int64_t, int64_t, int64_t, float*, int);
template bool cross_gram<double>(const double*, int64_t, const double*, int64_t, int64_t, int64_t, double*,
                                 int);

}  // namespace tk

tk_status tk_cross_gram_cpu(tk_dtype dtype, const tk_cross_gram_problem* problems, int64_t count,
                            int threads) {
  if (count < 0 || threads < 1) return TK_INVALID_ARGUMENT;
  std::vector<double> cost(count);
  for (int64_t i = 0; i < count; ++i) {
    const tk_cross_gram_problem& p = problems[i];
    if (p.outer < 0 || p.inner < 0 || p.a_size < 0 || p.b_size < 0) return TK_INVALID_ARGUMENT;
    cost[i] = double(p.outer) * double(p.inner) * double(p.a_size) * double(p.b_size);
  }
  return tk::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    return tk::share_problems(cost, threads, [&](int64_t i, int used) {
      const tk_cross_gram_problem& p = problems[i];
      return tk::cross_gram(static_cast<const T*>(p.a), p.a_size, static_cast<const T*>(p.b), p.b_size,
                            p.outer, p.inner, static_cast<T*>(p.out), used);
    });
  });
}
