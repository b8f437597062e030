// Which instruction set the CPU kernels use here, decided once.
#pragma once

#include "cpu/simd/table.h"

namespace tk {

template <class T>
const SimdTable<T>& simd();

}  // namespace tk
