"""How far base optimisers get with Tucker layers from random weights: a small encoder on scikit-learn's digits.

    python bench/optimisers.py [--ranks 0.25] [--steps 200] [--seeds 3]

Every linear layer but the first and the last is factorised. Test loss and accuracy after the same number of steps, at
the best of a few learning rates, means over seeds. The row "by entry" has a base of somebody else's: a second moment
for every entry of a core, and no momentum outside the bases.
"""

import argparse

import harness
import tdlrt
import torch
from encoder import Encoder, best, by_adamw, by_muon, digits

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class EntrywiseAdamW(torch.optim.AdamW):
    """As torch's, which is taken for "adamw" itself."""


def candidates(fraction):
    """{name: (lr) -> (model, [optimiser, …])}."""

    def dense():
        return Encoder(4, 16, 64, 3, 10)

    def factors():
        return tdlrt.tuckerize(dense(), ranks=fraction, skip=["embed", "head"])

    def tucker(base, **options):
        def make(lr):
            model = factors()
            return model, [tdlrt.TDLRT(model, lr=lr, base=base, **{"tol": None, **options})]

        return make

    rows = {}
    for name, base, alone in (("AdamW", "adamw", by_adamw), ("Muon", "muon", by_muon)):
        rows |= {
            f"{name}, dense": lambda lr, alone=alone: alone(dense(), lr),
            f"{name}, the factors alone": lambda lr, alone=alone: alone(factors(), lr),
            f"{name}, given ranks": tucker(base),
            f"{name}, tol=0.1": tucker(base, tol=0.1),
            f"{name}, parallel": tucker(base, integrator="parallel"),
            f"{name}, basis_every=4": tucker(base, basis_every=4),
        }
    return {**rows, "AdamW, given ranks, by entry": tucker(EntrywiseAdamW)}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write bench/results/optimisers.json")
    options = parser.parse_args(arguments)
    with harness.threads(1):
        data, test = digits()
        rows = best(candidates(options.ranks), LEARNING_RATES, options.seeds, data, test, options.steps)
        harness.print_table(rows, title=f"{options.steps} steps, ranks {options.ranks} n, {options.seeds} seeds")
        if options.save:
            harness.save("optimisers", rows, ranks=options.ranks, steps=options.steps, seeds=options.seeds)


if __name__ == "__main__":
    main()
