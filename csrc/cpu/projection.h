// Projection of one mode of a core, together with what it loses.
#pragma once

#include <cstdint>

namespace tk {

// y[o,r,i] = Σ_k P[r,k] x[o,k,i] for a P (rows×n) with orthonormal rows; x (outer, n, inner) and y (outer,
// rows, inner) contiguous. Returns |x − x ×_k PᵀP|² to one part in a thousand, however small it is beside
// |x|².
template <class T>
double project_and_measure(int64_t outer, int64_t n, int64_t inner, int64_t rows, const T* p, const T* x,
                           T* y);

}  // namespace tk
