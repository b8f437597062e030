"""Fine-tuning by `tdlrt.adapt` beside LoRA (peft): what a step costs, and how far it gets.

    python bench/adapters.py [--rank 8] [--width 256] [--seeds 2] [--steps 200] [--no-quality] [--no-speed]

Speed: one step of a transformer encoder (4 blocks, 8 sequences of 128 tokens), forward and backward pass and the
optimiser's step apart, CPU time of one thread, in turns. "held MiB" is what parameters and optimiser state take, "step
MiB" what a step needs on top of them at most. LoRA is peft's at the same rank on the same layers; without peft there is
no such row.

Quality: a small encoder learns the even classes of scikit-learn's digits, and then, adapted, all ten classes of the
inverted images. Test loss and accuracy after the same number of steps, at the best of a few learning rates, means over
seeds.
"""

import argparse
import copy
import statistics
import time

import harness
import tdlrt
import torch
from encoder import Encoder, best, by_adamw, by_muon, digits, train
from training_step import loss_of

try:
    import peft
except ImportError:
    peft = None

LEARNING_RATES = (3e-3, 1e-2, 3e-2)


def lora(model, rank):
    names = ["query", "key", "value", "merge", "up", "down"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=["head"])
    return peft.get_peft_model(model, config)


def adapter(model, rank):
    model = tdlrt.adapt(model, ranks=rank, skip=["embed", "head"])
    model.head.requires_grad_(True)
    return model


def adapted(base, **options):
    def make(model, rank, lr):
        model = adapter(model, rank)
        return model, [tdlrt.TDLRT(model, lr=lr, base=base, **{"tol": None, **options})]

    return make


def plainly(prepare, alone):
    return lambda model, rank, lr: alone(prepare(model, rank), lr)


def candidates():
    """{name: (model, rank, lr) -> (model, [optimiser, …])}."""
    rows = {}
    for name, base, alone in (("AdamW", "adamw", by_adamw), ("Muon", "muon", by_muon)):
        rows[f"{name}, all weights"] = plainly(lambda model, rank: model, alone)
        if peft is not None:
            rows[f"{name}, LoRA"] = plainly(lora, alone)
        rows |= {
            f"{name}, adapt's factors alone": plainly(adapter, alone),
            f"{name}, adapt": adapted(base),
            f"{name}, adapt, tol=0.1": adapted(base, tol=0.1),
            f"{name}, adapt, basis_every=4": adapted(base, basis_every=4),
        }
    return rows


def speed(rank, width, repeats):
    torch.manual_seed(0)
    dense = Encoder(32, 128, width, 4, 10)
    data = torch.randn(8, 128, 32), torch.randint(0, 10, (8,))
    made = {name: make(copy.deepcopy(dense), rank, 1e-4) for name, make in candidates().items()}
    parts = {name: ([], []) for name in made}

    def step(name):
        model, optimisers = made[name]
        begin = time.process_time()
        loss_of(model, data).backward()
        middle = time.process_time()
        for own in optimisers:
            own.step()
            own.zero_grad()
        return middle - begin, time.process_time() - middle

    for name in made:
        for _ in range(4):
            step(name)
    rises = {name: max(harness.peak_bytes(lambda name=name: step(name)) for _ in range(4)) for name in made}
    for _ in range(repeats):
        for name in made:
            taken = [step(name) for _ in range(4)]  # of basis_every=4 a whole period
            for found, values in zip(parts[name], zip(*taken)):
                found.append(sum(values) / 4)
    rows = []
    for name, (model, optimisers) in made.items():
        passes, steps = (1e3 * statistics.median(values) for values in parts[name])
        rows.append(
            {
                "method": name,
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "passes ms": passes,
                "step ms": steps,
                "sum ms": passes + steps,
                "held MiB": harness.held_bytes(model, *optimisers) / 2**20,
                "step MiB": rises[name] / 2**20,
            }
        )
    return rows


def quality(rank, seeds, steps):
    (x, y), (test_x, test_y) = digits()
    torch.manual_seed(0)
    pretrained = Encoder(4, 16, 64, 3, 10)
    even = y % 2 == 0
    train(*by_adamw(pretrained, 2e-3), (x[even], y[even]), 150, 0)
    made = {
        name: lambda lr, make=make: make(copy.deepcopy(pretrained), rank, lr) for name, make in candidates().items()
    }
    return best(made, LEARNING_RATES, seeds, (-x, y), (-test_x, test_y), steps)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--save", action="store_true", help="write bench/results/adapters_PART.json")
    options = parser.parse_args(arguments)
    if peft is None:
        print("peft is not installed, so there is no row of LoRA (pip install peft)")
    with harness.threads(1):
        tables = {}
        if not options.no_speed:
            tables["speed"] = speed(options.rank, options.width, options.repeats)
        if not options.no_quality:
            tables["quality"] = quality(options.rank, options.seeds, options.steps)
        for part, rows in tables.items():
            harness.print_table(rows, title=f"{part}, rank {options.rank}")
            if options.save:
                harness.save(f"adapters_{part}", rows, rank=options.rank, width=options.width, steps=options.steps)


if __name__ == "__main__":
    main()
