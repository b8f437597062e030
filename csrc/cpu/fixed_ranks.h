// Truncation of one core to given ranks, where its leading subspaces lie near the first coordinates of each
// mode.
#pragma once

#include <cstdint>

#include "cpu/orthogonal_iteration.h"
#include "tucker_kernels.h"

namespace tk {

// The head of a mode are its first rank[i] indices, the tail the others. One instance per core; `step` may be
// called for different modes at once.
template <class T>
class FixedRanks {
 public:
  // Reads the core once. Modes with rank = shape are not cut and need no step.
  FixedRanks(const T* core, int64_t modes, const int64_t* shape, const int64_t* rank);
  // Whether the tails hold so little that one step is likely to be enough.
  bool promising() const;
  double tail_energy(int64_t mode) const { return own_[mode]; }
  bool cut(int64_t mode) const { return rank_[mode] < shape_[mode]; }
  // One step for a cut mode: rows (rank×shape) become Pᵀ. False where the head has not full rank.
  bool step(int64_t mode, T* rows);
  // After all steps: whether |C − C ×_i P_i P_iᵀ|² is at most 1.0001 Σ_i τ_i, τ_i the energy behind the
  // rank_i largest singular values of mode i.
  bool optimal() const;
  // |C − C ×_i P_i P_iᵀ|², or −1 where it is not known to within two percent.
  double squared_error() const;

 private:
  double in_tails() const;              // energy of everything that lies in some tail
  double residual(int64_t mode) const;  // what is left of single_ after the step
  double rounded(int64_t mode) const;   // bound on what rounding of the step adds to it
  // Bound on the norm of what lies in the tails of this mode and of others after its step.
  double unseen(int64_t mode) const;
  // Of a matrix: bound on the norm of what its second step changes in `corner_`.
  double corner_drift() const;
  // Bound on how far the steps move what lies in tails and was not looked at: the blocks in many tails, and
  // what other modes' steps bring into a single one.
  double drift() const;
  void form_corner(int64_t n, int64_t r, const T* x);

  const T* core_;
  int64_t modes_;
  int64_t shape_[TK_MAX_MODES], rank_[TK_MAX_MODES];
  double energy_ = 0;
  double own_[TK_MAX_MODES] = {};     // in the tail of mode i
  double single_[TK_MAX_MODES] = {};  // in the tail of mode i and the heads of all others
  double many_ = 0;                   // in the tails of at least two modes
  // Where C is a matrix [A B; D E] cut to a square: its first mode, and the norm of E − X B after the step of
  // that mode. Else −1.
  int64_t first_of_matrix_ = -1;
  double corner_ = -1;
  OrthogonalIteration found_[TK_MAX_MODES] = {};
};

}  // namespace tk
