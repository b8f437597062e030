"""Times a training step of a small decoder: TDLRT with AdamW, and once with Muon, against dense AdamW.

    python bench/transformer.py [--layers 2] [--tokens 1024] [--ranks 0.5 0.25 0.125] [--threads 1]

Width 512, sequences of 256 tokens, float32. All projections are `nn.Linear`s, which `tuckerize` replaces; embedding and
norms stay. Otherwise as `training_step.py`: ranks stay at the fraction, given or (row "tol") chosen by a tolerance with
the fraction as the smallest, and all candidates take turns in one process.
"""

import argparse
import copy
import time

import harness
import tdlrt
import torch
from encoder import Block
from torch import nn
from training_step import Choosing, Step, measure

WIDTH, HEADS, SEQUENCE, VOCABULARY = 512, 8, 256, 256
LR = 1e-4


def decoder(layers):
    """Tokens (batch, SEQUENCE) -> logits (batch · SEQUENCE, VOCABULARY)."""
    embedding, blocks = nn.Embedding(VOCABULARY, WIDTH), [Block(WIDTH, HEADS, causal=True) for _ in range(layers)]
    return nn.Sequential(embedding, *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY), nn.Flatten(0, 1))


def batch(tokens):
    text = torch.randint(VOCABULARY, (tokens // SEQUENCE, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1], text[:, 1:].flatten()


def candidates(dense, fraction, data):
    """{name: a callable that takes one step}."""

    def tucker(optimizer=tdlrt.TDLRT, base="adamw", tol=None, **options):
        model = tdlrt.tuckerize(copy.deepcopy(dense), ranks=fraction)
        return Step(model, optimizer(model, lr=LR, base=base, tol=tol, **options), data)

    def plainly(model):
        return Step(model, torch.optim.AdamW(model.parameters(), lr=LR), data)

    return {
        "dense": plainly(copy.deepcopy(dense)),
        "one_pass": tucker(),
        "one_pass, tol": tucker(Choosing, tol=0.5),
        "one_pass, inline": tucker(retain="inline"),
        "parallel": tucker(integrator="parallel"),
        "basis_every=4": tucker(basis_every=4),
        "one_pass, Muon": tucker(base="muon"),
        "plain factors": plainly(tdlrt.tuckerize(copy.deepcopy(dense), ranks=fraction)),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--ranks", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1 on a busy machine: process time")
    parser.add_argument("--save", action="store_true", help="write bench/results/transformer_RANK.json")
    options = parser.parse_args(arguments)

    if options.tokens < SEQUENCE or options.tokens % SEQUENCE:
        parser.error(f"--tokens is {options.tokens}; it must be a multiple of {SEQUENCE}")
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up threads; it needs --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    with harness.threads(options.threads):
        torch.manual_seed(0)
        dense = decoder(options.layers)
        for fraction in options.ranks:
            found = candidates(dense, fraction, batch(options.tokens))
            rows = measure(found, {"rank": f"{fraction} n"}, options.repeats, clock)
            title = f"decoder of {options.layers} layers, {options.tokens} tokens, {options.threads} threads"
            harness.print_table(rows, title=title)
            if options.save:
                harness.save(f"transformer_{fraction}", rows, layers=options.layers, tokens=options.tokens)


if __name__ == "__main__":
    main()
