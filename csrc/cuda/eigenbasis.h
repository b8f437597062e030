// Eigenvectors of Gram matrices A Aᵀ, largest first, as a sequence of launches: float64 Gram and sorted
// Cholesky factor L, then one-sided Jacobi on the columns of L in T. Dropping columns of L J loses no more
// than their norms say, at any stage, so a rank chosen from them keeps its error bound however few sweeps are
// made.
//
// Jacobi ends with a sweep that has nothing to rotate: the columns, zero from the rank on, are orthogonal up
// to some rounding errors, which a Newton step takes off.
//
// G + shift·trace·I is factored, so that L has full rank and the basis is complete also where A has not; the
// shift is what rounding moves G by, and is taken off the energies again.
#pragma once

#include <limits>
#include <vector>

#include "cuda/gram_table.h"

namespace tk {

// Cores in HOSVD form need one or two, cold ones 9 to 14 at n = 192, a Vandermonde matrix of float64 more.
constexpr int32_t most_sweeps = 30;

template <class T>
struct Eigenproblem {
  Matrix<T> a;  // size×depth; k in two dimensions where inner > 0
  int64_t inner, col_outer;
  int64_t size, depth;
  T* basis;       // null (only trace and flag are wanted), or size×size, zero beyond the rank
  T* sigma;       // null, or size
  double* trace;  // null, or where ‖A‖² goes
  int64_t* rank;  // null, or where the rank goes
  double bound;   // relative to the trace; negative: take max_rank
  int32_t min_rank, max_rank;
  int32_t* flag;
  OnFlag on_flag;
};

template <class T>
void eigenbases(PlanBuilder& builder, const std::vector<Eigenproblem<T>>& all) {
  GramTable<T> grams;
  CholeskyTable<T> factors;
  JacobiTable<T> rotations;
  NewtonTable<T> steps;
  for (const Eigenproblem<T>& e : all) {
    double* gram = builder.scratch<double>(e.size * e.size);
    double* trace = e.trace ? e.trace : builder.scratch<double>(1);
    GramProblem<T>& g = grams.add(builder, e.a, e.size, e.depth, gram);
    g.inner = static_cast<int32_t>(e.inner), g.col_outer = e.col_outer;
    CholeskyProblem<T>& c = factors.add(builder, gram, e.size, 0, e.flag);
    c.trace = trace;
    c.sort = 1;
    c.shift = 2 * static_cast<double>(e.size) * std::numeric_limits<double>::epsilon();
    if (!e.basis) continue;
    c.factor = builder.scratch<T>(e.size * e.size);
    JacobiProblem<T>& j = rotations.add(builder, c.factor, e.size);
    j.basis = builder.scratch<T>(e.size * e.size);
    j.sigma = e.sigma;
    j.trace = trace;
    j.rank = e.rank;
    j.flag = e.flag;
    j.bound = e.bound;
    j.shift = c.shift;
    j.tolerance = 8.0 * std::numeric_limits<T>::epsilon();
    j.min_rank = e.min_rank, j.max_rank = e.max_rank, j.sweeps = most_sweeps;
    steps.add(builder, j.basis, e.size, e.size, e.basis, e.flag, e.on_flag);
  }
  grams.launch(builder);
  factors.launch(builder);
  rotations.launch(builder);
  steps.launch(builder);
}

}  // namespace tk
