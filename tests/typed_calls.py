"""Calls as the documentation shows them, for mypy: it takes these, and refuses the ones that are marked. Never run."""

import tdlrt
import torch

import tucker_kernels as tk

x = torch.randn(2, 16, 8, 8)
factors = [torch.randn(8, 4), torch.randn(16, 4), None, None]
y = tk.tucker_conv(x, torch.randn(4, 4, 3, 3), factors, stride=2, padding=(1, 1))
y = tk.multi_mode_dot(x, [torch.eye(16), None], modes=(1, 2))
new, projections, ranks, error = tk.hosvd_truncate(
    [x], tol=[0.1], modes=(0, 1), min_rank=(1, 1, 2, 2), max_rank=[(2, 2, 2, 2)]
)
new, projections, ranks, error = tk.hosvd_truncate([x], ranks=3)
with tk.use_backend("reference"):
    bases, counts = tk.tangent_basis([torch.eye(4, 2)], [torch.randn(4, 2)])

conv = tdlrt.TuckerConv2d(16, 32, (3, 3), padding="same", ranks=0.5)
model = torch.nn.Sequential(conv, torch.nn.Flatten(), tdlrt.TuckerLinear((32, 64), 10, ranks=(2, 4, 8)))
model = tdlrt.tuckerize(model, ranks={"0": 0.5, "2": (4, 4)}, modes=(0, 1), skip=["head"])
optimizer = tdlrt.TDLRT(model, 0.05, momentum=0.9, tol={"0": 0.1, "2": None}, nesterov=True)
torch.optim.lr_scheduler.StepLR(optimizer, 3)
optimizer.step()
saved: float = tdlrt.compression(model).compression
kept: dict[str, tuple[int, ...]] = tdlrt.ranks(model)

tk.mode_dot(x, x, "1")  # type: ignore[arg-type]
tk.tucker_conv(x, x, factors, path="fastest")  # type: ignore[arg-type]
tk.hosvd_truncate([x], tol="small")  # type: ignore[arg-type]
tdlrt.tuckerize(model, modes="both")  # type: ignore[arg-type]
tdlrt.TDLRT(model, 0.05, integrator="two")  # type: ignore[arg-type]
