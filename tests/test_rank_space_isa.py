"""The rank-space operators give the same answers with every instruction set: those of the reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matrix_families import cores, gaussian, matrices, orthonormal, tangent_problems

import tucker_kernels as tk

TESTS = Path(__file__).parent


def outcomes():
    """Everything that does not depend on signs, for both dtypes: ranks, counts, errors, singular values, projectors."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        problems = [(u.to(dtype), d.to(dtype)) for u, d, wanted in tangent_problems().values() if wanted is not None]
        bases, counts = tk.tangent_basis([u for u, _ in problems], [d for _, d in problems])
        found[f"tangent_basis counts {dtype}"] = counts
        for i, (V, (_, d)) in enumerate(zip(bases, problems)):
            scaled = d / d.norm(dim=0).clamp_min(1e-30)
            found[f"tangent_basis {i} {dtype}"] = V @ (V.T @ scaled)
        inputs = [c.to(dtype) for name, c in cores().items() if "ties" not in name and name != "flat"]
        _, projections, ranks, error = tk.hosvd_truncate(inputs, tol=0.1)
        found[f"hosvd_truncate ranks {dtype}"], found[f"hosvd_truncate error {dtype}"] = ranks, error
        for i, own in enumerate(projections):
            for mode, P in enumerate(own):
                found[f"hosvd_truncate {i} {mode} {dtype}"] = (P.T @ P).diagonal()
        bases = [u for u, _ in problems if u.shape[1]]
        rotations = [orthonormal(u.shape[1], u.shape[1], i).to(dtype) for i, u in enumerate(bases)]
        for i, rotated in enumerate(tk.rotate_bases(bases, rotations)):
            found[f"rotate_bases {i} {dtype}"] = rotated
        tensors = [gaussian(40, 90, seed=1).to(dtype), gaussian(7, 35, 9, seed=2).to(dtype)]
        right_sides = [gaussian(20, 40, seed=3).to(dtype), gaussian(33, 35, seed=4).to(dtype)]
        for i, X in enumerate(tk.gram_solve(tensors, [0, 1], right_sides)):
            found[f"gram_solve {i} {dtype}"] = X
        qs, rs = tk.batched_qr([a.to(dtype) for a in matrices().values()])
        for i, (Q, R) in enumerate(zip(qs, rs)):
            found[f"batched_qr {i} {dtype}"] = Q @ R
        _, values, _ = tk.batched_svd([a.to(dtype) for a in matrices().values()])
        for i, s in enumerate(values):
            found[f"batched_svd {i} {dtype}"] = s
    return found


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_reference(isa, tmp_path):
    file = tmp_path / "found.pt"
    program = f"import torch, test_rank_space_isa as t; torch.save(t.outcomes(), {str(file)!r})"
    environment = dict(os.environ, TK_ISA=isa, PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path]))
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    found = torch.load(file)
    with tk.use_backend("reference"):
        expected = outcomes()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(found[name], value), name
            continue
        scale = max(float(value.abs().max()), 1e-30) if value.numel() else 1.0
        bound = 1e-4 if "float32" in name else 1e-9
        assert torch.allclose(found[name].double() / scale, value.double() / scale, rtol=0, atol=bound), name
