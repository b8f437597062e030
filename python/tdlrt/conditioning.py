"""The regulariser that draws the singular values of a core together (RobustDLRT, arXiv 2505.08022, for matrices)."""

import torch


def conditioning_gradient(core, active=None):
    """∇_C ‖SSᵀ − α²I‖_F for S = Mat_1(C) and α² = ‖S‖²/r; zero where the singular values are equal.

    active: which rows of S are in use (boolean), where the others are zero columns of the factor; r counts these.
    """
    S = core.flatten(1)
    E = S @ S.T
    used = torch.ones_like(S[:, 0]) if active is None else active.to(S.dtype)
    E.diagonal().sub_(E.diagonal().sum() / used.sum() * used)  # the derivative of α² is orthogonal to E
    norm = torch.linalg.vector_norm(E)
    return (2 / torch.where(norm > 0, norm, 1.0) * (E @ S)).view_as(core)
