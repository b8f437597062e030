"""The picture of a run: the rank of every layer and mode over the steps, with the test accuracy."""

import math

from tdlrt.checkpoint import write_atomically

# Colours by mode (output channels, input channels, window …), told apart in print and by colour-blind readers.
_COLOURS = ("#0b6aa8", "#d1600a", "#2f8f5b", "#8a5aa8", "#6b6b6b")
_INK, _FAINT = "#2b2b2b", "#9a9a9a"


def draw_ranks(path, steps, layers, history, metrics, title):
    """Writes ranks.png, one panel per layer.

    Args:
        steps: how many steps were made.
        layers: [(name, shape of the weight, factorised modes)], in the order of the columns of `history`.
        history: (steps, factorised modes of all layers) integer tensor.
        metrics: one dict per epoch with `step` and `accuracy`.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    columns = min(len(layers), 3 if len(layers) <= 9 else 4 if len(layers) <= 16 else 5)
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(1.2 + 3.3 * columns, 1.2 + 2.45 * rows), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    used, start = set(), 0
    for index, (name, shape, modes) in enumerate(layers):
        axis = axes[index // columns][index % columns]
        ranks = history[:, start : start + len(modes)]
        start += len(modes)
        used.update(modes)
        _panel(axis, name, shape, modes, ranks)
        twin = _accuracy(axis, metrics)
        twin.tick_params(labelright=index % columns == columns - 1 or index == len(layers) - 1)
        lowest = index + columns >= len(layers)
        axis.tick_params(labelbottom=lowest)
        if lowest:
            axis.set_xlabel("step", fontsize=9, color=_INK)
        axis.set_xlim(0, max(steps, 1))
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=12, color=_INK, x=0.015, ha="left")
    _legend(figure, sorted(used))
    figure.supylabel("rank", fontsize=10, color=_INK)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _panel(axis, name, shape, modes, ranks):
    axis.set_title(f"{name}  {'×'.join(map(str, shape))}", fontsize=9.5, color=_INK, loc="left")
    top = max(int(ranks.max()) if ranks.numel() else 1, 1)
    steps = range(1, len(ranks) + 1)
    for mode, column in zip(modes, ranks.unbind(1)):
        # Modes of equal rank (both modes of a matrix, always) are drawn thin over thick, so that each is seen.
        width = max(4.5 - 2.7 * modes.index(mode), 1.2)
        axis.plot(steps, column.numpy(), color=_colour(mode), linewidth=width, solid_capstyle="butt")
    axis.set_ylim(0, top * 1.08)
    axis.yaxis.get_major_locator().set_params(integer=True, nbins=5)
    axis.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    _plain(axis)


def _accuracy(axis, metrics):
    twin = axis.twinx()
    steps, accuracy = [m["step"] for m in metrics], [100 * m["accuracy"] for m in metrics]
    twin.plot(steps, accuracy, color=_FAINT, linewidth=1, linestyle=(0, (4, 2)), marker="o", markersize=2.5)
    twin.set_ylim(0, 102)
    twin.set_yticks([0, 25, 50, 75, 100])
    twin.yaxis.set_major_formatter("{x:.0f} %")
    _plain(twin)
    twin.tick_params(labelcolor=_FAINT)
    return twin


def _plain(axis):
    for side in axis.spines.values():
        side.set_visible(False)
    axis.spines["bottom"].set(visible=True, color="#bdbdbd")
    axis.tick_params(length=0, labelsize=8, labelcolor=_INK)


def _colour(mode):
    return _COLOURS[min(mode, len(_COLOURS) - 1)]


def _legend(figure, modes):
    from matplotlib.lines import Line2D

    names = {0: "output mode", 1: "input mode"}
    labels = [names.get(mode, f"window mode {mode - 1}") for mode in modes]
    handles = [Line2D([], [], color=_colour(mode), linewidth=2.5, label=label) for mode, label in zip(modes, labels)]
    accuracy = Line2D([], [], color=_FAINT, linestyle=(0, (4, 2)), marker="o", markersize=3, label="test accuracy")
    figure.legend(
        handles=[*handles, accuracy], loc="outside lower center", ncols=len(handles) + 1, frameon=False, fontsize=9
    )
