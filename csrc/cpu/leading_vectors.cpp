// Rank selection and the vectors kept. From a Gram matrix G: sort its diagonal, factor G = L Lᵀ skipping
// pivots at rounding level, rotate the columns of L until they are orthogonal (one-sided Jacobi): their norms
// are the singular values, their directions the vectors. From the unfolding itself: QR and one-sided Jacobi.
//
// Numerics: float64. At any stage of the rotations, dropping columns of L J loses exactly at most the sum of
// their squared norms, so the bound holds whatever the rotations have reached.
#include "cpu/leading_vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/scratch.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

constexpr double eps = std::numeric_limits<double>::epsilon();

double orthogonality(int64_t n) { return 2 * eps * std::sqrt(static_cast<double>(std::max<int64_t>(n, 4))); }

// energy: squared singular values in descending order; lost: energy that is in none of them.
int64_t choose_rank(int64_t n, const double* energy, int64_t count, double lost, const RankRule& rule) {
  int64_t wanted = n;
  if (rule.bound >= 0) {
    double tail = lost;
    wanted = count;
    while (wanted > 0 && (tail += energy[wanted - 1]) <= rule.bound) --wanted;
  }
  return std::max(std::min({wanted, rule.upper, n}), std::min(rule.lower, n));
}

}  // namespace

int64_t leading_eigenvectors(int64_t n, const double* g, const RankRule& rule, double* rows,
                             double* discarded) {
  Buffer<double> a(n * n), v(n * n), d(n), e(n), tau(n), values(n);
  std::copy_n(g, n * n, a.data());
  tridiagonalise(n, a, d, e, v, tau);
  const int64_t rank = tridiagonal_eigen(
      n, d, e,
      [&](double* energy) {
        for (int64_t i = 0; i < n; ++i) energy[i] = std::max(energy[i], 0.0);
        return choose_rank(n, energy, n, 0, rule);
      },
      values, rows);
  back_transform(rank, n, v, tau, rows);
  if (discarded) *discarded = std::accumulate(values + rank, values + n, 0.0);
  return rank;
}

int64_t leading_singular_vectors(int64_t n, int64_t m, const double* a, const RankRule& rule, double* rows) {
  const int64_t k = std::min(n, m);
  Buffer<double> s(k), vt(k * m);
  svd(n, m, a, orthogonality(n), rows, s, vt);
  std::vector<double> energy(k);
  for (int64_t i = 0; i < k; ++i) energy[i] = s[i] * s[i];
  const int64_t rank = choose_rank(n, energy.data(), k, 0, rule);
  complete_rows(n, rows, std::min(k, rank), rank);
  return rank;
}

}  // namespace tk
