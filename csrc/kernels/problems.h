// What each CUDA kernel is told about one problem: one plain struct per kernel, in tables that the launch
// plans (csrc/cuda) fill on the host and the kernels read from device memory. Host and device see the same
// bytes.
//
// Shared rules
// - T is float or double, the type of the whole table; Gram matrices and Cholesky factors are always double.
// - `flag` (may be null) points to a counter that is non-zero once a non-finite input was seen in the
// problem. A
//   kernel that finds it set leaves its outputs as `on_flag` says, or untouched.
// - An index k that runs over two dimensions lies at (k / inner) * outer_stride + (k % inner) * stride; inner
// = 0
//   means one dimension, k * stride.
// - `first_tile` is the number of tiles of all earlier problems of the table: tile t of a persistent grid
// belongs
//   to the last problem with first_tile <= t.
#pragma once

#include <cstdint>

namespace tk {

// A piece of a table on its way to the device, without its zeros, which are about half of it. It is passed by
// value: kernel parameters are copied at launch, so nothing on the host has to stay alive, no copy waits for
// the host, and a captured graph replays the same table.
//
// The table is cut into groups of 32 words. Group g of the piece has two words: bit i of word[2 g] says that
// its word i is not zero; those that are not follow each other from word[2 g + 1] on.
struct TablePiece {
  static constexpr int32_t capacity = 8180;  // 32,728 bytes in all; a kernel takes 32,764 bytes of parameters
  int32_t first_group, groups;
  uint32_t word[capacity];
};

// What a product writes where the flag is set.
enum class OnFlag : int32_t { skip, zero, source, identity, nan };

// out[i,j] = alpha Σ_k a[i,k] b[k,j] + beta source[i,j],   i < m, j < n, k < depth.
template <class T>
struct GemmProblem {
  const T* a;
  const T* b;
  const T* source;  // read where beta != 0 or on_flag = source
  T* out;           // null: only the sum of squares is wanted
  double* squares;  // null, or one sum of squares of out per tile
  const int32_t* flag;
  int64_t a_row, a_col, a_col_outer;
  int64_t b_row, b_row_outer, b_col, b_col_outer;
  int64_t source_row, source_col, source_col_outer;
  int64_t out_row, out_col, out_col_outer;
  int32_t m, n, depth;
  int32_t depth_inner, n_inner;  // how k and j fall into two dimensions; 0: they do not
  int32_t first_tile;
  float alpha, beta;
  OnFlag on_flag;  // source or nan
  int32_t upper;   // non-zero: entries with i > j are written as zero
};

// w = d with columns of length one (or zero, below 1e-30), or d itself; then `passes` times w ← w − U Uᵀw.
// Sets the flag where d or U is not finite.
template <class T>
struct ProjectionProblem {
  const T* d;
  const T* u;  // n×r, contiguous; r may be 0
  T* out;      // n×cols, contiguous; may be d
  T* work;     // n×16 elements for every strip where shared memory is too small for one, else null
  int32_t* flag;
  int64_t d_row, d_col;
  int32_t n, r, cols;
  int32_t normalise, passes;
  int32_t first_tile;  // tiles are strips of 16 columns; one where there is no column, for the flag's sake
};

// out[i,j] = Σ_k a[i,k] b[k,j] (b[j,k] where transposed) in double precision, i < m; b is n×n, row-major.
// With `newton`, b = aᵀa and out = (3 a − a b) / 2.
template <class T>
struct TriangularProblem {
  const T* a;
  const double* b;
  T* out;
  const int32_t* flag;
  int64_t a_row, a_col, out_row, out_col;
  int32_t m, n;
  int32_t first_tile;
  int32_t packed;  // zero: b is upper triangular
  int32_t transposed;
  int32_t newton;
  OnFlag on_flag;  // not `source`
};

// gram[i,j] = Σ_k a[i,k] a[j,k], both triangles, row-major, leading dimension = size.
template <class T>
struct GramProblem {
  const T* a;
  double* gram;
  double* partial;             // [splits][size][size] when splits > 1 (lower tiles only)
  int32_t* finished;           // zeros, one per lower tile, when splits > 1: counts the parts that are done
  int64_t row;                 // stride between rows i
  int64_t col, col_outer;      // strides of k
  int32_t size, depth, inner;  // inner: how k falls into two dimensions; 0: it does not
  int32_t splits;              // parts of the depth; part p is [p, p + 1) * split_depth
  int32_t split_depth;         // a multiple of 16
  int32_t first_tile;          // tiles are (lower 64×64 tile, split), split fastest
};

// Semidefinite Cholesky of (gram + shift trace I) with a static order, G = L Lᵀ. A pivot d_j that is not
// above max(tolerance, relative gram[j,j]) drops its column: that column of L (and of the inverse) is exactly
// zero. With `defer`, such a column is left for another factor instead: its pivot counts as one and it takes
// part in nothing, so that in (what G is of) R⁻¹ it is what the columns before it leave of it.
template <class T>
struct CholeskyProblem {
  const double* gram;
  double* work;     // size (size + 1) / 2 doubles where not every row is resident, else null
  double* inverse;  // null, or R⁻¹ (R = Lᵀ), upper triangular, row-major, dropped columns zero
  T* factor;        // null, or L with rows in the original order: factor[j * size + row] = L[row, j]
  double* trace;    // null, or the trace of gram
  int64_t* rank;    // null, or the number of kept columns (−1 where the flag is set)
  int32_t* flag;    // set where the trace is not finite
  double tolerance;
  double relative;
  double shift;  // relative to the trace; where that is 0, L = I if the factor is wanted, else every column
                 // is dropped
  int32_t size;
  int32_t sort;  // non-zero: pivots in the order of the descending diagonal of gram (stable)
  int32_t defer;
  int32_t pack;      // non-zero: kept columns of the inverse first, in order, zeros after
  int32_t resident;  // rows of L that lie in shared memory
};

// One-sided Jacobi on the columns of `factor` (column-major, size×size): at most `sweeps` sweeps, ended early
// by one without rotation. Then columns are sorted by descending norm (stable), the rank is chosen, and the
// unit columns up to the rank are written to `basis`, zeros beyond.
//   energy_j = max(‖column_j‖² − shift trace, 0);  rank = min k with Σ_{j≥k} energy_j <= bound trace,
//   clamped.
// Where the flag is set: rank = size, basis = identity, sigma = NaN.
template <class T>
struct JacobiProblem {
  T* factor;          // destroyed
  int32_t* progress;  // three zeros where several blocks have the matrix, else null
  T* basis;           // row-major size×size
  T* sigma;           // null, or sqrt(energy) descending
  const double* trace;
  int64_t* rank;  // null, or where the rank goes
  const int32_t* flag;
  double bound;  // negative: the rank is max_rank
  double shift;
  double tolerance;  // rotate where |x·y| > tolerance ‖x‖‖y‖
  int32_t size, sweeps;
  int32_t min_rank, max_rank;
  int32_t width;        // 0: one block has the matrix; else several do, as pairs of so many columns meet
  int32_t meetings;     // ⌈size / (2 width)⌉: how many blocks that is
  int32_t first_block;  // of the launch
};

// A truncated core's ranks and relative error: error = sqrt(Σ squares / trace), 0 where the trace is 0, NaN
// where the flag is set. A rank that exceeds the product of the others is cut to it, with core and
// projection.
template <class T>
struct FinishProblem {
  const double* squares;
  const double* trace;
  const int32_t* flag;
  double* error;
  int64_t* ranks;        // the row of the output
  const int64_t* found;  // one rank per mode, −1 where the mode keeps `size`
  T* core;
  T* projections[8];  // null: not cut
  double* work;       // null where no rank can be too large, else (rows + size + 3) columns doubles for the
                      // worst of them: its rank, its size, and the product of the others
  int32_t tiles;
  int32_t modes, width;  // width − modes trailing zeros
  int32_t size[8];
};

}  // namespace tk
