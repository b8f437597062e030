"""Arguments of the wrong kind, one by one, for everything public in tdlrt: a TypeError that names the argument."""

import pytest
import tdlrt
from torch import nn


def model():
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 12))


OPTIMIZER = dict.fromkeys(
    ("lr", "momentum", "weight_decay", "tol", "min_rank", "max_rank", "basis_every", "rank_every", "max_grad_norm"), "x"
) | {"budget": 1.5, "rank_multiple": True, "conditioning": [1], "params": 3, "process_group": "WORLD", "base": 3}
CASES = [
    *(("TDLRT", {name: value}) for name, value in OPTIMIZER.items()),
    *((f, {name: value}) for f in ("tuckerize", "adapt") for name, value in {"ranks": "all", "skip": 3}.items()),
    *(("tuckerize", {name: value}) for name, value in {"tol": "0.1", "min_features": 1.5, "skip": [0]}.items()),
    *(("tuckerize", {"ranks": value}) for value in ((1.5, 2, 3, 3), {0: 4}, True)),
    *(("plan", {name: value}) for name, value in {"skip": "head", "min_features": None}.items()),
    *(
        ("TuckerLinear", {name: value})
        for name, value in {"in_features": 1.5, "out_features": None, "ranks": "x"}.items()
    ),
]
BARE = ("ranks", "compression", "orthogonality_error", "to_dense", "to_sequential", "merge", "tucker_parameters")


@pytest.mark.parametrize(("function", "wrong"), CASES, ids=str)
def test_a_wrong_kind_is_a_type_error_that_names_the_argument(function, wrong):
    right = {
        "TDLRT": lambda: {"model": tdlrt.tuckerize(model()), "lr": 0.1},
        "TuckerLinear": lambda: {"in_features": 8, "out_features": 8},
    }
    arguments = {**right.get(function, lambda: {"model": model()})(), **wrong}
    with pytest.raises(TypeError, match=f"^{next(iter(wrong))} ") as caught:
        getattr(tdlrt, function)(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [*BARE, "adapter_state_dict", "prepare_ddp", "plan", "tuckerize", "adapt"])
def test_what_is_no_model_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        getattr(tdlrt, function)({})


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "lr", "conditioning"])
@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_numbers_that_make_no_step_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; allowed are numbers from 0 on"):
        tdlrt.TDLRT(tdlrt.tuckerize(model()), **{"lr": 0.1, name: value})


def test_a_fraction_is_of_the_full_rank_of_a_mode():
    """64 output channels of 3×3 windows on 3 channels have rank 27 at most."""
    layer = nn.Conv2d(3, 64, 3)
    assert tdlrt.TuckerConv2d.from_dense(layer).ranks == (27, 3, 3, 3)
    assert tdlrt.TuckerConv2d.from_dense(layer, ranks=1.0).ranks == (27, 3, 3, 3)
    assert tdlrt.TuckerConv2d.from_dense(layer, ranks=0.4).ranks == (9, 1, 3, 3)  # at most 1·3·3
    assert tdlrt.TuckerConv2d.from_dense(layer, ranks=2 / 3).ranks == (18, 2, 3, 3)
    assert tdlrt.TuckerConv2d.from_dense(layer, ranks=0.5).ranks == (14, 2, 3, 3)
