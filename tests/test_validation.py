"""Wrong arguments: the exact error, and a message that names the argument, what was given and what is allowed."""

import re

import numpy as np
import pytest
import torch

import tucker_kernels as tk

T = torch.zeros(2, 3, 4)
INTEGERS = torch.zeros(2, 3, dtype=torch.int64)
CORE, IMAGE = torch.zeros(3, 2, 3, 3), torch.zeros(1, 4, 8, 8)
FACTORS = [torch.zeros(5, 3), torch.zeros(4, 2), None, None]
Y = torch.zeros(1, 5, 6, 6)
ROWS, MATRIX_CORE, PAIR = torch.zeros(7, 4), torch.zeros(3, 2), FACTORS[:2]


def m(*shape, **options):
    return torch.zeros(*shape, **options)


def conv(input=IMAGE, core=CORE, factors=FACTORS, bias=None, **options):
    return tk.tucker_conv(input, core, factors, bias, **options)


def conv_core_grad(input=IMAGE, grad_output=Y, factors=FACTORS, window=(3, 3), **options):
    return tk.tucker_conv_core_grad(input, grad_output, factors, window, **options)


def linear(input=ROWS, core=MATRIX_CORE, factors=PAIR, bias=None, **options):
    return tk.tucker_linear(input, core, factors, bias, **options)


def linear_core_grad(input=ROWS, grad_output=None, factors=PAIR, sizes=(5, 4), **options):
    return tk.tucker_linear_core_grad(input, m(7, 5) if grad_output is None else grad_output, factors, sizes, **options)


HALF, DOUBLE, META = {"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}
CASES = [
    # unfold, fold
    (lambda: tk.unfold([1.0], 0), TypeError, "tensor must be a tensor, got list"),
    (lambda: tk.unfold(INTEGERS, 0), TypeError, "tensor has dtype torch.int64; allowed are float32, float64, bfloat16"),
    (lambda: tk.unfold(T.to(torch.complex64), 0), TypeError, "tensor has dtype torch.complex64; allowed are float32"),
    (lambda: tk.unfold(T.to_sparse(), 0), TypeError, "tensor has layout torch.sparse_coo; allowed are dense tensors"),
    (lambda: tk.mode_dot(T, m(5, 3).to_sparse_csr(), 1), TypeError, "matrix has layout torch.sparse_csr; allowed are"),
    (lambda: linear(ROWS.to_mkldnn()), TypeError, "input has layout torch._mkldnn; allowed are dense tensors"),
    (lambda: tk.batched_qr([torch.nested.nested_tensor([m(2, 3)])]), TypeError, "matrices[0] is nested; allowed are"),
    (lambda: tk.unfold(T, 3), ValueError, "mode is 3; allowed are -3 to 2"),
    (lambda: tk.unfold(T, -4), ValueError, "mode is -4; allowed are -3 to 2"),
    (lambda: tk.unfold(T, 1.0), TypeError, "mode must be an integer, got float"),
    (lambda: tk.unfold(T, True), TypeError, "mode must be an integer, got bool"),
    (lambda: tk.unfold(torch.tensor(1.0), 0), ValueError, "mode is 0, but there are no dimensions"),
    (lambda: tk.fold(T, 0, (2, 3, 4)), ValueError, "matrix must have 2 dimensions, got shape (2, 3, 4)"),
    (
        lambda: tk.fold(m(2, 12), 1, (2, 3, 4)),
        ValueError,
        "shape (2, 12); folding mode 1 of shape (2, 3, 4) needs (3, 8)",
    ),
    (lambda: tk.fold(m(2, 12), 3, (2, 3, 4)), ValueError, "mode is 3; allowed are -3 to 2"),
    (lambda: tk.fold(m(2, 12), 0, (2, 3.0, 4)), TypeError, "shape must hold integers, got 3.0"),
    (lambda: tk.fold(m(2, 12), 0, (2, -3, -4)), ValueError, "shape is (2, -3, -4); allowed are integers from 0 on"),
    (lambda: tk.fold(m(2, 12), 0, 2), TypeError, "shape must be a sequence of integers, got int"),
    # mode_dot
    (lambda: tk.mode_dot(T, m(5, 4), 1), ValueError, "matrix has 4 columns, but mode 1 of tensor has size 3"),
    (
        lambda: tk.mode_dot(T, m(4, 5), 1, transpose=True),
        ValueError,
        "matrix has 4 rows, but mode 1 of tensor has size 3",
    ),
    (lambda: tk.mode_dot(T, m(3), 1), ValueError, "matrix must have 2 dimensions, got shape (3,)"),
    (
        lambda: tk.mode_dot(T, m(5, 3, **DOUBLE), 1),
        TypeError,
        "matrix has dtype torch.float64, but tensor has torch.float32",
    ),
    (lambda: tk.mode_dot(T, m(5, 3, **META), 1), ValueError, "matrix is on meta, but tensor is on cpu"),
    (lambda: tk.mode_dot(T, None, 1), TypeError, "matrix must be a tensor, got NoneType"),
    (lambda: tk.mode_dot(T, m(5, 3), 4), ValueError, "mode is 4; allowed are -3 to 2"),
    (lambda: tk.mode_dot(T, m(5, 3), 1, "no"), TypeError, "transpose must be True or False, got 'no'"),
    # multi_mode_dot
    (lambda: tk.multi_mode_dot(T, m(3, 5, 2)), TypeError, "matrices must be a list of matrices, got Tensor"),
    (lambda: tk.multi_mode_dot(T, None), TypeError, "matrices must be a list of matrices, got NoneType"),
    (
        lambda: tk.multi_mode_dot(T, [m(5, 2), m(5, 4)]),
        ValueError,
        "matrices[1] has 4 columns, but mode 1 of tensor has size 3",
    ),
    (lambda: tk.multi_mode_dot(T, [m(5, 2)], modes=[0, 1]), ValueError, "modes has 2 entries, but matrices has 1"),
    (
        lambda: tk.multi_mode_dot(T, [m(5, 2), m(5, 2)], modes=[0, -3]),
        ValueError,
        "modes is [0, 0]; each mode may be named once",
    ),
    (lambda: tk.multi_mode_dot(T, [m(5, 2)], modes=[7]), ValueError, "modes[0] is 7; allowed are -3 to 2"),
    (lambda: tk.multi_mode_dot(T, [m(5, 2)], modes=0), TypeError, "modes must be a sequence of integers, got int"),
    (lambda: tk.multi_mode_dot(T, [m(5, 2)], skip=1), ValueError, "skip is 1; allowed are -1 to 0"),
    (lambda: tk.multi_mode_dot(T, [m(5, 2)] * 4), ValueError, "modes[3] is 3; allowed are -3 to 2"),
    # tucker_to_tensor
    (lambda: tk.tucker_to_tensor(CORE, PAIR), ValueError, "factors has 2 entries, but core has 4 modes"),
    (lambda: tk.tucker_to_tensor(CORE, m(4, 5, 3)), TypeError, "factors must be a list of matrices, got Tensor"),
    (
        lambda: tk.tucker_to_tensor(MATRIX_CORE, [m(5, 2), None]),
        ValueError,
        "factors[0] has 2 columns, but mode 0 of core has size 3",
    ),
    (
        lambda: tk.tucker_to_tensor(MATRIX_CORE, [None, m(4, 2, **META)]),
        ValueError,
        "factors[1] is on meta, but core is on cpu",
    ),
    # tucker_conv
    (
        lambda: conv(stride=torch.tensor(3)),
        TypeError,
        "stride must be an integer or a sequence of integers, got Tensor",
    ),
    (lambda: conv(recompute=1), TypeError, "recompute must be True or False, got 1"),
    (lambda: conv(memory="fused"), TypeError, "memory must be a dict or None, got str"),
    (lambda: tk.gram_solve([CORE], 0, [m(2, 3)]), TypeError, "modes must be a sequence of integers, got int"),
    (lambda: conv(core=m(3, 2)), ValueError, "core has 2 modes; a 1-, 2- or 3-dimensional convolution has 3, 4 or 5"),
    (lambda: conv(core=m(3, 2, 1, 1, 1, 1)), ValueError, "core has 6 modes; a 1-, 2- or 3-dimensional"),
    (lambda: conv(core=m(0, 2, 3, 3), factors=[m(5, 0), *FACTORS[1:]]), ValueError, "core has shape (0, 2, 3, 3); e"),
    (lambda: conv(core=m(3, 2, 0, 3)), ValueError, "core has shape (3, 2, 0, 3); every mode needs a positive size"),
    (lambda: conv(factors=[m(0, 3), *FACTORS[1:]]), ValueError, "factors[0] has 0 rows; every mode needs a positive"),
    (lambda: conv(m(1, 4, 0, 8)), ValueError, "input has shape (1, 4, 0, 8); every dimension but the batch needs a"),
    (lambda: conv(input=m(4, 8, 8)), ValueError, "input must have 4 dimensions, got shape (4, 8, 8)"),
    (lambda: conv(input=m(1, 6, 8, 8)), ValueError, "input has 6 channels, but the weight takes 4"),
    (
        lambda: conv(input=m(1, 4, 8, 8, **HALF)),
        TypeError,
        "input has dtype torch.bfloat16, but core has torch.float32",
    ),
    (lambda: conv(input=m(1, 4, 8, 8, **META)), ValueError, "input is on meta, but core is on cpu"),
    (
        lambda: conv(input=m(1, 4, 2, 8)),
        ValueError,
        "input of size (2, 8) with padding (0, 0) is smaller than the window (3, 3)",
    ),
    (lambda: conv(dilation=4), ValueError, "is smaller than the window (3, 3) with dilation (4, 4)"),
    (lambda: conv(core=INTEGERS), TypeError, "core has dtype torch.int64; allowed are"),
    (lambda: conv(factors=PAIR), ValueError, "factors has 2 entries, but core has 4 modes; use None for a mode"),
    (
        lambda: conv(factors=[m(5, 4), *FACTORS[1:]]),
        ValueError,
        "factors[0] has 4 columns, but mode 0 of core has size 3",
    ),
    (
        lambda: conv(factors=[*PAIR, m(5, 2), None]),
        ValueError,
        "factors[2] has 2 columns, but mode 2 of core has size 3",
    ),
    (lambda: conv(bias=m(4)), ValueError, "bias has 4 entries, but the weight has 5 outputs"),
    (lambda: conv(bias=m(5, 1)), ValueError, "bias must have 1 dimension, got shape (5, 1)"),
    (lambda: conv(bias=m(5, **DOUBLE)), TypeError, "bias has dtype torch.float64, but core has torch.float32"),
    (lambda: conv(stride=0), ValueError, "stride is 0; allowed are integers from 1 on"),
    (lambda: conv(stride=(1, 2, 3)), ValueError, "stride must be one integer or 2, got (1, 2, 3)"),
    (lambda: conv(stride=1.5), TypeError, "stride must be an integer or a sequence of integers, got float"),
    (lambda: conv(stride=(1, 2.0)), TypeError, "stride must hold integers, got 2.0"),
    (lambda: conv(padding=-1), ValueError, "padding is -1; allowed are integers from 0 on"),
    (lambda: conv(padding="same"), TypeError, "padding must be an integer or a sequence of integers, got str"),
    (lambda: conv(dilation=(1, 0)), ValueError, "dilation is (1, 0); allowed are integers from 1 on"),
    (lambda: conv(path="fast"), ValueError, "path is 'fast'; allowed are 'auto', 'chain', 'fused', 'reconstruct'"),
    # tucker_conv_core_grad
    (lambda: conv_core_grad(window=None), ValueError, "window is None, but some window factor is None too"),
    (lambda: conv_core_grad(window=(3,)), ValueError, "window must be one integer or 2, got (3,)"),
    (lambda: conv_core_grad(window=(3, 0)), ValueError, "window is (3, 0); allowed are integers from 1 on"),
    (
        lambda: conv_core_grad(factors=PAIR),
        ValueError,
        "factors has 2 entries; a 1-, 2- or 3-dimensional convolution has 3, 4 or 5",
    ),
    (lambda: conv_core_grad(factors=m(4, 5, 3)), TypeError, "factors must be a list of matrices, got Tensor"),
    (lambda: conv_core_grad(input=m(1, 6, 8, 8)), ValueError, "factors[1] has 4 rows, but input has 6 channels"),
    (
        lambda: conv_core_grad(grad_output=m(1, 6, 6, 6)),
        ValueError,
        "factors[0] has 5 rows, but grad_output has 6 channels",
    ),
    (
        lambda: conv_core_grad(grad_output=m(2, 5, 6, 6)),
        ValueError,
        "(2, 5, 6, 6); for this input and window it must be (1, 5, 6, 6)",
    ),
    (
        lambda: conv_core_grad(grad_output=m(1, 5, 8, 6)),
        ValueError,
        "grad_output has shape (1, 5, 8, 6); for this input and window",
    ),
    (
        lambda: conv_core_grad(grad_output=m(1, 5, 6, 6, **DOUBLE)),
        TypeError,
        "grad_output has dtype torch.float64, but input has torch.float32",
    ),
    (
        lambda: conv_core_grad(factors=[m(5, 3, **META), *FACTORS[1:]]),
        ValueError,
        "factors[0] is on meta, but input is on cpu",
    ),
    (lambda: conv_core_grad(factors=[*PAIR, m(5, 2), None]), ValueError, "factors[2] has 5 rows, but window[0] is 3"),
    (lambda: conv_core_grad(stride=0), ValueError, "stride is 0; allowed are integers from 1 on"),
    (lambda: conv_core_grad(known=(4, 1)), ValueError, "known is (4, 1); allowed are two integers from 0 to (3, 2)"),
    (lambda: conv_core_grad(known=(-1, 1)), ValueError, "known is (-1, 1); allowed are two integers from 0"),
    (lambda: conv_core_grad(known=(1,)), ValueError, "known is (1,); allowed are two integers from 0 to (3, 2)"),
    (lambda: conv_core_grad(known=3), TypeError, "known must be a sequence of integers, got int"),
    # tucker_linear
    (lambda: linear(input=m(7, 5)), ValueError, "input has shape (7, 5); its last dimension must be 4"),
    (lambda: linear(input=torch.tensor(1.0)), ValueError, "input has shape (); its last dimension must be 4"),
    (lambda: linear(input=m(7, 4, **DOUBLE)), TypeError, "input has dtype torch.float64, but core has torch.float32"),
    (lambda: linear(input=m(7, 4, **META)), ValueError, "input is on meta, but core is on cpu"),
    (lambda: linear(core=m(3)), ValueError, "core has 1 modes; a linear layer has at least 2"),
    (lambda: linear(factors=PAIR[:1]), ValueError, "factors has 1 entries, but core has 2 modes"),
    (lambda: linear(out_modes=0), ValueError, "out_modes is 0; allowed are 1 to 1"),
    (lambda: linear(out_modes=2), ValueError, "out_modes is 2; allowed are 1 to 1"),
    (lambda: linear(out_modes=1.0), TypeError, "out_modes must be an integer, got float"),
    (lambda: linear(bias=m(4)), ValueError, "bias has 4 entries, but the weight has 5 outputs"),
    (lambda: linear(path="full"), ValueError, "path is 'full'; allowed are 'auto', 'chain', 'fused', 'reconstruct'"),
    # tucker_linear_core_grad
    (lambda: linear_core_grad(sizes=(5,)), ValueError, "sizes has 1 entries, but factors has 2"),
    (lambda: linear_core_grad(sizes=(5, 0)), ValueError, "sizes is (5, 0); allowed are integers from 1 on"),
    (lambda: linear_core_grad(sizes=5), TypeError, "sizes must be a sequence of integers, got int"),
    (lambda: linear_core_grad(factors=None), TypeError, "factors must be a list of matrices, got NoneType"),
    (lambda: linear_core_grad(out_modes=2), ValueError, "out_modes is 2; allowed are 1 to 1"),
    (lambda: linear_core_grad(input=m(7, 3)), ValueError, "input has shape (7, 3); its last dimension must be 4"),
    (lambda: linear_core_grad(grad_output=m(7, 4)), ValueError, "grad_output has shape (7, 4); it must be (7, 5)"),
    (lambda: linear_core_grad(grad_output=m(6, 5)), ValueError, "grad_output has shape (6, 5); it must be (7, 5)"),
    (lambda: linear_core_grad(factors=[m(6, 3), None]), ValueError, "factors[0] has 6 rows, but sizes[0] is 5"),
    (
        lambda: linear_core_grad(factors=[m(5, 3, **META), None]),
        ValueError,
        "factors[0] is on meta, but input is on cpu",
    ),
    # tangent_basis
    (lambda: tk.tangent_basis(m(5, 3), [m(5, 2)]), TypeError, "bases must be a list of matrices, got Tensor"),
    (lambda: tk.tangent_basis([], []), ValueError, "bases is empty; at least one matrix is needed"),
    (lambda: tk.tangent_basis([m(5, 3)], [m(5, 2)] * 2), ValueError, "directions has 2 entries, but bases has 1"),
    (lambda: tk.tangent_basis([m(5, 3)], [m(4, 2)]), ValueError, "directions[0] has 4 rows, but bases[0] has 5"),
    (
        lambda: tk.tangent_basis([m(5, 3, **HALF)], [m(5, 2, **HALF)]),
        TypeError,
        "bases[0] has dtype torch.bfloat16; allowed are float32, float64",
    ),
    (
        lambda: tk.tangent_basis([m(5, 3)], [m(5, 2, **DOUBLE)]),
        TypeError,
        "directions[0] has dtype torch.float64, but bases[0] has torch.float32",
    ),
    (
        lambda: tk.tangent_basis([m(5, 3)], [m(5, 2, **META)]),
        ValueError,
        "directions[0] is on meta, but bases[0] is on cpu",
    ),
    (
        lambda: tk.tangent_basis([m(5, 3), m(5)], [m(5, 2)] * 2),
        ValueError,
        "bases[1] must have 2 dimensions, got shape (5,)",
    ),
    # hosvd_truncate
    (lambda: tk.hosvd_truncate(CORE, tol=0.1), TypeError, "cores must be a list of tensors, got Tensor"),
    (lambda: tk.hosvd_truncate([], tol=0.1), ValueError, "cores is empty; at least one core is needed"),
    (
        lambda: tk.hosvd_truncate([m(3, 0)], tol=0.1),
        ValueError,
        "cores[0] has shape (3, 0); every mode needs a positive size",
    ),
    (
        lambda: tk.hosvd_truncate([m(3, 3, **HALF)], tol=0.1),
        TypeError,
        "cores[0] has dtype torch.bfloat16; allowed are float32, float64",
    ),
    (
        lambda: tk.hosvd_truncate([T, T.double()], tol=0.1),
        TypeError,
        "cores[1] has dtype torch.float64, but cores[0] has torch.float32",
    ),
    (
        lambda: tk.hosvd_truncate([T, m(3, 3, **META)], tol=0.1),
        ValueError,
        "cores[1] is on meta, but cores[0] is on cpu",
    ),
    (lambda: tk.hosvd_truncate([T]), ValueError, "give either tol or ranks: tol is None and ranks is None"),
    (
        lambda: tk.hosvd_truncate([T], tol=0.1, ranks=2),
        ValueError,
        "give either tol or ranks: tol is 0.1 and ranks is 2",
    ),
    (lambda: tk.hosvd_truncate([T], tol=-0.1), ValueError, "tol is -0.1; allowed are finite numbers from 0 on"),
    (lambda: tk.hosvd_truncate([T], tol=float("nan")), ValueError, "tol is nan; allowed are finite numbers from 0 on"),
    (lambda: tk.hosvd_truncate([T], tol="0.1"), TypeError, "tol must be a number or one per core, got str"),
    (lambda: tk.hosvd_truncate([T], tol=["0.1"]), TypeError, "tol must hold numbers, got '0.1'"),
    (lambda: tk.hosvd_truncate([T], tol=[0.1, 0.2]), ValueError, "tol has 2 entries, but there are 1 cores"),
    (lambda: tk.hosvd_truncate([T], ranks=0), ValueError, "ranks is 0; allowed are integers from 1 on"),
    (lambda: tk.hosvd_truncate([T], ranks=(2, 2)), ValueError, "ranks must be one integer or 3, got (2, 2)"),
    (lambda: tk.hosvd_truncate([T], ranks=[(2, 2, 2)] * 2), ValueError, "ranks has 2 entries, but there are 1 cores"),
    (
        lambda: tk.hosvd_truncate([T], ranks=1.5),
        TypeError,
        "ranks must be an integer or a sequence of integers, got float",
    ),
    (lambda: tk.hosvd_truncate([T], tol=0.1, min_rank=0), ValueError, "min_rank is 0; allowed are integers from 1 on"),
    (lambda: tk.hosvd_truncate([T], tol=0.1, max_rank=0), ValueError, "max_rank is 0; allowed are integers from 1 on"),
    (
        lambda: tk.hosvd_truncate([T], tol=0.1, min_rank=3, max_rank=2),
        ValueError,
        "min_rank is 3, above max_rank, which is 2",
    ),
    (lambda: tk.hosvd_truncate([T], tol=0.1, modes=(0, 3)), ValueError, "modes is 3; allowed are -3 to 2"),
    (lambda: tk.hosvd_truncate([T], tol=0.1, modes=1), TypeError, "modes must be a sequence of integers, got int"),
    (
        lambda: tk.hosvd_truncate([T], tol=0.1, modes=[(0,), (1,)]),
        ValueError,
        "modes has 2 entries, but there are 1 cores",
    ),
    (
        lambda: tk.hosvd_truncate([T], tol=0.1, tolerance_mode="local"),
        ValueError,
        "tolerance_mode is 'local'; allowed are 'global', 'per_mode'",
    ),
    # gram_solve
    (lambda: tk.gram_solve(m(5, 3), [0], [m(2, 5)]), TypeError, "tensors must be a list of tensors, got Tensor"),
    (lambda: tk.gram_solve([], [], []), ValueError, "tensors is empty; at least one tensor is needed"),
    (lambda: tk.gram_solve([m(5, 3)], [0, 1], [m(2, 5)]), ValueError, "modes has 2 entries, but tensors has 1"),
    (lambda: tk.gram_solve([m(5, 3)], [2], [m(2, 5)]), ValueError, "modes[0]"),
    (
        lambda: tk.gram_solve([m(5, 3)], [0], [m(2, 3)]),
        ValueError,
        "right_sides[0] has 3 columns, but mode 0 of tensors[0] has size 5",
    ),
    (lambda: tk.gram_solve([m(5, 3)], [0], [m(2, 5, **DOUBLE)]), TypeError, "right_sides[0] has dtype torch.float64"),
    # rotate_bases
    (lambda: tk.rotate_bases(m(5, 3), [m(3, 2)]), TypeError, "bases must be a list of matrices, got Tensor"),
    (lambda: tk.rotate_bases([], []), ValueError, "bases is empty; at least one matrix is needed"),
    (lambda: tk.rotate_bases([m(5, 3)], [m(3, 2)] * 2), ValueError, "rotations has 2 entries, but bases has 1"),
    (
        lambda: tk.rotate_bases([m(5, 3)], [m(4, 2)]),
        ValueError,
        "rotations[0] has 4 rows, but bases[0] has 3 columns",
    ),
    (
        lambda: tk.rotate_bases([m(5, 3)], [m(3, 2, **DOUBLE)]),
        TypeError,
        "rotations[0] has dtype torch.float64, but bases[0] has torch.float32",
    ),
    # batched_qr, batched_svd
    *(
        case
        for function in (tk.batched_qr, tk.batched_svd)
        for case in (
            (lambda f=function: f(m(3, 3)), TypeError, "matrices must be a list of matrices, got Tensor"),
            (lambda f=function: f([]), ValueError, "matrices is empty; at least one matrix is needed"),
            (lambda f=function: f([T]), ValueError, "matrices[0] must have 2 dimensions, got shape (2, 3, 4)"),
            (
                lambda f=function: f([m(3, 3, **HALF)]),
                TypeError,
                "matrices[0] has dtype torch.bfloat16; allowed are float32, float64",
            ),
            (
                lambda f=function: f([m(3, 3), m(3, 3, **DOUBLE)]),
                TypeError,
                "matrices[1] has dtype torch.float64, but matrices[0] has",
            ),
            (
                lambda f=function: f([m(3, 3), m(3, 3, **META)]),
                ValueError,
                "matrices[1] is on meta, but matrices[0] is on cpu",
            ),
        )
    ),
    # use_backend
    (lambda: tk.use_backend("gpu"), ValueError, "name must be one of reference, cpu, cuda, triton or None, got 'gpu'"),
    (lambda: tk.use_backend(3), TypeError, "name must be one of reference, cpu, cuda, triton or None, got int"),
    # texts and values of another kind
    (lambda: conv(path=None), TypeError, "path is None; allowed are 'auto', 'chain', 'fused', 'reconstruct'"),
    (lambda: linear(path=np.ones(2)), TypeError, "path is ndarray; allowed are 'auto', 'chain'"),
    (lambda: tk.hosvd_truncate([T], tol=0.1, tolerance_mode=T), TypeError, "tolerance_mode is Tensor; allowed are"),
    (lambda: tk.hosvd_truncate([T], tol=0.1, ranks=T), ValueError, "tol is 0.1 and ranks is Tensor"),
    (lambda: tk.mode_dot(T, m(5, 3), 1, T), TypeError, "transpose must be True or False, got Tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:60] for _, _, message in CASES])
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        call()
    assert raised.type is error


def test_every_public_function_is_covered():
    """A public function without a case above, or without a docstring, is an oversight."""
    used = " ".join(str(call.__code__.co_names + call.__code__.co_consts) for call, _, _ in CASES)
    helpers = {
        "tucker_conv": "conv",
        "tucker_conv_core_grad": "conv_core_grad",
        "tucker_linear": "linear",
        "tucker_linear_core_grad": "linear_core_grad",
    }
    covered_by_loop = {"batched_qr", "batched_svd"}
    for name in set(tk.__all__) - {"backends", "functions"} - covered_by_loop:
        assert f"'{helpers.get(name, name)}'" in used, name


def test_right_arguments_pass():
    """The defaults of the helpers above are valid, so that each case fails for the reason it names."""
    assert conv().shape == (1, 5, 6, 6)
    assert conv_core_grad().shape == (3, 2, 3, 3)
    assert linear().shape == (7, 5)
    assert linear_core_grad().shape == (3, 2)


def test_all_on_meta_infers_shapes():
    """Tensors without storage are legal where all of them are: nothing is computed, shapes are."""
    to = lambda x: None if x is None else x.to("meta")  # noqa: E731
    y = tk.tucker_conv(to(IMAGE), to(CORE), [to(f) for f in FACTORS], path="chain")
    assert y.shape == (1, 5, 6, 6)
    assert y.is_meta


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_the_result(value, backend):
    """Never silently zeroed: products carry it on, and rank-space operators mark it."""
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    x[1, 2, 3] = value
    assert not tk.mode_dot(x, torch.ones(5, 3, dtype=torch.float64), 1).isfinite().all()
    assert not tk.multi_mode_dot(x, [torch.ones(5, n, dtype=torch.float64) for n in x.shape]).isfinite().all()
    image = IMAGE.clone()
    image[0, 0, 4, 4] = value
    assert (
        not conv(input=image, factors=[m(5, 3).fill_(1), m(4, 2).fill_(1), None, None], core=CORE + 1).isfinite().all()
    )
    (V,), counts = tk.tangent_basis([torch.eye(4, 2, dtype=torch.float64)], [torch.full((4, 2), value).double()])
    assert counts.tolist() == [-1]
    assert not V.any()
    new, projections, ranks, error = tk.hosvd_truncate([x], tol=0.5)
    assert torch.equal(new[0], x) or (value != value and torch.equal(new[0].nan_to_num(), x.nan_to_num()))
    assert ranks.tolist() == [[2, 3, 4]]
    assert error.isnan().all()
    assert all(torch.equal(p, torch.eye(n, dtype=p.dtype)) for p, n in zip(projections[0], x.shape))


def test_numpy_scalars_are_numbers():
    """Sizes, modes, ranks and tolerances that were computed with numpy."""
    two, generator = np.int64(2), torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator)
    assert torch.equal(tk.unfold(x, two), tk.unfold(x, 2))
    assert torch.equal(tk.fold(m(5, 12), two, (np.int64(3), np.int32(4), 5)), m(3, 4, 5))
    assert tk.mode_dot(x, m(7, 5), two).shape == (3, 4, 7)
    assert tk.multi_mode_dot(x, [m(7, 5), m(2, 3)], modes=[two, np.int8(0)], skip=np.int64(1)).shape == (3, 4, 7)
    assert conv(stride=two, padding=(two, 1), dilation=np.int64(1)).shape == (1, 5, 5, 4)
    assert conv_core_grad(window=(np.int64(3), 3), known=(np.int64(1), 1)).shape == (3, 2, 3, 3)
    assert linear(out_modes=np.int64(1)).shape == (7, 5)
    for bounds in ({"ranks": (two, 3, two)}, {"tol": np.float32(0.5), "min_rank": two, "max_rank": two}):
        found = tk.hosvd_truncate([x], modes=(np.int64(0), two), **bounds)[2]
        assert found.tolist() == [[2, 4, 2]]


def test_modes_that_can_be_read_once_count_for_every_core():
    _, projections, ranks, _ = tk.hosvd_truncate([m(3, 3) + 1, m(3, 3) + 1], tol=0.1, modes=(i for i in (0, 1)))
    assert [[p is None for p in row] for row in projections] == [[False, False]] * 2
    assert ranks.tolist() == [[1, 1]] * 2


OPS = torch.ops.tucker_kernels
UNCHECKED = {
    "a mode twice": lambda: OPS.multi_mode_dot(m(3, 3, 3), [m(3, 3), m(3, 3)], [0, 0], False),
    "no input mode": lambda: OPS.tucker_linear_forward(m(7, 1), MATRIX_CORE, [None, None], None, 2, False),
    "more known than there is": lambda: OPS.rank_space_wgrad(
        *(IMAGE, Y, FACTORS[0], FACTORS[1]), *([3, 3], [1, 1], [0, 0], [1, 1], [4, 0])
    ),
}


@pytest.mark.parametrize("case", UNCHECKED)
def test_the_compiled_module_checks_what_comes_past_the_public_functions(case):
    with tk.use_backend("cpu"), pytest.raises(RuntimeError, match="a size, mode or pointer is out of range"):
        UNCHECKED[case]()
