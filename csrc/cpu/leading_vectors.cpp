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

int64_t leading_eigenvectors(int64_t n, const double* g, const RankRule& rule, double* rows) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return g[i * n + i] > g[j * n + j]; });
  Buffer<double> sorted(n * n), lt(n * n), sigma(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) sorted[i * n + j] = g[order[i] * n + order[j]];
  const double lost = semidefinite_cholesky(n, sorted, n * eps * sorted[0], lt);
  jacobi_svd(n, n, lt, 0, nullptr, orthogonality(n), sigma);
  std::vector<double> energy(n);
  for (int64_t i = 0; i < n; ++i) energy[i] = sigma[i] * sigma[i];
  const int64_t rank = choose_rank(n, energy.data(), n, lost, rule);
  int64_t kept = 0;
  for (; kept < rank && sigma[kept] > 0; ++kept)
    for (int64_t i = 0; i < n; ++i) rows[kept * n + order[i]] = lt[kept * n + i] / sigma[kept];
  complete_rows(n, rows, kept, rank);
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
