"""cross_gram (the matrix gradient of a mode product) against torch.einsum in float64."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import tensors
from tolerances import assert_sum_close

import tucker_kernels as tk
from tucker_kernels.library import ops


def check(a, b, mode, function=ops.cross_gram):
    g = function(a, b, mode)
    assert g.dtype == a.dtype
    length = a.numel() // max(a.shape[mode], 1)
    magnitude = oracles.cross_gram(a.abs(), b.abs(), mode)
    assert_sum_close(g, oracles.cross_gram(a, b, mode), magnitude, length)
    return g


@pytest.mark.parametrize("name", ["reference", "cpu"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_mode_and_layout(name, data):
    a = data.draw(tensors(dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)))
    mode = data.draw(st.integers(-a.ndim, a.ndim - 1))
    shape = list(a.shape)
    shape[mode] = data.draw(st.integers(0, 40))
    b = torch.randn(shape).to(a.dtype)
    with tk.use_backend(name):
        check(a, b, mode)


# Inner lengths that are gathered (2 to 63) and not, sums that are cut into chunks (from 2048 on) and not, results
# that come out transposed and not.
@pytest.mark.parametrize("inner", [1, 2, 9, 63, 64, 300])
@pytest.mark.parametrize("outer", [1, 2, 37, 260])
@pytest.mark.parametrize("sides", [(1, 1), (5, 33), (40, 7), (130, 16), (16, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_path_equals_einsum(outer, inner, sides, dtype):
    check(torch.randn(outer, sides[0], inner, dtype=dtype), torch.randn(outer, sides[1], inner, dtype=dtype), 1)


def test_operands_in_different_layouts(backend):
    a, b = torch.randn(3, 5, 4, 6), torch.randn(3, 7, 4, 6).contiguous(memory_format=torch.channels_last)
    check(a, b, 1)
    check(b, a, 1)


@pytest.mark.parametrize(
    ("p", "q", "outer", "inner"),
    [
        (48, 40, 20_000, 1),
        (30, 64, 3, 5000),
        (60, 50, 700, 9),
        (200, 150, 9, 100),
        (150, 200, 900, 1),
        (20, 300, 300, 4),
    ],
)
def test_threads_change_no_bit(p, q, outer, inner):
    a, b = torch.randn(outer, p, inner), torch.randn(outer, q, inner)
    alone = check(a, b, 1)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(ops.cross_gram(a, b, 1), alone)


def test_long_sums_stay_accurate():
    """200,000 equal terms: a plain float32 sum in order would lose three digits more."""
    a, b = torch.full((200_000, 2), 0.1), torch.full((200_000, 3), 0.1)
    for first, second in ((a, b), (a.T.contiguous(), b.T.contiguous())):
        g = ops.cross_gram(first, second, 1 if first is a else 0)
        expected = oracles.cross_gram(first, second, 1 if first is a else 0)
        assert float(((g - expected) / expected).abs().max()) < 2e-5


def test_nan_and_infinity_stay_where_they_belong(backend):
    a, b = torch.rand(6, 50, 9), torch.rand(6, 11, 9)
    a[3, 7, 2], b[5, 4, 8] = torch.nan, torch.inf
    g = ops.cross_gram(a, b, 1)
    expected = torch.ones(50, 11, dtype=torch.bool)
    expected[7], expected[:, 4] = False, False
    assert torch.equal(g.isfinite(), expected)


@pytest.mark.parametrize("shapes", [((0, 3), (0, 2), 1), ((4, 3, 0), (4, 2, 0), 1), ((3, 0), (2, 0), 0)])
def test_empty_sum_is_zero(shapes, backend):
    g = ops.cross_gram(torch.randn(shapes[0]), torch.randn(shapes[1]), shapes[2])
    assert torch.equal(g, torch.zeros(3, 2))


@pytest.mark.parametrize("mistake", ["operands exchanged", "last slice missing", "one entry wrong"])
def test_oracle_catches(mistake):
    def wrong(a, b, mode):
        if mistake == "operands exchanged":
            return ops.cross_gram(b, a, mode)
        if mistake == "last slice missing":
            return ops.cross_gram(a[:-1], b[:-1], mode)
        g = ops.cross_gram(a, b, mode)
        g[-1, 0] *= 1 + 1e-4
        return g

    with pytest.raises(AssertionError):
        check(torch.rand(5, 8, 7), torch.rand(5, 8, 7), 1, function=wrong)
