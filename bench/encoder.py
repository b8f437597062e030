"""A transformer's block, a small encoder of it, scikit-learn's digits, and a table of how far methods get: what
adapters.py, optimisers.py and transformer.py share; and torch's Muon beside AdamW, which cifar.py takes, too.
"""

import statistics

import torch
from torch import nn
from training_step import loss_of


class Block(nn.Module):
    """Self-attention and a perceptron of four times the width, each after a norm and beside an identity.

    Every product with a weight is a linear layer of its own.
    """

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norms[0](x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.merge(y.transpose(1, 2).flatten(2))
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


def by_adamw(model, lr):
    """The model, and AdamW over what is not frozen in a list."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, [torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)]


def by_muon(model, lr):
    """The model, and torch's Muon over the matrices of its blocks that are not frozen, AdamW over the rest."""
    inner = {p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2}
    return model, muon_and_adamw(model, inner, lr, weight_decay=0.0)


def muon_and_adamw(model, inner, lr, weight_decay):
    """torch's Muon over those of these matrices that are not frozen, AdamW over the rest.

    The rates are those that `base="muon"` has: a step of Muon is as long as one of AdamW.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    shared = {"lr": lr, "weight_decay": weight_decay}
    muon = torch.optim.Muon([p for p in trained if p in inner], **shared, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW([p for p in trained if p not in inner], **shared)]


def digits():
    """(images as 16 patches of 2 × 2, labels) of training and test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    patches, labels = patches[order], torch.tensor(found.target)[order]
    return (patches[:1400], labels[:1400]), (patches[1400:], labels[1400:])


def train(model, optimisers, data, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    schedules = [torch.optim.lr_scheduler.LambdaLR(own, lambda i: 1 - i / steps) for own in optimisers]
    for _ in range(steps):
        rows = torch.randint(len(data[1]), (64,), generator=generator)
        for own in optimisers:
            own.zero_grad()
        loss_of(model, (data[0][rows], data[1][rows])).backward()
        for own in (*optimisers, *schedules):
            own.step()


def best(candidates, rates, seeds, data, test, steps):
    """Rows of test loss and accuracy after so many steps, at the best of the learning rates; means over seeds.

    candidates: {name: (lr) -> (model, [optimiser, …])}. Test images choose the rate, for every row alike: the
    differences count, not the levels.
    """
    rows = []
    for name, make in candidates.items():
        tried = []
        for lr in rates:
            ends = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model, optimisers = make(lr)
                train(model, optimisers, data, steps, seed)
                with torch.no_grad():
                    scores = model(test[0])
                    right = (scores.argmax(1) == test[1]).double().mean()
                    ends.append((float(loss_of(model, test)), 100 * float(right)))
            losses, accuracies = zip(*ends)
            tried.append((statistics.mean(losses), statistics.mean(accuracies), max(losses) - min(losses), lr))
        loss, accuracy, spread, lr = min(tried)
        rows.append({"method": name, "lr": lr, "test loss": loss, "spread of seeds": spread, "test %": accuracy})
    return rows
