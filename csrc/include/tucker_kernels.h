/* The C interface of tucker-kernels: plain pointers and sizes, no torch and no Python.
 *
 * Every function returns a tk_status and writes only to the outputs it names. Matrices are row-major and
 * tensors are contiguous in C order unless a stride is given. `threads` is the number of OpenMP threads to
 * use (at least 1). Functions whose name ends in _cpu take host pointers.
 */
#ifndef TUCKER_KERNELS_H
#define TUCKER_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define TK_API
#else
#define TK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { TK_MAX_MODES = 8 };

typedef enum {
  TK_OK = 0,
  TK_INVALID_ARGUMENT = 1,
  TK_UNSUPPORTED = 2,
  TK_OUT_OF_MEMORY = 3,
  TK_CUDA_ERROR = 4
} tk_status;

typedef enum { TK_FLOAT32 = 0, TK_FLOAT64 = 1, TK_BFLOAT16 = 2 } tk_dtype;

/* A sentence for a status, never NULL. */
TK_API const char* tk_status_string(tk_status status);

/* The instruction set the CPU kernels run with here: "avx512", "avx2" or "baseline". The environment variable
 * TK_ISA lowers it (for tests); asking for one the machine lacks is ignored. */
TK_API const char* tk_cpu_isa(void);

/* By what tk_tucker_conv_*_cpu decide whether a 3x3 window of stride 1 works in tiles of 4x4 pixels: if
 * tiles * (costs[0] + costs[1] max(r_in, r_out) / (r_in r_out)) + costs[2] is less than costs[3] times the
 * taps inside the images, summed over all pixels. Returns 0 if it never does (the environment variable
 * TK_WINOGRAD is 0), else 1. */
TK_API int tk_tile_costs_cpu(double costs[4]);

/* n-mode product. x is (outer, n, inner), matrix is (rows, n), or (n, rows) when transpose is non-zero;
 * y is (outer, rows, inner):  y[o,r,i] = sum_k matrix[r,k] x[o,k,i]. */
TK_API tk_status tk_mode_dot_cpu(tk_dtype dtype, const void* x, int64_t outer, int64_t n, int64_t inner,
                                 const void* matrix, int64_t rows, int transpose, void* y, int threads);

/* A two-dimensional convolution with a Tucker weight; sizes are {rows, columns}. A one-dimensional one has
 * one row. */
typedef struct {
  int64_t batch, n_in, n_out, r_in, r_out;
  int64_t size[2], out_size[2], window[2], stride[2], padding[2], dilation[2];
} tk_conv2d;

/* Fused Tucker convolution  y = U_out (core * (U_in^T x)) + bias. Images (x, y, z, t, ...) are channels-last,
 * dense, of the dtype named; core (r_out, r_in, *window), U_out (n_out, r_out), U_in (n_in, r_in), bias
 * (n_out) and their gradients are float32 where that is bfloat16. Null: U_out, U_in the identity (n = r),
 * bias zero, z = U_in^T x and t = core * z not saved. */
TK_API tk_status tk_tucker_conv_forward_cpu(tk_dtype dtype, const tk_conv2d* conv, const void* x,
                                            const void* core, const void* out_factor, const void* in_factor,
                                            const void* bias, void* y, void* z, void* t, int threads);

/* Outputs of the backward pass; null ones are not computed. The leading known[0]×known[1] block of channels
 * of the core's gradient is not computed either, but set to zero. */
typedef struct {
  void *input, *core, *out_factor, *in_factor, *bias;
  int64_t known[2];
} tk_conv2d_gradients;

/* Gradients of the above from that of y. z and t are what the forward pass saved, null: computed again. core
 * may be null when only the gradients of core and bias are asked for. */
TK_API tk_status tk_tucker_conv_backward_cpu(tk_dtype dtype, const tk_conv2d* conv, const void* grad,
                                             const void* x, const void* z, const void* t, const void* core,
                                             const void* out_factor, const void* in_factor,
                                             const tk_conv2d_gradients* gradients, int threads);

/* A linear layer whose weight has `modes` modes, the first out_modes of them on the output side: factor[i] is
 * (size[i], rank[i]), or null where rank[i] is size[i] and there is none. Every field is 8 bytes wide. */
typedef struct {
  int64_t rows, out_modes, modes;
  int64_t size[TK_MAX_MODES], rank[TK_MAX_MODES];
  const void *core, *factor[TK_MAX_MODES];
} tk_linear;

/* y = t ×_out U + bias with z = x ×_in Vᵀ and t = C z, of all rows: x (rows, in sizes), z (rows, in ranks), t
 * (rows, out ranks), y (rows, out sizes). Null: bias zero, z and t not saved. */
TK_API tk_status tk_tucker_linear_forward_cpu(tk_dtype dtype, const tk_linear* layer, const void* x,
                                              const void* bias, void* y, void* z, void* t, int threads);

/* Outputs of the backward pass; null ones are not computed. t: of the t above, left alone where that is y. */
typedef struct {
  void *input, *core, *bias, *t, *factor[TK_MAX_MODES];
} tk_linear_gradients;

/* Gradients of the above from that of y. z and t are what the forward pass saved; null where that side has no
 * factor, so that they are x and y. */
TK_API tk_status tk_tucker_linear_backward_cpu(tk_dtype dtype, const tk_linear* layer, const void* grad,
                                               const void* x, const void* z, const void* t,
                                               const tk_linear_gradients* gradients, int threads);

/* The operators below take a table of problems of different sizes and do all of them in one call. Every field
 * of their structs is 8 bytes wide. */

/* out = tensor ×_{modes[0]} matrices[0] ×_{modes[1]} …, every mode at most once, in the order that takes the
 * fewest operations; matrices[k] is (rows[k], n), or (n, rows[k]) with transpose. tensor and out are
 * contiguous. */
typedef struct {
  const void* tensor;
  void* out;
  int64_t ndim, products, transpose;
  int64_t shape[TK_MAX_MODES], modes[TK_MAX_MODES], rows[TK_MAX_MODES];
  const void* matrices[TK_MAX_MODES];
} tk_multi_mode_dot_problem;

TK_API tk_status tk_multi_mode_dot_cpu(tk_dtype dtype, const tk_multi_mode_dot_problem* problems,
                                       int64_t count, int threads);

/* out[i,j] = sum_{o,k} a[o,i,k] b[o,j,k] for a (outer, a_size, inner) and b (outer, b_size, inner). */
typedef struct {
  const void *a, *b;
  void* out;
  int64_t outer, inner, a_size, b_size;
} tk_cross_gram_problem;

TK_API tk_status tk_cross_gram_cpu(tk_dtype dtype, const tk_cross_gram_problem* problems, int64_t count,
                                   int threads);

/* found (n×count): orthonormal columns spanning the part of directions (n×count) outside basis (n×rank),
 * dependent columns dropped, then zeros. */
typedef struct {
  const void *basis, *directions;
  void* found;
  int64_t n, rank, count;
} tk_tangent_basis_problem;

/* counts[i]: how many columns problem i found, or -1 where an input is not finite (found is zero then). */
TK_API tk_status tk_tangent_basis_cpu(tk_dtype dtype, const tk_tangent_basis_problem* problems, int64_t count,
                                      int64_t* counts, int threads);

/* rotated (n×rank) = Q (3I - QᵀQ) / 2 with Q = basis (n×size) rotation (size×rank, rows rotation_row apart).
 */
typedef struct {
  const void *basis, *rotation;
  void* rotated;
  int64_t n, size, rank, rotation_row;
} tk_rotate_bases_problem;

TK_API tk_status tk_rotate_bases_cpu(tk_dtype dtype, const tk_rotate_bases_problem* problems, int64_t count,
                                     int threads);

/* solution (rows×n) = right_side (rows×n) (M Mᵀ + ρ I)⁻¹ with M the unfolding of the middle index of tensor
 * (outer, n, inner) and ρ = 4ε tr(M Mᵀ). */
typedef struct {
  const void *tensor, *right_side;
  void* solution;
  int64_t outer, n, inner, rows;
} tk_gram_solve_problem;

TK_API tk_status tk_gram_solve_cpu(tk_dtype dtype, const tk_gram_solve_problem* problems, int64_t count,
                                   int threads);

/* matrix (m×n) = q (m×k) r (k×n), k = min(m, n), r with a non-negative diagonal. */
typedef struct {
  const void* matrix;
  void *q, *r;
  int64_t m, n;
} tk_batched_qr_problem;

TK_API tk_status tk_batched_qr_cpu(tk_dtype dtype, const tk_batched_qr_problem* problems, int64_t count,
                                   int threads);

/* matrix (m×n) = u (m×k) diag(s) vh (k×n), k = min(m, n), s descending. */
typedef struct {
  const void* matrix;
  void *u, *s, *vh;
  int64_t m, n;
} tk_batched_svd_problem;

TK_API tk_status tk_batched_svd_cpu(tk_dtype dtype, const tk_batched_svd_problem* problems, int64_t count,
                                    int threads);

/* Truncated higher-order SVD of one core of `modes` dimensions. Where truncated[i] is non-zero, projection[i]
 * (shape[i]×shape[i]) receives orthonormal columns and then zeros; elsewhere it may be NULL. new_core has the
 * size of core and is zero beyond the ranks. */
typedef struct {
  const void* core;
  void* new_core;
  int64_t modes;
  int64_t shape[TK_MAX_MODES], truncated[TK_MAX_MODES], min_rank[TK_MAX_MODES], max_rank[TK_MAX_MODES];
  void* projection[TK_MAX_MODES];
} tk_hosvd_truncate_problem;

/* tol[l] < 0 takes max_rank exactly. ranks is (count, width), zero beyond a core's modes; errors[l] is
 * |C - C' x P| / |C|, NaN where the core is not finite (it comes back unchanged with identity projections).
 */
TK_API tk_status tk_hosvd_truncate_cpu(tk_dtype dtype, const tk_hosvd_truncate_problem* problems,
                                       int64_t count, const double* tol, int per_mode, int64_t* ranks,
                                       int64_t width, double* errors, int threads);

#ifdef __cplusplus
}
#endif
#endif /* TUCKER_KERNELS_H */
