// Gram matrices and unfoldings of the modes of one core, seen as (outer, n, inner) in C order; one thread
// each.
#pragma once

#include <cstdint>

namespace tk {

// G (n×n, float64) = Σ_{o,i} x[o,:,i] x[o,:,i]ᵀ. `exact`: every product and sum in float64; otherwise
// products and sums of up to 256 terms in T, which is twice as fast for float32.
template <class T>
void mode_gram(const T* x, int64_t outer, int64_t n, int64_t inner, bool exact, double* gram);

// The first `columns` columns of A Aᵀ (n×columns), A (n×k) with element strides.
template <class T>
void gram_strip(int64_t n, int64_t columns, int64_t k, const T* a, int64_t row, int64_t col, bool exact,
                double* gram);

// Copies the unfolding of the middle index into `out` (n × outer·inner) in float64.
template <class T>
void unfold(const T* x, int64_t outer, int64_t n, int64_t inner, double* out);

}  // namespace tk
