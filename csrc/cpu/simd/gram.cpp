// Gram matrix:  G[i,j] = Σ_p A[i,p] A[j,p],  A is n×k in T with any strides, G in float64 and symmetric.
//
// Blocks of 256 rows and up to 256 columns of A are packed, as numbers of the type of the products, in panels
// of one tile's width (up to 512 KiB for a block), which serve as left and as right operand of the GEMM's
// micro-kernel. Only tiles that reach the diagonal or lie below it are computed (half the operations), the
// rest is mirrored. Numerics: products and sums in float64, in order of k within blocks of at most 256, whose
// sums are added in order; or products and the sums within a block in float32: then an entry is off by some
// √256 u of |a_i||a_j|, and the energy of a tail by far less than 1e-6 of the whole.
#include "cpu/simd/gemm.h"

namespace tk::TK_ISA {
namespace {

constexpr int64_t block = 256;
template <class A>
constexpr int64_t width = tile_vectors * Vector<A>::lanes;
static_assert(block % width<float> == 0 && block % width<double> == 0, "blocks must hold whole panels");
static_assert(block * block <= gram_scratch, "scratch too small");

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t blocks_of(int64_t a, int64_t size) { return (a + size - 1) / size; }

template <class T, class A>
inline typename Vector<A>::Type load_as(const T* p) {
  return __builtin_convertvector(Lanes<T, Vector<A>::lanes>::load(p), typename Vector<A>::Type);
}

// Packs rows×k of A as panels: element (i, p) at out[i / width * (width * k) + p * width + i % width].
template <class T, class A>
void pack(const T* a, int64_t row, int64_t col, int64_t rows, int64_t k, A* out) {
  using S = Vector<A>;
  constexpr int W = S::lanes;
  constexpr int64_t wide = width<A>;
  const int64_t whole = row == 1 ? rows / W * W : 0;  // of contiguous rows of Aᵀ, which are read as a stream
  if (whole > 0)
    for (int64_t p = 0; p < k; ++p)
      for (int64_t i = 0; i < whole; i += W)
        S::store(out + i / wide * (wide * k) + p * wide + i % wide, load_as<T, A>(a + p * col + i));
  for (int64_t i = whole; i < blocks_of(rows, wide) * wide; i += W) {
    A* panel = out + i / wide * (wide * k) + i % wide;
    const T* from = a + i * row;
    const int64_t live = rows - i;
    int64_t p = 0;
    if (col == 1 && live > 0) {
      for (; p + W <= k; p += W) {
        typename S::Type lines[W] = {};
        for (int r = 0; r < W; ++r)
          if (r < live) lines[r] = load_as<T, A>(from + r * row + p);
        transpose<A>(lines);
        for (int r = 0; r < W; ++r) S::store(panel + (p + r) * wide, lines[r]);
      }
    }
    for (; p < k; ++p)
      for (int r = 0; r < W; ++r) panel[p * wide + r] = r < live ? from[r * row + p * col] : T(0);
  }
}

// c (rows×cols) = left rightᵀ + beta c for two packed blocks; on the diagonal (lower) only what is at or
// below it.
template <class A>
void multiply(int64_t k, const A* left, int64_t rows, const A* right, int64_t cols, bool lower, A beta, A* c,
              int64_t c_row) {
  constexpr int64_t wide = width<A>;
  for (int64_t j = 0; j < cols; j += wide) {
    const A* b = right + j * k;
    for (int64_t i = lower ? j : 0; i < rows; i += wide) {
      const int64_t height = least(wide, rows - i), tiles = blocks_of(height, tile_rows);
      const bool diagonal = lower && i == j;
      for (int64_t tile = 0, top = 0; tile < tiles; ++tile) {
        const int64_t high = (height - top) / (tiles - tile);
        const int64_t live = diagonal ? least(cols - j, top + high) : least(wide, cols - j);
        TileStripArgs<A> s = {k,    1, beta, left + i * k + top,        1,     wide, b,
                              wide, b, 0,    c + (i + top) * c_row + j, c_row, live, true};
        tile_strip<A>(high, blocks_of(live, Vector<A>::lanes))(s, 1);
        top += high;
      }
    }
  }
}

// out (+)= part (rows×cols); on the diagonal (lower) only what is at or below it.
void add(int64_t rows, int64_t cols, bool lower, bool first, const float* part, double* out,
         int64_t out_row) {
  using D = Vector<double>;
  for (int64_t i = 0; i < rows; ++i, part += cols, out += out_row) {
    const int64_t live = lower ? least(cols, i + 1) : cols;
    int64_t j = 0;
    for (; j + D::lanes <= live; j += D::lanes) {
      const auto sum = load_as<float, double>(part + j);
      D::store(out + j, first ? sum : sum + D::load(out + j));
    }
    for (; j < live; ++j) out[j] = first ? part[j] : part[j] + out[j];
  }
}

void mirror(int64_t n, double* out, int64_t out_row) {
  using D = Vector<double>;
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

template <class T, class A>
void gram(int64_t n, int64_t columns, int64_t k, const T* a, int64_t a_row, int64_t a_col, double* out,
          int64_t out_row, double* scratch) {
  constexpr bool in_place = sizeof(A) == sizeof(double);
  A* packed = reinterpret_cast<A*>(scratch);
  A* part = packed + block * block;  // of a block of G, in the other half of the scratch
  if (k == 0)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < columns; ++j) out[i * out_row + j] = 0;
  for (int64_t j = 0; j < columns; j += block)
    for (int64_t i = j; i < n; i += block) {
      const int64_t rows = least(block, n - i), cols = least(block, columns - j);
      double* target = out + i * out_row + j;
      // Two blocks share the scratch off the diagonal.
      const bool diagonal = i == j;
      const int64_t depth = diagonal ? block : block / 2;
      for (int64_t p = 0; p < k; p += depth) {
        const int64_t deep = least(depth, k - p);
        const A* left = packed;
        const A* right = packed;
        pack(a + i * a_row + p * a_col, a_row, a_col, rows, deep, packed);
        if (!diagonal) {
          right = packed + block * depth;
          pack(a + j * a_row + p * a_col, a_row, a_col, cols, deep, packed + block * depth);
        }
        if constexpr (in_place) {
          multiply<A>(deep, left, rows, right, cols, diagonal, p == 0 ? 0 : 1, target, out_row);
        } else {
          multiply<A>(deep, left, rows, right, cols, diagonal, 0, part, cols);
          add(rows, cols, diagonal, p == 0, part, target, out_row);
        }
      }
    }
  mirror(columns, out, out_row);
}

template void gram<float, float>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, double*, int64_t,
                                 double*);
template void gram<float, double>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, double*, int64_t,
                                  double*);
template void gram<double, double>(int64_t, int64_t, int64_t, const double*, int64_t, int64_t, double*,
                                   int64_t, double*);

}  // namespace tk::TK_ISA
