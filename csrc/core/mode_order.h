// In which order to multiply a tensor by several matrices.
#pragma once

#include <cstdint>

namespace tk {

// order: the numbers of `count` modes, sizes n[i] before and rows[i] after, so that their products take the
// fewest operations. Doing mode i before mode j costs less exactly when 1/n_i − 1/rows_i < 1/n_j − 1/rows_j,
// whatever the other modes are, so sorting by that number is optimal (adjacent exchange). Of equals, the
// first goes first where tensors shrink and last where they grow: if modes come in the order of their
// dimensions, the products with the longest rows then run on the larger tensors.
inline void cheapest_order(int count, const int64_t* n, const int64_t* rows, int* order) {
  const auto key = [&](int i) {
    return 1.0 / static_cast<double>(n[i] > 0 ? n[i] : 1) -
           1.0 / static_cast<double>(rows[i] > 0 ? rows[i] : 1);
  };
  for (int i = 0; i < count; ++i) {
    int at = i;
    for (; at > 0; --at) {
      const double other = key(order[at - 1]);
      if (other < key(i) || (other == key(i) && key(i) <= 0)) break;
      order[at] = order[at - 1];
    }
    order[at] = i;
  }
}

}  // namespace tk
