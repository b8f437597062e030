"""Layers with Tucker weights and the rank-adaptive training step for them.

>>> import tdlrt
>>> model = tdlrt.tuckerize(model, ranks=0.5)
>>> optimizer = tdlrt.TDLRT(model, lr=0.05, momentum=0.9, tol=0.1)
>>> criterion(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
"""

from tdlrt.adapters import adapt, adapter_state_dict, merge
from tdlrt.convert import plan, prepare_ddp, to_dense, to_sequential, tuckerize
from tdlrt.expansion import NonFiniteError
from tdlrt.layers import (
    TuckerAdapter,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerEmbedding,
    TuckerGroupedConv,
    TuckerLinear,
)
from tdlrt.optimizer import TDLRT
from tdlrt.sharding import take_ranks, tucker_parameters
from tdlrt.summary import Compression, compression, orthogonality_error, ranks

__all__ = [
    "TDLRT",
    "Compression",
    "NonFiniteError",
    "TuckerAdapter",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerEmbedding",
    "TuckerGroupedConv",
    "TuckerLinear",
    "adapt",
    "adapter_state_dict",
    "compression",
    "merge",
    "orthogonality_error",
    "plan",
    "prepare_ddp",
    "ranks",
    "take_ranks",
    "to_dense",
    "to_sequential",
    "tucker_parameters",
    "tuckerize",
]
