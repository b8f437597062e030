"""Operands in any memory layout give what their contiguous copies give. The reference leaves layouts to torch."""

import pytest
import torch
from test_operators import OPS, SAMPLES, tensors
from torch.utils._pytree import tree_map_only

import tucker_kernels as tk

LAYOUTS = {
    "every other element": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "dimensions reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "part of a larger one": lambda x: torch.nn.functional.pad(x, [2, 1] * x.ndim)[(..., *[slice(2, -1)] * x.ndim)],
    "rows repeated": lambda x: x[:1].expand_as(x),
    "columns repeated": lambda x: x[..., :1].expand_as(x),
    "overlapping": lambda x: torch.randn(sum(x.shape) + 1, dtype=x.dtype).as_strided(x.shape, [1] * x.ndim),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_compiled_operator_reads_any_layout(name, layout):
    for sample in SAMPLES[name]():
        given = tree_map_only(torch.Tensor, LAYOUTS[layout], sample)
        copies = tree_map_only(torch.Tensor, lambda x: x.clone(memory_format=torch.contiguous_format), given)
        with tk.use_backend("cpu"):
            found, expected = (tensors(getattr(OPS, name)(*arguments)) for arguments in (given, copies))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
