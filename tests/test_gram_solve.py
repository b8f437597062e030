"""gram_solve: X (M Mᵀ + ρ I) = B up to what ρ stands for, whatever the sizes, the mode, the rank and the threads."""

import pytest
import torch
from oracles import unfold

import tucker_kernels as tk

DTYPES = (torch.float32, torch.float64)
# (shape, mode, rows)
CASES = [
    ((1,), 0, 1),
    ((5, 3), 0, 4),
    ((5, 3), 1, 2),
    ((4, 6, 2), 1, 9),
    ((7, 33, 3, 3), 1, 20),
    ((65, 20, 3, 3), 0, 64),
    ((130, 200), 0, 70),
    ((3, 40), 1, 5),  # deficient: 40 columns of rank 3
    ((8, 8), 0, 0),
]


def problems(dtype):
    tensors = [torch.randn(shape, dtype=dtype) for shape, _, _ in CASES]
    return (
        tensors,
        [mode for _, mode, _ in CASES],
        [torch.randn(p, shape[mode], dtype=dtype) for shape, mode, p in CASES],
    )


def check(C, mode, B, X):
    """‖X (M Mᵀ + ρ I) − B‖ ≤ ρ ‖X‖ + 4ε ‖B‖ with ρ = 4ε tr(M Mᵀ)."""
    assert X.shape == B.shape
    assert X.dtype == B.dtype
    M, X = unfold(C.double(), mode), X.double()
    gram = M @ M.T
    eps = torch.finfo(C.dtype).eps
    rho = 4 * eps * gram.trace()
    residual = X @ gram + rho * X - B
    assert residual.norm() <= rho * X.norm() + 4 * eps * B.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solves_the_normal_equations(dtype, backend):
    tensors, modes, right_sides = problems(dtype)
    for C, mode, B, X in zip(tensors, modes, right_sides, tk.gram_solve(tensors, modes, right_sides)):
        check(C, mode, B, X)


def test_a_wrong_mode_is_caught():
    C, B = torch.randn(6, 6, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(AssertionError):
        check(C, 0, B, tk.gram_solve([C], [1], [B])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_tensor_is_the_pseudo_inverse(dtype, backend):
    """Well conditioned, X ×_mode C is B (Mᵀ)⁺ to the accuracy of ρ."""
    C, B = torch.randn(5, 4, 9, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    (X,) = tk.gram_solve([C], [0], [B])
    M = unfold(C.double(), 0)
    assert torch.allclose(
        X.double() @ M, B.double() @ torch.linalg.pinv(M).T, rtol=0, atol=1e3 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gives_zero_and_what_is_not_finite_is_seen(dtype, backend):
    B = torch.randn(2, 3, dtype=dtype)
    bad = torch.ones(3, 4, dtype=dtype)
    bad[1, 2] = torch.nan
    zero, broken = tk.gram_solve([torch.zeros(3, 4, dtype=dtype), bad], [0, 0], [B, B])
    assert not zero.any()
    assert not torch.isfinite(broken).all()


def test_the_number_of_threads_changes_no_bit():
    tensors, modes, right_sides = problems(torch.float32)
    alone = tk.gram_solve(tensors, modes, right_sides)
    torch.set_num_threads(3)
    together = tk.gram_solve(tensors, modes, right_sides)
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
