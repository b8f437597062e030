"""Throughput of every operator on every back end that runs here, and of a training step, under pytest-benchmark.

    make bench                                       # or: pytest bench --benchmark-enable
    pytest bench --benchmark-enable -k tucker_conv   # one operator
    pytest bench --benchmark-enable --benchmark-autosave     # keep, and next time: --benchmark-compare

A group is one problem; its rows are the back ends and what torch offers for the same, with their relative times. The
JSON that pytest-benchmark writes has GFLOP/s or images per second of each row under `extra_info`. Without
`--benchmark-enable`, as among the ordinary tests, every case runs once and its result is compared with float64.
For claims about speed there are the other scripts here, which time rivals in turns.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tdlrt
import torch
from tdlrt import models

import tucker_kernels as tk
from tucker_kernels.dispatch import DEVICES

F = torch.nn.functional
RIVAL = "torch"
ROUNDING = 1e-5  # relative, in norm: about a hundred float32 epsilons; what is compared is well conditioned
MACHINES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROWS = [(machine, RIVAL) for machine in MACHINES] + [
    (machine, name)
    for name, (usable, _) in tk.backends().items()
    for machine in MACHINES
    if usable and machine in DEVICES[name]
]


@dataclass
class Problem:
    """ours and rival take the operands; `invariant` maps a result to what two right answers have in common."""

    operands: list
    ours: Callable
    rival: Callable
    operations: float
    invariant: Callable = lambda result: [result]

    def on(self, machine, dtype=None):
        return [x.to(machine, dtype) for x in self.operands]


def conv(n, size, r, batch=8):
    """A 3×3 convolution of n channels at rank r, against three convolutions."""
    operands = [
        torch.randn(batch, n, size, size).to(memory_format=torch.channels_last),
        torch.randn(r, r, 3, 3) / math.sqrt(9 * r),
        torch.randn(n, r) / math.sqrt(r),
        torch.randn(n, r) / math.sqrt(n),
    ]

    def ours(x, core, u_out, u_in):
        return tk.tucker_conv(x, core, [u_out, u_in, None, None], padding=1)

    def rival(x, core, u_out, u_in):
        return F.conv2d(F.conv2d(F.conv2d(x, u_in.T[:, :, None, None]), core, padding=1), u_out[:, :, None, None])

    return Problem(operands, ours, rival, 2 * batch * size**2 * (2 * n * r + 9 * r * r))


def linear(rows, n, r):
    operands = [torch.randn(rows, n), *(torch.randn(m, r) / math.sqrt(r) for m in (r, n, n))]

    def ours(x, core, u_out, u_in):
        return tk.tucker_linear(x, core, [u_out, u_in])

    def rival(x, core, u_out, u_in):
        return x @ u_in @ core.T @ u_out.T

    return Problem(operands, ours, rival, 2 * rows * (2 * n * r + r * r))


def mode_products(n, r):
    """Both channel factors onto the core of a convolution."""
    operands = [torch.randn(r, r, 3, 3), *(torch.randn(n, r) / math.sqrt(r) for _ in range(2))]

    def ours(core, u, v):
        return tk.multi_mode_dot(core, [u, v], modes=[0, 1])

    def rival(core, u, v):
        return torch.einsum("abxy,oa,ib->oixy", core, u, v)

    return Problem(operands, ours, rival, 2 * 9 * (n * r * r + n * n * r))


def bases(n, r, layers=20):
    """The directions that the gradients of `layers` factors add, against a QR each; compared as projectors."""
    operands = [torch.linalg.qr(torch.randn(n, r))[0] for _ in range(layers)]
    operands += [torch.randn(n, r) for _ in range(layers)]

    def ours(*operands):
        return tk.tangent_basis(operands[:layers], operands[layers:])[0]

    def rival(*operands):
        pairs = zip(operands, operands[layers:])
        return [torch.linalg.qr(torch.cat([u, d], 1))[0][:, r:] for u, d in pairs]

    return Problem(operands, ours, rival, layers * 2 * n * r * 4 * r, lambda found: [v @ v.mT for v in found])


def truncation(r, layers=20):
    """Cores of 2r to rank r, cold, against an SVD per mode; compared by what is left of their norms."""
    decay = torch.arange(1, 2 * r + 1) ** -1.0
    operands = [
        torch.randn(2 * r, 2 * r, 3, 3) * decay[:, None, None, None] * decay[:, None, None] for _ in range(layers)
    ]
    ranks = (r, r, 3, 3)

    def ours(*cores):
        kept, *_ = tk.hosvd_truncate(list(cores), ranks=ranks, modes=(0, 1))
        return [core[:r, :r] for core in kept]

    def rival(*cores):
        found = []
        for core in cores:
            u, v = (torch.linalg.svd(core.movedim(i, 0).flatten(1), full_matrices=False)[0][:, :r] for i in (0, 1))
            found.append(torch.einsum("abxy,ai,bj->ijxy", core, u, v))
        return found

    m = 2 * r
    operations = layers * (2 * 2 * m * m * 9 * m / 2 + 2 * 9 * (m * m * r + m * r * r))
    return Problem(operands, ours, rival, operations, lambda found: [c.double().norm() for c in found])


def decompositions(name, rows, columns, count=40):
    """Many matrices of one size, which favours torch, against its loop; compared by R and by singular values."""
    operands = [torch.randn(rows, columns) for _ in range(count)]
    ours = {"qr": tk.batched_qr, "svd": tk.batched_svd}[name]
    single = {"qr": torch.linalg.qr, "svd": lambda a: torch.linalg.svd(a, full_matrices=False)}[name]

    def invariant(found):
        return [r.abs() for r in found[1]]

    return Problem(
        operands,
        lambda *matrices: ours(list(matrices)),
        lambda *matrices: tuple(zip(*map(single, matrices))),
        count * 4 * rows * columns**2,
        invariant,
    )


PROBLEMS = {
    "tucker_conv 64 channels 32x32 r=16": lambda: conv(64, 32, 16),
    "tucker_conv 256 channels 8x8 r=64": lambda: conv(256, 8, 64),
    "tucker_linear 128x1024 r=64": lambda: linear(128, 1024, 64),
    "multi_mode_dot 256 r=64": lambda: mode_products(256, 64),
    "tangent_basis 20 of 256x32": lambda: bases(256, 32),
    "hosvd_truncate 20 of 64x64x9": lambda: truncation(32),
    "batched_qr 40 of 256x32": lambda: decompositions("qr", 256, 32),
    "batched_svd 40 of 96x32": lambda: decompositions("svd", 96, 32),
}


@pytest.fixture(autouse=True)
def one_thread_in_tests(benchmark):
    before = torch.get_num_threads()
    torch.set_num_threads(before if benchmark.enabled else 1)
    yield
    torch.set_num_threads(before)


def side(name):
    return contextlib.nullcontext() if name == RIVAL else tk.use_backend(name)


def finished(call, machine):
    """`call`, returning once the device has done it."""
    if machine == "cpu":
        return call

    def waited(*operands):
        result = call(*operands)
        torch.cuda.synchronize()
        return result

    return waited


@pytest.mark.parametrize(("machine", "name"), ROWS, ids=["-".join(row) for row in ROWS])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_operator(benchmark, problem, machine, name):
    torch.manual_seed(0)
    benchmark.group = f"{problem} on {machine}"
    case = PROBLEMS[problem]()
    call = finished(case.rival if name == RIVAL else case.ours, machine)
    with torch.no_grad(), side(name):
        result = benchmark(call, *case.on(machine))
        want = case.invariant(case.rival(*case.on("cpu", torch.float64)))
    for found, wanted in zip(case.invariant(result), want, strict=True):
        error = torch.linalg.vector_norm(found.cpu().double() - wanted)
        assert error <= ROUNDING * torch.linalg.vector_norm(wanted)
    if benchmark.enabled:
        benchmark.extra_info["GFLOP/s"] = case.operations / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("step", ["dense", "one_pass", "factors"])
@pytest.mark.parametrize("machine", MACHINES)
def test_training_step(benchmark, machine, step):
    """ResNet18 for CIFAR at r = n/4: the dense network by SGD, ours by TDLRT, and its factors by plain SGD."""
    images = 32 if benchmark.enabled else 4
    torch.manual_seed(0)
    benchmark.group = f"training step of resnet18 on {machine}"
    model = models.build("resnet18", (3, 32, 32), 10, (0.0,) * 3, (1.0,) * 3)
    if step != "dense":
        model = tdlrt.tuckerize(model, ranks=0.25)
    model = model.to(machine, memory_format=torch.channels_last)
    if step == "one_pass":
        optimizer = tdlrt.TDLRT(model, lr=1e-3, momentum=0.9, tol=None)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(images, 3, 32, 32, device=machine).to(memory_format=torch.channels_last)
    y = torch.randint(10, (images,), device=machine)

    def once():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    before = once()
    after = benchmark.pedantic(once, rounds=5 if benchmark.enabled else 1, warmup_rounds=1)
    assert after < before
    if benchmark.enabled:
        benchmark.extra_info["images/s"] = images / benchmark.stats.stats.median
