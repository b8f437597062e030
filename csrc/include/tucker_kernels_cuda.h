/* The C interface of the CUDA back end: device pointers, one call for any number of problems of different
 * sizes.
 *
 * Every operator is called twice. With workspace = NULL it only writes the bytes of device memory it needs to
 * *workspace_bytes. With a workspace of that size (256-byte aligned) it launches on `stream` (a cudaStream_t)
 * and returns at once: nothing waits for the device, so calls can be captured into a CUDA graph. Sizes are
 * host values; ranks that depend on data are counters in device memory. Matrices are row-major and
 * contiguous. dtype is the type of every matrix of the call. Factorisations take matrices whose smaller side
 * is at most 1024; beyond that they answer TK_UNSUPPORTED.
 */
#ifndef TUCKER_KERNELS_CUDA_H
#define TUCKER_KERNELS_CUDA_H

#include "tucker_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The GPU architectures the kernels were compiled for, for instance "80 90a". */
TK_API const char* tk_cuda_architectures(void);

/* The products of each problem are done in the order given. */
TK_API tk_status tk_multi_mode_dot_cuda(tk_dtype dtype, int32_t count, const tk_mode_products* problems,
                                        void* workspace, int64_t* workspace_bytes, void* stream);

TK_API tk_status tk_cross_gram_cuda(tk_dtype dtype, int32_t count, const tk_cross_gram* problems,
                                    void* workspace, int64_t* workspace_bytes, void* stream);

/* basis (n, r) with orthonormal or zero columns, direction (n, p): tangent (n, p) gets orthonormal columns
 * that complete span[basis | direction], exact zeros after them, and *kept their number (-1, and a zero
 * tangent, where an input is not finite). */
typedef struct {
  const void* basis;
  const void* direction;
  void* tangent;
  int64_t* kept;
  int64_t n, r, p;
} tk_tangent;
TK_API tk_status tk_tangent_basis_cuda(tk_dtype dtype, int32_t count, const tk_tangent* problems,
                                       void* workspace, int64_t* workspace_bytes, void* stream);

/* Truncated higher-order SVD. projections[i] (shape[i], shape[i]) is NULL for a mode that is not cut;
 * new_core has the size of core; both are exactly zero beyond the ranks. tol < 0: take max_ranks. ranks
 * points to `width` counters (zero beyond ndim); error is the relative error, NaN where the core is not
 * finite, which then comes back unchanged with identity projections. A rank that exceeds the product of the
 * others is cut to it; nothing is lost by that. sweeps: the most Jacobi sweeps; they end early when
 * nothing rotates. */
typedef struct {
  const void* core;
  void* new_core;
  int64_t* ranks;
  double* error;
  double tol;
  int32_t ndim, width, per_mode, sweeps;
  int64_t shape[TK_MAX_MODES];
  int64_t min_ranks[TK_MAX_MODES], max_ranks[TK_MAX_MODES];
  void* projections[TK_MAX_MODES];
} tk_truncation;
TK_API tk_status tk_hosvd_truncate_cuda(tk_dtype dtype, int32_t count, const tk_truncation* problems,
                                        void* workspace, int64_t* workspace_bytes, void* stream);

/* See tk_rotate_bases_cpu; all of a problem's sizes below 2^31, any rank. */
TK_API tk_status tk_rotate_bases_cuda(tk_dtype dtype, int32_t count, const tk_rotation_problem* problems,
                                      void* workspace, int64_t* workspace_bytes, void* stream);

/* See tk_gram_solve_cpu; n at most 1024. NaN where the tensor is not finite. */
TK_API tk_status tk_gram_solve_cuda(tk_dtype dtype, int32_t count, const tk_gram_solve_problem* problems,
                                    void* workspace, int64_t* workspace_bytes, void* stream);

/* See tk_batched_qr_cpu. A column that depends on those before it has a zero column in q and a zero row in r.
 * NaN where the matrix is not finite. */
TK_API tk_status tk_batched_qr_cuda(tk_dtype dtype, int32_t count, const tk_qr_problem* problems,
                                    void* workspace, int64_t* workspace_bytes, void* stream);

/* See tk_batched_svd_cpu. Singular vectors of the longer side that belong to singular values of rounding size
 * may be exactly zero. NaN where the matrix is not finite. */
TK_API tk_status tk_batched_svd_cuda(tk_dtype dtype, int32_t count, const tk_svd_problem* problems,
                                     void* workspace, int64_t* workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* TUCKER_KERNELS_CUDA_H */
