// Which singular vectors of an unfolding a truncation keeps, and those vectors.
#pragma once

#include <cstdint>

namespace tk {

// The rank is the smallest k whose discarded energy Σ_{j>k} σ_j² is at most `bound` (all of them when `bound`
// is negative), clamped to [lower, upper].
struct RankRule {
  double bound;
  int64_t lower, upper;
};

// Leading eigenvectors of a positive semidefinite n×n matrix G, as rows of `rows` (room for n); returns the
// rank. Always orthonormal. Where G is nearly diagonal they are nearly the eigenvectors, and the rank may be
// one more than the smallest. `single`: G is no better than float32. `discarded`, if not null: a bound on the
// energy left out.
int64_t leading_eigenvectors(int64_t n, const double* g, const RankRule& rule, bool single, double* rows,
                             double* discarded = nullptr);

// The same for A Aᵀ with A (n×m) given, without squaring its singular values: for tolerances a Gram matrix
// cannot see.
int64_t leading_singular_vectors(int64_t n, int64_t m, const double* a, const RankRule& rule, double* rows,
                                 double* discarded = nullptr);

}  // namespace tk
