// Calls a generic lambda with a zero of the C++ type a tk_dtype stands for.
#pragma once

#include "tucker_kernels.h"

namespace tk {

template <class F>
tk_status dispatch(tk_dtype dtype, F&& f) {
  switch (dtype) {
    case TK_FLOAT32:
      return f(float{});
    case TK_FLOAT64:
      return f(double{});
    case TK_BFLOAT16:  // only where an operator reads and writes it itself
      break;
  }
  return TK_UNSUPPORTED;
}

}  // namespace tk
