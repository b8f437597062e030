// What launch plans must know about the kernels: threads per block, tiles, and shared memory by problem size.
#pragma once

#include <cstdint>

namespace tk {

constexpr int32_t gemm_tile = 64, gemm_threads = 128;
constexpr int32_t projection_columns = 16, projection_chunk = 128, projection_threads = 256;
constexpr int32_t gram_tile = 64, gram_threads = 128;
constexpr int32_t semidefinite_cholesky_threads = 512;
constexpr int32_t jacobi_svd_threads = 512;
constexpr int32_t finish_threads = 256;
constexpr int32_t store_threads = 256;

// The largest matrix the factorisations take.
constexpr int32_t largest_factorization = 1024;
// What a block may have of shared memory without asking for more.
constexpr int64_t granted_shared_bytes = 48 * 1024;

// Dynamic shared memory of a block with one problem.
template <class T>
constexpr int64_t project_out_shared(int64_t rows) {
  return (rows + projection_chunk) * projection_columns * static_cast<int64_t>(sizeof(T));
}
// What a problem needs besides the matrix, and the matrix's rows up to `resident`; the others lie in device
// memory.
constexpr int64_t semidefinite_cholesky_shared(int64_t size, int64_t resident) {
  return size * 16 + resident * (resident + 1) / 2 * 8;
}
// So many columns: what a block needs besides them, and with them.
template <class T>
constexpr int64_t jacobi_svd_shared(int64_t columns, int64_t rows) {
  return columns * (8 + (2 + rows) * static_cast<int64_t>(sizeof(T)));
}

}  // namespace tk
