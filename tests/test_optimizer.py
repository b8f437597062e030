"""TDLRT as an optimiser: what it steps, what it refuses, what it remembers."""

import copy
import io

import pytest
import tdlrt
import torch
from quadratic import Quadratic
from tdlrt.integrators.checks import refuse_nonfinite
from tdlrt.reduction import LocalReducer
from torch import nn


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 20), nn.ReLU(), nn.Linear(20, 5)),
    )
    return tdlrt.tuckerize(model.to(dtype), ranks=0.3, min_features=8)  # the first convolution stays dense


def batch(seed=0, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randint(0, 5, (size,), generator=generator)


def backward(model, data, factor=1.0):
    loss = nn.functional.cross_entropy(model(data[0]), data[1])
    (loss * factor).backward()
    return loss.item()


def run(model, optimizer, steps, start=0, dtype=torch.float64):
    for i in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, batch(i, dtype=dtype))
        optimizer.step()


def snapshot(model, optimizer):
    values = [v.clone() for v in model.state_dict().values()]
    for state in optimizer.state.values():
        values += [v.clone() for v in state.values() if isinstance(v, torch.Tensor)]
    return values


def same(one, two):
    return len(one) == len(two) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two))


def test_every_parameter_is_stepped_and_dense_ones_exactly_as_by_sgd():
    model = network()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = tdlrt.TDLRT(model, tol=0.05, **options)
    for i in range(3):
        twin = copy.deepcopy(model)  # same weights now; its dense parameters take one step of SGD
        dense = [p for n, p in twin.named_parameters() if n.split(".")[0] in ("0", "1") or n.endswith("bias")]
        sgd = torch.optim.SGD(dense, **options)
        names = [n for n, p in twin.named_parameters() if any(p is d for d in dense)]
        before = dict(model.named_parameters())
        for name, p in zip(names, dense):
            if before[name] in optimizer.state:
                sgd.state[p] = copy.deepcopy(optimizer.state[before[name]])
        before = {n: p.clone() for n, p in model.named_parameters()}
        backward(twin, batch(i))
        sgd.step()
        optimizer.zero_grad()
        backward(model, batch(i))
        optimizer.step()
        after = dict(model.named_parameters())
        for name, p in zip(names, dense):
            assert torch.equal(after[name], p), name
        for name, p in after.items():
            assert p.shape != before[name].shape or not torch.equal(p, before[name]), name


@pytest.mark.parametrize("where", ["input", "one_gradient", "dense_gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("integrator", ["one_pass", "two_pass"])
def test_non_finite_gradients_change_nothing(where, value, integrator):
    model = network()
    for policy in ("raise", "skip"):
        optimizer = tdlrt.TDLRT(model, lr=0.1, momentum=0.9, tol=0.05, on_nonfinite=policy, integrator=integrator)
        calls = []

        def closure(bad=True, optimizer=optimizer, calls=calls):
            optimizer.zero_grad()
            x, y = batch(7)
            if bad and where == "input":
                x[0, 0, 0, 0] = value
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            calls.append(1)
            if bad and where == "one_gradient":
                model[6].factors[0].grad[0, 0] = value
            if bad and where == "dense_gradient" and len(calls) == 2:  # the second pass of two_pass
                model[0].weight.grad[0, 0, 0, 0] = value
            return loss

        def step(bad, optimizer=optimizer, closure=closure):
            if integrator == "two_pass":
                return optimizer.step(lambda: closure(bad))
            closure(bad)
            if bad and where == "dense_gradient":
                model[0].weight.grad[0, 0, 0, 0] = value
            return optimizer.step()

        model.eval()  # batch-norm statistics would follow the input, whatever the optimiser does
        step(False)
        calls.clear()
        before = snapshot(model, optimizer)
        if policy == "raise":
            with pytest.raises(tdlrt.NonFiniteError, match="NaN or Inf"):
                step(True)
        else:
            assert step(True) is None
            assert optimizer.skipped_steps == 1
        assert same(before, snapshot(model, optimizer))
        calls.clear()
        step(False)  # and it goes on
        assert not same(before, snapshot(model, optimizer))


def test_the_message_names_the_parameter():
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1)
    backward(model, batch())
    model[3].factors[1].grad[0, 0] = float("inf")
    with pytest.raises(tdlrt.NonFiniteError, match=r"3\.factors\.1"):
        optimizer.step()


@pytest.mark.parametrize("factor", [0.25, 1024.0])
def test_scaled_gradients_scale_the_whole_step(factor):
    """Clipping, averaging or unscaling multiply gradients after the backward pass; the new blocks follow."""
    results = []
    for way in ("loss", "gradients"):
        model = network()
        optimizer = tdlrt.TDLRT(model, lr=0.1 / factor, tol=0.02)
        backward(model, batch(), factor if way == "loss" else 1.0)
        if way == "gradients":
            for p in model.parameters():
                p.grad.mul_(factor)
        optimizer.step()
        results.append(tdlrt.to_dense(model).state_dict())
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=0, atol=1e-12), name


def test_an_input_buffer_reused_before_the_step_is_refused():
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1)
    first = model[3]
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64)
    first(x).sum().backward()
    x.add_(1)  # the next batch loaded into the same memory, before optimizer.step()
    with pytest.raises(RuntimeError, match="modified in place"):
        optimizer.step()


def test_accumulated_micro_batches_equal_one_batch():
    data = batch(size=6)
    whole, parts = network(), network()
    whole.eval(), parts.eval()
    one, many = (tdlrt.TDLRT(m, lr=0.1, momentum=0.9, tol=0.02) for m in (whole, parts))
    for _ in range(3):
        one.zero_grad(), many.zero_grad()
        backward(whole, data)
        for i in range(3):
            backward(parts, (data[0][2 * i : 2 * i + 2], data[1][2 * i : 2 * i + 2]), 1 / 3)
        one.step(), many.step()
    assert tdlrt.ranks(whole) == tdlrt.ranks(parts)
    for a, b in zip(tdlrt.to_dense(whole).parameters(), tdlrt.to_dense(parts).parameters()):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_layer_called_twice_equals_two_pass():
    results = []
    for integrator in ("one_pass", "two_pass"):
        torch.manual_seed(0)
        shared = tdlrt.TuckerLinear(8, 8, ranks=3, dtype=torch.float64)
        model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(8, 5).double())
        optimizer = tdlrt.TDLRT(model, lr=0.2, tol=0.02, integrator=integrator)
        for i in range(4):
            x = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i))

            def closure(x=x):
                optimizer.zero_grad()
                loss = (model(x) ** 2).mean()
                loss.backward()
                return loss

            if integrator == "two_pass":
                optimizer.step(closure)
            else:
                optimizer.step(closure if i % 2 else closure() and None)
        results.append(shared.weight.detach())
    # The weight grows to 8 in these four steps, and a difference by a factor of 30 in each: 1e-15 becomes 1e-12.
    assert torch.allclose(*results, rtol=0, atol=1e-12)


def test_frozen_bases_are_core_only_steps():
    model = network()
    layer = model[6]
    for factor in layer.factors:
        factor.requires_grad_(False)
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.3)
    factors, core = [f.clone() for f in layer.factors], layer.core.detach().clone()
    backward(model, batch())
    gradient = layer.core.grad.clone()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(factors, layer.factors))
    assert torch.allclose(layer.core, core - 0.1 * gradient, rtol=0, atol=1e-15)


def test_unused_layers_are_left_alone():
    model = nn.ModuleList([tdlrt.TuckerLinear(6, 6, ranks=2), tdlrt.TuckerLinear(6, 6, ranks=2)])
    optimizer = tdlrt.TDLRT(model, lr=0.1, weight_decay=0.1)
    before = [v.clone() for v in model[1].state_dict().values()]
    model[0](torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert same(before, list(model[1].state_dict().values()))


def test_fixed_ranks_and_bounds():
    def ranks_after(**options):
        model = network()
        run(model, tdlrt.TDLRT(model, lr=0.2, **options), 5)
        return tdlrt.ranks(model)

    start = tdlrt.ranks(network())
    assert ranks_after(tol=None) == start
    assert all(r <= 3 for ranks in ranks_after(tol=0.0, max_rank=3).values() for r in ranks[:2])
    floor = ranks_after(tol=0.9, min_rank=2)
    assert all(r == 2 for ranks in floor.values() for r in ranks[:2])
    mixed = dict.fromkeys(start, 0.9)
    mixed["3"] = None
    result = ranks_after(tol=mixed)
    assert result["3"] == start["3"]
    assert result["6"] < start["6"]


def test_tolerance_is_kept_in_the_group_and_can_be_scheduled():
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.2, tol=0.0)
    run(model, optimizer, 3)
    large = tdlrt.ranks(model)["6"]
    optimizer.param_groups[0]["tol"] = 0.8
    run(model, optimizer, 1)
    assert tdlrt.ranks(model)["6"] < large
    assert optimizer.truncation_errors["6"] <= 0.8


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "ReduceLROnPlateau", "CosineAnnealingLR"])
def test_schedulers_reach_the_base_optimiser(scheduler):
    problem = Quadratic()
    optimizer = tdlrt.TDLRT(problem.layer, lr=0.5, momentum=0.5, tol=0.0)
    kind = getattr(torch.optim.lr_scheduler, scheduler)
    options = {
        "OneCycleLR": {"max_lr": 0.5, "total_steps": 10},
        "ReduceLROnPlateau": {"patience": 0, "threshold": 10.0},
    }
    schedule = kind(optimizer, **options.get(scheduler, {"T_max": 10}))
    rates = []
    for _ in range(8):
        loss = problem.step(optimizer)
        schedule.step(loss) if scheduler == "ReduceLROnPlateau" else schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.base.param_groups[0]["lr"] == rates[-1]
    assert rates[-1] < rates[1]


def test_the_learning_rate_of_a_group_is_used():
    model = network()
    body = [p for n, p in model.named_parameters() if not n.startswith("8")]
    head = [p for n, p in model.named_parameters() if n.startswith("8")]
    optimizer = tdlrt.TDLRT(model, lr=0.1, tol=0.02, params=[{"params": body}, {"params": head, "lr": 0.0}])
    before = tdlrt.to_dense(model).state_dict()
    run(model, optimizer, 1)
    after = tdlrt.to_dense(model).state_dict()
    error = torch.linalg.vector_norm(after["8.weight"] - before["8.weight"])
    assert error <= 0.02 * torch.linalg.vector_norm(before["8.weight"]) * 1.0001  # truncation alone
    assert torch.equal(after["8.bias"], before["8.bias"])
    assert not torch.equal(after["6.bias"], before["6.bias"])


@pytest.mark.parametrize(
    ("base", "options"), [("sgd", {"momentum": 0.9}), ("adam", {"amsgrad": True}), ("adamw", {}), ("muon", {})]
)
def test_resuming_from_a_checkpoint_is_bitwise(base, options):
    def make(seed):
        model = network(seed)
        return model, tdlrt.TDLRT(
            model, lr=0.3 if base == "sgd" else 0.01, weight_decay=1e-3, tol=0.02, base=base, **options
        )

    model, optimizer = make(0)
    run(model, optimizer, 4)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    run(model, optimizer, 4, start=4)
    resumed, other = make(1)
    assert tdlrt.ranks(resumed) != tdlrt.ranks(model)  # before its first step
    run(resumed, other, 1)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(stored["model"])
    other.load_state_dict(stored["optimizer"])
    run(resumed, other, 4, start=4)
    assert same(snapshot(model, optimizer), snapshot(resumed, other))


def test_second_moments_stay_non_negative():
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.01, tol=0.05, base=torch.optim.NAdam)  # one for every entry
    for i in range(6):
        run(model, optimizer, 1, start=i)
        for layer in (model[3], model[6]):
            assert optimizer.state[layer.core]["exp_avg_sq"].shape == layer.core.shape
            assert optimizer.state[layer.core]["exp_avg_sq"].min() >= 0


@pytest.mark.long
def test_orthogonality_after_a_thousand_float32_steps():
    model = network(dtype=torch.float32)
    optimizer = tdlrt.TDLRT(model, lr=0.05, momentum=0.9, tol=0.02)
    worst = 0.0
    for i in range(20):
        run(model, optimizer, 50, start=50 * i, dtype=torch.float32)
        worst = max(worst, tdlrt.orthogonality_error(model))
    assert worst <= 1e-6


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr is -1.0; allowed"),
        ({"lr": "0.1"}, TypeError, "lr is '0.1'; allowed"),
        ({"lr": float("nan")}, ValueError, "lr is nan; allowed"),
        ({"lr": 0.1, "ranks": 4}, TypeError, "ranks: not among the arguments of TDLRT and of its base SGD"),
        (
            {"lr": 0.1, "base": torch.optim.LBFGS},
            TypeError,
            "weight_decay: not among .* base LBFGS, which takes params",
        ),
        ({"lr": 0.1, "max_grad_norm": "1"}, TypeError, "max_grad_norm is '1'"),
        ({"lr": 0.1, "tol": 1.5}, ValueError, r"tol is 1.5.*\[0, 1\)"),
        ({"lr": 0.1, "tol": {"6": 0.1}}, ValueError, "must name every one"),
        ({"lr": 0.1, "integrator": "rk4"}, ValueError, "integrator is 'rk4'; allowed are 'one_pass', 'two_pass'"),
        ({"lr": 0.1, "base": "lion"}, ValueError, "base is 'lion'"),
        ({"lr": 0.1, "base": 3}, TypeError, "base must be one of"),
        ({"lr": 0.1, "base": "adam", "momentum": 0.9}, ValueError, "momentum is 0.9"),
        ({"lr": 0.1, "tolerance_mode": "total"}, ValueError, "tolerance_mode is 'total'"),
        ({"lr": 0.1, "min_rank": 0}, ValueError, "min_rank is 0"),
        ({"lr": 0.1, "min_rank": 5, "max_rank": 4}, ValueError, "max_rank is 4"),
        ({"lr": 0.1, "on_nonfinite": "ignore"}, ValueError, "on_nonfinite is 'ignore'"),
    ],
)
def test_bad_arguments_are_named(options, error, words):
    with pytest.raises(error, match=words):
        tdlrt.TDLRT(network(), **options)


def test_missing_parameters_dtypes_and_closures():
    model = network()
    with pytest.raises(ValueError, match=r"params leaves out .*6\.core"):
        tdlrt.TDLRT(model, lr=0.1, params=[p for n, p in model.named_parameters() if not n.startswith("6")])
    with pytest.raises(TypeError, match="bfloat16"):
        tdlrt.TDLRT(network().bfloat16(), lr=0.1)
    with pytest.raises(TypeError, match="got generator; TDLRT takes the model, not its parameters"):
        tdlrt.TDLRT(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="closure is None"):
        tdlrt.TDLRT(model, lr=0.1, integrator="two_pass").step()
    with pytest.raises(RuntimeError, match="none of its calls was seen"):
        backward(model, batch())
        tdlrt.TDLRT(model, lr=0.1).step()


def test_an_unknown_base_state_is_refused():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    self.state[p]["curvature"] = torch.ones_like(p)

    class Late(Odd):
        """Takes another argument than its default says, so that it cannot be tried beforehand."""

        def __init__(self, params, lr, weight_decay, last=None):
            super().__init__(params, lr, weight_decay=weight_decay)
            self.defaults["unknown"] = last

    for base, key in ((Odd, "curvature"), (torch.optim.RMSprop, "square_avg"), (torch.optim.Adagrad, "sum")):
        with pytest.raises(ValueError, match=f"base keeps '{key}' per entry.*; known are momentum_buffer, exp_avg"):
            tdlrt.TDLRT(network(), lr=0.1, base=base)
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1, base=Late)
    with pytest.raises(ValueError, match="'curvature'"):
        run(model, optimizer, 2)


def test_a_frozen_core_with_factors_in_training_is_refused():
    model = network()
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "core"))
    optimizer = tdlrt.TDLRT(model, lr=0.1)
    layer.core.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    for refused in (lambda: run(model, optimizer, 1), lambda: tdlrt.TDLRT(model, lr=0.1)):
        with pytest.raises(ValueError, match=f"{name}.core is frozen, but its factors are not"):
            refused()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    layer.requires_grad_(False)
    run(model, optimizer, 1)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_step_at_learning_rate_zero_changes_no_weight_and_no_rank(lr):
    """As a warm-up may begin, and as torch.distributed.checkpoint makes optimiser states; tol would cut ranks."""
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.1, momentum=0.9, tol=0.9)
    ranks, before = tdlrt.ranks(model), dict(tdlrt.to_dense(model).named_parameters())
    optimizer.param_groups[0]["lr"] = lr
    backward(model, batch())
    optimizer.step()
    assert tdlrt.ranks(model) == ranks
    for name, value in tdlrt.to_dense(model).named_parameters():
        assert torch.allclose(value, before[name], rtol=0, atol=1e-12), name
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    backward(model, batch())
    optimizer.step()
    assert tdlrt.ranks(model) != ranks


@pytest.mark.parametrize("integrator", ["two_pass", "standard"])
def test_a_missing_closure_is_named_at_learning_rate_zero_too(integrator):
    """Where a warm-up begins; a step of zeros needs none, with which torch.distributed.checkpoint makes states."""
    model = network()
    optimizer = tdlrt.TDLRT(model, lr=0.0, momentum=0.9, integrator=integrator)
    backward(model, batch())
    with pytest.raises(ValueError, match=f"closure is None; integrator='{integrator}'"):
        optimizer.step()
    for p in model.parameters():
        p.grad.zero_()
    optimizer.step()
    assert all("momentum_buffer" in optimizer.state[layer.core] for layer in optimizer.layers.values())


def test_a_core_that_the_update_makes_infinite_is_put_back():
    model = network(dtype=torch.float32)
    optimizer = tdlrt.TDLRT(model, lr=1e38, momentum=0.9)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.split(".")[0] in ("3", "6")}
    backward(model, batch(dtype=torch.float32), 1e6)
    with pytest.raises(tdlrt.NonFiniteError, match=r"made the core of .* NaN or Inf; those layers were put back"):
        optimizer.step()
    after = dict(model.named_parameters())
    put_back = [n for n in before if after[n].shape == before[n].shape and torch.equal(after[n], before[n])]
    assert {n for n in before if "bias" not in n} <= set(put_back)
    for layer in (model[3], model[6]):
        assert not optimizer.state[layer.core]


def test_a_core_of_full_rank_is_put_back_too():
    layer = tdlrt.TuckerLinear(6, 6, bias=False)
    optimizer = tdlrt.TDLRT(layer, lr=1e38, momentum=0.9)
    before = layer.weight.detach().clone()
    (1e6 * layer(torch.randn(4, 6)).sum()).backward()
    with pytest.raises(tdlrt.NonFiniteError):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("tol", [None, 0.1])
def test_layers_of_two_dtypes_step_as_each_alone(tol):
    layers = [tdlrt.TuckerLinear(9, 7, ranks=3), tdlrt.TuckerLinear(8, 6, ranks=3).double()]
    rows = [torch.randn(5, 9), torch.randn(5, 8, dtype=torch.float64)]

    def trained(*which):
        chosen = torch.nn.ModuleList(copy.deepcopy(layers[i]) for i in which)
        optimizer = tdlrt.TDLRT(chosen, lr=0.1, momentum=0.9, tol=tol)
        for _ in range(3):
            optimizer.zero_grad()
            for layer, i in zip(chosen, which):
                layer(rows[i]).square().sum().backward()
            optimizer.step()
        return [layer.weight.detach() for layer in chosen]

    for found, alone in zip(trained(0, 1), trained(0) + trained(1), strict=True):
        assert torch.allclose(found, alone, rtol=0, atol=100 * torch.finfo(found.dtype).eps)


def test_gradients_whose_norm_overflows_are_finite():
    refuse_nonfinite([("large", torch.full((9,), 1e30))], LocalReducer())
    with pytest.raises(tdlrt.NonFiniteError, match=r"the gradient of bad holds"):
        refuse_nonfinite([("large", torch.full((9,), 1e30)), ("bad", torch.tensor([1.0, torch.inf]))], LocalReducer())
