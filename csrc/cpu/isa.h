// Which instruction set the CPU kernels use here, decided once.
#pragma once

#include "cpu/simd/table.h"

namespace tk {

template <class T>
const SimdTable<T>& simd();

// Whether 3×3 windows may run in Winograd tiles, which are faster and about one digit less accurate than
// direct sums; the environment variable TK_WINOGRAD=0 says no.
bool winograd_allowed();

}  // namespace tk
