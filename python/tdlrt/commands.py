"""The commands of `tdlrt` and what they print. Their options are read in `options.py`, the work is in `train.py`."""

import contextlib
import importlib.util
import json
import shlex
import signal
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import tucker_kernels
from tdlrt import checkpoint, display, export, models, options, processes, train
from tdlrt import data as datasets
from tdlrt.arguments import CHOICES
from tdlrt.integrators import INTEGRATORS
from tdlrt.layers import MODES
from tdlrt.options import RANKS, RUN, STEPS, WHAT, at_least, one_of, option
from tdlrt.train import Config

# Reported as one sentence, with exit status 1.
FAILURES = (
    *(datasets.DataError, checkpoint.CheckpointError, train.DivergenceError, export.ExportError),
    processes.ProcessError,
)
INTERRUPTED = 130

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
console = Console()

CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint of `tdlrt train`, or its folder.", metavar="CHECKPOINT", show_default=False)
]
DataDirOption = Annotated[
    Path | None, option("Folder with the files of mnist or cifar10.", WHAT, metavar="DIR", default="none")
]
ModesOption = Annotated[
    str,
    option("Modes of a convolution that get a factor: the channels, or all (the window too).", RANKS, one_of(MODES)),
]
OverwriteOption = Annotated[bool, option("Replace what is there.", RUN, name="--overwrite")]
VersionOption = Annotated[bool, option("Print the version and exit.", None, name="--version")]


@app.callback(invoke_without_command=True)
def tdlrt(context: typer.Context, version: VersionOption = False):
    """Train networks whose weights are in Tucker form by rank-adaptive, geometry-aware steps (TDLRT)."""
    if version:
        typer.echo(tucker_kernels.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


# ---- train -----------------------------------------------------------------------------------------------


@app.command("train")
def train_command(
    context: typer.Context,
    data: Annotated[str, option("Images; digits needs no files.", WHAT, one_of(datasets.NAMES))] = "digits",
    data_dir: DataDirOption = None,
    model: Annotated[str | None, option("Network.", WHAT, one_of(models.NAMES), by_data="model")] = None,
    dense: Annotated[bool, option("Train the ordinary network by SGD, for comparison.", WHAT, name="--dense")] = False,
    tol: Annotated[
        float | None,
        option(
            "Relative error a step may make by cutting ranks, or none for fixed ranks.",
            *(RANKS, options.tolerance),
            by_data="tol",
        ),
    ] = None,
    rank: Annotated[
        float | None,
        option(
            "Largest rank at the start: an integer, a fraction of each mode's size, or full.",
            *(RANKS, options.rank),
            by_data="rank",
        ),
    ] = None,
    modes: ModesOption = Config.modes,
    tolerance_mode: Annotated[
        str,
        option("Whether --tol bounds the error of a weight or of each mode.", RANKS, one_of(CHOICES["tolerance_mode"])),
    ] = Config.tolerance_mode,
    integrator: Annotated[
        str, option("How a step finds bases and core; see tdlrt.TDLRT.", RANKS, one_of(tuple(INTEGRATORS)))
    ] = Config.integrator,
    epochs: Annotated[int | None, option("Passes over the data.", STEPS, at_least(1), by_data="epochs")] = None,
    batch_size: Annotated[
        int | None, option("Images per step, over all processes.", STEPS, at_least(1), by_data="batch_size")
    ] = None,
    lr: Annotated[float | None, option("Learning rate.", STEPS, options.positive, by_data="lr")] = None,
    schedule: Annotated[str, option("Of the learning rate.", STEPS, one_of(train.SCHEDULES))] = Config.schedule,
    momentum: Annotated[float, option("Of SGD.", STEPS, options.below_one)] = Config.momentum,
    weight_decay: Annotated[
        float | None, option("Of SGD.", STEPS, options.not_negative, by_data="weight_decay")
    ] = None,
    seed: Annotated[
        int, option("Of first weights, order of the data and augmentation.", STEPS, at_least(0, 2**63 - 1))
    ] = Config.seed,
    device: Annotated[str, option("Where to compute.", RUN, options.device)] = Config.device,
    dtype: Annotated[str, option("Of all weights.", RUN, one_of(("float32", "float64")))] = Config.dtype,
    threads: Annotated[int | None, option("CPU threads.", RUN, at_least(1), default="torch's choice")] = None,
    out: Annotated[
        Path | None, option("Folder for everything that is written.", RUN, options.folder, default="runs/DATA")
    ] = None,
    checkpoint_every: Annotated[
        int | None, option("Also write a checkpoint every so many steps.", RUN, at_least(1), default="never")
    ] = None,
    resume: Annotated[
        bool, option("Continue the run in --out bit for bit; --epochs may be more than before.", RUN, name="--resume")
    ] = False,
    overwrite: OverwriteOption = False,
    quiet: Annotated[bool, option("Print nothing but errors.", RUN, name="--quiet")] = False,
):
    """Train a network with Tucker weights by TDLRT.

    Writes into --out: checkpoint.pt, metrics.jsonl (a line per epoch), summary.json and ranks.png.

    With several processes: torchrun --nproc-per-node=2 -m tdlrt train … Each takes its part of every batch.
    """
    given = {name: _plain(value) for name, value in context.params.items() if _was_given(context, name)}
    out = out or Path("runs") / data
    if resume and overwrite:
        raise typer.BadParameter("cannot be combined with --resume.", param_hint="--overwrite")
    if not dense and importlib.util.find_spec("matplotlib") is None:
        raise checkpoint.CheckpointError(
            "the picture of the ranks needs matplotlib, which is not installed: pip install 'tucker-kernels[train]'"
        )
    first = processes.rank() == 0
    with processes.joined(device), checkpoint.hold(out) if first else contextlib.nullcontext():
        if resume:
            run = _resumed(given, out)
        else:
            config = _config(given, data)
            dataset = _load(config.data, config.data_dir)
            found = _found(out, overwrite) if first else []
            run = _checked(train.Run, config, dataset, out)
            _delete(found)
        return _train(run, quiet or not first, checkpoint_every)


def _stored(file):
    """The contents of a checkpoint, of which all that the commands read is there."""
    contents = checkpoint.load(file)
    with checkpoint.understood(file):
        Config(**contents["config"])
        contents["progress"]["epoch"]
        [(line["accuracy"], line["seconds"]) for line in contents["metrics"]]
    return contents


def _plain(value):
    return str(value.resolve()) if isinstance(value, Path) else value


def _was_given(context, name):
    return context.get_parameter_source(name).name == "COMMANDLINE"


def _config(given, data):
    own = {field.name for field in fields(Config)}
    return train.default_config(data, **{name: value for name, value in given.items() if name in own - {"data"}})


def _load(name, folder):
    if folder is None and name != "digits":
        raise typer.BadParameter(f"it must name the folder that {name} is in.", param_hint="--data-dir")
    return datasets.load(name, folder)


def _checked(make, *arguments):
    """Errors that name an argument of the library are errors of the option of that name."""
    try:
        return make(*arguments)
    except ValueError as error:
        if _option_of(str(error))[2:].replace("-", "_") not in {field.name for field in fields(Config)}:
            raise  # no option's fault
        raise typer.BadParameter(f"{error}.", param_hint=_option_of(str(error))) from error


def _option_of(message):
    return "--" + message.split(maxsplit=1)[0].replace("_", "-")


def _found(out, overwrite):
    """The files of a run that is in this folder; they are deleted once nothing can be refused any more."""
    found = [out / name for name in train.FILES if (out / name).exists()]
    if found and not overwrite:
        raise typer.BadParameter(
            f"{out} holds a run; continue it with --resume, replace it with --overwrite, or name another folder.",
            param_hint="--out",
        )
    return found


def _delete(files):
    for file in files:
        file.unlink()


# What may differ when a run is continued.
_CHANGEABLE = ("epochs", "threads", "device", "data_dir")


def _resumed(given, out):
    contents = _stored(out / "checkpoint.pt")
    stored = contents["config"]
    for name, value in given.items():
        if name in stored and name not in _CHANGEABLE and value != stored[name]:
            raise typer.BadParameter(
                f"{value} is not what this run was started with, {stored[name]}; with --resume leave it out.",
                param_hint="--" + name.replace("_", "-"),
            )
    changes = {name: given[name] for name in _CHANGEABLE if name in given}
    if changes.get("epochs", stored["epochs"]) < contents["progress"]["epoch"]:
        raise typer.BadParameter(
            f"{changes['epochs']} is less than the {contents['progress']['epoch']} epochs already made.",
            param_hint="--epochs",
        )
    dataset = _load(stored["data"], changes.get("data_dir", stored["data_dir"]))
    return train.Run.resumed(contents, dataset, out, **changes)


def _train(run, quiet, checkpoint_every):
    where = shlex.quote(str(run.out))
    if run.finished and not quiet:
        console.print(f"All {run.config.epochs} epochs were made; --epochs takes more.", highlight=False)
    try:
        with stopping(run), display.Quiet() if quiet else display.Bar(run, console) as shown:
            run.train(shown, checkpoint_every)
    except (train.InterruptionError, KeyboardInterrupt) as error:
        done = "after a whole step; everything is saved" if isinstance(error, train.InterruptionError) else "at once"
        if run.processes.rank == 0:
            typer.echo(f"tdlrt: stopped {done}; continue with: tdlrt train --resume --out {where}", err=True)
        return INTERRUPTED
    except train.DivergenceError as error:
        advice = "try a smaller --lr; the last checkpoint is kept"
        raise train.DivergenceError(f"the training diverged: {error}; {advice}") from error
    if not quiet:
        _report(run)
    return 0


@contextlib.contextmanager
def stopping(run):
    """The first Ctrl-C (or SIGTERM) lets the step end and a checkpoint be written; the second stops at once.

    torchrun passes a Ctrl-C on that its processes have got already, so with several of them further ones do nothing.
    """

    def ask(number, frame):
        run.stop = True
        if run.processes.size == 1:
            signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(run):
    summary = run.summary()
    if run.layers:
        console.print(display.layer_table(display.describe(run.model), title=None))
    sizes = (
        f"compression [bold]{display.percent(summary['compression'])}[/] of the factorised weights, "
        f"{display.percent(summary['network_compression'])} of the network  "
    )
    console.print(
        f"test accuracy [bold]{display.percent(summary['test_accuracy'])}[/]  {sizes if run.layers else ''}"
        f"{1000 * summary['seconds_per_step']:.1f} ms per step",
        highlight=False,
    )
    for name in train.FILES:
        if (run.out / name).exists():
            console.print(f"  {run.out / name}", highlight=False, soft_wrap=True)


# ---- compress, info, export -----------------------------------------------------------------------------


@app.command()
def compress(
    context: typer.Context,
    file: CheckpointArgument,
    out: Annotated[Path, option("Folder for the new run.", RUN, options.folder)],
    tol: Annotated[
        float | None, option("Relative error of each weight.", RANKS, options.below_one, default=0.3)
    ] = None,
    rank: Annotated[
        float | None,
        option(
            "Instead of --tol: an integer, a fraction of each mode's size, or full.",
            RANKS,
            options.rank,
            default="none",
        ),
    ] = None,
    modes: ModesOption = "channels",
    epochs: Annotated[
        int | None, option("For a later `tdlrt train --resume`.", RUN, at_least(1), default="as before")
    ] = None,
    data_dir: DataDirOption = None,
    overwrite: OverwriteOption = False,
):
    """Factorise a network trained with --dense, and measure it before and after.

    Layers whose Tucker form would be no smaller at --tol stay dense. Writes a run into --out; `tdlrt train --resume`
    fine-tunes it at the ranks found.
    """
    by_rank = _was_given(context, "rank")  # which is None for "full"
    if tol is not None and by_rank:
        raise typer.BadParameter("cannot be combined with --tol.", param_hint="--rank")
    contents = _stored(file)
    config = contents["config"]
    if not config["dense"]:
        raise checkpoint.CheckpointError(f"{file} is factorised already; compress takes a run of `tdlrt train --dense`")
    dataset = _load(config["data"], _plain(data_dir) or config["data_dir"])
    with checkpoint.hold(out):
        found = _found(out, overwrite)
        if tol is None and not by_rank:
            tol = 0.3
        run, before, kept = _checked(train.compress, contents, dataset, out, tol, rank, modes, epochs)
        _delete(found)
        run.save()
        run.write_results()
        after = run.summary()["test_accuracy"]
    console.print(display.layer_table(display.describe(run.model), title=None))
    if kept:
        console.print(f"Left dense, because they would not become smaller: {', '.join(kept)}.", highlight=False)
    if run.sizes()["compression"] < 0:
        console.print("It became larger than the dense network: take a smaller --rank.", style="bold", highlight=False)
    console.print(
        f"test accuracy {display.percent(before)} before, [bold]{display.percent(after)}[/] after\n"
        f"Fine-tune with: tdlrt train --resume --out {shlex.quote(str(out))}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def info(
    file: CheckpointArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", metavar="")] = False,
):
    """Print layers, shapes, ranks, parameters and compression of a checkpoint."""
    contents = _stored(file)
    config, progress, metrics = contents["config"], contents["progress"], contents["metrics"]
    description = display.describe(checkpoint.network(contents))
    accuracy = metrics[-1]["accuracy"] if metrics else None
    if as_json:
        about = {"epoch": progress["epoch"], "test_accuracy": accuracy, "config": config}
        typer.echo(json.dumps({**description, **about}, indent=2))
        return
    title = f"{config['model']} on {config['data']}, {'dense, ' * config['dense']}epoch {progress['epoch']} of "
    title += f"{config['epochs']}" + (f", test accuracy {display.percent(accuracy)}" if metrics else "")
    console.print(display.layer_table(description, title))


@app.command("export")
def export_command(
    file: CheckpointArgument,
    out: Annotated[
        Path | None, option("File to write.", RUN, metavar="FILE", default="model.pt2 beside the checkpoint")
    ] = None,
    overwrite: OverwriteOption = False,
):
    """Write a network as plain convolutions and linear layers that run anywhere torch runs, without tdlrt.

    Load it with `torch.export.load("model.pt2").module()`; it takes pixels in \\[0, 1].
    """
    contents = _stored(file)
    folder = file if file.is_dir() else file.parent
    out = out or folder / "model.pt2"
    if out.exists() and not overwrite:
        raise typer.BadParameter(f"{out} exists; replace it with --overwrite.", param_hint="--out")
    difference = export.export(contents, out)
    console.print(f"{out}: outputs agree to {difference:.1e}", highlight=False, soft_wrap=True)
