// The table of this instruction set.
#include "cpu/simd/table.h"

#include "cpu/simd/copy.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/matvec.h"
#include "cpu/simd/tucker_conv.h"
#include "cpu/simd/vector.h"

#define TK_STRING_(x) #x
#define TK_STRING(x) TK_STRING_(x)

namespace tk::TK_ISA {

extern const SimdTable<float> table_f32 = {TK_STRING(TK_ISA),     gemm<float>,          gram<float, double>,
                                           gram<float, float>,    copy<float>,          transpose<float>,
                                           scale<float, float>,   scale<float, double>, scale<double, float>,
                                           Vector<float>::lanes,  sum_squares<float>,   gemv<float>,
                                           gemv_subtract<float>,  symv<float>,          secular<float>,
                                           scale_by_ratio<float>, rotate<float>,        &tucker_conv_f32};
extern const SimdTable<double> table_f64 = {
    TK_STRING(TK_ISA),     gemm<double>,          gram<double, double>,  gram<double, double>,
    copy<double>,          transpose<double>,     scale<double, double>, scale<double, double>,
    scale<double, double>, Vector<double>::lanes, sum_squares<double>,   gemv<double>,
    gemv_subtract<double>, symv<double>,          secular<double>,       scale_by_ratio<double>,
    rotate<double>,        &tucker_conv_f64};

}  // namespace tk::TK_ISA
