"""What a user would otherwise call for the linear algebra of a step: rivals of bench/linear_algebra.py, in plain torch.

Each layer has modes, ranks, bases, a core, gradients of the bases, and a `step` to be added to the augmented core.
"""

import torch


def unfold(core, mode):
    return core.movedim(mode, 0).reshape(core.shape[mode], -1)


def mode_dot(core, matrix, mode):
    return torch.tensordot(matrix, core, dims=([1], [mode])).movedim(0, mode)


def _cut(sigma, bound, most):
    """The smallest rank with a tail of at most `bound`, in [1, most]."""
    tail = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
    return max(1, min(int((tail > bound).sum()), most))


def literal(layers, tol):
    """Algorithm 1 of arXiv 2305.19059, layer by layer: QR of the core unfoldings, QR of [K|U], projection of the core,
    SVD of the unfoldings, rotation. Returns the ranks found, layer by layer."""
    found = []
    for layer in layers:
        core, bases, lifts = layer.core, [], []
        for i, U, gradient in zip(layer.modes, layer.bases, layer.gradients):
            _, S = torch.linalg.qr(unfold(core, i).mT)
            K = U[:, : S.shape[0]] @ S if S.shape[0] != S.shape[1] else U @ S.mT
            if K.shape == gradient.shape:
                K = K - 1e-2 * gradient
            width = min(2 * U.shape[1], U.shape[0])
            bases.append(torch.linalg.qr(torch.cat([K, U], 1))[0][:, :width])
            lifts.append(bases[-1].mT @ U)
        for i, lift in zip(layer.modes, lifts):
            core = mode_dot(core, lift, i)
        core = core + layer.step
        rotations = []
        for i, r in zip(layer.modes, layer.ranks):
            P, sigma, _ = torch.linalg.svd(unfold(core, i), full_matrices=False)
            bound = tol / len(layer.modes) ** 0.5 * torch.linalg.norm(sigma)
            rotations.append(P[:, : r if layer.fixed else _cut(sigma, bound, r)])
        for k, i in enumerate(layer.modes):
            core = mode_dot(core, rotations[k].mT, i)
            bases[k] = bases[k] @ rotations[k]
        found.append(list(core.shape))
    return found


def augmented_bug(layers, tol):
    """As github.com/ScSteffen/RobustDLRT augments and truncates a convolution with channel modes and Adam: QR of
    [U|−∇U], projection of core and moments by einsum, an SVD per mode, a loop over the tail norms, einsum again."""
    found = []
    for layer in layers:
        bases, lifts = [], []
        for U, gradient in zip(layer.bases, layer.gradients):
            Q = torch.linalg.qr(torch.cat([U, -gradient], 1), "reduced")[0][:, : min(2 * U.shape[1], U.shape[0])]
            lifts.append(Q.T @ U)
            bases.append(Q)
        first, second = layer.moments
        core, first, root = (torch.einsum("abcd,ia,jb->ijcd", x, *lifts) for x in (layer.core, first, second.sqrt()))
        core, second, rotations = core + layer.step, root.pow(2), []
        for i in (0, 1):
            P, sigma, _ = torch.linalg.svd(unfold(core, i), full_matrices=False)
            bound, rank = tol * torch.linalg.norm(sigma), len(sigma)
            for j in range(len(sigma)):
                if torch.linalg.norm(sigma[j:]) < bound:
                    rank = j
                    break
            rotations.append(P[:, : max(1, min(rank, layer.ranks[i]))].T)
            bases[i] = bases[i] @ rotations[i].T
        core, first, root = (torch.einsum("abcd,ia,jb->ijcd", x, *rotations) for x in (core, first, second.sqrt()))
        found.append((list(core.shape), bases, first, root.pow(2)))
    return found


def tensorly_tucker(weights, ranks):
    """Channel-mode Tucker decomposition of each kernel by TensorLy, from an SVD and one sweep of HOOI."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    with tensorly.backend_context("pytorch"):
        return [partial_tucker(w, rank=list(r), modes=[0, 1], n_iter_max=1) for w, r in zip(weights, ranks)]
