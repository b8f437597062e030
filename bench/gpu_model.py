"""Whole training steps of LeNet5 and ResNet18 on a GPU, captured in a CUDA graph and compared with eager ones.

    python bench/gpu_model.py [--budget 50] [--rows FILE] [--dry-run]

Forward pass, loss, backward pass and TDLRT(capturable=True) with ranks chosen on the device. From the same weights and
momentum, a replayed graph and eager calls make 50 steps on the same batches and must end in the same place; then the
capacities are cut to the ranks in use, in buckets of 8, and a second graph makes 10 more. float32, r = n/4, batch 32.
"""

import copy
import sys

import tdlrt
import torch
from gpu_device import Rows, arguments, opened
from tdlrt import models
from torch import nn

STEPS, AFTER, BUCKET = 50, 10, 8
# Kernels are the same and in the same order, so that the two should agree bit for bit; what algorithms chosen anew add
# up to in 60 steps is far below this.
ALLOWED = 1e-3


class Training:
    """A model, its optimiser, and one step on a batch that lies in place."""

    def __init__(self, model, batch):
        self.model = model
        self.optimizer = tdlrt.TDLRT(model, lr=0.01, momentum=0.9, tol=0.05, capturable=True)
        self.images, self.labels = (t.clone() for t in batch)

    def step(self):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def take(self, batch):
        for own, new in zip((self.images, self.labels), batch):
            own.copy_(new)

    def tensors(self):
        values = [v for p in self.model.parameters() for v in self.optimizer.state.get(p, {}).values()]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
        own = [*(p.data for p in self.model.parameters()), *self.model.buffers()]
        return own + [v for v in flat if isinstance(v, torch.Tensor)]

    def weights(self):
        return torch.cat([p.detach().double().flatten() for p in tdlrt.to_dense(self.model).parameters()])


def networks(dry_run):
    """name → (dense network, shape of a batch)."""
    if dry_run:
        return {
            "tiny": (nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 10)), (4, 3, 6, 6))
        }
    shapes = {"lenet5": (1, 28, 28), "resnet18": (3, 32, 32)}
    return {
        name: (models.build(name, shape, 10, [0.5] * shape[0], [0.25] * shape[0]), (32, *shape))
        for name, shape in shapes.items()
    }


def compare(name, when, eager, captured, rows):
    ranks = [t.optimizer.captured.ranks_later() for t in (eager, captured)]
    expected, found = eager.weights(), captured.weights()
    difference = float((found - expected).norm() / expected.norm())
    steps = f"{name}: {when}, replayed and eager steps"
    if ranks[0]() != ranks[1]() or not difference <= ALLOWED:
        rows.add("wrong", text=f"{steps} are {difference:.1e} apart, ranks {ranks[1]()} and {ranks[0]()}")
    else:
        rows.add("note", text=f"{steps} end {difference:.1e} apart with the same ranks")


def follow(card, name, when, steps, eager, captured, batches, rows):
    """Captures, starts both in the same place, makes the steps and compares; seconds per step are added to the rows."""
    replay, _ = card.captured(captured.step)
    for own, other in zip(captured.tensors(), eager.tensors(), strict=True):
        own.copy_(other)
    for batch in batches(steps):
        for training, step in ((eager, eager.step), (captured, replay)):
            training.take(batch)
            step()
    compare(name, when, eager, captured, rows)
    for label, step in (("eager", eager.step), ("CUDA graph", replay)):
        rows.add("model", name=f"{name}, {when}", how=label, seconds=card.seconds(step))


def measure(card, name, dense, shape, dry_run, rows):
    def batches(count):
        generator = torch.Generator("cpu").manual_seed(count)
        for _ in range(count):
            images = torch.rand(shape, generator=generator, device="cpu")
            labels = torch.randint(10, shape[:1], generator=generator, device="cpu")
            yield images.to(card.device), labels.to(card.device)

    (first,) = batches(1)
    with torch.device("cpu"):  # where the dense network is
        model = tdlrt.tuckerize(dense, ranks=0.25, min_features=0 if dry_run else 16)
    model.to(card.device)
    eager, captured = (Training(copy.deepcopy(model), first) for _ in range(2))
    for training in (eager, captured):  # makes the state
        training.step()
    follow(card, name, "at capacity", 2 if dry_run else STEPS, eager, captured, batches, rows)
    for own, other in zip(captured.tensors(), eager.tensors(), strict=True):
        own.copy_(other)
    for training in (eager, captured):
        training.step()
        training.optimizer.compact(1 if dry_run else BUCKET)
    follow(card, name, "cut to the ranks in use", 1 if dry_run else AFTER, eager, captured, batches, rows)


def main(argv=None):
    options = arguments(__doc__, argv)
    rows = Rows(options.rows, options.budget)
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    found = networks(options.dry_run)
    with opened(options.dry_run) as card:
        for name, (dense, shape) in found.items():
            if rows.time_is_up():
                rows.add("note", text=f"no time left for the training steps of {name}")
                continue
            try:
                measure(card, name, dense, shape, options.dry_run, rows)
            except Exception as error:  # a capture that fails says nothing about the next model
                rows.add("wrong", text=f"{name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(main())
