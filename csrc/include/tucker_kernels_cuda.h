/* The C interface of the CUDA back end: device pointers, one call for any number of problems of different
 * sizes.
 *
 * tk_NAME_cuda takes what tk_NAME_cpu takes (tucker_kernels.h), with (workspace, workspace_bytes, stream) in
 * the place of threads. The table of problems and tol are host memory, everything they point to and every
 * other output is device memory.
 *
 * Every operator is called twice. With workspace = NULL it only writes the bytes of device memory it needs to
 * *workspace_bytes. With a workspace of that size (256-byte aligned) it launches on `stream` (a cudaStream_t)
 * and returns at once: nothing waits for the device, so calls can be captured into a CUDA graph. Sizes are
 * host values; ranks that depend on data are counters in device memory. Factorisations take matrices whose
 * smaller side (for tk_tangent_basis the number of directions, for tk_hosvd_truncate and tk_gram_solve the
 * mode) is at most 1024; beyond that they answer TK_UNSUPPORTED.
 */
#ifndef TUCKER_KERNELS_CUDA_H
#define TUCKER_KERNELS_CUDA_H

#include "tucker_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The GPU architectures the kernels were compiled for, for instance "80 90a". */
TK_API const char* tk_cuda_architectures(void);

/* Why kernels cannot run on the current device, for instance because they were compiled for others; an empty
 * string where they can. Loads the kernels. Valid until the next call of this thread. */
TK_API const char* tk_cuda_unusable(void);

/* What failed where the last call of this thread answered TK_CUDA_ERROR: the kernel, and CUDA's own words.
 * Errors that other CUDA calls left behind are neither reported nor cleared (but after a fault of anybody's
 * kernel every call fails, with the words for that). */
TK_API const char* tk_cuda_error(void);

TK_API tk_status tk_multi_mode_dot_cuda(tk_dtype dtype, const tk_multi_mode_dot_problem* problems,
                                        int64_t count, void* workspace, int64_t* workspace_bytes,
                                        void* stream);

TK_API tk_status tk_cross_gram_cuda(tk_dtype dtype, const tk_cross_gram_problem* problems, int64_t count,
                                    void* workspace, int64_t* workspace_bytes, void* stream);

/* Columns of the basis may be zero. */
TK_API tk_status tk_tangent_basis_cuda(tk_dtype dtype, const tk_tangent_basis_problem* problems,
                                       int64_t count, int64_t* counts, void* workspace,
                                       int64_t* workspace_bytes, void* stream);

/* A rank that exceeds the product of the others is cut to it; nothing is lost by that. */
TK_API tk_status tk_hosvd_truncate_cuda(tk_dtype dtype, const tk_hosvd_truncate_problem* problems,
                                        int64_t count, const double* tol, int per_mode, int64_t* ranks,
                                        int64_t width, double* errors, void* workspace,
                                        int64_t* workspace_bytes, void* stream);

/* All of a problem's sizes below 2^31, any rank. */
TK_API tk_status tk_rotate_bases_cuda(tk_dtype dtype, const tk_rotate_bases_problem* problems, int64_t count,
                                      void* workspace, int64_t* workspace_bytes, void* stream);

/* NaN where the tensor is not finite. */
TK_API tk_status tk_gram_solve_cuda(tk_dtype dtype, const tk_gram_solve_problem* problems, int64_t count,
                                    void* workspace, int64_t* workspace_bytes, void* stream);

/* A column that depends on those before it has a zero column in q and a zero row in r. NaN where the matrix
 * is not finite. */
TK_API tk_status tk_batched_qr_cuda(tk_dtype dtype, const tk_batched_qr_problem* problems, int64_t count,
                                    void* workspace, int64_t* workspace_bytes, void* stream);

/* Singular vectors of the longer side that belong to singular values of rounding size may be exactly zero.
 * NaN where the matrix is not finite. */
TK_API tk_status tk_batched_svd_cuda(tk_dtype dtype, const tk_batched_svd_problem* problems, int64_t count,
                                     void* workspace, int64_t* workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* TUCKER_KERNELS_CUDA_H */
