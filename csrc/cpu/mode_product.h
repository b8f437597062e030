// One n-mode product, and any part of it: the piece that mode_dot and multi_mode_dot are made of.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace tk {

// y[o,r,i] = Σ_k M[r,k] x[o,k,i] with x (outer, n, inner) and y (outer, rows, inner) contiguous and M[r,k] at
// matrix[r * row + k * col]. Its columns are the outer * inner pairs (o, i), which are independent.
template <class T>
struct ModeProduct {
  int64_t outer, n, inner, rows;
  const T* matrix;
  int64_t row, col;

  int64_t columns() const { return outer * inner; }
  int64_t work() const { return columns() * n * rows; }
  // Whether columns of several o are gathered before the product, because inner fills vectors badly.
  bool gathers() const;
  // Ranges of columns should begin and end at multiples of this.
  int64_t grain() const;
  // Elements of 64-byte aligned scratch that `run` needs.
  int64_t scratch() const;
  void run(const T* x, T* y, Range columns, T* scratch) const;
  // All columns, on up to `threads` threads; false when memory ran out.
  bool run(const T* x, T* y, int threads) const;
};

}  // namespace tk
