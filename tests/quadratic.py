"""A Tucker convolution whose loss is ½‖W − W*‖², so that gradients, Lipschitz constants and minima are known exactly.

The batch holds every unit impulse of the window, so the outputs are the entries of W.
"""

import tdlrt
import torch


class Quadratic:
    """layer: TuckerConv2d (n_out, n_in, 3, 3) in float64; target: W*. The loss has Lipschitz constant 1 in W."""

    def __init__(self, n_out=9, n_in=7, ranks=(3, 3, 2, 2), target=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.shape = (n_out, n_in, 3, 3)
        self.layer = tdlrt.TuckerConv2d(n_in, n_out, 3, bias=False, ranks=ranks, modes="all", dtype=torch.float64)
        self.fill(generator)
        self.target = target
        if target is None:
            self.target = torch.randn(self.shape, dtype=torch.float64, generator=generator)
        count = n_in * 9
        self.impulses = torch.eye(count, dtype=torch.float64).reshape(count, n_in, 3, 3)

    def fill(self, generator):
        for factor in self.layer.factors:
            q = torch.linalg.qr(torch.randn(factor.shape, dtype=torch.float64, generator=generator))[0]
            factor.data.copy_(q)
        core = torch.randn(self.layer.core.shape, dtype=torch.float64, generator=generator)
        self.layer.core.data.copy_(core)

    def loss(self):
        outputs = self.layer(self.impulses).reshape(len(self.impulses), -1)
        wanted = self.target.reshape(self.shape[0], -1).T
        return 0.5 * ((outputs - wanted) ** 2).sum()

    def weight(self):
        return self.layer.weight.detach().clone()

    def step(self, optimizer):
        optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        optimizer.step()
        return loss.item()


def random_tucker(shape, ranks, spectrum=None, seed=0):
    """A tensor of exact multilinear rank `ranks`; with a spectrum, every unfolding has those singular values."""
    generator = torch.Generator().manual_seed(seed)
    if spectrum is None:
        core = torch.randn(ranks, dtype=torch.float64, generator=generator)
    else:
        core = torch.zeros(ranks, dtype=torch.float64)
        for i, s in enumerate(spectrum):
            core[(i,) * len(ranks)] = s
    for mode, n in enumerate(shape):
        q = torch.linalg.qr(torch.randn(n, ranks[mode], dtype=torch.float64, generator=generator))[0]
        core = torch.tensordot(q, core, dims=([1], [mode])).movedim(0, mode)
    return core


def whole_rank(seed=0):
    """(a linear layer with whole bases, its loss ‖W − W*‖² times a factor, W*)."""
    torch.manual_seed(seed)
    layer = tdlrt.TuckerLinear(6, 6, bias=False, ranks=6, dtype=torch.float64)
    target = torch.randn(6, 6, dtype=torch.float64)
    return layer, lambda scale=1.0: scale * (layer(torch.eye(6, dtype=torch.float64)).T - target).square().sum(), target
