"""Times a whole training step: TDLRT against dense SGD and against the two-gradient algorithm written literally.

    python bench/training_step.py [--model resnet18] [--batch 32] [--ranks 0.5 0.25 0.125] [--threads 2] [--repeats 5]

CIFAR shapes, channel modes, float32, channels-last, SGD. Ranks are held at the fraction (augmentation, core step and
truncation all happen; nothing drifts between repeats); the first, cold truncation happens in the warm-up. All
candidates take turns in one process.
"""

import argparse
import copy
import gc
import time

import harness
import literal
import tdlrt
import torch
from tdlrt import models
from torch import nn

LR = 1e-3


def batch(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (size,), generator=generator)


def candidates(dense, fraction, data, literally):
    """{name: a callable that takes one step}."""
    images, labels = data

    def loss_of(model):
        return nn.functional.cross_entropy(model(images), labels)

    def stepper(model, optimizer):
        def step():
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

        return step

    def tucker(**options):
        model = tdlrt.tuckerize(copy.deepcopy(dense), ranks=fraction).to(memory_format=torch.channels_last)
        return stepper(model, tdlrt.TDLRT(model, lr=LR, momentum=0.9, tol=None, **options))

    plain = copy.deepcopy(dense)
    found = {
        "dense": stepper(plain, torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.9)),
        "one_pass": tucker(),
        "parallel": tucker(integrator="parallel"),
        "basis_every=4": tucker(basis_every=4),
    }
    factors = tdlrt.tuckerize(copy.deepcopy(dense), ranks=fraction).to(memory_format=torch.channels_last)
    found["plain factors"] = stepper(factors, torch.optim.SGD(factors.parameters(), lr=LR, momentum=0.9))
    if literally:
        model = literal.literal(copy.deepcopy(dense), fraction)
        found["literal"] = lambda: literal.step(model, loss_of, LR)
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", choices=("resnet18", "vgg16"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-literal", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1 on a busy machine: process time")
    parser.add_argument("--save", action="store_true", help="write bench/results/training_step.json")
    options = parser.parse_args(arguments)

    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up threads; it needs --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.manual_seed(0)
    dense = models.build(options.model, (3, 32, 32), 10, (0.0,) * 3, (1.0,) * 3).to(memory_format=torch.channels_last)
    rows = []
    with harness.threads(options.threads):
        for fraction in options.ranks:
            found = candidates(dense, fraction, batch(options.batch), not options.no_literal)
            # basis_every=4 alternates: its median would be a core-only step, so a sample is four steps.
            four = found.pop("basis_every=4")
            found["basis_every=4"] = lambda four=four: [four() for _ in range(4)]
            times = harness.compare(found, repeats=options.repeats, clock=clock)
            times["basis_every=4"] /= 4
            for name, seconds in times.items():
                rows.append(
                    {
                        "model": options.model,
                        "rank": f"{fraction} n",
                        "step": name,
                        "ms": 1e3 * seconds,
                        "x dense": seconds / times["dense"],
                        "literal / it": times["literal"] / seconds if "literal" in times else None,
                    }
                )
            del found
            gc.collect()
    harness.print_table(rows, title=f"{options.model}, batch {options.batch}, {options.threads} threads")
    if options.save:
        harness.save(f"training_step_{options.model}", rows, batch=options.batch, threads=options.threads)


if __name__ == "__main__":
    main()
