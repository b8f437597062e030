"""The linear algebra of one TDLRT step for all layers of a ResNet18 on a GPU: ours, captured, and torch.linalg's.

    python bench/gpu_step.py [--budget 80] [--rows FILE] [--dry-run]

Ours: one `tangent_basis`, zero padding and a step of the cores, one `hosvd_truncate` with ranks chosen on the device,
and rotated bases; shapes are fixed by capacity, so that the whole is captured in a CUDA graph. Its replay must equal
the eager call bit for bit. Rivals: the literal loop of bench/step_rivals.py (QR of core unfoldings and of [K|U],
SVD of unfoldings), and torch.linalg batched by zero-padding all channel modes to the largest: QR of [K|U], and eigh
of the Gram matrices (kinder to the rival than the SVD). float32; ranks n/8, n/4, n/2; all four modes.
"""

import sys

import linear_algebra
import step_rivals
import torch
from gpu_device import Rows, arguments, opened

import tucker_kernels as tk

DIVISORS = (8, 4, 2)
TOLERANCE = 0.1


def pad_to(tensor, shape):
    widths = [w for n, m in zip(reversed(tensor.shape), reversed(shape)) for w in (0, m - n)]
    return torch.nn.functional.pad(tensor, widths)


def augment(layers):
    return tk.tangent_basis([u for x in layers for u in x.bases], [d for x in layers for d in x.gradients])


def grown(layers):
    """Cores at full capacity 2r (n at most), plus the step."""
    return [pad_to(x.core, x.step.shape) + x.step for x in layers]


def truncate(layers, cores):
    return tk.hosvd_truncate(cores, tol=TOLERANCE, max_rank=[tuple(x.ranks) for x in layers])


def rotate(layers, found, projections):
    bases = [torch.cat([u, v], 1) for u, v in zip((u for x in layers for u in x.bases), found)]
    rotations = zip(bases, (p for own in projections for p in own), (r for x in layers for r in x.ranks))
    return tk.rotate_bases(*zip(*((b[:, : len(p)], p[:, :r]) for b, p, r in rotations)))


def step(layers):
    """Fixed shapes, no value read: (bases, cores, ranks, errors)."""
    found, counts = augment(layers)
    cores, projections, ranks, errors = truncate(layers, grown(layers))
    return [*rotate(layers, found, projections), *cores, counts, ranks, errors]


def padded_qr(layers):
    pairs = [torch.cat([d, u], 1) for x in layers for u, d in zip(x.bases[:2], x.gradients[:2])]
    most = [max(p.shape[i] for p in pairs) for i in (0, 1)]
    return torch.linalg.qr(torch.stack([pad_to(p, most) for p in pairs]))


def padded_eigh(layers, cores):
    unfolded = [step_rivals.unfold(core, mode) for core in cores for mode in (0, 1)]
    largest = max(u.shape[0] for u in unfolded)
    return torch.linalg.eigh(torch.stack([pad_to(u @ u.mT, (largest, largest)) for u in unfolded]))


def layers_of(divisor, dry_run):
    shapes = linear_algebra.NETS["resnet18"]()
    shapes = [(16, 8, 3, 3), (8, 8, 1, 1)] if dry_run else shapes
    return [linear_algebra.Layer.random(shape, divisor, False) for shape in shapes]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def check_capture(card, layers, name, rows):
    """Times the replay, and says whether it gives what eager calls give, twice over."""
    eager = [t.clone() for t in step(layers)]
    replay, results = card.captured(lambda: step(layers))
    for _ in range(2):
        for t in results:
            t.zero_() if card.repeats > 1 else None
        replay()
    if same(eager, results):
        rows.add("note", text=f"{name}: a captured step, replayed twice, equals the eager one bit for bit")
    else:
        rows.add("wrong", text=f"{name}: a replayed step differs from the eager one")
    return card.seconds(replay)


def measure(card, divisor, dry_run, rows, rivals):
    name = f"n/{divisor}"
    torch.manual_seed(0)
    layers = layers_of(divisor, dry_run)
    found, _ = augment(layers)
    cores = grown(layers)
    _, projections, _, _ = truncate(layers, cores)
    ours = {
        "ours: whole step, eager": lambda: card.seconds(lambda: step(layers)),
        "ours: whole step, CUDA graph": lambda: check_capture(card, layers, name, rows),
        "  tangent_basis": lambda: card.seconds(lambda: augment(layers)),
        "  hosvd_truncate": lambda: card.seconds(lambda: truncate(layers, cores)),
        "  padding and the step of the cores": lambda: card.seconds(lambda: grown(layers)),
        "  rotated bases": lambda: card.seconds(lambda: rotate(layers, found, projections)),
    }
    theirs = {
        "torch.linalg.qr of [K|U], padded": lambda: card.seconds(lambda: padded_qr(layers)),
        "torch.linalg.eigh of Gram, padded": lambda: card.seconds(lambda: padded_eigh(layers, cores)),
        "torch.linalg, literal loop": lambda: card.seconds(lambda: step_rivals.literal(layers, TOLERANCE)),
    }
    for label, seconds in (theirs if rivals else ours).items():
        if rows.time_is_up():
            rows.add("note", text=f"{name}: no time left for {label.strip()}")
        else:
            rows.add("step", name=label, ranks=name, seconds=seconds())


def main(argv=None):
    options = arguments(__doc__, argv)
    rows = Rows(options.rows, options.budget)
    with torch.no_grad(), opened(options.dry_run) as card:
        for rivals in (False, True):  # ours first, should time run out
            for divisor in DIVISORS[:1] if options.dry_run else DIVISORS:
                measure(card, divisor, options.dry_run, rows, rivals)


if __name__ == "__main__":
    sys.exit(main())
