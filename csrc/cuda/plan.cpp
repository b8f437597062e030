#include "cuda/plan.h"

#include <algorithm>

namespace tk {

const char* kernel_name(Kernel kernel) {
  switch (kernel) {
#define TK_KERNEL(name, Problem, how, bytes) \
  case Kernel::name:                         \
    return #name;
    TK_KERNELS(TK_KERNEL)
#undef TK_KERNEL
  }
  return "unknown";
}

int64_t static_shared_bytes(Kernel kernel) {
  switch (kernel) {
#define TK_KERNEL(name, Problem, how, bytes) \
  case Kernel::name:                         \
    return bytes;
    TK_KERNELS(TK_KERNEL)
#undef TK_KERNEL
  }
  return 0;
}

std::vector<TablePiece> pieces(const std::vector<unsigned char>& table) {
  constexpr size_t group_bytes = 32 * sizeof(uint32_t);
  std::vector<TablePiece> all;
  std::vector<uint32_t> values;  // of the piece that is being filled
  const auto finish = [&] {
    if (all.empty()) return;
    TablePiece& piece = all.back();
    for (int32_t g = 0; g < piece.groups; ++g) piece.word[2 * g + 1] += 2 * piece.groups;
    std::copy(values.begin(), values.end(), piece.word + 2 * piece.groups);
    values.clear();
  };
  for (size_t at = 0; at < table.size(); at += group_bytes) {
    uint32_t word[32] = {}, present = 0;
    std::memcpy(word, table.data() + at, std::min(group_bytes, table.size() - at));
    const size_t most = values.size() + 32 - std::count(word, word + 32, 0u);
    if (all.empty() || 2 * (all.back().groups + 1) + most > TablePiece::capacity) {
      finish();
      all.push_back({static_cast<int32_t>(at / group_bytes), 0, {}});
    }
    TablePiece& piece = all.back();
    piece.word[2 * piece.groups + 1] = static_cast<uint32_t>(values.size());
    for (int i = 0; i < 32; ++i) {
      if (word[i] == 0) continue;
      present |= 1u << i;
      values.push_back(word[i]);
    }
    piece.word[2 * piece.groups++] = present;
  }
  finish();
  return all;
}

}  // namespace tk
