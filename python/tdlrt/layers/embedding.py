"""The embedding with a Tucker weight."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

import tucker_kernels as tk
from tdlrt.layers.base import Device, DType, Modes, Ranks, TuckerLayer, copied, filled
from tucker_kernels.validation import at_least

# Arguments of nn.Embedding that act on single rows of the dense weight, which a Tucker weight does not have.
_UNSUPPORTED = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False, "sparse": False}


class TuckerEmbedding(TuckerLayer):
    """Embedding whose weight (num_embeddings, embedding_dim) is U C Vᵀ: rows of U are looked up, then C and V applied.

    ranks: a fraction, an integer cap, a pair, or None (full). Input: indices of any shape; output: (*shape, dim).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ranks: Ranks = None,
        modes: Modes = "all",
        device: Device = None,
        dtype: DType = None,
    ) -> None:
        shape = at_least("num_embeddings", num_embeddings, 1), at_least("embedding_dim", embedding_dim, 1)
        super().__init__(shape, ranks, modes, False, device, dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Random orthonormal factors, and a core that gives W the norm of torch's default, normal entries."""
        super().reset_parameters()
        self.core.mul_(math.sqrt(math.prod(self.weight_shape)) / torch.linalg.vector_norm(self.core))

    def forward(self, input: Tensor) -> Tensor:
        input, core, _, (rows, columns) = self._operands(input)
        if rows is None:
            rows, core = core, None
        x = nn.functional.embedding(input, rows)
        if core is None:
            return x if columns is None else tk.mode_dot(x, columns, -1)
        return tk.tucker_linear(x, core.T.contiguous(), [columns, None], path=self.path)

    def core_gradient(self, input, grad_output, factors, known=None):
        """Gradient of the loss with respect to a core in the given bases, from one call's indices and output gradient.

        known: sizes of a leading block whose gradient the caller has; it may be left zero.
        """
        rows, columns = factors
        dy = grad_output.reshape(-1, self.embedding_dim).to(self.core.dtype)
        if rows is None:
            gradient = dy.new_zeros(self.weight_shape).index_add_(0, input.reshape(-1), dy)
            return tk.multi_mode_dot(gradient, [None, columns], transpose=True)
        x = rows[input.reshape(-1)]
        return tk.tucker_linear_core_grad(x, dy, [columns, None], (self.embedding_dim, rows.shape[1])).T.contiguous()

    def input_norm(self, input):
        return math.sqrt(input.numel())  # of the rows of the identity that the indices stand for

    @classmethod
    def from_dense(
        cls,
        layer: nn.Embedding,
        ranks: Ranks = None,
        tol: float | None = None,
        modes: Modes = "all",
        method: Literal["hosvd", "hooi"] = "hosvd",
    ) -> "TuckerEmbedding":
        """The Tucker embedding nearest to an `nn.Embedding` by truncated SVD, at `ranks` or to the tolerance `tol`.

        Raises ValueError for one with padding_idx, max_norm, scale_grad_by_freq or sparse.
        """
        if type(layer) is not nn.Embedding:
            raise TypeError(f"layer must be an Embedding, got {type(layer).__name__}")
        reason = cls.why_not(layer)
        if reason is not None:
            raise ValueError(f"layer has {reason}; an Embedding with a Tucker weight has no such rows")
        core, factors = cls._truncated(layer.weight, ranks, tol, modes, method)
        device, dtype = layer.weight.device, layer.weight.dtype
        new = cls(layer.num_embeddings, layer.embedding_dim, tuple(core.shape), modes, device, dtype)
        return filled(new, layer, core, factors)

    @staticmethod
    def why_not(layer):
        """The argument that keeps an `nn.Embedding` dense, or None."""
        found = [f"{name}={getattr(layer, name)}" for name, off in _UNSUPPORTED.items() if getattr(layer, name) != off]
        return found[0] if found else None

    def to_dense(self) -> nn.Embedding:
        """The `nn.Embedding` with the reconstructed weight."""
        return copied(_table(self.weight), self.weight, None).train(self.training)

    def to_sequential(self) -> nn.Sequential:
        """The same map as plain layers: look up a row of U, multiply by the core, expand."""
        rows, columns = self.factors
        matrices = [rows, self.core.T, columns] if rows is not None else [self.core, columns]
        first, *others = [m for m in matrices if m is not None]
        layers = [copied(_table(first), first, None)]
        for matrix in others:
            options = {"bias": False, "device": matrix.device, "dtype": matrix.dtype}
            layers.append(copied(nn.Linear(*matrix.shape[::-1], **options), matrix, None))
        return nn.Sequential(*layers).train(self.training)


def _table(weight):
    return nn.Embedding(*weight.shape, device=weight.device, dtype=weight.dtype)
