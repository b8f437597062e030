"""rotate_bases: the nearest orthonormal matrix to B P, to rounding, whatever the sizes, strides and threads."""

import pytest
import torch
from matrix_families import gaussian, orthonormal
from tolerances import TOLERANCES

import tucker_kernels as tk

DTYPES = (torch.float32, torch.float64)
SIZES = [
    (1, 1, 1),
    (5, 3, 2),
    (17, 16, 16),
    (40, 40, 7),
    (64, 32, 16),
    (130, 67, 33),
    (300, 70, 35),
    (9, 4, 0),
    (600, 9, 9),
]


def problems(dtype, defect=0.0):
    """Bases that are `defect` from orthonormal, and rotations that are parts of larger matrices."""
    bases = [orthonormal(n, a, 7 * i) + defect * gaussian(n, a, seed=i) / n for i, (n, a, _) in enumerate(SIZES)]
    rotations = [orthonormal(a, a, 100 + i)[:, :r] for i, (_, a, r) in enumerate(SIZES)]
    return [b.to(dtype) for b in bases], [p.to(dtype) for p in rotations]


def check(basis, rotation, rotated, defect):
    product = basis.double() @ rotation.double()
    left, _, right = torch.linalg.svd(product, full_matrices=False)
    polar = left @ right
    tolerance = TOLERANCES["factorisation"][basis.dtype]
    assert rotated.shape == product.shape
    assert rotated.dtype == basis.dtype
    # One Newton step leaves 3/8 of the square of the distance.
    assert float((rotated.double() - polar).norm()) <= tolerance * max(1, polar.shape[1] ** 0.5) + defect**2
    gram = rotated.double().T @ rotated.double()
    bound = TOLERANCES["orthogonality"][basis.dtype] + defect**2
    assert torch.linalg.matrix_norm(gram - torch.eye(len(gram)).double(), "fro") <= bound * max(1, len(gram) ** 0.5)


@pytest.mark.parametrize("defect", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_orthonormal_matrix(dtype, defect, backend):
    bases, rotations = problems(dtype, defect)
    for basis, rotation, rotated in zip(bases, rotations, tk.rotate_bases(bases, rotations)):
        check(basis, rotation, rotated, 3 * defect)


def test_without_the_newton_step_the_check_fails():
    basis, rotation = (x[5] for x in problems(torch.float64, 1e-3))
    with pytest.raises(AssertionError):
        check(basis, rotation, basis @ rotation, 1e-4)
    with pytest.raises(AssertionError):
        check(basis, rotation, tk.rotate_bases([basis], [rotation.flip(0)])[0], 3e-3)


def test_result_does_not_depend_on_threads_strides_or_company():
    bases, rotations = problems(torch.float32)
    together = tk.rotate_bases(bases, rotations)
    torch.set_num_threads(3)
    strided = [b.T.contiguous().T for b in bases]
    for b, p, u in zip(strided, [p.T.contiguous().T for p in rotations], together):
        assert torch.equal(tk.rotate_bases([b], [p])[0], u)


def test_rotations_are_read_where_they_are(backend):
    """Leading columns of a larger matrix, by rows or by columns, and one column that is one number repeated."""
    basis, whole = orthonormal(20, 4), orthonormal(4, 4)
    repeated = torch.full((1, 1), 0.5, dtype=torch.float64).expand(4, 1)
    for rotation in (whole.contiguous()[:, :2], whole.T.contiguous().T[:, :2], whole.contiguous()[:, 1:2], repeated):
        check(basis, rotation, tk.rotate_bases([basis], [rotation])[0], 0.0)


def test_nan_stays_visible(backend):
    basis = orthonormal(20, 6)
    basis[3, 2] = torch.nan
    assert tk.rotate_bases([basis], [orthonormal(6, 4)])[0].isnan().any()


def test_a_thousand_rotations_leave_no_drift():
    """Without the Newton step rounding adds up to 1e-5; one step each keeps it at rounding."""
    basis = orthonormal(60, 24).float()
    rotations = [orthonormal(24, 24, seed).float() for seed in range(8)]
    for step in range(1000):
        (basis,) = tk.rotate_bases([basis], [rotations[step % 8]])
    gram = basis.double().T @ basis.double()
    assert torch.linalg.matrix_norm(gram - torch.eye(24).double(), 2) <= TOLERANCES["orthogonality"][torch.float32]
