// Gram matrix in float64:  G[i,j] = Σ_p A[i,p] A[j,p],  A is n×k in T with any strides, G full and symmetric.
//
// Blocks of 256 rows and up to 256 columns of A are widened to float64 and packed in panels of one tile's
// width (512 KiB for a block), which serve as left and as right operand of the GEMM's micro-kernel. Only
// tiles that reach the diagonal or lie below it are computed (half the operations), the rest is mirrored.
// Numerics: products and sums in float64, in order of k within blocks of at most 256, whose sums are added in
// order.
#include "cpu/simd/gemm.h"

namespace tk::TK_ISA {
namespace {

using D = Vector<double>;
constexpr int64_t width = tile_vectors * D::lanes, block = 256;
static_assert(block % width == 0, "blocks must hold whole panels");
static_assert(block * block <= gram_scratch, "scratch too small");

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks_of(int64_t a, int64_t size) { return (a + size - 1) / size; }

template <class T>
inline D::Type widened(const T* p) {
  typedef T Narrow __attribute__((vector_size(D::lanes * sizeof(T)), aligned(alignof(T)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), D::Type);
}

// Packs rows×k of A as panels: element (i, p) at out[i / width * (width * k) + p * width + i % width].
template <class T>
void pack(const T* a, int64_t row, int64_t col, int64_t rows, int64_t k, double* out) {
  constexpr int W = D::lanes;
  for (int64_t i = 0; i < blocks_of(rows, width) * width; i += W) {
    double* panel = out + i / width * (width * k) + i % width;
    const T* from = a + i * row;
    const int64_t live = rows - i;
    int64_t p = 0;
    if (row == 1 && live >= W) {
      for (; p < k; ++p) D::store(panel + p * width, widened(from + p * col));
    } else if (col == 1 && live > 0) {
      for (; p + W <= k; p += W) {
        D::Type lines[W] = {};
        for (int r = 0; r < W; ++r)
          if (r < live) lines[r] = widened(from + r * row + p);
        transpose<double>(lines);
        for (int r = 0; r < W; ++r) D::store(panel + (p + r) * width, lines[r]);
      }
    }
    for (; p < k; ++p)
      for (int r = 0; r < W; ++r) panel[p * width + r] = r < live ? from[r * row + p * col] : T(0);
  }
}

// c (rows×cols) += left rightᵀ for two packed blocks; on the diagonal (lower) only what is at or below it.
void multiply(int64_t k, const double* left, int64_t rows, const double* right, int64_t cols, bool lower,
              double beta, double* c, int64_t c_row) {
  for (int64_t j = 0; j < cols; j += width) {
    const double* b = right + j * k;
    for (int64_t i = lower ? j : 0; i < rows; i += width) {
      const int64_t height = least(width, rows - i), tiles = blocks_of(height, tile_rows);
      const bool diagonal = lower && i == j;
      for (int64_t tile = 0, top = 0; tile < tiles; ++tile) {
        const int64_t high = (height - top) / (tiles - tile);
        const int64_t live = diagonal ? least(cols - j, top + high) : least(width, cols - j);
        TileStripArgs<double> s = {k,     1, beta, left + i * k + top,        1,     width, b,
                                   width, b, 0,    c + (i + top) * c_row + j, c_row, live,  true};
        tile_strip<double>(high, blocks_of(live, D::lanes))(s, 1);
        top += high;
      }
    }
  }
}

void mirror(int64_t n, double* out, int64_t out_row) {
  constexpr int W = D::lanes;
  for (int64_t i = 0; i < n; i += W)
    for (int64_t j = 0; j <= i; j += W) {
      if (i + W <= n) {
        D::Type lines[W];
        for (int r = 0; r < W; ++r) lines[r] = D::load(out + (i + r) * out_row + j);
        if (i == j)
          for (int r = 0; r < W; ++r)
            for (int q = r + 1; q < W; ++q) lines[r][q] = out[(i + q) * out_row + j + r];
        else
          transpose<double>(lines);
        for (int r = 0; r < W; ++r) D::store(out + (j + r) * out_row + i, lines[r]);
      } else {
        for (int64_t r = i; r < n; ++r)
          for (int64_t q = j; q < least(j + W, r); ++q) out[q * out_row + r] = out[r * out_row + q];
      }
    }
}

}  // namespace

template <class T>
void gram(int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, double* out, int64_t out_row,
          double* scratch) {
  if (k == 0)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) out[i * out_row + j] = 0;
  for (int64_t j = 0; j < n; j += block)
    for (int64_t i = j; i < n; i += block) {
      const int64_t rows = least(block, n - i), cols = least(block, n - j);
      // Two blocks share the scratch off the diagonal.
      const int64_t depth = i == j ? block : block / 2;
      for (int64_t p = 0; p < k; p += depth) {
        const int64_t deep = least(depth, k - p);
        double* left = i == j ? scratch : scratch + block * depth;
        pack(a + j * a_row + p * a_col, a_row, a_col, cols, deep, scratch);
        if (i != j) pack(a + i * a_row + p * a_col, a_row, a_col, rows, deep, left);
        multiply(deep, left, rows, scratch, cols, i == j, p == 0 ? 0 : 1, out + i * out_row + j, out_row);
      }
    }
  mirror(n, out, out_row);
}

template void gram<float>(int64_t, int64_t, const float*, int64_t, int64_t, double*, int64_t, double*);
template void gram<double>(int64_t, int64_t, const double*, int64_t, int64_t, double*, int64_t, double*);

}  // namespace tk::TK_ISA
