// The contraction of two tensors over every index but one: a mode product's matrix gradient.
#pragma once

#include <cstdint>

namespace tk {

// out (p×q) = Σ_{o,i} a[o,·,i] b[o,·,i]ᵀ for a (outer, p, inner) and b (outer, q, inner), on up to `threads`
// threads, whose number changes no bit; false when memory ran out.
template <class T>
bool cross_gram(const T* a, int64_t p, const T* b, int64_t q, int64_t outer, int64_t inner, T* out,
                int threads);

}  // namespace tk
