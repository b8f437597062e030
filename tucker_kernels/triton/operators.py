"""The operators of `library.py` made of these kernels; semantics as in `reference.py`, where the formulas are.

Products of an image with a basis alone are the library's: there is nothing to fuse with them, and torch's own flags say
how they multiply float32. The kernels' products are as `input_precision` says, which callers of the operators leave to
the default.
"""

from tucker_kernels.reference import channels_last, format_of
from tucker_kernels.triton import configs
from tucker_kernels.triton.launch import dtype_kind
from tucker_kernels.triton.project_accumulate import project_accumulate
from tucker_kernels.triton.rank_space_wgrad import rank_space_wgrad as wgrad
from tucker_kernels.triton.tucker_core_expand import tucker_core_expand
from tucker_kernels.triton.tucker_linear import tucker_linear


def _pixels(image):
    """A channels-last image as a (pixels, channels) matrix; a view."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(matrix, like):
    """A (pixels, channels) matrix as a channels-last image of the batch and size of `like`; a view."""
    B, _, H, W = like.shape
    return matrix.view(B, H, W, matrix.shape[1]).permute(0, 3, 1, 2)


def _project(image, basis):
    return _image(_pixels(image) @ basis, image)


def _is_linear(core, stride, padding, input_precision):
    """Whether a convolution is a linear layer on pixels whose ranks fit the one-kernel form."""
    kind = dtype_kind(core.dtype, max(core.shape[:2]), input_precision)
    pointwise = (*core.shape[2:], *stride, *padding) == (1, 1, 1, 1, 0, 0)
    return pointwise and configs.fits_tucker_linear(kind, max(core.shape[:2]))


def tucker_conv_forward(
    input, core, out_factor, in_factor, bias, stride, padding, dilation, path, save, *, input_precision=None
):
    """Two launches: z = U_inᵀ x, then core convolution and expansion as a pair. One launch for a pointwise window."""
    x = channels_last(input)
    options = {"save_intermediate": save, "input_precision": input_precision}
    if _is_linear(core, stride, padding, input_precision):
        found = tucker_linear(_pixels(x), core[..., 0, 0], out_factor, in_factor, bias, **options)
        y, z, t = (None if m is None else _image(m, x) for m in found)
    else:
        z = _project(x, in_factor)
        y, t = tucker_core_expand(z, core, out_factor, bias, stride, padding, dilation, **options)
    y = y.contiguous(memory_format=format_of(input))
    return (y, z, t) if save else (y, input.new_empty(0), input.new_empty(0))


def tucker_conv_backward(
    grad, input, z, t, core, out_factor, in_factor, stride, padding, dilation, need, path, *, input_precision=None
):
    """dt and dU_out in one read of dy; dz and dx as a pair; dU_in and dcore by split sums."""
    need_x, need_core, need_out, need_in, need_bias = need
    geometry, products = (stride, padding, dilation), {"input_precision": input_precision}
    x, dy = channels_last(input), channels_last(grad)
    if z.ndim != 4 and (need_core or (need_out and t.ndim != 4)):
        z = _project(x, in_factor)
    if need_out and t.ndim != 4:
        t = tucker_core_expand(z, core, out_factor[:0], None, *geometry, save_intermediate=True, **products)[1]
    dt, d_out = project_accumulate(_pixels(dy), out_factor, _pixels(t) if need_out else None, **products)
    dt = _image(dt, dy)
    dx = d_in = d_core = None
    if need_x or need_in:
        # Without a wish for dx the expansion has no columns.
        expansion = in_factor if need_x else in_factor[:0]
        size = tuple(x.shape[2:])
        dx, dz = tucker_core_expand(
            dt, core, expansion, None, *geometry, transposed_size=size, save_intermediate=need_in, **products
        )
        if need_in:
            d_in = project_accumulate(_pixels(x), None, _pixels(dz), **products)[1]
    if need_core:
        d_core = wgrad(z, dt, core.shape[2:], *geometry, **products)
    empty = [input.new_empty(0) for _ in range(5)]
    return (
        dx.contiguous(memory_format=format_of(input)) if need_x else empty[0],
        d_core if need_core else empty[1],
        d_out if need_out else empty[2],
        d_in if need_in else empty[3],
        dy.sum([0, 2, 3]) if need_bias else empty[4],
    )


def rank_space_wgrad(input, grad, out_basis, in_basis, window, stride, padding, dilation, known=()):
    """Both projections by the library, then the split weight gradient."""
    x, dy = channels_last(input), channels_last(grad)
    z = x if in_basis is None else _project(x, in_basis)
    d = dy if out_basis is None else _project(dy, out_basis)
    if not known or 0 in known:
        return wgrad(z, d, window, stride, padding, dilation)
    parts = [[p for p in image.tensor_split([n], 1) if p.shape[1]] for image, n in ((z, known[1]), (d, known[0]))]
    return wgrad(*parts, window, stride, padding, dilation, known=0)


def augmented_core_grad(input, grad, z, dt, out_directions, in_directions, known, stride, padding, dilation):
    """The augmented core gradient of the one-pass step, (2r_out, 2r_in, *window), from what the backward pass has.

    H̃ = wgrad([z | X V_in], [dt | dY V_out]) with the (z, dt) block `known`: the core's own gradient.

    Args:
        z, dt: U_inᵀ x and U_outᵀ dy, channels-last images of rank space; `known`: wgrad(z, dt).
        out_directions, in_directions: V_out (C_out, p) and V_in (C_in, p), the new directions.
    """
    x, dy = channels_last(input), channels_last(grad)
    window = known.shape[2:]
    parts = [z, _project(x, in_directions)], [dt, _project(dy, out_directions)]
    return wgrad(*parts, window, stride, padding, dilation, known=known)
