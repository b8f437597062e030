"""Fine-tuning by `tdlrt.adapt` beside LoRA (peft): what a step costs, and how far it gets.

    python bench/adapters.py [--rank 8] [--width 256] [--seeds 2] [--steps 60] [--no-quality] [--no-speed]

Speed: one step of a transformer encoder (4 blocks, 8 sequences of 128 tokens), forward and backward pass and the
optimiser's step apart, CPU time of one thread, in turns. "held MiB" is what parameters and optimiser state take, "step
MiB" what a step needs on top of them at most. LoRA is peft's at the same rank on the same layers; without peft there is
no such row.

Quality: a small encoder learns the even classes of scikit-learn's digits, and then, adapted, all ten classes of the
inverted images. Test loss and accuracy after the same number of steps, at the best of a few learning rates, means over
seeds. Test images choose the learning rate, for every row alike: the differences count, not the levels.
"""

import argparse
import copy
import statistics
import time

import harness
import tdlrt
import torch
from torch import nn

try:
    import peft
except ImportError:
    peft = None

LEARNING_RATES = (3e-3, 1e-2, 3e-2)


class Block(nn.Module):
    """Self-attention and a perceptron, every product a linear layer of its own."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norms[0](x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.merge(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Encoder(nn.Module):
    """Vectors (batch, tokens, inputs) to classes."""

    def __init__(self, inputs, tokens, width, blocks, classes):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, width // 32) for _ in range(blocks)))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x) + self.place).mean(1))


def trained(model, lr):
    """The model, and AdamW over what is not frozen."""
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def full(model, rank, lr):
    return trained(model, lr)


def lora(model, rank, lr):
    names = ["query", "key", "value", "merge", "up", "down"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, modules_to_save=["head"])
    return trained(peft.get_peft_model(model, config), lr)


def adapter(model, rank):
    model = tdlrt.adapt(model, ranks=rank, skip=["embed", "head"])
    model.head.requires_grad_(True)
    return model


def factors_alone(model, rank, lr):
    return trained(adapter(model, rank), lr)


def adapted(**options):
    def make(model, rank, lr):
        model = adapter(model, rank)
        return model, tdlrt.TDLRT(model, lr=lr, base="adamw", **{"tol": None, **options})

    return make


CANDIDATES = {
    "all weights": full,
    **({} if peft is None else {"LoRA": lora}),
    "adapt's factors by AdamW": factors_alone,
    "adapt": adapted(),
    "adapt, tol=0.1": adapted(tol=0.1),
    "adapt, basis_every=4": adapted(basis_every=4),
    "adapt, inline": adapted(retain="inline"),
}


def loss_of(model, data):
    return nn.functional.cross_entropy(model(data[0]), data[1])


def held(model, optimizer):
    tensors = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def speed(rank, width, repeats):
    torch.manual_seed(0)
    dense = Encoder(32, 128, width, 4, 10)
    data = torch.randn(8, 128, 32), torch.randint(0, 10, (8,))
    made = {name: make(copy.deepcopy(dense), rank, 1e-4) for name, make in CANDIDATES.items()}
    parts = {name: ([], []) for name in made}

    def step(name):
        model, optimizer = made[name]
        begin = time.process_time()
        loss_of(model, data).backward()
        middle = time.process_time()
        optimizer.step()
        optimizer.zero_grad()
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
    for name, (model, optimizer) in made.items():
        passes, steps = (1e3 * statistics.median(values) for values in parts[name])
        rows.append(
            {
                "method": name,
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "passes ms": passes,
                "step ms": steps,
                "sum ms": passes + steps,
                "held MiB": held(model, optimizer) / 2**20,
                "step MiB": rises[name] / 2**20,
            }
        )
    return rows


def digits():
    """(images as 16 patches of 2 × 2, labels) of training and test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    patches, labels = patches[order], torch.tensor(found.target)[order]
    return (patches[:1400], labels[:1400]), (patches[1400:], labels[1400:])


def train(model, optimizer, data, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    for _ in range(steps):
        rows = torch.randint(len(data[1]), (64,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, (data[0][rows], data[1][rows])).backward()
        optimizer.step()
        schedule.step()


def quality(rank, seeds, steps):
    (x, y), (test_x, test_y) = digits()
    torch.manual_seed(0)
    pretrained = Encoder(4, 16, 64, 3, 10)
    even = y % 2 == 0
    train(*full(pretrained, rank, 2e-3), (x[even], y[even]), 150, 0)
    rows = []
    for name, make in CANDIDATES.items():
        if name == "adapt, inline":  # the same numbers
            continue
        tried = []
        for lr in LEARNING_RATES:
            ends = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model, optimizer = make(copy.deepcopy(pretrained), rank, lr)
                train(model, optimizer, (-x, y), steps, seed)
                with torch.no_grad():
                    scores = model(-test_x)
                    right = (scores.argmax(1) == test_y).double().mean()
                    ends.append((float(nn.functional.cross_entropy(scores, test_y)), 100 * float(right)))
            losses, accuracies = zip(*ends)
            tried.append((statistics.mean(losses), statistics.mean(accuracies), max(losses) - min(losses), lr))
        loss, accuracy, spread, lr = min(tried)
        rows.append({"method": name, "lr": lr, "test loss": loss, "spread of seeds": spread, "test %": accuracy})
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
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
