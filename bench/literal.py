"""The two-gradient algorithm written down literally in torch: what a user would write from the paper.

Three `F.conv2d` calls for the forward pass; per layer and mode QR of the core's unfolding, QR of [K|U], projection of
the core and SVD of its unfoldings, all by `torch.linalg` in a Python loop. A rival for timing, on fixed ranks; not
tuned, and not slowed down either: gradients of both passes come from autograd, channels-last is kept.
"""

import torch
from torch import nn


def unfold(tensor, mode):
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor, matrix, mode):
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


class LiteralTuckerConv2d(nn.Module):
    """Channel-mode Tucker convolution from a dense one, at ranks (r_out, r_in)."""

    def __init__(self, dense, ranks):
        super().__init__()
        weight, self.ranks = dense.weight.detach(), ranks
        self.stride, self.padding = dense.stride, dense.padding
        U = [torch.linalg.svd(unfold(weight, i), full_matrices=False)[0][:, :r] for i, r in enumerate(ranks)]
        self.core = nn.Parameter(mode_product(mode_product(weight, U[0].T, 0), U[1].T, 1).contiguous())
        self.U = nn.Parameter(U[0].contiguous())
        self.V = nn.Parameter(U[1].contiguous())

    def forward(self, x):
        z = nn.functional.conv2d(x, self.V.T[:, :, None, None])
        t = nn.functional.conv2d(z, self.core, None, self.stride, self.padding)
        return nn.functional.conv2d(t, self.U[:, :, None, None])

    @torch.no_grad()
    def augment(self, lr):
        """K-steps from the factors' gradients, QR of [K|U], core projected on the new bases."""
        old = [self.U.data, self.V.data]
        new = []
        for mode, (U, gradient) in enumerate(zip(old, (self.U.grad, self.V.grad))):
            R = torch.linalg.qr(unfold(self.core, mode).T, mode="r")[1]  # Mat(C)ᵀ = Q R, so S = Rᵀ and K = U Rᵀ
            K = U @ R.T
            dK = torch.linalg.solve_triangular(R.T, gradient.T, upper=False).T  # from ∇_U L = (∇_K L) R
            new.append(torch.linalg.qr(torch.cat([K - lr * dK, U], 1))[0])
        core = self.core.data
        for mode in (0, 1):
            core = mode_product(core, new[mode].T @ old[mode], mode)
        self._assign(core, new)

    @torch.no_grad()
    def truncate(self):
        """SVD of both unfoldings, back to the ranks."""
        core, bases = self.core.data, [self.U.data, self.V.data]
        P = [torch.linalg.svd(unfold(core, i), full_matrices=False)[0][:, :r] for i, r in enumerate(self.ranks)]
        small = mode_product(mode_product(core, P[0].T, 0), P[1].T, 1)
        self._assign(small, [b @ p for b, p in zip(bases, P)])

    def _assign(self, core, bases):
        # New parameters: the old ones keep their shapes in autograd's memory.
        self.core = nn.Parameter(core.contiguous(memory_format=torch.channels_last))
        self.U, self.V = (nn.Parameter(b.contiguous()) for b in bases)


def literal(model, fraction):
    """Replaces the convolutions of a model with at least eight channels on each side."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.Conv2d) and min(child.weight.shape[:2]) >= 8:
                ranks = tuple(max(1, round(fraction * n)) for n in child.weight.shape[:2])
                rest = child.weight[0, 0].numel()
                ranks = (min(ranks[0], ranks[1] * rest), min(ranks[1], ranks[0] * rest))
                setattr(module, name, LiteralTuckerConv2d(child, ranks))
    return model


def step(model, loss_of, lr):
    """One step of SGD on everything: gradients for the bases, augmentation, gradients for the cores, truncation."""
    layers = [m for m in model.modules() if isinstance(m, LiteralTuckerConv2d)]
    model.zero_grad()
    loss_of(model).backward()
    for layer in layers:
        layer.augment(lr)
    model.zero_grad()
    loss_of(model).backward()
    bases = {p for layer in layers for p in (layer.U, layer.V)}
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and p not in bases:
                p -= lr * p.grad
    for layer in layers:
        layer.truncate()
