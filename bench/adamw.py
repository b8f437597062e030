"""How far AdamW gets with Tucker layers from random weights: a small transformer encoder on scikit-learn's digits.

    python bench/adamw.py [--ranks 0.25] [--steps 200] [--seeds 3]

Every linear layer but the first and the last is factorised. Test loss and accuracy after the same number of steps, at
the best of a few learning rates, means over seeds. The row "by entry" has a base of somebody else's: a second moment
for every entry of a core, and no momentum outside the bases.
"""

import argparse

import harness
import tdlrt
import torch
from encoder import Encoder, best, digits, trained

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


class EntrywiseAdamW(torch.optim.AdamW):
    """As torch's, which is taken for "adamw" itself."""


def candidates(fraction):
    """{name: (lr) -> (model, optimizer)}."""

    def dense():
        return Encoder(4, 16, 64, 3, 10)

    def factors():
        return tdlrt.tuckerize(dense(), ranks=fraction, skip=["embed", "head"])

    def tucker(base="adamw", **options):
        def make(lr):
            model = factors()
            return model, tdlrt.TDLRT(model, lr=lr, base=base, weight_decay=0.0, **{"tol": None, **options})

        return make

    return {
        "dense": lambda lr: trained(dense(), lr),
        "its factors by AdamW": lambda lr: trained(factors(), lr),
        "given ranks": tucker(),
        "tol=0.1": tucker(tol=0.1),
        "parallel": tucker(integrator="parallel"),
        "basis_every=4": tucker(basis_every=4),
        "given ranks, by entry": tucker(EntrywiseAdamW),
        "basis_every=4, by entry": tucker(EntrywiseAdamW, basis_every=4),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write bench/results/adamw.json")
    options = parser.parse_args(arguments)
    with harness.threads(1):
        data, test = digits()
        rows = best(candidates(options.ranks), LEARNING_RATES, options.seeds, data, test, options.steps)
        harness.print_table(rows, title=f"{options.steps} steps, ranks {options.ranks} n, {options.seeds} seeds")
        if options.save:
            harness.save("adamw", rows, ranks=options.ranks, steps=options.steps, seeds=options.seeds)


if __name__ == "__main__":
    main()
