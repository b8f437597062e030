// Truncation to given ranks by one orthogonal iteration per mode:  P_i = orth(H_i[:, :r_i]),
// H_i the Gram matrix of mode i over the heads of all other modes.
//
// A core that was zero beyond its ranks before a small step has tails of the size of that step. Its leading
// subspaces then lie near the heads, and with ranks given only subspaces matter, not single vectors. H_i
// leaves out what lies in the tail of another mode too (as an iteration of HOOI does from the old bases), so
// that a mode costs 3/8 of its Gram matrix where ranks were doubled. The result is held to the guarantee of
// the HOSVD:
//   τ_i ≥ t_i − g_i,  t_i = |P_⊥ᵀ C|²,  g_i = |P_⊥ᵀ G P|² / (λ_min(Pᵀ G P) − |P_⊥ᵀ G P_⊥|)
// bounds the optimal tail of each mode from below (the trace of a Schur complement), and what lies in two
// tails is counted twice by Σ t_i but lost once. All of it follows from energies of blocks of C and from the
// step itself; of a matrix [A B; D E], which the steps leave nothing but E − D A⁻¹ B of, that block is
// formed. Numerics: everything is relative to the tails, not to |C|: the blocks are summed up in float64, and
// the rounding of X changes t_i in second order only.
#include "cpu/fixed_ranks.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "core/scratch.h"
#include "cpu/core_tensor.h"
#include "cpu/isa.h"
#include "cpu/linalg.h"

namespace tk {
namespace {

// With more energy per direction in a tail than this part of the mean in the head, a step is not tried.
constexpr double promising_ratio = 0.05;
constexpr double slack = 1e-4;  // relative, of the discarded energy
// Part of the error by which what no step has looked at, and the angles between old and new subspaces, may
// change it; where it may be more, it is measured.
constexpr double known_error = 0.01;
// What rounding of the core and of P may change in the root of a loss, relative to |C|.
template <class T>
constexpr double unit = std::numeric_limits<T>::epsilon();

int64_t product(const int64_t* begin, const int64_t* end) {
  return std::accumulate(begin, end, int64_t(1), std::multiplies<int64_t>());
}

}  // namespace

template <class T>
FixedRanks<T>::FixedRanks(const T* core, int64_t modes, const int64_t* shape, const int64_t* rank)
    : core_(core), modes_(modes) {
  std::copy_n(shape, modes, shape_);
  std::copy_n(rank, modes, rank_);
  int64_t last = modes;  // behind the last cut mode everything is one run
  while (last > 0 && !cut(last - 1)) --last;
  const int64_t run = product(shape + last, shape + modes);
  int64_t in_tail[TK_MAX_MODES], count = 0;
  const std::function<void(int64_t, const T*)> visit = [&](int64_t mode, const T* x) {
    const int64_t stride = product(shape + mode + 1, shape + modes);
    const auto part = [&](int64_t begin, int64_t end, bool tail) {
      if (tail) in_tail[count++] = mode;
      if (mode + 1 == last) {
        const double sum = simd<T>().sum_squares((end - begin) * run, x + begin * run);
        energy_ += sum;
        for (int64_t i = 0; i < count; ++i) own_[in_tail[i]] += sum;
        if (count == 1) single_[in_tail[0]] += sum;
        if (count > 1) many_ += sum;
      } else {
        for (int64_t i = begin; i < end; ++i) visit(mode + 1, x + i * stride);
      }
      if (tail) --count;
    };
    part(0, rank_[mode], false);
    if (cut(mode)) part(rank_[mode], shape_[mode], true);
  };
  if (last > 0)
    visit(0, core);
  else
    energy_ = simd<T>().sum_squares(run, core);
  std::vector<int64_t> sides;
  for (int64_t i = 0; i < modes; ++i)
    if (shape_[i] > 1) sides.push_back(i);
  if (sides.size() == 2 && cut(sides[0]) && cut(sides[1]) && rank_[sides[0]] == rank_[sides[1]])
    first_of_matrix_ = sides[0];
}

template <class T>
bool FixedRanks<T>::promising() const {
  for (int64_t i = 0; i < modes_; ++i) {
    const double head = (energy_ - own_[i]) / rank_[i];
    if (cut(i) && !(own_[i] <= promising_ratio * head * (shape_[i] - rank_[i]))) return false;
  }
  return true;
}

template <class T>
bool FixedRanks<T>::step(int64_t mode, T* rows) {
  const int64_t n = shape_[mode], r = rank_[mode];
  // Where the heads of the other modes lie: offsets of the index before, and runs of the index behind.
  const auto offsets = [&](int64_t begin, int64_t end) {
    std::vector<int64_t> found{0};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t stride = product(shape_ + i + 1, shape_ + modes_);
      std::vector<int64_t> next;
      for (int64_t offset : found)
        for (int64_t k = 0; k < rank_[i]; ++k) next.push_back(offset + k * stride);
      found = std::move(next);
    }
    return found;
  };
  int64_t last = modes_;
  while (last > mode + 1 && !cut(last - 1)) --last;
  const bool whole = last == mode + 1;
  const int64_t inner = product(shape_ + mode + 1, shape_ + modes_);
  const int64_t run = whole ? inner : rank_[last - 1] * product(shape_ + last, shape_ + modes_);
  const std::vector<int64_t> before = offsets(0, mode),
                             behind = offsets(mode + 1, whole ? mode + 1 : last - 1);
  Buffer<double> strip(n * r);
  const int64_t pieces = static_cast<int64_t>(before.size() * behind.size());
  if (pieces == 1) {
    gram_strip(n, r, run, core_, inner, int64_t(1), false, strip.data());
  } else {
    Buffer<T> heads(pieces * run * n);
    T* to = heads;
    for (int64_t o : before)
      for (int64_t i : behind) {
        transpose(n, run, core_ + o + i, inner, to, n);
        to += run * n;
      }
    gram_strip<T>(n, r, pieces * run, heads, 1, n, false, strip);
  }
  Buffer<T> x((n - r) * r);
  if (!orthogonal_iteration<T>(n, r, strip, x, rows, found_[mode])) return false;
  if (mode == first_of_matrix_) form_corner(n, r, x);
  return true;
}

template <class T>
void FixedRanks<T>::form_corner(int64_t n, int64_t r, const T* x) {
  const int64_t row = product(shape_, shape_ + modes_) / n, width = row - r;
  Buffer<T> corner((n - r) * width);
  simd<T>().copy(n - r, width, core_ + r * row + r, row, corner, width);
  multiply<T>(n - r, width, r, -1, x, r, 1, core_ + r, row, 1, 1, corner, width);
  corner_ = std::sqrt(simd<T>().sum_squares((n - r) * width, corner));
}

template <class T>
double FixedRanks<T>::in_tails() const {
  double once = 0;
  for (int64_t i = 0; i < modes_; ++i) once += single_[i];
  return once + many_;
}

template <class T>
double FixedRanks<T>::drift() const {
  double angle = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < modes_; ++i)
    if (cut(i)) angle += found_[i].size, ++count;
  return count < 2 ? 0 : 2 * angle * std::exp(angle) * std::sqrt(in_tails());
}

template <class T>
double FixedRanks<T>::residual(int64_t mode) const {
  return first_of_matrix_ < 0 ? std::max(single_[mode] - found_[mode].explained, 0.0) : 0;
}

template <class T>
double FixedRanks<T>::rounded(int64_t mode) const {
  return found_[mode].rounding * found_[mode].rounding * single_[mode];
}

// After both steps of a matrix E − X₁ B − (D − X₁ A) X₂ᵀ is in both tails; after the second alone E − D X₂ᵀ,
// which is that and X₁ (B − A X₂ᵀ).
template <class T>
double FixedRanks<T>::corner_drift() const {
  double sum = 0;
  for (int64_t i = 0; i < modes_; ++i)
    for (int64_t j = 0; j < modes_; ++j)
      if (i != j && cut(i) && cut(j)) sum += found_[i].size * std::sqrt(rounded(j));
  return sum;
}

template <class T>
double FixedRanks<T>::unseen(int64_t mode) const {
  if (mode == first_of_matrix_) return corner_;
  if (first_of_matrix_ >= 0) return corner_ + corner_drift();
  const double elsewhere = std::max(in_tails() - own_[mode], 0.0);
  return std::sqrt(std::max(own_[mode] - single_[mode], 0.0)) + found_[mode].size * std::sqrt(elsewhere);
}

template <class T>
bool FixedRanks<T>::optimal() const {
  const double tails = in_tails();
  double gain = 0, least = 0, shrink = 1;
  for (int64_t i = 0; i < modes_; ++i) {
    if (!cut(i)) continue;
    const OrthogonalIteration& f = found_[i];
    // Of P_⊥ᵀ C: the part in tails of other modes, which the step did not see, and all of it.
    const double elsewhere = std::max(tails - own_[i], 0.0);
    const double hidden = unseen(i), lost = residual(i) + hidden * hidden;
    const double coupling = hidden * std::sqrt(elsewhere) + f.size * std::sqrt(lost * own_[i]);
    const double gap = 1 / (f.inverse * (1 + f.size * f.size)) - lost;
    if (!(gap > 0)) return false;
    gain += coupling * coupling / gap + rounded(i);
    least += residual(i);
    shrink /= 1 + f.size * f.size;
  }
  const double both = first_of_matrix_ < 0 ? std::sqrt(many_) - drift() : corner_ - corner_drift();
  const double twice = std::max(both, 0.0);
  return gain <= slack * least + shrink * twice * twice + unit<T> * unit<T> * energy_;
}

// What is lost is Σ_i |E_i|², E_i = P_⊥iᵀ C ×_{j<i} P_jᵀ. Of E_i the residual of the step and the blocks with
// i their first tail are known. Not looked at: what −X_i takes from the head of i and the tail of a later
// mode (of a matrix it is in the corner), and what X_jᵀ brings into it from the tail of an earlier one.
template <class T>
double FixedRanks<T>::squared_error() const {
  const bool matrix = first_of_matrix_ >= 0;
  const double both = matrix ? corner_ * corner_ : many_;
  double sum = both, unsure = 0, squares = 0, before = 0, stretch = 1;
  for (int64_t i = 0; i < modes_; ++i) {
    if (!cut(i)) continue;
    const double size = found_[i].size, later = std::accumulate(own_ + i + 1, own_ + modes_, 0.0);
    const double known = residual(i) + (later > 0 ? both : 0);
    const double moved = stretch * ((matrix ? 0 : size * std::sqrt(later)) + before * unseen(i));
    sum += residual(i);
    unsure += moved * (moved + 2 * std::sqrt(known)) + rounded(i);
    squares += size * size;
    before += size;
    stretch *= 1 + size;
  }
  const double allowed = known_error * std::sqrt(sum) + unit<T> * std::sqrt(energy_);
  return unsure + squares * sum <= 2 * allowed * std::sqrt(sum) ? sum : -1;
}

template class FixedRanks<float>;
template class FixedRanks<double>;

}  // namespace tk
