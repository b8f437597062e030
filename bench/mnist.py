"""LeNet5 on MNIST in five epochs: test accuracy and compression of TDLRT and of the dense network, mean of the seeds.

    python bench/mnist.py --data-dir DIR [--seeds 0 1 2] [--settings adaptive fixed dense] [--threads 1]

Each run is a run of `tdlrt train` in its own folder under --out: one that is finished is read, one that was stopped is
continued. Accuracy is after the last epoch, not the best one; compression is 1 − c/f of the factorised weights
(conv2 and fc1; conv1 and fc2, 1.3 % of the weights, stay dense) and of the whole network.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import harness
from tdlrt import checkpoint, data, train
from tdlrt.display import Quiet

SETTINGS = {
    "adaptive": {},  # the defaults of `tdlrt train --data mnist`
    "fixed": {"tol": None, "rank": 48, "batch_size": 64, "weight_decay": 0.0005},
    "dense": {"dense": True, "weight_decay": 0.0005},
}

SHOWN = ("tol", "rank", "weight_decay", "lr")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with the four .gz files of MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.settings:
        runs = [run(name, seed, arguments) for seed in arguments.seeds]
        accuracy = [100 * r["test_accuracy"] for r in runs]
        config = asdict(train.default_config("mnist", **SETTINGS[name]))
        rows.append(
            {
                "setting": name,
                **{key: None if config["dense"] and key in ("tol", "rank") else config[key] for key in SHOWN},
                "accuracy %": _mean(runs, "test_accuracy"),
                "each seed": " ".join(f"{a:.2f}" for a in accuracy),
                "compression %": _mean(runs, "compression"),
                "network %": _mean(runs, "network_compression"),
                "ranks, first seed": " ".join(f"{n} {'×'.join(map(str, r[:2]))}" for n, r in runs[0]["ranks"].items()),
            }
        )
    harness.print_table(rows, title=f"MNIST, LeNet5, {arguments.epochs} epochs, seeds {arguments.seeds}")
    harness.save("mnist", rows)


def _mean(runs, key):
    return f"{statistics.mean(100 * r[key] for r in runs):.2f}"


def run(name, seed, arguments):
    """The summary of one run, made now unless it is there."""
    out = arguments.out / f"{name}-{seed}"
    if (out / "summary.json").exists():
        return json.loads((out / "summary.json").read_text())
    with checkpoint.hold(out):
        dataset = data.load("mnist", arguments.data_dir)
        if (out / "checkpoint.pt").exists():
            training = train.Run.resumed(checkpoint.load(out), dataset, out)
        else:
            own = {"data_dir": arguments.data_dir, "epochs": arguments.epochs, "threads": arguments.threads}
            config = train.default_config("mnist", seed=seed, **SETTINGS[name], **own)
            training = train.Run(config, dataset, out)
        training.train(Quiet())
    print(name, seed, json.dumps(training.summary()["test_accuracy"]), flush=True)
    return training.summary()


if __name__ == "__main__":
    main()
