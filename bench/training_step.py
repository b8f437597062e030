"""Times a whole training step: TDLRT against dense SGD and against the two-gradient algorithm written literally.

    python bench/training_step.py [--models resnet18 vgg16] [--batch 32] [--ranks 0.5 0.25 0.125] [--threads 2]

CIFAR shapes, channel modes, float32, channels-last, SGD. Ranks stay at the fraction, so that nothing drifts between
repeats: they are given (`tol=None`), or in the row "tol" chosen by a tolerance, as by default, with the fraction as the
smallest. Augmentation, core step and truncation all happen; the first, cold truncations happen in the warm-up. All
candidates take turns in one process.

"peak MiB" is what parameters, gradients, optimiser state and everything live during a step come to at most.
"""

import argparse
import copy
import gc
import time
from dataclasses import dataclass

import harness
import literal
import tdlrt
import torch
from tdlrt import models
from torch import nn

LR = 1e-3
WARM_UP = 3


def batch(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (size,), generator=generator)


@dataclass
class Step:
    """One training step of a model with its optimiser."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: tuple

    def __call__(self):
        self.optimizer.zero_grad()
        loss_of(self.model, self.data).backward()
        self.optimizer.step()


class Choosing(tdlrt.TDLRT):
    """Chooses ranks by its tolerance, and no smaller ones than there are."""

    def _truncation_rules(self, expansions):
        rules = super()._truncation_rules(expansions)
        return [(e, {**rule, "min_rank": list(e.core.shape)}) for e, rule in rules]


def loss_of(model, data):
    return nn.functional.cross_entropy(model(data[0]), data[1])


def candidates(dense, fraction, data, literally):
    """{name: a callable that takes one step}."""

    def factors(path="auto"):
        model = tdlrt.tuckerize(copy.deepcopy(dense), ranks=fraction).to(memory_format=torch.channels_last)
        for layer in model.modules():
            if hasattr(layer, "path"):
                layer.path = path
        return model

    def tucker(path="auto", optimizer=tdlrt.TDLRT, tol=None, **options):
        model = factors(path)
        return Step(model, optimizer(model, lr=LR, momentum=0.9, tol=tol, **options), data)

    def plainly(model):
        return Step(model, torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), data)

    found = {
        "dense": plainly(copy.deepcopy(dense)),
        "one_pass": tucker(),
        "one_pass, tol": tucker(optimizer=Choosing, tol=0.5),
        "one_pass, inline": tucker(retain="inline"),
        "parallel": tucker(integrator="parallel"),
        "basis_every=4": tucker(basis_every=4),
        "one_pass, reconstruct": tucker(path="reconstruct"),
        "plain factors": plainly(factors()),
    }
    if literally:
        model = literal.literal(copy.deepcopy(dense), fraction)
        found["literal"] = lambda: literal.step(model, lambda net: loss_of(net, data), LR)
    return found


def measure(found, about, repeats, clock):
    """The table's rows of these candidates, each beginning with the columns `about`."""
    peaks = {}
    for kind, step in found.items():
        for _ in range(WARM_UP):
            step()
        if isinstance(step, Step):
            peaks[kind] = (harness.held_bytes(step.model, step.optimizer) + harness.peak_bytes(step)) / 2**20
    # basis_every=4 alternates: its median would be a core-only step, so a sample is four steps.
    four = found.pop("basis_every=4")
    found["basis_every=4"] = lambda: [four() for _ in range(4)]
    times = harness.compare(found, repeats=repeats, clock=clock)
    times["basis_every=4"] /= 4
    return [
        {
            **about,
            "step": kind,
            "ms": 1e3 * seconds,
            "x dense": seconds / times["dense"],
            **({"literal / it": times["literal"] / seconds} if "literal" in times else {}),
            "peak MiB": peaks.get(kind),
        }
        for kind, seconds in times.items()
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18"], choices=("resnet18", "vgg16"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-literal", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1 on a busy machine: process time")
    parser.add_argument("--save", action="store_true", help="write bench/results/training_step_MODEL_RANK.json")
    options = parser.parse_args(arguments)

    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up threads; it needs --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    with harness.threads(options.threads):
        for name in options.models:
            torch.manual_seed(0)
            dense = models.build(name, (3, 32, 32), 10, (0.0,) * 3, (1.0,) * 3).to(memory_format=torch.channels_last)
            for fraction in options.ranks:
                found = candidates(dense, fraction, batch(options.batch), not options.no_literal)
                rows = measure(found, {"model": name, "rank": f"{fraction} n"}, options.repeats, clock)
                gc.collect()
                harness.print_table(rows, title=f"{name}, batch {options.batch}, {options.threads} threads")
                if options.save:
                    harness.save(f"training_step_{name}_{fraction}", rows, batch=options.batch)


if __name__ == "__main__":
    main()
