// The table of this instruction set.
#include "cpu/simd/table.h"

#include "cpu/simd/gemm.h"

#define TK_STRING_(x) #x
#define TK_STRING(x) TK_STRING_(x)

namespace tk::TK_ISA {

extern const SimdTable<float> table_f32 = {TK_STRING(TK_ISA), gemm<float>, gram<float>};
extern const SimdTable<double> table_f64 = {TK_STRING(TK_ISA), gemm<double>, gram<double>};

}  // namespace tk::TK_ISA
