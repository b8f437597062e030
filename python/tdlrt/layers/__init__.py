"""Layers with a Tucker weight `W = core ×_i factors[i]`. They hold parameters; the arithmetic is tucker_kernels'."""

from tdlrt.layers.adapter import TuckerAdapter
from tdlrt.layers.base import METHODS, MODES, TuckerLayer
from tdlrt.layers.conv import TuckerConv1d, TuckerConv2d, TuckerConv3d
from tdlrt.layers.embedding import TuckerEmbedding
from tdlrt.layers.grouped import TuckerGroupedConv
from tdlrt.layers.linear import TuckerLinear

__all__ = [
    "METHODS",
    "MODES",
    "TuckerAdapter",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerEmbedding",
    "TuckerGroupedConv",
    "TuckerLayer",
    "TuckerLinear",
]
