// Products and Gram matrices of the modes of one core, seen as (outer, n, inner) in C order; one thread each.
#pragma once

#include <cstdint>

namespace tk {

// G (n×n, float64) = Σ_{o,i} x[o,:,i] x[o,:,i]ᵀ.
template <class T>
void mode_gram(const T* x, int64_t outer, int64_t n, int64_t inner, double* gram);

// y[o,r,i] = Σ_k M[r,k] x[o,k,i],  M rows×n with element strides.
template <class T>
void mode_product(const T* x, int64_t outer, int64_t n, int64_t inner, const T* matrix, int64_t rows,
                  int64_t row, int64_t col, T* y);

// Copies the unfolding of the middle index into `out` (n × outer·inner) in float64.
template <class T>
void unfold(const T* x, int64_t outer, int64_t n, int64_t inner, double* out);

}  // namespace tk
