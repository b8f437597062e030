// The matrix products of this instruction set, for its other kernels and for its table.
#pragma once

#include "cpu/simd/table.h"
#include "cpu/simd/vector.h"

namespace tk::TK_ISA {

template <class T>
void gemm(const GemmArgs<T>& args, T* scratch);

// With products, and sums within a block, in A.
template <class T, class A>
void gram(int64_t n, int64_t columns, int64_t k, const T* a, int64_t a_row, int64_t a_col, double* out,
          int64_t out_row, double* scratch);

// The micro-kernel: tiles of C = alpha A B + beta C, one below the other, that share a panel of B.
constexpr int tile_rows = 6, tile_vectors = vector_registers == 32 ? 4 : 2;

template <class T>
struct TileStripArgs {
  int64_t k;
  T alpha, beta;
  const T* a;
  int64_t a_row, a_col;
  const T* b;  // rows of whole vectors; without cheap_partial_loads they are read beyond cols
  int64_t b_row;
  const T* next;  // the panel that the first tile prefetches, or b with next_row = 0
  int64_t next_row;
  T* c;
  int64_t c_row, cols;
  bool far;  // C is not in the first-level cache
  bool streams =
      false;  // A is contiguous and new to the caches: tiles prefetch the rows of the tile after the next
};

template <class T>
using TileStrip = void (*)(const TileStripArgs<T>& args, int64_t count);

// The kernel for `count` tiles of this many rows (1 to tile_rows) and vectors (1 to tile_vectors).
template <class T>
TileStrip<T> tile_strip(int64_t rows, int64_t vectors);

}  // namespace tk::TK_ISA
