"""The transforms of `torch.func` through operators and layers equal those of einsum and of the dense weight."""

import pytest
import tdlrt
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

import tucker_kernels as tk


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


PRODUCTS = {
    "mode_dot": (
        lambda x, m: tk.mode_dot(x, m, 1),
        lambda x, m: torch.einsum("abc,ib->aic", x, m),
        lambda: (rand(6, 2, 3, 4), rand(5, 3)),
    ),
    "multi_mode_dot": (
        lambda x, m: tk.multi_mode_dot(x, [m, m], (1, 2)),
        lambda x, m: torch.einsum("abc,ib,jc->aij", x, m, m),
        lambda: (rand(6, 2, 3, 3), rand(5, 3)),
    ),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("case", PRODUCTS)
def test_transforms_of_products_equal_those_of_einsum(case, place):
    ours, oracle, operands = PRODUCTS[case]
    operands = operands()

    def loss(function):
        return lambda x, m: vmap(lambda sample: function(sample, m))(x).pow(3).sum()

    def second(function, other):
        return grad(lambda *z: grad(loss(function), place)(*z).pow(2).sum(), other)(*operands)

    def per_sample(function):
        return vmap(grad(lambda m, x: function(x, m).pow(3).sum()), (None, 0))(operands[1], operands[0])

    def results(function):
        return [
            grad(loss(function), place)(*operands),
            second(function, 0),
            second(function, 1),
            per_sample(function),
            jacrev(lambda m: function(operands[0][0], m))(operands[1]),
        ]

    torch.testing.assert_close(results(ours), results(oracle), rtol=1e-11, atol=1e-11)


def layers():
    for path in ("chain", "fused", "reconstruct"):
        for dense in (nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, stride=2), nn.Linear(8, 6)):
            yield pytest.param(path, dense, id=f"{path}-{type(dense).__name__}-{dense.weight[0].numel()}")


@pytest.mark.parametrize(("path", "dense"), list(layers()))
def test_transforms_of_layers_equal_those_of_the_dense_weight(path, dense):
    model = tdlrt.tuckerize(nn.Sequential(dense).double(), ranks=0.5, min_features=0)
    layer = model[0]
    layer.path = path
    parameters = dict(model.named_parameters())
    x = rand(3, 4, 8, 8)

    def ours(p, x):
        return functional_call(model, p, (x,))

    def oracle(p, x):
        factors = [p.get(f"0.factors.{i}") for i in range(len(layer.factors))]
        weight = torch.einsum("ab...,ia,jb->ij...", p["0.core"], *factors[:2])
        if isinstance(dense, nn.Linear):
            return nn.functional.linear(x, weight, p["0.bias"])
        return nn.functional.conv2d(x, weight, p["0.bias"], dense.stride, dense.padding)

    def results(model):
        def loss(p, x):
            return model(p, x).pow(3).mean()

        def squared(p):
            return sum(g.pow(2).sum() for g in grad(loss)(p, x).values())

        ensemble = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
        return [
            grad(loss)(parameters, x),
            grad(squared)(parameters),
            grad(loss, 1)(parameters, x),
            vmap(grad(loss), (None, 0))(parameters, x[:, None]),
            vmap(lambda x: grad(lambda x: grad(loss, 1)(parameters, x[None]).pow(2).sum())(x))(x),
            grad(lambda p: vmap(grad(loss), (None, 0))(p, x[:, None])["0.core"].pow(2).sum())(parameters),
            vmap(lambda sample: model(parameters, sample[None]))(x),
            vmap(model, (0, None))(ensemble, x),
        ]

    torch.testing.assert_close(results(ours), results(oracle), rtol=1e-10, atol=1e-11)


def test_operators_called_directly_work_without_derivatives_and_refuse_with_them():
    x, m = rand(6, 2, 3), rand(5, 3)
    operator = torch.ops.tucker_kernels.mode_dot
    torch.testing.assert_close(vmap(lambda x: operator(x, m, 1, False))(x), x @ m.T, rtol=1e-13, atol=1e-13)
    with pytest.raises(RuntimeError, match="mode_dot has no derivative inside torch"):
        grad(lambda m: operator(x[0], m, 1, False).sum())(m)


def test_lists_are_batched_too():
    cores = rand(4, 3, 5)
    R = vmap(lambda a: tk.batched_qr([a, 2 * a])[1][1])(cores)
    assert torch.allclose(R.mT @ R, 4 * cores.mT @ cores, rtol=0, atol=1e-12)
