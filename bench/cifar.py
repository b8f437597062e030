"""CIFAR-10 from random weights to the end: dense SGD and Muon, and TDLRT by both, with one schedule.

    python bench/cifar.py --data-dir DIR [--epochs 5] [--rows dense n/4 …] [--seed 0]

A residual network of half the width of the usual nine-layer one (32 to 256 channels), one thread, batch 64, all 50,000
images cropped and flipped, momentum 0.9, weight decay 5e-4, the rate up to 0.05 (Muon 0.01) in the first sixth and down
to 0 along a cosine. Accuracy on all test images after the last epoch; compression 1 − c/f of the factorised weights;
processor minutes of the steps alone, so that another program on the machine does not decide.
"""

import argparse
import math
import time

import harness
import tdlrt
import torch
from encoder import muon_and_adamw
from tdlrt import data
from tdlrt.models import Normalize
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

BATCH = 64
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
MUON = {"lr": 0.01, "weight_decay": 5e-4}


class Unflatten(nn.Module):
    """Parametrisation of a convolution's weight by its matrix, since torch's Muon takes no other parameters."""

    def __init__(self, weight):
        super().__init__()
        self.shape = weight.shape

    def forward(self, matrix):
        return matrix.view(self.shape)

    def right_inverse(self, weight):
        return weight.flatten(1)


def by_sgd(model):
    return [torch.optim.SGD(model.parameters(), **SGD)]


def by_muon(model):
    """Of the layers that `tuckerize` would replace; all else by AdamW."""
    inner = [found.layer for found in tdlrt.plan(model) if found.reason is None]
    for layer in inner:
        nn.utils.parametrize.register_parametrization(layer, "weight", Unflatten(layer.weight))
    return muon_and_adamw(model, {layer.parametrizations.weight.original for layer in inner}, **MUON)


def by_tdlrt(**options):
    return lambda model: [tdlrt.TDLRT(model, **options)]


# Where ranks start, as a fraction of every mode, and (model) -> [optimiser, …].
ROWS = {
    "dense": (None, by_sgd),
    "dense, Muon": (None, by_muon),
    "n/4, factors by SGD": (0.25, by_sgd),
    "n/4": (0.25, by_tdlrt(**SGD, tol=None)),
    "n/4, Muon": (0.25, by_tdlrt(**MUON, base="muon", tol=None)),
    "n/4, basis_every=4": (0.25, by_tdlrt(**SGD, tol=None, basis_every=4)),
    "n/2, tol=0.1": (0.5, by_tdlrt(**SGD, tol=0.1)),
    "n/2, tol=0.1, Muon": (0.5, by_tdlrt(**MUON, base="muon", tol=0.1)),
    "n/2, tol=0.05": (0.5, by_tdlrt(**SGD, tol=0.05)),
    "n/2, tol=0.1, basis_every=4": (0.5, by_tdlrt(**SGD, tol=0.1, basis_every=4)),
}


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


def convolution(inputs, features, *after):
    first = nn.Conv2d(inputs, features, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(features), nn.ReLU(), *after)


def network(images):
    return nn.Sequential(
        Normalize(images.mean, images.std),
        convolution(3, 32),
        convolution(32, 64, nn.MaxPool2d(2)),
        Residual(convolution(64, 64), convolution(64, 64)),
        convolution(64, 128, nn.MaxPool2d(2)),
        convolution(128, 256, nn.MaxPool2d(2)),
        Residual(convolution(256, 256), convolution(256, 256)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def rate(done):
    """The learning rate after this part of the training, in [0, 1]; of the largest."""
    warm = 1 / 6
    if done < warm:
        return done / warm
    return (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2


def run(row, images, epochs, seed):
    """(model, processor seconds of the steps) after the last epoch."""
    torch.manual_seed(seed)
    ranks, optimisers = row
    model = network(images) if ranks is None else tdlrt.tuckerize(network(images), ranks=ranks)
    steps = epochs * images.steps_per_epoch(BATCH)
    used, steppers = 0.0, optimisers(model)
    schedules = [LambdaLR(own, lambda step: rate((step + 1) / steps)) for own in steppers]
    for epoch in range(epochs):
        total = 0.0
        for x, y in images.batches(BATCH, seed, epoch, torch.float32):
            start = time.process_time()
            for own in steppers:
                own.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            for own in (*steppers, *schedules):
                own.step()
            used, total = used + time.process_time() - start, total + loss.item()
        saved = tdlrt.compression(model).factorised_compression
        mean = total / images.steps_per_epoch(BATCH)
        print(f"epoch {epoch + 1}: loss {mean:.3f}, compression {saved:.0%}, {used / 60:.1f} minutes", flush=True)
    return model, used


@torch.no_grad()
def accuracy(model, images):
    model.eval()
    right = [
        (model(images.pixels(x, torch.float32)).argmax(1) == y).sum()
        for x, y in zip(images.test_images.split(250), images.test_labels.split(250))
    ]
    return 100 * float(sum(right)) / len(images.test_labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the binary version of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    images = data.load("cifar10", arguments.data_dir)
    torch.set_num_threads(1)
    rows = []
    for name in arguments.rows:
        print(name, flush=True)
        model, used = run(ROWS[name], images, arguments.epochs, arguments.seed)
        rows.append(
            {
                "row": name,
                "accuracy %": f"{accuracy(model, images):.2f}",
                "compression %": f"{100 * tdlrt.compression(model).factorised_compression:.1f}",
                "processor minutes": round(used / 60, 1),
                "ranks": str([ranks[:2] for ranks in tdlrt.ranks(model).values()]),
            }
        )
        harness.print_table(rows, title=f"CIFAR-10, {arguments.epochs} epochs, seed {arguments.seed}, one thread")
    harness.save("cifar", rows)


if __name__ == "__main__":
    main()
