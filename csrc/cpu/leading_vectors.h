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
// rank. Always orthonormal; where G has fewer eigenvalues than asked for, completed by unit vectors.
// `discarded`, if not null, receives the sum of the other eigenvalues.
int64_t leading_eigenvectors(int64_t n, const double* g, const RankRule& rule, double* rows,
                             double* discarded = nullptr);

// The same for A Aᵀ with A (n×m) given, without squaring its singular values: for tolerances a Gram matrix
// cannot see.
int64_t leading_singular_vectors(int64_t n, int64_t m, const double* a, const RankRule& rule, double* rows);

}  // namespace tk
