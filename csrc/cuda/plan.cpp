#include "cuda/plan.h"

namespace tk {

const char* kernel_name(Kernel kernel) {
  switch (kernel) {
    case Kernel::grouped_gemm:
      return "grouped_gemm";
    case Kernel::project_out:
      return "project_out";
    case Kernel::gram:
      return "gram";
    case Kernel::semidefinite_cholesky:
      return "semidefinite_cholesky";
    case Kernel::triangular_product:
      return "triangular_product";
    case Kernel::jacobi_svd:
      return "jacobi_svd";
    case Kernel::finish_truncation:
      return "finish_truncation";
  }
  return "unknown";
}

}  // namespace tk
