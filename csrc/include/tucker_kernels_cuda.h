/* The C interface of the CUDA back end: device pointers, one call for any number of problems of different
 * sizes.
 *
 * Every operator is called twice. With workspace = NULL it only writes the bytes of device memory it needs to
 * *workspace_bytes, and touches no device. With a workspace of at least that size (256-byte aligned) it
 * launches on `stream` (a cudaStream_t) and returns at once: nothing waits for the device, so calls can be
 * captured into a CUDA graph. Sizes are host values; ranks that depend on data are counters in device memory.
 * Matrices are row-major and contiguous. dtype is the type of every matrix of the call.
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

#ifdef __cplusplus
}
#endif
#endif /* TUCKER_KERNELS_CUDA_H */
