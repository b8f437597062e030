"""Wrong arguments, one by one, for everything public in tdlrt: a TypeError or ValueError that names the argument."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import tdlrt
import torch
from torch import nn


def model():
    return nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 16))


OPTIMIZER = dict.fromkeys(
    ("lr", "momentum", "weight_decay", "tol", "min_rank", "max_rank", "basis_every", "rank_every", "max_grad_norm"), "x"
) | {"budget": 1.5, "rank_multiple": True, "conditioning": [1], "params": 3, "process_group": "WORLD", "base": 3}
NAN = float("nan")
INTEGER = {TypeError: ("8", 1.5, None, True, torch.ones(2), 2.0, [4]), ValueError: (0, -1, np.int64(0))}
CONV = {
    "in_channels": INTEGER,
    "out_channels": INTEGER,
    "kernel_size": {TypeError: ("3", 1.5, None, (3, True), torch.ones(2)), ValueError: (0, -1, (3, 0), (3,), [])},
    "stride": {TypeError: ("3", None, NAN), ValueError: (0, (1, -1), (1, 1, 1, 1))},
    "dilation": {TypeError: (1.5, None), ValueError: (0, -1, ())},
    "padding": {TypeError: (1.5, None, True), ValueError: (-1, "full", (0, -1))},
    "padding_mode": {TypeError: (0, None, ["zeros"]), ValueError: ("mirror",)},
}
ANY = {
    "ranks": {TypeError: ("x", True, (True, 1), np.ones(2)), ValueError: ((), 0, -1, NAN, 1.5, (1, 0), np.float64(0))},
    "modes": {TypeError: (1, None, (0.0,), (True, 1), np.ones(2)), ValueError: ("window", (0, 9), [-1])},
    "dtype": {TypeError: ("float32", torch.int64, torch.complex64, 3)},
    "device": {TypeError: (1.5, []), ValueError: ("gpu9", -7)},
}
BIAS = {"bias": {TypeError: (None, 0, "False", np.ones(2))}}
FROM_DENSE = {
    "layer": {TypeError: (None, 3, "x", nn.Linear, nn.ReLU())},
    "ranks": ANY["ranks"],
    "modes": ANY["modes"],
    "method": {TypeError: (None, 1, np.ones(2)), ValueError: ("als",)},
}
TEXT = {TypeError: (None, 3, np.ones(2), torch.ones(2), ["raise"]), ValueError: ("x", "")}
COUNT = {TypeError: (True, 1.5, NAN, torch.ones(2)), ValueError: (0, -1)}
TOL = {"tol": {TypeError: ("0.1", True, torch.ones(2)), ValueError: (1, -0.1, NAN)}}
WRONG = {
    "TuckerConv1d": {**CONV, "kernel_size": INTEGER | {TypeError: ("3", 1.5, None, True)}, **ANY, **BIAS},
    "TuckerConv2d": {**CONV, **ANY, **BIAS},
    "TuckerConv3d": {**CONV, "kernel_size": {ValueError: ((3, 3), 0)}, **ANY, **BIAS},
    "TuckerLinear": {"in_features": {**INTEGER, TypeError: ("8", 1.5, None, True, [4.0])}, **ANY, **BIAS}
    | {"out_features": {TypeError: (np.ones(2), (2, True)), ValueError: (0, (), (4, -1))}},
    "TuckerEmbedding": {"num_embeddings": INTEGER, "embedding_dim": INTEGER, **ANY},
    "TuckerGroupedConv": {
        "layers": {
            TypeError: (None, 3, "x", [None], [nn.Conv2d(4, 4, 3)], torch.ones(2)),
            ValueError: ([], (), [tdlrt.TuckerConv2d(4, 4, 3), tdlrt.TuckerConv2d(4, 4, 3, stride=2)]),
        }
    },
    "TuckerAdapter": {
        "base": {TypeError: (None, nn.ReLU(), tdlrt.TuckerLinear(8, 12)), ValueError: (nn.Linear(8, 11),)},
        "delta": {TypeError: (None, nn.Linear(8, 12)), ValueError: (tdlrt.TuckerLinear(8, 12),)},
    },
    "TuckerConv2d.from_dense": FROM_DENSE,
    "TuckerGroupedConv.from_dense": FROM_DENSE,
    "TuckerEmbedding.from_dense": FROM_DENSE,
    "TuckerLinear.from_dense": {
        **FROM_DENSE,
        "in_modes": {TypeError: (4.0, "x", (2, True)), ValueError: (0, [], (), (2, 3), (-2, -4))},
        "out_modes": {TypeError: ([2.0, 6],), ValueError: (0, (5, 2))},
    },
    "tuckerize": {
        "modes": ANY["modes"],
        "method": FROM_DENSE["method"],
        "embeddings": BIAS["bias"],
        "keep_larger": BIAS["bias"],
        "skip": {TypeError: (torch.ones(2), b"x", None), ValueError: (["nowhere"],)},
        **TOL,
    },
    "adapt": {"ranks": ANY["ranks"], "modes": ANY["modes"]},
    "plan": {"embeddings": BIAS["bias"], "skip": {TypeError: (torch.ones(2), b"x", [None])}},
    "take_ranks": {
        "metadata": {TypeError: (None, 3, {}), ValueError: (SimpleNamespace(state_dict_metadata={}),)},
        "prefix": {TypeError: (None, 3)},
    },
    "TDLRT": {
        **{name: {TypeError: (True, torch.ones(2))} for name in ("momentum", "weight_decay", "conditioning")},
        **dict.fromkeys(("integrator", "tolerance_mode", "on_nonfinite", "retain", "budget_of"), TEXT),
        **dict.fromkeys(("min_rank", "max_rank", "basis_every", "rank_every", "budget", "rank_multiple"), COUNT),
        **dict.fromkeys(("capturable", "nesterov", "maximize"), BIAS["bias"]),
        "max_grad_norm": {TypeError: ("1",), ValueError: (0, -1, NAN)},
        "dampening": {TypeError: ("0",), ValueError: (NAN, -1)},
        "lr": {ValueError: (NAN, -1, torch.tensor(NAN), torch.tensor(-1.0), torch.ones(2))},
        **TOL,
    },
}
RIGHT = {
    **{f"TuckerConv{d}d": lambda: {"in_channels": 4, "out_channels": 5, "kernel_size": 3} for d in (1, 2, 3)},
    "TuckerLinear": lambda: {"in_features": 8, "out_features": 8},
    "TuckerEmbedding": lambda: {"num_embeddings": 9, "embedding_dim": 5},
    "TuckerGroupedConv": lambda: {"layers": [tdlrt.TuckerConv2d(4, 4, 3)] * 2},
    "TuckerAdapter": lambda: {"base": nn.Linear(8, 12), "delta": tdlrt.TuckerLinear(8, 12, bias=False)},
    "TuckerConv2d.from_dense": lambda: {"layer": nn.Conv2d(4, 5, 3)},
    "TuckerGroupedConv.from_dense": lambda: {"layer": nn.Conv2d(4, 6, 3, groups=2)},
    "TuckerEmbedding.from_dense": lambda: {"layer": nn.Embedding(9, 5)},
    "TuckerLinear.from_dense": lambda: {"layer": nn.Linear(8, 12)},
    "take_ranks": lambda: {"model": tdlrt.tuckerize(model()), "metadata": SimpleNamespace(state_dict_metadata={})},
    "TDLRT": lambda: {"model": tdlrt.tuckerize(model()), "lr": 0.1, "momentum": 0.9},
}
EACH = [
    (function, argument, error, value)
    for function, arguments in WRONG.items()
    for argument, errors in arguments.items()
    for error, values in errors.items()
    for value in values
]


def call(function, wrong):
    arguments = {**RIGHT.get(function, lambda: {"model": model()})(), **wrong}
    found = tdlrt
    for name in function.split("."):
        found = getattr(found, name)
    return found(**arguments)


@pytest.mark.parametrize("function", [*(RIGHT.keys() - {"take_ranks"}), "tuckerize", "adapt", "plan"])
def test_right_arguments_pass(function):
    """So that each of the cases fails for the argument that it changes."""
    call(function, {})


@pytest.mark.parametrize(("function", "argument", "error", "value"), EACH)
def test_a_wrong_argument_is_named_in_one_line(function, argument, error, value):
    with pytest.raises(error) as caught:
        call(function, {argument: value})
    assert caught.type is error
    message = str(caught.value)
    other = "delta has shape" if argument == "base" else argument  # which of the two is wrong, nobody knows
    assert message.startswith((argument, other))
    assert "\n" not in message
    assert "allowed" in message or "must" in message or "names" in message or "has" in message


@pytest.mark.parametrize("wrong", [{"a": 1}, {}, {"state": {}}, 3, None, [1]], ids=str)
def test_a_state_that_is_no_optimisers_changes_nothing(wrong):
    network = tdlrt.tuckerize(model())
    optimizer = tdlrt.TDLRT(network, lr=0.1, momentum=0.9)
    network(torch.randn(2, 16, 4, 4)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError if isinstance(wrong, dict) else TypeError, match=r"^state_dict (has|must)"):
        optimizer.load_state_dict(wrong)
    with pytest.raises(ValueError if isinstance(wrong, dict) else TypeError, match=r"^param_group (has|must)"):
        optimizer.add_param_group(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(s["momentum_buffer"], after["state"][k]["momentum_buffer"]) for k, s in before["state"].items()
    )


def test_a_closure_that_cannot_be_called_is_named():
    network = tdlrt.tuckerize(model())
    for integrator in ("one_pass", "two_pass"):
        with pytest.raises(TypeError, match=r"^closure must be a function or None, got float"):
            tdlrt.TDLRT(network, lr=0.1, integrator=integrator).step(0.5)
    with pytest.raises(TypeError, match=r"^frozen must be True or False, got 1"):
        tdlrt.TDLRT(network, lr=0.1).freeze_bases(1)


def test_bounds_that_meet_fix_the_ranks():
    network = tdlrt.tuckerize(model(), ranks=2)
    optimizer = tdlrt.TDLRT(network, lr=0.1, min_rank=3, max_rank=3)
    network(torch.randn(2, 16, 4, 4)).square().sum().backward()
    optimizer.step()
    assert all(ranks[:2] == (3, 3) for ranks in tdlrt.ranks(network).values())


def test_numpy_scalars_are_numbers():
    """Sizes, ranks and tolerances that were computed with numpy."""
    three = np.int64(3)
    layer = tdlrt.TuckerConv2d(three, np.int32(4), three, stride=(three, 1), padding=three, ranks=(three, three))
    assert layer(torch.randn(1, 3, 6, 6)).shape == (1, 4, 4, 10)
    assert tdlrt.TuckerLinear((three, 2), np.int64(5), modes=(np.int64(0),)).ranks == (5, 3, 2)
    network = tdlrt.tuckerize(model(), ranks=np.float32(0.5), min_features=np.int64(8))
    bounds = {"min_rank": np.int64(2), "max_rank": three, "rank_multiple": np.int64(1), "basis_every": np.int64(1)}
    optimizer = tdlrt.TDLRT(network, lr=np.float32(0.1), tol=np.float32(0.2), budget=np.int64(1000), **bounds)
    network(torch.randn(2, 16, 4, 4)).square().sum().backward()
    optimizer.step()
    assert all(2 <= r <= 3 for ranks in tdlrt.ranks(network).values() for r in ranks[:2])


def test_ranks_of_a_checkpoint_are_taken_by_all_layers_or_none():
    network = tdlrt.tuckerize(model(), ranks=4)
    before = copy.deepcopy(network.state_dict())
    half = {name: SimpleNamespace(size=value.shape) for name, value in before.items() if name.startswith("0.")}
    with pytest.raises(ValueError, match=r"^metadata has"):
        tdlrt.take_ranks(network, SimpleNamespace(state_dict_metadata=half))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


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


def test_a_subclass_of_sgd_has_its_momentum():
    class Own(torch.optim.SGD):
        pass

    class Any(torch.optim.SGD):
        def __init__(self, params, **options):
            super().__init__(params, **options)

    weights = []
    for base in ("sgd", Own, Any):
        torch.manual_seed(0)
        layer = tdlrt.TuckerLinear(9, 8, ranks=3, dtype=torch.float64)
        optimizer = tdlrt.TDLRT(layer, lr=0.1, momentum=0.9, base=base)
        for x in torch.randn(4, 5, 9, dtype=torch.float64):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight)
    assert all(torch.equal(weights[0], weight) for weight in weights[1:])
    with pytest.raises(ValueError, match=r"momentum is 0.9, but base=.*NAdam.* has no momentum"):
        tdlrt.TDLRT(layer, lr=0.1, momentum=0.9, base=torch.optim.NAdam)


def test_a_base_with_statistics_of_rows_and_columns_is_refused():
    with pytest.raises(ValueError, match=r"base keeps 'row_var' per entry, row or column.*; known are momentum_buffer"):
        tdlrt.TDLRT(tdlrt.TuckerLinear(9, 8, ranks=3), lr=0.1, base=torch.optim.Adafactor)


def test_a_step_has_no_derivative():
    with pytest.raises(ValueError, match="differentiable is True"):
        tdlrt.TDLRT(tdlrt.TuckerLinear(9, 8), lr=0.1, differentiable=True)
