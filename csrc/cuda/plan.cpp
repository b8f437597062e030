#include "cuda/plan.h"

namespace tk {

const char* kernel_name(Kernel kernel) {
  switch (kernel) {
    case Kernel::grouped_gemm:
      return "grouped_gemm";
    case Kernel::column_norms:
      return "column_norms";
    case Kernel::gram:
      return "gram";
    case Kernel::gram_reduce:
      return "gram_reduce";
    case Kernel::semidefinite_cholesky:
      return "semidefinite_cholesky";
    case Kernel::jacobi_svd:
      return "jacobi_svd";
    case Kernel::truncation_error:
      return "truncation_error";
    case Kernel::core_step:
      return "core_step";
  }
  return "unknown";
}

}  // namespace tk
