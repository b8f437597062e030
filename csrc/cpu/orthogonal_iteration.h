// One step of orthogonal iteration on a Gram matrix, from the coordinate axes that were the subspace before.
#pragma once

#include <cstdint>

namespace tk {

// What the step found, for judging it: G = [A Bᵀ; B D], X = B A⁻¹.
struct OrthogonalIteration {
  double explained;  // tr B A⁻¹ Bᵀ, the energy that the step moved into the head
  double size;       // ‖XᵀX‖^½ ≥ ‖X‖₂, the tangent of the largest angle that it moved by
  double inverse;    // ‖A⁻¹‖, so that no eigenvalue of A is below 1/inverse
  double rounding;   // relative error that rounding may have left in X (in the metric of A)
};

// P = orth(G[:, :r]) = [I; X] (I + XᵀX)^(−1/2) up to a rotation. strip: G[:, :r] (n×r) of which the part
// above the diagonal is not read. x: X ((n−r)×r); rows: Pᵀ (r×n). False, and rows not written, where A is
// not definite.
template <class T>
bool orthogonal_iteration(int64_t n, int64_t r, const double* strip, T* x, T* rows,
                          OrthogonalIteration& found);

}  // namespace tk
