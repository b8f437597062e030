"""What the `tdlrt` command shows: progress, the summary of a run, the table of a network."""

import math
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tdlrt.summary import compression, layer_multiply_adds, layer_parameters, tucker_layers

_EVERY = 0.1  # seconds between two looks at the running loss, each of which waits for the device


class Quiet:
    """Shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def step(self, run):
        pass

    def epoch(self, run):
        pass


class Bar(Quiet):
    """A progress bar over all steps with loss, accuracy and compression, and a line for every epoch above it."""

    def __init__(self, run, console):
        self.console, self.shown = console, 0.0
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]}[/]"),
            TextColumn("accuracy [bold]{task.fields[accuracy]}[/]"),
            TextColumn("compression [bold]{task.fields[compression]}[/]"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        unknown = {"epoch": _epoch(run), "loss": "–", "accuracy": "–", "compression": "–"}
        self.task = self.progress.add_task("train", total=run.total_steps, completed=run.steps, **unknown)

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *error):
        self.progress.stop()

    def step(self, run):
        if time.monotonic() - self.shown < _EVERY:
            return
        self.shown = time.monotonic()
        loss, accuracy = run.running()
        self.progress.update(
            self.task,
            completed=run.steps,
            epoch=_epoch(run),
            loss=f"{loss:.4f}",
            accuracy=percent(accuracy),
            compression=percent(run.sizes()["compression"]),
        )

    def epoch(self, run):
        line = run.metrics[-1]
        self.progress.update(self.task, completed=run.steps)
        self.console.print(
            f"epoch {line['epoch']:>3}  loss {line['loss']:.4f}  test accuracy [bold]{percent(line['accuracy'])}[/]  "
            f"compression [bold]{percent(line['compression'])}[/]  {line['seconds']:.1f} s",
            highlight=False,
        )


def _epoch(run):
    return f"{min(run.epoch + 1, run.config.epochs)}/{run.config.epochs}"


def percent(fraction):
    return f"{100 * fraction:.2f} %"


def describe(model):
    """The layers of a network with Tucker weights and its totals, as plain numbers: what `tdlrt info --json` prints."""
    layers = []
    for name, layer in tucker_layers(model).items():
        parameters, dense = layer_parameters(layer), math.prod(layer.weight_shape)
        layers.append(
            {
                "name": name,
                "shape": list(layer.weight_shape),
                "ranks": [layer.ranks[mode] for mode in layer.modes],
                "modes": list(layer.modes),
                "parameters": parameters,
                "dense_parameters": dense,
                "compression": 1 - parameters / dense,
                "multiply_adds": layer_multiply_adds(layer),
            }
        )
    size = compression(model)
    return {
        "layers": layers,
        "factorised_parameters": size.factorised_parameters,
        "factorised_dense_parameters": size.factorised_dense_parameters,
        "compression": size.factorised_compression,
        "parameters": size.parameters,
        "dense_parameters": size.dense_parameters,
        "network_compression": size.compression,
    }


def layer_table(description, title):
    """`describe(model)` as a table."""
    table = Table(title=title, title_style="bold", title_justify="left")
    table.add_column("layer")
    table.add_column("weight")
    table.add_column("ranks", style="bold")
    for name in ("parameters", "dense", "compression"):
        table.add_column(name, justify="right")
    for row in description["layers"]:
        _add(table, row["name"], row, "parameters", "dense_parameters", row["shape"], row["ranks"])
    table.add_section()
    if description["layers"]:
        _add(table, "factorised weights", description, "factorised_parameters", "factorised_dense_parameters")
    _add(table, "whole network", description, "parameters", "dense_parameters")
    return table


def _add(table, name, numbers, parameters, dense, shape=(), ranks=()):
    now, before = numbers[parameters], numbers[dense]
    table.add_row(name, _by(shape), _by(ranks), f"{now:,}", f"{before:,}", percent(1 - now / before))


def _by(sizes):
    return "×".join(map(str, sizes))
