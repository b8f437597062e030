"""The main job: trains a network with Tucker layers by TDLRT (or densely), and can be killed at any moment.

The checkpoint is the one source of truth; `metrics.jsonl`, `summary.json` and `ranks.png` are written from it. With
several processes (see `processes.py`) each holds the whole run, and process 0 writes.
"""

import json
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import nn

import tucker_kernels
from tdlrt import checkpoint, models, plots, processes
from tdlrt.convert import plan, tuckerize
from tdlrt.optimizer import TDLRT
from tdlrt.summary import compression, ranks, tucker_layers

FILES = ("checkpoint.pt", "metrics.jsonl", "summary.json", "ranks.png")
SCHEDULES = ("cosine", "constant")
# What a Run counts: where it stands, and the sums of the running epoch.
PROGRESS = ("epoch", "batch", "seen", "loss_sum", "correct", "seconds", "epoch_seconds")


class Recipe(NamedTuple):
    """Defaults that depend on the data; `bench/mnist.py` and the tests show what they reach."""

    model: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    rank: float | int
    tol: float


RECIPES = {
    "digits": Recipe("lenet5", epochs=25, batch_size=64, lr=0.05, weight_decay=0.005, rank=20, tol=0.15),
    "mnist": Recipe("lenet5", epochs=5, batch_size=128, lr=0.05, weight_decay=0.002, rank=32, tol=0.13),
    "cifar10": Recipe("resnet18", epochs=70, batch_size=128, lr=0.05, weight_decay=0.0005, rank=0.5, tol=0.05),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run computes. `rank`: where adaptive ranks start, or what fixed ones are."""

    data: str
    data_dir: str | None = None
    model: str
    dense: bool = False
    modes: str = "channels"
    rank: float | int | None
    tol: float | None
    tolerance_mode: str = "global"
    integrator: str = "one_pass"
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float
    schedule: str = "cosine"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int


def default_config(data, **given):
    """The Config of `tdlrt train --data …` with nothing else said."""
    return Config(**{"data": data, **RECIPES[data]._asdict(), "threads": torch.get_num_threads(), **given})


class InterruptionError(Exception):
    """The run was asked to stop, and did so after a whole step, with a checkpoint."""


class DivergenceError(RuntimeError):
    """The loss or a gradient became NaN or infinite."""


class Run:
    """A training run in memory: network, optimiser, position, and what was measured so far."""

    def __init__(self, config, dataset, out, model=None):
        """`model`: a network to start from; default: a new one, as the seed has it."""
        self.config, self.out = config, Path(out)
        self.processes = processes.current()
        self.device, self.dtype = self.processes.device(torch.device(config.device)), getattr(torch, config.dtype)
        self.dataset = dataset.to(self.device)
        if dataset.batch_length(config.batch_size, self.steps_per_epoch - 1) < self.processes.size:
            raise ValueError(f"batch_size is {config.batch_size}, too small for {self.processes.size} processes")
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.model = (new_network(config, dataset) if model is None else model).to(self.device)
        self.parallel = self.processes.wrap(self.model)
        self.optimizer = make_optimizer(self.parallel, config)
        self.stop = False
        self.epoch = self.batch = self.seen = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seconds = self.epoch_seconds = 0.0
        self.metrics = []
        self.layers = [(n, tuple(m.weight_shape), m.modes) for n, m in tucker_layers(self.model).items()]
        columns = sum(len(modes) for _, _, modes in self.layers)
        self.history = torch.zeros(self.total_steps, columns, dtype=torch.int32)

    @classmethod
    def resumed(cls, contents, dataset, out, **changes):
        """Continues a stored run where it stood; `changes` are of the Config (epochs, threads, device, data_dir).

        Raises CheckpointError for contents that are no run.
        """
        with checkpoint.understood("the run in the checkpoint"):
            return cls._resumed(contents, dataset, out, changes)

    @classmethod
    def _resumed(cls, contents, dataset, out, changes):
        run = cls(replace(Config(**contents["config"]), **changes), dataset, out, checkpoint.network(contents))
        run.optimizer.load_state_dict(contents["optimizer"])
        torch.set_rng_state(contents["random"]["cpu"])
        if run.device.type == "cuda" and "cuda" in contents["random"]:
            torch.cuda.set_rng_state(contents["random"]["cuda"], run.device)
        for name in PROGRESS:
            value = contents["progress"][name]
            setattr(run, name, value.to(run.device) if isinstance(value, torch.Tensor) else value)
        run.metrics = list(contents["metrics"])
        run.history[: run.steps] = contents["history"]
        return run

    # ---- position ------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self):
        return self.dataset.steps_per_epoch(self.config.batch_size)

    @property
    def steps(self):
        """Steps made so far."""
        return self.epoch * self.steps_per_epoch + self.batch

    @property
    def total_steps(self):
        return max(self.config.epochs, self.epoch) * self.steps_per_epoch

    @property
    def finished(self):
        return self.epoch >= self.config.epochs

    def learning_rate(self):
        """A function of the position alone."""
        if self.config.schedule == "constant":
            return self.config.lr
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * self.steps / self.total_steps))

    # ---- training ------------------------------------------------------------------------------------------

    def train(self, display, checkpoint_every=None):
        """Trains to the last epoch; a checkpoint after each, and after every so many steps.

        Raises InterruptionError (after a checkpoint) when `stop` was set, and DivergenceError.
        """
        self.save()
        self.write_metrics()
        while not self.finished:
            self._epoch(display, checkpoint_every)
            self.save()
            self.write_metrics()
            display.epoch(self)
        self.write_results()

    def _epoch(self, display, checkpoint_every):
        self.model.train()
        mark = time.perf_counter()
        config = self.config
        share = {"rank": self.processes.rank, "processes": self.processes.size}
        where = (config.seed, self.epoch, self.dtype, self.batch)
        for pixels, labels in self.dataset.batches(config.batch_size, *where, **share):
            self._step(pixels, labels)
            mark, elapsed = time.perf_counter(), time.perf_counter() - mark
            self.seconds += elapsed
            self.epoch_seconds += elapsed
            display.step(self)
            if self.stop or (checkpoint_every and self.steps % checkpoint_every == 0):
                self.save()
                mark = time.perf_counter()
            if self.stop:
                raise InterruptionError
        loss, accuracy = self.evaluate()
        self.metrics.append(self._line(loss, accuracy, self.epoch_seconds + time.perf_counter() - mark))
        self.epoch, self.batch, self.seen, self.epoch_seconds = self.epoch + 1, 0, 0, 0.0
        self.loss_sum.zero_()
        self.correct.zero_()

    def _step(self, pixels, labels):
        outputs = []
        total = self.dataset.batch_length(self.config.batch_size, self.batch)
        # Processes average their gradients; so weighted, that is the gradient of the mean over the whole batch.
        weight = len(labels) * self.processes.size / total

        def closure():
            self.optimizer.zero_grad()
            logits = self.parallel(pixels)
            loss = nn.functional.cross_entropy(logits, labels)
            (loss * weight).backward()
            outputs.append((loss.detach(), logits.detach()))
            return loss

        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        try:
            # Every optimiser takes a closure; two_pass calls it twice, and the first call counts.
            self.optimizer.step(closure)
        except FloatingPointError as error:
            raise DivergenceError(f"{error} (step {self.steps + 1})") from error
        loss, logits = outputs[0]
        correct = (logits.argmax(1) == labels).sum().double()
        own = torch.stack([loss.double() * len(labels), correct, torch.full_like(self.loss_sum, self.stop)])
        loss, correct, stop = self.processes.total(own)
        self.loss_sum += loss
        self.correct += correct.to(torch.int64)
        self.stop = self.stop or self._asked_elsewhere(stop)
        self.seen += total
        layers = tucker_layers(self.model).values()
        row = [layer.ranks[mode] for layer in layers for mode in layer.modes]
        self.history[self.steps] = torch.tensor(row, dtype=torch.int32)
        self.batch += 1

    def _asked_elsewhere(self, stop):
        """Whether any process was asked to stop: all stop after the same step."""
        return self.processes.size > 1 and bool(stop)

    def evaluate(self):
        self.processes.take_buffers(self.model)
        return evaluate(self.model, self.dataset, self.dtype)

    # ---- what is written -----------------------------------------------------------------------------------

    def running(self):
        """Mean train loss and accuracy of the epoch so far."""
        return float(self.loss_sum) / max(self.seen, 1), int(self.correct) / max(self.seen, 1)

    def sizes(self):
        """Compression of the factorised weights and of the whole network; both 0 for a dense one."""
        size = compression(self.model)
        return {
            "compression": size.factorised_compression,
            "network_compression": size.compression,
            "parameters": size.parameters,
        }

    def _line(self, test_loss, test_accuracy, seconds):
        loss, accuracy = self.running()
        return {
            "epoch": self.epoch + 1,
            "step": self.steps,
            "loss": loss,
            "train_accuracy": accuracy,
            "test_loss": test_loss,
            "accuracy": test_accuracy,
            **self.sizes(),
            "ranks": {name: list(r) for name, r in ranks(self.model).items()},
            "seconds": seconds,
        }

    def contents(self):
        """The run as a checkpoint holds it."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        data = self.dataset
        return {
            "config": asdict(self.config),
            "network": {
                "name": self.config.model,
                "image_shape": list(data.image_shape),
                "classes": data.classes,
                "mean": data.mean,
                "std": data.std,
            },
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random,
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "metrics": self.metrics,
            "history": self.history[: self.steps].clone(),
        }

    def save(self):
        """Writes checkpoint.pt, unless what it would hold is no longer finite."""
        if not math.isfinite(float(self.loss_sum)):
            raise DivergenceError(f"the loss is no longer finite (step {self.steps})")
        self.processes.take_buffers(self.model)
        if self.processes.rank == 0:
            checkpoint.save(self.out / "checkpoint.pt", self.contents())

    def write_metrics(self):
        if self.processes.rank == 0:
            checkpoint.write_text(self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.metrics))

    def summary(self):
        last = self.metrics[-1] if self.metrics else self._line(*self.evaluate(), 0.0)
        return {
            "test_accuracy": last["accuracy"],
            # 1 − c/f of the Tucker weights, the figure of the literature; and of every parameter of the network.
            "compression": last["compression"],
            "network_compression": last["network_compression"],
            "parameters": last["parameters"],
            "ranks": last["ranks"],
            "seconds_per_step": self.seconds / max(self.steps, 1),
            "seconds": sum(line["seconds"] for line in self.metrics),
            "steps": self.steps,
            "seed": self.config.seed,
            "config": asdict(self.config),
            "versions": versions(),
        }

    def write_results(self):
        """metrics.jsonl, summary.json and, where there are ranks, ranks.png."""
        self.write_metrics()
        summary = self.summary()  # of all processes: it may evaluate
        if self.processes.rank > 0:
            return
        checkpoint.write_json(self.out / "summary.json", summary)
        if self.layers and self.steps:
            title = f"{self.config.model} on {self.config.data}: {100 * summary['test_accuracy']:.1f} % test accuracy, "
            title += f"{100 * summary['compression']:.1f} % compression"
            history = self.history[: self.steps]
            plots.draw_ranks(self.out / "ranks.png", self.steps, self.layers, history, self.metrics, title)


def compress(contents, dataset, out, tol, rank, modes, epochs=None):
    """Factorises the dense network of a checkpoint into a new run at `out`, whose ranks stay as they are.

    Returns the run, of which nothing is written yet; the test accuracy before; and the names of the layers that would
    not become smaller at `tol` and so stayed dense. Raises ValueError when that is every one.
    """
    config = Config(**contents["config"])
    model = checkpoint.network(contents)
    dtype = getattr(torch, config.dtype)
    before = evaluate(model, dataset, dtype)[1]
    eligible = [d for d in plan(model) if d.reason is None]
    tuckerize(model, ranks=rank, tol=tol, modes=modes)
    kept = [d.name for d in eligible if model.get_submodule(d.name) is d.layer]
    if len(kept) == len(eligible):
        raise ValueError(
            f"tol is {tol}, at which no Tucker form is smaller than its weight; take a larger one, or ranks"
        )
    changes = {"dense": False, "rank": rank, "tol": None, "modes": modes, "epochs": epochs or config.epochs}
    run = Run(replace(config, **changes), dataset, out, model)
    return run, before, kept


def new_network(config, dataset):
    model = models.build(config.model, dataset.image_shape, dataset.classes, dataset.mean, dataset.std)
    model = model.to(getattr(torch, config.dtype))
    if not config.dense:
        tuckerize(model, ranks=config.rank, modes=config.modes)
        for layer in tucker_layers(model).values():
            # Random bases and a Gaussian core, whose singular values fall off to zero, have ranks that can shrink.
            layer.reset_parameters()
    return model


def make_optimizer(model, config):
    options = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    if config.dense:
        return torch.optim.SGD(model.parameters(), **options)
    integration = {"integrator": config.integrator, "tolerance_mode": config.tolerance_mode}
    return TDLRT(model, tol=config.tol, **integration, **options)


@torch.no_grad()
def evaluate(model, dataset, dtype, batch_size=1000):
    """Mean loss and accuracy of a network on the test images."""
    training = model.training
    model.eval()
    among = processes.current()
    own = slice(among.rank, None, among.size)
    sums = torch.zeros(2, dtype=torch.float64, device=dataset.test_images.device)
    for images, labels in zip(dataset.test_images[own].split(batch_size), dataset.test_labels[own].split(batch_size)):
        logits = model(dataset.pixels(images, dtype))
        sums[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    model.train(training)
    loss, correct = among.total(sums).tolist()
    return loss / len(dataset.test_labels), correct / len(dataset.test_labels)


def versions():
    return {
        "tucker-kernels": tucker_kernels.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
