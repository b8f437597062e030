"""The first minutes of a ResNet18 of half the width on CIFAR-10: dense SGD and TDLRT for the same processor time.

    python bench/cifar.py --data-dir DIR [--seconds 130] [--rows dense n/4 …]

One thread, batch 64, the first 20,000 images cropped and flipped, momentum 0.9, weight decay 5e-4, a cosine from 0.05
to 0 over the given time; accuracy on all test images, compression 1 − c/f of the factorised weights. It is
processor time, so that another program on the machine does not decide, without the evaluation.
"""

import argparse
import math
import time
from dataclasses import replace
from itertools import pairwise

import harness
import tdlrt
import torch
from tdlrt import data
from tdlrt.models import BasicBlock, Normalize
from torch import nn

LR, SHARED = 0.05, {"momentum": 0.9, "weight_decay": 5e-4}
# Rank, whether the head stays dense, and what TDLRT is told.
ROWS = {
    "dense": None,
    "n/4, head dense": (0.25, True, {"tol": None}),
    "n/4, head dense, basis_every=4": (0.25, True, {"tol": None, "basis_every": 4}),
    "n/4": (0.25, False, {"tol": None}),
    "n/4, basis_every=4": (0.25, False, {"tol": None, "basis_every": 4}),
    "n/2, tol=0.1": (0.5, False, {"tol": 0.1}),
    "n/2, tol=0.05": (0.5, False, {"tol": 0.05}),
    "n/2, tol=0.03": (0.5, False, {"tol": 0.03}),
    "n/2, tol=0.1, basis_every=4": (0.5, False, {"tol": 0.1, "basis_every": 4}),
    "n/2, head dense, tol=0.1, basis_every=4": (0.5, True, {"tol": 0.1, "basis_every": 4}),
}


def network(images):
    sizes = [32, 32, 64, 128, 256]
    blocks = [
        BasicBlock(n_in if first else n_out, n_out, 2 if first and n_in != n_out else 1)
        for n_in, n_out in pairwise(sizes)
        for first in (True, False)
    ]
    stem = [
        Normalize(images.mean, images.std),
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
    ]
    body = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(body, nn.Linear(256, 10))


def run(row, images, seconds):
    torch.manual_seed(0)
    model = network(images)
    if row is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, **SHARED)
    else:
        ranks, dense_head, options = row
        model = tdlrt.tuckerize(model, ranks=ranks, min_features=16 if dense_head else 8)
        optimizer = tdlrt.TDLRT(model, lr=LR, **SHARED, **options)
    used = steps = epoch = 0
    while used < seconds:
        for x, y in images.batches(64, 0, epoch, torch.float32):
            start = time.process_time()
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 + math.cos(math.pi * min(1, used / seconds))) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            used, steps = used + time.process_time() - start, steps + 1
            if used >= seconds:
                break
        epoch += 1
    return model, steps


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
    parser.add_argument("--seconds", type=float, default=130)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    whole = data.load("cifar10", arguments.data_dir)
    images = replace(whole, train_images=whole.train_images[:20000], train_labels=whole.train_labels[:20000])
    torch.set_num_threads(1)
    rows = []
    for name in arguments.rows:
        model, steps = run(ROWS[name], images, arguments.seconds)
        found = tdlrt.compression(model)
        rows.append(
            {
                "row": name,
                "steps": steps,
                "accuracy %": f"{accuracy(model, images):.1f}",
                "compression %": f"{100 * found.factorised_compression:.0f}",
                "last ranks": str(list(tdlrt.ranks(model).values())[-2:]),
            }
        )
    harness.print_table(rows, title=f"CIFAR-10, ResNet18 of half the width, {arguments.seconds:g} s each, one thread")
    harness.save("cifar", rows)


if __name__ == "__main__":
    main()
