"""Exports a checkpoint as a chain of plain convolutions and linear layers that needs nothing but torch to run.

>>> program = torch.export.load("model.pt2")          # anywhere, without tdlrt
>>> logits = program.module()(pixels)                 # pixels in [0, 1], shape (batch, channels, height, width)

Every Tucker convolution is a 1×1, a core-sized and a 1×1 `Conv2d`, every Tucker linear layer three `Linear`s (for a
plain `U C Vᵀ`); `program.state_dict` holds their weights under the layers' names. Batches of any size are accepted.
Shape, classes, ranks and accuracy are in the archive: `torch.export.load(file, extra_files={"tdlrt.json": ""})`.
"""

import io
import json

import torch

from tdlrt import checkpoint
from tdlrt.convert import to_sequential
from tdlrt.summary import ranks

# Largest difference of the outputs, relative to the largest output: sums of a few hundred terms in another order.
AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-10}


class ExportError(RuntimeError):
    """The exported program does not compute what the network computes; nothing was written."""


def export(contents, path):
    """Writes the network of a checkpoint to `path` (.pt2), after the file, read back, gave the same outputs.

    Returns the largest relative difference of the outputs seen. Raises ExportError.
    """
    model = checkpoint.network(contents)
    chain = to_sequential(model).eval()
    dtype = next(model.parameters()).dtype
    shape = contents["network"]["image_shape"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, *shape, generator=generator, dtype=dtype)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(chain, (pixels[:2],), dynamic_shapes=({0: batch},))
        file = io.BytesIO()
        about = {key: contents["network"][key] for key in ("name", "image_shape", "classes")}
        about["ranks"] = {name: list(r) for name, r in ranks(model).items()}
        about["test_accuracy"] = contents["metrics"][-1]["accuracy"] if contents["metrics"] else None
        torch.export.save(program, file, extra_files={"tdlrt.json": json.dumps(about)})
        file.seek(0)
        loaded = torch.export.load(file).module()
        difference = max(_difference(model, loaded, pixels[:n]) for n in (1, len(pixels)))
    if not difference <= AGREEMENT[dtype]:
        raise ExportError(
            f"the exported program differs from the network by {difference:.1e} of the largest output, more than "
            f"{AGREEMENT[dtype]:.0e}; nothing was written"
        )
    checkpoint.write_atomically(path, lambda target: target.write(file.getvalue()))
    return difference


def _difference(model, program, pixels):
    expected = model(pixels)
    return float((program(pixels) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
