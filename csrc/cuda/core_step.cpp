// Launch plan of core_step: one launch over all cores.
#include <algorithm>
#include <cmath>

#include "core/dispatch.h"
#include "cuda/operators.h"
#include "kernels/limits.h"

namespace tk {
namespace {

tk_status check(int32_t count, const tk_core_step* problems) {
  if (count < 0) return TK_INVALID_ARGUMENT;
  for (int32_t c = 0; c < count; ++c) {
    const tk_core_step_tensors& p = problems[c].tensors;
    if (p.ndim < 1 || p.ndim > TK_MAX_MODES || problems[c].step < 1) return TK_INVALID_ARGUMENT;
    int64_t elements = 1;
    for (int32_t d = 0; d < p.ndim; ++d) {
      if (p.shape[d] < 0 || p.shape[d] > p.augmented[d]) return TK_INVALID_ARGUMENT;
      elements *= p.augmented[d];
      if (elements >= largest_index) return TK_UNSUPPORTED;
    }
  }
  return TK_OK;
}

// Dimensions that are not padded join the one before them.
template <class T>
void merge_dimensions(const tk_core_step_tensors& tensors, StepProblem<T>& p) {
  for (int32_t d = 0; d < tensors.ndim; ++d) {
    const int32_t shape = static_cast<int32_t>(tensors.shape[d]);
    const int32_t augmented = static_cast<int32_t>(tensors.augmented[d]);
    if (p.dims > 0 && shape == augmented) {
      p.shape[p.dims - 1] *= shape;
      p.augmented[p.dims - 1] *= augmented;
    } else {
      p.shape[p.dims] = shape;
      p.augmented[p.dims++] = augmented;
    }
  }
}

template <class T>
StepProblem<T> step_problem(const tk_core_step& given) {
  const tk_core_step_tensors& t = given.tensors;
  StepProblem<T> p{};
  p.core = static_cast<const T*>(t.core);
  p.gradient = static_cast<const T*>(t.gradient);
  p.first = static_cast<const T*>(t.first);
  p.second = static_cast<const T*>(t.second);
  p.new_core = static_cast<T*>(t.new_core);
  p.new_first = static_cast<T*>(t.new_first);
  p.new_second = static_cast<T*>(t.new_second);
  p.norm = t.norm;
  p.elements = 1;
  for (int32_t d = 0; d < t.ndim; ++d) p.elements *= static_cast<int32_t>(t.augmented[d]);
  p.tiles = (p.elements + step_tile - 1) / step_tile;
  merge_dimensions(t, p);
  const double steps = static_cast<double>(given.step);
  p.adam = given.optimizer == TK_ADAM;
  p.nesterov = given.nesterov;
  p.lr = static_cast<T>(given.lr);
  p.weight_decay = given.decoupled ? T(0) : static_cast<T>(given.weight_decay);
  p.decay = given.decoupled ? static_cast<T>(1 - given.lr * given.weight_decay) : T(1);
  p.momentum = static_cast<T>(given.momentum);
  p.damped = t.first ? static_cast<T>(1 - given.dampening) : T(1);
  p.beta1 = static_cast<T>(given.beta1);
  p.beta2 = static_cast<T>(given.beta2);
  p.step_size = static_cast<T>(given.lr / (1 - std::pow(given.beta1, steps)));
  p.root_correction = static_cast<T>(std::sqrt(1 - std::pow(given.beta2, steps)));
  p.epsilon = static_cast<T>(given.epsilon);
  return p;
}

}  // namespace

tk_status core_step_plan(tk_dtype dtype, int32_t count, const tk_core_step* problems, void* workspace,
                         const Device& device, Plan* plan) {
  const tk_status status = check(count, problems);
  if (status != TK_OK) return status;
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    *plan = make_plan(dtype, workspace, device, [&](PlanBuilder& builder) {
      int32_t* finished = builder.initialised(std::vector<int32_t>(count));
      std::vector<StepProblem<T>> table;
      int64_t tiles = 0;
      for (int32_t c = 0; c < count; ++c) {
        StepProblem<T> p = step_problem<T>(problems[c]);
        if (p.elements == 0) continue;
        p.finished = finished + c;
        p.squares = builder.scratch<double>(p.tiles);
        p.first_tile = static_cast<int32_t>(tiles);
        tiles += p.tiles;
        table.push_back(p);
      }
      builder.persistent(Kernel::core_step, table, tiles, step_threads);
    });
    return TK_OK;
  });
}

}  // namespace tk
