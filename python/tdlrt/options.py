"""Options of the `tdlrt` command: how their texts are read, and what is said of a wrong one."""

import math
from pathlib import Path

import torch
import typer

from tdlrt.train import RECIPES

WHAT, RANKS, STEPS, RUN = "Data and network", "Ranks", "Training", "Run"


def option(help, panel, parser=None, metavar=None, name=None, default=None, by_data=None):
    """A typer option.

    default: what the help says of a default that is no constant; by_data: the field of `Recipe` that it is.
    """
    if by_data is not None:
        default = ", ".join(f"{data} {getattr(recipe, by_data)}" for data, recipe in RECIPES.items())
    if default is not None:
        help += f" [dim]\\[default: {default}][/dim]"
    own = {} if parser is None else {"parser": parser, "metavar": metavar or parser.metavar}
    if parser is None and metavar is not None:
        own["metavar"] = metavar
    names = [] if name is None else [name]
    if parser is None and metavar is None:
        own["metavar"] = ""  # a switch
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default is None, **own)


def parser(metavar):
    """Gives a function from text to value the name of its value in the help."""

    def mark(function):
        function.metavar = metavar
        return function

    return mark


def refuse(text, allowed):
    raise typer.BadParameter(f"{text!r} is not allowed; allowed are {allowed}.")


@parser("DIR")
def folder(text):
    """A folder; an empty text, as an unset variable leaves it, would be the current one."""
    return Path(text) if text.strip() else refuse(text, "names of folders; the current one is .")


def one_of(names):
    @parser("|".join(names))
    def read(text):
        return text if text in names else refuse(text, ", ".join(names))

    return read


def at_least(least, most=2**31 - 1):
    """An integer; `most` is what torch can take."""

    @parser("INTEGER")
    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        return value if least <= value <= most else refuse(text, f"integers from {least} on, to {most}")

    return read


def _number(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


@parser("NUMBER")
def positive(text):
    value = _number(text)
    return value if 0 < value < math.inf else refuse(text, "numbers above 0")


@parser("NUMBER")
def not_negative(text):
    value = _number(text)
    return value if 0 <= value < math.inf else refuse(text, "numbers from 0 on")


@parser("NUMBER")
def below_one(text):
    value = _number(text)
    return value if 0 <= value < 1 else refuse(text, "numbers from 0 to below 1")


@parser("NUMBER|none")
def tolerance(text):
    if text == "none":
        return None
    value = _number(text)
    return value if 0 <= value < 1 else refuse(text, "none (ranks stay fixed) and numbers from 0 to below 1")


@parser("INTEGER|FRACTION|full")
def rank(text):
    if text == "full":
        return None
    value = _number(text)
    if 1 <= value < math.inf and value == int(value) and "." not in text:
        return int(value)
    return value if 0 < value < 1 else refuse(text, "full, fractions between 0 and 1, and integers from 1 on")


@parser("cpu|cuda|cuda:N")
def device(text):
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        refuse(text, "cpu, cuda and cuda:N")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise typer.BadParameter(f"{text!r} is not there; torch sees {count} CUDA devices.")
    return text
