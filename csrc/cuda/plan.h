// A launch plan: everything an operator will launch, worked out on the host before anything runs.
//
// Plans are pure functions of sizes and addresses; they need no GPU and are compiled into every build.
// launch.cu runs a plan on a stream: first the table goes to the front of the workspace, then the launches
// follow in order.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/dispatch.h"
#include "kernels/problems.h"
#include "tucker_kernels.h"

namespace tk {

// Every kernel, what one problem in its table is, how launch.cu starts it (Start::tiles or Start::blocks),
// and the bytes of shared memory that it may declare itself, which tests compare with what compilers say.
#define TK_KERNELS(X)                                    \
  X(grouped_gemm, GemmProblem, tiles, 35328)             \
  X(project_out, ProjectionProblem, tiles, 2176)         \
  X(gram, GramProblem, tiles, 41216)                     \
  X(semidefinite_cholesky, CholeskyProblem, blocks, 384) \
  X(triangular_product, TriangularProblem, tiles, 41216) \
  X(jacobi_svd, JacobiProblem, blocks, 128)              \
  X(finish_truncation, FinishProblem, blocks, 128)

#define TK_KERNEL(name, Problem, how, bytes) name,
enum class Kernel : int32_t { TK_KERNELS(TK_KERNEL) };
#undef TK_KERNEL
const char* kernel_name(Kernel kernel);
int64_t static_shared_bytes(Kernel kernel);

struct Launch {
  Kernel kernel;
  int64_t table;  // bytes from the start of the workspace to the first problem
  int32_t count;  // problems
  int32_t work;   // tiles of a persistent grid, else blocks
  int32_t grid, block;
  int64_t shared;  // dynamic shared memory in bytes
};

struct Plan {
  tk_dtype dtype;
  std::vector<unsigned char> table;  // what the front of the workspace must hold
  std::vector<Launch> launches;
  int64_t workspace;  // bytes, the table included
};

// The table as what brings it to the device, in as few launches as hold it.
std::vector<TablePiece> pieces(const std::vector<unsigned char>& table);

// What a plan must know of the device.
struct Device {
  int32_t multiprocessors;
  int64_t shared_bytes;  // the most shared memory a block may have, declared and dynamic together
};

// Blocks of a persistent grid that one multiprocessor is given: what the registers of the larger kernels
// allow.
constexpr int32_t blocks_per_multiprocessor = 4;

// Collects the launches of one operator. `build` is run twice with the same calls: first to learn how long
// the table is, then with the addresses that follow from it.
class PlanBuilder {
 public:
  PlanBuilder(tk_dtype dtype, void* workspace, int64_t table_bytes, const Device& device)
      : base_(workspace ? reinterpret_cast<uintptr_t>(workspace) : nowhere),
        used_(table_bytes),
        device_(device) {
    plan_.dtype = dtype;
  }

  // What a block of this kernel may have of dynamic shared memory.
  int64_t shared_bytes(Kernel kernel) const { return device_.shared_bytes - static_shared_bytes(kernel); }

  // Uninitialised scratch, 256-byte aligned.
  template <class T>
  T* scratch(int64_t elements) {
    T* at = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(elements * static_cast<int64_t>(sizeof(T)));
    return at;
  }

  // Values that the table itself brings to the device.
  template <class T>
  T* initialised(const std::vector<T>& values) {
    return reinterpret_cast<T*>(base_ + append(values));
  }

  // One launch of a persistent grid over `tiles`; nothing where there is nothing to do.
  template <class Problem>
  void persistent(Kernel kernel, const std::vector<Problem>& problems, int64_t tiles, int32_t block,
                  int64_t shared = 0) {
    if (tiles == 0) return;
    const int64_t most = static_cast<int64_t>(device_.multiprocessors) * blocks_per_multiprocessor;
    add(kernel, problems, static_cast<int32_t>(tiles), static_cast<int32_t>(tiles < most ? tiles : most),
        block, shared);
  }

  // One launch of so many blocks, each of which knows its problem.
  template <class Problem>
  void blocks(Kernel kernel, const std::vector<Problem>& problems, int32_t count, int32_t block,
              int64_t shared) {
    if (count > 0) add(kernel, problems, count, count, block, shared);
  }

  template <class Problem>
  void one_block_each(Kernel kernel, const std::vector<Problem>& problems, int32_t block, int64_t shared) {
    blocks(kernel, problems, static_cast<int32_t>(problems.size()), block, shared);
  }

  Plan finish() {
    plan_.workspace = used_;
    return std::move(plan_);
  }

  static int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

 private:
  template <class T>
  int64_t append(const std::vector<T>& values) {
    static_assert(std::is_trivially_copyable<T>::value, "tables are copied as bytes");
    const size_t at = plan_.table.size(), bytes = values.size() * sizeof(T);
    plan_.table.resize((at + bytes + 15) / 16 * 16);
    if (bytes) std::memcpy(plan_.table.data() + at, values.data(), bytes);
    return static_cast<int64_t>(at);
  }

  template <class Problem>
  void add(Kernel kernel, const std::vector<Problem>& problems, int32_t work, int32_t grid, int32_t block,
           int64_t shared) {
    const int64_t at = append(problems);
    plan_.launches.push_back({kernel, at, static_cast<int32_t>(problems.size()), work, grid, block, shared});
  }

  Plan plan_{};
  // Stands for an unknown address: a null pointer would mean "not wanted".
  static constexpr uintptr_t nowhere = 256;

  uintptr_t base_;
  int64_t used_;
  Device device_;
};

// Runs `build(builder)` twice and returns the plan for this workspace (null: only its size is wanted).
template <class Build>
Plan make_plan(tk_dtype dtype, void* workspace, const Device& device, Build&& build) {
  PlanBuilder draft(dtype, nullptr, 0, device);
  build(draft);
  const int64_t table = PlanBuilder::round_up(static_cast<int64_t>(draft.finish().table.size()));
  PlanBuilder final(dtype, workspace, table, device);
  build(final);
  return final.finish();
}

// A whole plan function: check(p) is the status of one problem, and build(zero, builder) makes the launches
// in the type of zero where all are TK_OK.
template <class Problem, class Check, class Build>
tk_status plan_problems(tk_dtype dtype, const Problem* problems, int64_t count, void* workspace,
                        const Device& device, Plan* plan, Check&& check, Build&& build) {
  if (count < 0) return TK_INVALID_ARGUMENT;
  if (count > std::numeric_limits<int32_t>::max()) return TK_UNSUPPORTED;
  for (int64_t i = 0; i < count; ++i)
    if (const tk_status status = check(problems[i]); status != TK_OK) return status;
  return dispatch(dtype, [&](auto zero) {
    *plan = make_plan(dtype, workspace, device, [&](PlanBuilder& builder) { build(zero, builder); });
    return TK_OK;
  });
}

}  // namespace tk
