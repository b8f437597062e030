"""Whole models to Tucker and back."""

import copy
import logging

import numpy as np
import pytest
import tdlrt
import torch
from torch import nn
from torch.nn.utils import prune


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = self.up(self.depthwise(self.body(self.stem(x)))).flatten(2).mean(2)
        x = self.attention(x[:, None], x[:, None], x[:, None])[0]
        return self.head(self.recurrent(x)[0][:, 0]) + self.tied(x[:, 0])


def kinds(model):
    return {name for name, m in model.named_modules() if hasattr(m, "core")}


def test_what_is_replaced_and_what_is_reported(caplog):
    model = Mixed()
    with caplog.at_level(logging.INFO, logger="tdlrt"):
        result = tdlrt.tuckerize(model, ranks=0.5)
    assert result is model
    assert kinds(model) == {"body.0"}
    for name, reason in {
        "stem": "below min_features=16",
        "depthwise": "groups=16",
        "up": "transposed",
        "attention": "attention",
        "recurrent": "recurrent",
        "head": "shared",
        "tied": "shared",
    }.items():
        assert any(name in message and reason in message for message in caplog.messages), name
    assert model.body[0].ranks == (8, 8, 3, 3)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 16)


def test_a_tolerance_leaves_dense_what_would_not_become_smaller(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 24), nn.Linear(24, 16), nn.Conv2d(16, 16, 3), nn.Conv2d(32, 32, 3, groups=2)))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(16, 2) @ torch.randn(2, 24))
    with caplog.at_level(logging.INFO, logger="tdlrt"):
        small = tdlrt.tuckerize(copy.deepcopy(model), tol=1e-3)
    assert kinds(small) == {"1"}
    assert small[1].ranks == (2, 2)
    assert "left dense: 0 (its Tucker form at tol=0.001 has 896 numbers, its weight 384)" in caplog.messages
    assert any(message.startswith("left dense: 3 ") for message in caplog.messages)
    assert tdlrt.compression(small).compression > 0
    assert kinds(tdlrt.tuckerize(copy.deepcopy(model), tol=1e-3, keep_larger=True)) == {
        *("0", "1", "2"),
        *("3.groups.0", "3.groups.1"),
    }
    assert kinds(tdlrt.tuckerize(copy.deepcopy(model))) == kinds(tdlrt.tuckerize(copy.deepcopy(model), ranks=30))
    caplog.clear()
    assert not kinds(tdlrt.tuckerize(nn.Sequential(nn.Linear(16, 16)), tol=0.0))
    assert "no layer was replaced" in caplog.text


def test_a_group_is_as_wide_as_its_smaller_side():
    (decision,) = tdlrt.plan(nn.Conv2d(64, 24, 3, groups=2))
    assert decision.reason == "its smaller side in each of its 2 groups is 12, below min_features=16"


def test_skip_takes_patterns():
    model = nn.ModuleDict({"first": nn.Linear(20, 20), "final": nn.Linear(20, 20), "other": nn.Linear(20, 20)})
    assert kinds(tdlrt.tuckerize(model, skip=["fi*"])) == {"other"}


def test_groups_of_two_channels_are_not_depthwise():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8))
    assert kinds(tdlrt.tuckerize(model, min_features=0)) == {f"0.groups.{i}" for i in range(4)}


def test_wide_groups_get_a_tucker_weight_each():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 48, 3, groups=2), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=4)).double()
    x = torch.randn(2, 32, 7, 7, dtype=torch.float64)
    full = tdlrt.tuckerize(copy.deepcopy(model))
    assert torch.allclose(full(x), model(x), atol=1e-12)
    assert kinds(full) == {"0.groups.0", "0.groups.1"}  # the groups of the other have 12 channels
    assert [d.reason for d in tdlrt.plan(full)] == [
        "its smaller side in each of its 4 groups is 12, below min_features=16"
    ]
    small = tdlrt.tuckerize(copy.deepcopy(model), ranks=3)
    assert set(tdlrt.ranks(small).values()) == {(3, 3, 3, 3)}
    for convert in (tdlrt.to_dense, tdlrt.to_sequential):
        plain = convert(small)
        assert not kinds(plain)
        assert torch.allclose(plain(x), small(x), atol=1e-12)
    steps = []
    for integrator in ("one_pass", "two_pass"):
        twin = copy.deepcopy(small)
        optimizer = tdlrt.TDLRT(twin, lr=0.1, tol=0.05, integrator=integrator)

        def closure(twin=twin, optimizer=optimizer):
            optimizer.zero_grad()
            loss = twin(x).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        steps.append(tdlrt.to_dense(twin).state_dict())
    assert all(torch.allclose(steps[0][name], steps[1][name], atol=1e-11) for name in steps[0])
    adapted = tdlrt.adapt(copy.deepcopy(model), ranks=3)
    assert torch.equal(adapted(x), model(x))
    nn.init.normal_(adapted[0].delta.groups[1].core)
    y = adapted(x)
    assert torch.allclose(tdlrt.merge(adapted)(x), y, atol=1e-12)


def test_tied_tucker_weights_are_refused():
    def tied(what):
        model = nn.Sequential(tdlrt.TuckerLinear(9, 9, ranks=3), nn.ReLU(), tdlrt.TuckerLinear(9, 9, ranks=3))
        if what == "core":
            model[2].core = model[0].core
        elif what == "one factor":
            model[2].factors[1] = model[0].factors[1]
        elif what == "all factors":
            model[2].factors = model[0].factors
        else:
            model.append(nn.Linear(3, 9, bias=False)).append(nn.ReLU())
            model[3].weight = model[0].factors[0]
        return model

    for what in ("core", "one factor", "all factors", "a dense weight"):
        with pytest.raises(ValueError, match=r"0 and [23] share a Tucker parameter; use one layer in both places"):
            tdlrt.TDLRT(tied(what), lr=0.1)


def test_skip_min_features_and_dicts():
    def net():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24, 10))

    assert kinds(tdlrt.tuckerize(net(), ranks=4)) == {"2"}
    assert kinds(tdlrt.tuckerize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 15)))) == {"0"}
    assert kinds(tdlrt.tuckerize(net(), ranks=4, min_features=10)) == {"2", "4"}
    assert kinds(tdlrt.tuckerize(net(), ranks=4, min_features=0)) == {"0", "2", "4"}
    assert kinds(tdlrt.tuckerize(net(), ranks=4, min_features=0, skip=("4",))) == {"0", "2"}
    model = tdlrt.tuckerize(net(), ranks={"2": (6, 5), "4": 0.5}, min_features=8)
    assert model[2].ranks == (6, 5, 3, 3)
    assert model[4].ranks == (5, 5)  # half of 24 would be infeasible beside half of 10
    with pytest.raises(ValueError, match="names 'conv9', but no such layer exists"):
        tdlrt.tuckerize(net(), ranks={"conv9": 3})
    with pytest.raises(ValueError, match="skip names 'x'"):
        tdlrt.tuckerize(net(), skip=("x",))
    with pytest.raises(TypeError, match="skip must be a sequence"):
        tdlrt.tuckerize(net(), skip="2")
    with pytest.raises(ValueError, match="either ranks or tol"):
        tdlrt.tuckerize(net(), ranks=2, tol=0.1)
    with pytest.raises(ValueError, match=r"tol is 2; allowed are numbers from 0 to below 1"):
        tdlrt.tuckerize(net(), tol=2)
    with pytest.raises(TypeError, match="got generator"):
        tdlrt.tuckerize(net().parameters())


def test_a_model_without_eligible_layers_is_returned_with_a_warning(caplog):
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))
    assert tdlrt.tuckerize(model) is model
    assert any("no layer is eligible" in message for message in caplog.messages)


def test_a_single_layer_and_a_layer_used_twice():
    assert isinstance(tdlrt.tuckerize(nn.Linear(20, 30), ranks=4), tdlrt.TuckerLinear)
    shared = nn.Linear(16, 16)
    model = tdlrt.tuckerize(nn.Sequential(shared, nn.ReLU(), shared), ranks=4)
    assert model[0] is model[2]
    assert isinstance(model[0], tdlrt.TuckerLinear)


@pytest.mark.parametrize("modes", ["channels", "all"])
def test_dense_and_sequential_copies_compute_the_same(modes):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, stride=2)),
        *(nn.Flatten(), nn.Linear(12 * 9, 10)),
    )
    model = tdlrt.tuckerize(model.double(), ranks=0.5, modes=modes, min_features=8).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    for convert in (tdlrt.to_dense, tdlrt.to_sequential):
        plain = convert(model)
        assert not kinds(plain)
        assert not any(m.training for m in plain.modules())
        assert torch.allclose(plain(x), model(x), atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the model itself is untouched


def test_a_model_on_the_meta_device_takes_ranks_and_is_filled_later():
    def net():
        return nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12 * 9, 10))

    model = tdlrt.tuckerize(net().to("meta"), ranks=0.5, min_features=8)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="meta device has no values"):
        tdlrt.tuckerize(net().to("meta"), tol=0.1, min_features=8)
    stored = tdlrt.tuckerize(net(), ranks=3, min_features=8)
    model.to_empty(device="cpu").load_state_dict(stored.state_dict())
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(model(x), stored(x))
    fresh = model[0].to_empty(device="cpu")
    fresh.reset_parameters()
    assert tdlrt.orthogonality_error(fresh) < 1e-6


def test_requires_grad_and_training_mode_are_kept():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].requires_grad_(False)
    model.eval()
    tdlrt.tuckerize(model, ranks=4)
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[1].parameters())
    assert not model[0].training


def test_compression_counts_what_is_stored():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1, bias=False))
    model = tdlrt.tuckerize(model, ranks=4, min_features=8)
    found = tdlrt.compression(model)
    first = 32 * 4 + 16 * 4 + 4 * 4 * 9
    second = 8 * 4 + 32 * 4 + 16
    assert tdlrt.ranks(model) == {"0": (4, 4, 3, 3), "2": (4, 4, 1, 1)}
    assert found.factorised_parameters == first + second
    assert found.factorised_dense_parameters == 32 * 16 * 9 + 8 * 32
    assert found.parameters == sum(p.numel() for p in model.parameters()) == first + second + 32
    assert found.dense_parameters == 32 * 16 * 9 + 8 * 32 + 32
    assert found.factorised_compression == pytest.approx(1 - (first + second) / (32 * 16 * 9 + 8 * 32))
    assert found.multiply_adds == first + second
    assert found.dense_multiply_adds == 32 * 16 * 9 + 8 * 32


def test_multiply_adds_of_window_factors_are_those_of_the_absorbed_core():
    layer = tdlrt.TuckerConv2d(16, 32, 3, ranks=(4, 4, 2, 2), modes="all")
    assert tdlrt.compression(layer).multiply_adds == 32 * 4 + 16 * 4 + 4 * 4 * 9
    linear = tdlrt.TuckerLinear(24, 16, ranks=3)
    assert tdlrt.compression(linear).multiply_adds == 24 * 3 + 9 + 16 * 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: nn.utils.parametrizations.weight_norm(layer), "its weight is parametrized"),
        (lambda layer: nn.utils.weight_norm(layer), "weight_g, weight_v"),
        (lambda layer: nn.utils.spectral_norm(layer), "weight_orig"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_mask"),
        (lambda layer: layer.register_buffer("scale", torch.ones(1)), "scale"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_weight_that_is_made_of_others_stays_dense(change, reason):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    change(model[0])
    kind, x = type(model[0]), torch.randn(2, 16, 6, 6)
    y = model[0](x)
    assert reason in tdlrt.plan(model)[0].reason
    tdlrt.tuckerize(model, ranks=0.5)
    assert type(model[0]) is kind
    assert torch.equal(model[0](x), y)
    assert isinstance(model[2], tdlrt.TuckerConv2d)


def test_a_plan_names_every_layer_with_a_matrix_and_why_it_stays():
    class Projection(nn.Module):  # as GPT-2's Conv1D
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(20, 30))

    model = nn.Sequential(nn.Embedding(40, 20), nn.LayerNorm(20), Projection(), nn.PReLU(30), nn.Linear(30, 40))
    assert [(d.name, d.reason) for d in tdlrt.plan(model)] == [
        ("0", "tuckerize replaces embeddings with embeddings=True only"),
        ("2", "Projection is no class that has a Tucker form here"),
        ("4", None),
    ]
    assert list(tdlrt.ranks(tdlrt.tuckerize(model, ranks=4, skip=["2"]))) == ["4"]


def test_a_lazy_layer_says_that_it_wants_a_forward_pass():
    model = nn.Sequential(nn.LazyConv2d(16, 3), nn.Flatten(), nn.LazyLinear(16))
    assert all("run the model once" in d.reason for d in tdlrt.plan(model))
    model(torch.randn(2, 16, 5, 5))
    assert all(d.reason is None for d in tdlrt.plan(model))


@pytest.mark.parametrize("there", [lambda m: tdlrt.tuckerize(m, 4, min_features=8), lambda m: tdlrt.adapt(m, ranks=4)])
@pytest.mark.parametrize("back", [tdlrt.to_dense, tdlrt.to_sequential, tdlrt.merge, lambda m: m])
def test_hooks_of_users_go_along_and_their_handles_work(there, back):
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)), []
    handles = [
        model[2].register_forward_pre_hook(lambda module, args: seen.append("pre")),
        model[2].register_forward_hook(lambda module, args, kwargs, output: seen.append("post"), with_kwargs=True),
        model[2].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward")),
    ]
    there(model)
    tdlrt.TDLRT(model, lr=0.1)  # its own hooks stay behind
    moved = back(model)
    assert moved[2](torch.randn(2, 16, 5, 5, requires_grad=True)).sum().backward() is None
    assert seen == ["pre", "post", "backward"]
    if back is tdlrt.to_sequential:
        assert len(moved[0]._forward_hooks) == 0
    if moved is model:
        for handle in handles:
            handle.remove()
        model[2](torch.randn(2, 16, 5, 5, requires_grad=True)).sum().backward()
        assert len(seen) == 3


@pytest.mark.parametrize("back", [tdlrt.to_dense, tdlrt.to_sequential, lambda m: m])
@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype")
@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoders_infer_by_their_fast_path_or_leave_it(back, masked):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = tdlrt.tuckerize(nn.TransformerEncoder(layer, 2), ranks=0.5)
    x = torch.randn(3, 5, 16)
    options = {"src_key_padding_mask": torch.arange(5) >= torch.tensor([[5], [4], [2]])} if masked else {}
    kept = ~options.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    model.eval()
    expected = model(x, **options)  # with gradients: no fast path
    assert isinstance(model.layers[1].linear1, tdlrt.TuckerLinear)
    with torch.no_grad():
        result = back(model)(x, **options)
    assert torch.allclose(result[kept], expected[kept], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_factorised_for_inference(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(144, 16))
    x = torch.randn(2, 16, 5, 5)
    y = model(x).float()
    half = tdlrt.tuckerize(model.to(dtype))
    assert half[0].core.dtype == half[2].factors[0].dtype == dtype
    assert torch.allclose(half(x.to(dtype)).float(), y, atol=0.03)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"min_features": -1}, ValueError, "min_features is -1"),
        ({"min_features": "8"}, TypeError, "min_features is '8'"),
        ({"modes": 2}, TypeError, "modes is 2; allowed"),
        ({"ranks": True}, TypeError, "ranks is True; allowed"),
        ({"ranks": "4"}, TypeError, "ranks is '4'; allowed"),
    ],
)
def test_bad_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        tdlrt.tuckerize(nn.Sequential(nn.Linear(16, 16)), **options)


@pytest.mark.parametrize("function", [tdlrt.ranks, tdlrt.compression, tdlrt.to_dense, tdlrt.to_sequential, tdlrt.merge])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        function([nn.Linear(8, 8)])


def test_a_dense_model_is_not_compressed():
    found = tdlrt.compression(nn.Linear(8, 8))
    assert found.compression == found.factorised_compression == 0


def test_numpy_numbers_are_ranks():
    for given, expected in ((np.int64(3), 3), (np.float32(0.25), 4)):
        assert tdlrt.TuckerLinear(16, 16, ranks=given).ranks == (expected, expected)


def test_a_layer_that_would_be_as_large_as_its_weight_stays_dense():
    """At rank 4 of 8 a square weight of 64 numbers has 16 + 2·32 = 80; of 6×12 at rank 3, 9 + 54 = 63 of 72."""
    layer = nn.Linear(12, 6, bias=False)
    U, V = torch.linalg.qr(torch.randn(6, 4))[0], torch.linalg.qr(torch.randn(12, 4))[0]
    sizes = {r: r * r + 18 * r for r in range(1, 5)}
    assert sizes[3] < 72 < sizes[4]
    for r in (3, 4):
        with torch.no_grad():
            layer.weight.copy_(U[:, :r] @ V[:, :r].T)
        found = tdlrt.tuckerize(copy.deepcopy(layer), tol=1e-3, min_features=0)
        assert isinstance(found, nn.Linear) == (r == 4)
    exact = nn.Conv2d(6, 6, 1, bias=False)  # rank 1: 1 + 12 numbers
    assert kinds(nn.Sequential(exact)) == set()
    with torch.no_grad():
        exact.weight.copy_(torch.ones(6, 6, 1, 1))
    assert kinds(tdlrt.tuckerize(nn.Sequential(exact), tol=1e-3, min_features=0)) == {"0"}
    equal = nn.Linear(2, 4, bias=False)  # rank 1: 1 + 2 + 4 = 7 numbers; rank 1 of 2×3 has as many as its weight, 6
    with torch.no_grad():
        equal.weight.fill_(1.0)
    assert kinds(tdlrt.tuckerize(nn.Sequential(equal), tol=1e-3, min_features=0)) == {"0"}
    equal = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        equal.weight.fill_(1.0)
    assert kinds(tdlrt.tuckerize(nn.Sequential(equal), tol=1e-3, min_features=0)) == set()


def test_a_name_comes_before_patterns():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert tdlrt.ranks(tdlrt.tuckerize(model, ranks={"*": 5, "1": 3})) == {"0": (5, 5), "1": (3, 3)}


def test_orthogonality_is_that_of_the_worst_entry_of_all_factors():
    model = tdlrt.tuckerize(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).double(), ranks=4)
    assert tdlrt.orthogonality_error(model) < 1e-14
    with torch.no_grad():
        model[0].factors[0][:, 1] *= 1.5  # the diagonal becomes 2.25
        model[1].factors[1][:, 0] += 0.5 * model[1].factors[1][:, 1]
    assert tdlrt.orthogonality_error(model) == pytest.approx(1.25)
    assert tdlrt.orthogonality_error(nn.Linear(2, 2)) == 0
