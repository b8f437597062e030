// General matrix product on one thread:  C[i,j] = alpha Σ_p A[i,p] B[p,j] + beta C[i,j].
//
// Tiling: the micro-kernel keeps R × V vectors of C in registers (R <= 6; V <= 4 vectors with 32 registers, 2
// with 16), loads V vectors of B and broadcasts R numbers of A per step of k. A is read where it lies: six
// rows are six streams. B is read where it lies when its rows are contiguous and few tiles share it, else one
// panel (kc × V vectors: 64 KiB) is copied into `scratch` and used by mc rows of A (256 KiB, second-level
// cache). The panel of B after the next is prefetched, or the rows of a streamed A two tiles ahead: one ahead
// is too late for memory (measured, 0.6 of the speed). Rows are split into tiles of nearly equal height,
// and ragged columns are masked, so no shape wastes more than part of one vector.
// Numerics: sums in T, fused multiply-add where the machine has it, in order of k within blocks of at most
// kc, whose sums are added in order; how C is cut into tiles changes no bit.
#include "cpu/simd/gemm.h"

#include "cpu/simd/vector.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t mc = 252, kc = 256, most_tiles_in_place = 11;
static_assert(mc % tile_rows == 0, "blocks must hold whole tiles");
static_assert(tile_vectors * vector_bytes / 4 * kc <= gemm_scratch, "scratch too small");

// `count` tiles of R rows and V vectors, one below the other. With `packs` the panel of B is copied on the
// way.
template <class T, int R, int V>
void strip(const TileStripArgs<T>& s, int64_t count) {
  using S = Vector<T>;
  using Vec = typename S::Type;
  constexpr int W = S::lanes;
  const typename S::First last(s.cols - (V - 1) * W);
  const T alpha = s.alpha, beta = s.beta;
  const int64_t a_row = s.a_row, a_col = s.a_col, b_row = s.b_row, c_row = s.c_row;
  const T *rows = s.a, *ahead = s.next;
  int64_t ahead_row = s.next_row;
  T* c = s.c;
  for (; count > 0; --count, rows += R * a_row, c += R * c_row) {
    Vec acc[R][V] = {};
    const T *a = rows, *b = s.b, *next = ahead;
    if (s.far)
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) __builtin_prefetch(c + r * c_row + v * W, 1, 3);
    for (int64_t p = s.k; p > 0; --p, a += a_col, b += b_row, next += ahead_row) {
      Vec row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        row[v] = cheap_partial_loads && v == V - 1 ? S::load(b + v * W, last) : S::load(b + v * W);
        __builtin_prefetch(next + v * W, 0, 2);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const T x = a[r * a_row];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += x * row[v];
      }
    }
    ahead = s.streams ? rows + 2 * R * a_row : s.b, ahead_row = s.streams ? R : 0;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        T* to = c + r * c_row + v * W;
        const Vec product = alpha * acc[r][v];
        if (v == V - 1)
          S::store(to, beta == T(0) ? product : product + beta * S::load(to, last), last);
        else
          S::store(to, beta == T(0) ? product : product + beta * S::load(to));
      }
  }
}

template <class T, int V>
TileStrip<T> strip_of_height(int64_t rows) {
  constexpr TileStrip<T> strips[] = {strip<T, 1, V>, strip<T, 2, V>, strip<T, 3, V>,
                                     strip<T, 4, V>, strip<T, 5, V>, strip<T, 6, V>};
  return strips[rows - 1];
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks_of(int64_t a, int64_t size) { return (a + size - 1) / size; }

// Copies a k×cols panel of B into rows of `width`, zero beyond cols.
template <class T>
void pack(const T* b, int64_t b_row, int64_t b_col, int64_t k, int64_t cols, int64_t width, T* out) {
  using S = Vector<T>;
  constexpr int W = S::lanes;
  if (b_col == 1) {
    const int64_t whole = cols / W * W;
    const typename S::First tail(cols - whole);
    for (int64_t p = 0; p < k; ++p, b += b_row, out += width) {
      for (int64_t j = 0; j < whole; j += W) S::store(out + j, S::load(b + j));
      if (whole < width) S::store(out + whole, S::load(b + whole, tail));
    }
    return;
  }
  for (int64_t j = 0; j < width; j += W) {
    int64_t p = 0;
    if (b_row == 1 && j < cols) {
      const int64_t live = least(W, cols - j);
      for (; p + W <= k; p += W) {
        typename S::Type rows[W] = {};
        for (int64_t i = 0; i < W; ++i)
          if (i < live) rows[i] = S::load(b + (j + i) * b_col + p);
        transpose<T>(rows);
        for (int i = 0; i < W; ++i) S::store(out + (p + i) * width + j, rows[i]);
      }
    }
    for (; p < k; ++p)
      for (int64_t i = 0; i < W; ++i)
        out[p * width + j + i] = j + i < cols ? b[p * b_row + (j + i) * b_col] : T(0);
  }
}

}  // namespace

template <class T>
TileStrip<T> tile_strip(int64_t rows, int64_t vectors) {
  if constexpr (tile_vectors == 4) {
    if (vectors == 4) return strip_of_height<T, 4>(rows);
    if (vectors == 3) return strip_of_height<T, 3>(rows);
  }
  return vectors == 2 ? strip_of_height<T, 2>(rows) : strip_of_height<T, 1>(rows);
}

template <class T>
void gemm(const GemmArgs<T>& g, T* scratch) {
  constexpr int W = Vector<T>::lanes, NR = tile_vectors * W;
  if (g.k == 0) {
    for (int64_t i = 0; i < g.m; ++i)
      for (int64_t j = 0; j < g.n; ++j)
        g.c[i * g.c_row + j] = g.beta == T(0) ? T(0) : g.beta * g.c[i * g.c_row + j];
    return;
  }
  const int64_t depth = blocks_of(g.k, blocks_of(g.k, kc));  // blocks of k of nearly equal depth
  const bool far = (g.m - 1) * g.c_row + g.n > 4096;
  for (int64_t p0 = 0; p0 < g.k; p0 += depth) {
    const int64_t k = least(depth, g.k - p0);
    for (int64_t i0 = 0; i0 < g.m; i0 += mc) {
      const int64_t m = least(mc, g.m - i0), tiles = blocks_of(m, tile_rows);
      const int64_t height = m / tiles, higher = m % tiles, lower = tiles - higher;
      const bool in_place = g.b_col == 1 && (tiles <= most_tiles_in_place || g.b_row <= 2 * NR);
      for (int64_t j = 0; j < g.n; j += NR) {
        const int64_t cols = least(NR, g.n - j), vectors = blocks_of(cols, W);
        const T* b = g.b + p0 * g.b_row + j * g.b_col;
        TileStripArgs<T> s = {k,
                              g.alpha,
                              p0 == 0 ? g.beta : T(1),
                              g.a + i0 * g.a_row + p0 * g.a_col,
                              g.a_row,
                              g.a_col,
                              b,
                              g.b_row,
                              b,
                              0,
                              g.c + i0 * g.c_row + j,
                              g.c_row,
                              cols,
                              far};
        if (g.b_col == 1 && j + 2 * NR < g.n) s.next = b + 2 * NR, s.next_row = g.b_row;
        s.streams = j == 0 && g.a_col == 1 && g.a_row == k && g.m > mc;
        if (!in_place || (!cheap_partial_loads && cols % W)) {
          pack(b, g.b_row, g.b_col, k, cols, vectors * W, scratch);
          s.b = scratch, s.b_row = vectors * W;
        }
        tile_strip<T>(height, vectors)(s, lower);
        if (higher == 0) continue;
        s.a += lower * height * g.a_row, s.c += lower * height * g.c_row;
        s.next = s.b, s.next_row = 0;
        tile_strip<T>(height + 1, vectors)(s, higher);
      }
    }
  }
}

template TileStrip<float> tile_strip<float>(int64_t, int64_t);
template TileStrip<double> tile_strip<double>(int64_t, int64_t);
template void gemm<float>(const GemmArgs<float>&, float*);
template void gemm<double>(const GemmArgs<double>&, double*);

}  // namespace tk::TK_ISA
