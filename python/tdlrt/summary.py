"""What a model looks like now: ranks, parameters, compression, multiply-adds, orthogonality."""

import math
from dataclasses import dataclass

import torch

from tdlrt.layers import TuckerAdapter, TuckerEmbedding, TuckerLayer


@dataclass(frozen=True)
class Compression:
    """Parameter counts of a model with Tucker layers.

    parameters, dense_parameters: of the whole model, now and with dense weights (adapters merged).
    factorised_parameters, factorised_dense_parameters: of the Tucker weights alone (no biases).
    multiply_adds, dense_multiply_adds: per output pixel (convolution) or row (linear layer), summed over the layers.
    """

    parameters: int
    dense_parameters: int
    factorised_parameters: int
    factorised_dense_parameters: int
    multiply_adds: int
    dense_multiply_adds: int

    @property
    def compression(self) -> float:
        """1 − c/f of the whole model."""
        return 1 - self.parameters / max(self.dense_parameters, 1)

    @property
    def factorised_compression(self) -> float:
        """1 − c/f of the Tucker weights, 0 where there are none: the figure the literature reports."""
        dense = self.factorised_dense_parameters
        return 1 - self.factorised_parameters / dense if dense else 0.0


def check_module(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def tucker_layers(model: torch.nn.Module) -> dict[str, TuckerLayer]:
    """The Tucker layers of a model by name."""
    check_module(model)
    return {name: m for name, m in model.named_modules() if isinstance(m, TuckerLayer)}


def ranks(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Ranks per layer: {name: one rank per mode}."""
    return {name: layer.ranks for name, layer in tucker_layers(model).items()}


def layer_parameters(layer, ranks=None):
    """Parameters of a Tucker weight, core and factors without the bias, as it is or at other ranks."""
    ranks = layer.ranks if ranks is None else ranks
    return math.prod(ranks) + sum(layer.weight_shape[mode] * ranks[mode] for mode in layer.modes)


def layer_multiply_adds(layer, ranks=None):
    """Multiply-adds of the chain per output pixel or row, stride 1, as it is or at other ranks.

    Looking up a row of an embedding costs none.
    """
    ranks = layer.ranks if ranks is None else ranks
    if isinstance(layer, TuckerEmbedding):
        return ranks[0] * ranks[1] * (0 in layer.modes) + ranks[1] * layer.embedding_dim * (1 in layer.modes)
    window = layer.weight_shape[2:] if hasattr(layer, "stride") else ()
    total = ranks[0] * ranks[1] * math.prod(window) if window else math.prod(ranks)
    for mode in layer.modes:
        if not window or mode < 2:
            total += layer.weight_shape[mode] * ranks[mode]
    return total


def compression(model: torch.nn.Module) -> Compression:
    """Parameters, dense parameters and multiply-adds of a model; see `Compression`."""
    layers = list(tucker_layers(model).values())
    now = sum(layer_parameters(layer) for layer in layers)
    dense = sum(math.prod(layer.weight_shape) for layer in layers)
    merged = sum(m.base.weight.numel() for m in model.modules() if isinstance(m, TuckerAdapter))
    total = sum(p.numel() for p in model.parameters())
    return Compression(
        parameters=total,
        dense_parameters=total - now + dense - merged,
        factorised_parameters=now,
        factorised_dense_parameters=dense,
        multiply_adds=sum(layer_multiply_adds(layer) for layer in layers),
        dense_multiply_adds=sum(math.prod(x.weight_shape) for x in layers if not isinstance(x, TuckerEmbedding)),
    )


@torch.no_grad()
def orthogonality_error(model: torch.nn.Module) -> float:
    """Largest entry of |UᵀU − I| over all factors of all Tucker layers; 0 for a model without any."""
    worst = 0.0
    for layer in tucker_layers(model).values():
        for factor in layer.factors:
            if factor is not None and factor.numel():
                U = factor.double()
                eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
                worst = max(worst, float((U.T @ U - eye).abs().max()))
    return worst
