"""Calls of operators that go past torch's dispatcher to their kernel, and those that must not.

What modes, transforms and subclasses see of an operator is tested here; that both ways give the same numbers, by every
other test, since public functions take the short way and direct calls of `torch.ops` the long one.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode

import tucker_kernels as tk
from tucker_kernels import library

X, M = torch.randn(3, 4), torch.randn(2, 4)


def product(x=X, m=M):
    return tk.mode_dot(x, m, 1)


@pytest.fixture
def through(monkeypatch):
    """Which way calls go: a list of True (past the dispatcher) and False."""
    ways, unobserved = [], library._unobserved

    def asked(args):
        ways.append(unobserved(args))
        return ways[-1]

    monkeypatch.setattr(library, "_unobserved", asked)
    return ways


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_plain_tensors_go_straight_to_the_kernel(context, through):
    with context():
        torch.testing.assert_close(product(), X @ M.T)
        torch.testing.assert_close(product(torch.nn.Parameter(X)), X @ M.T)
    assert through == [True, True]


def test_the_backward_pass_goes_straight_to_the_kernel(through):
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(product(x).sum(), x)
    torch.testing.assert_close(found, M.sum(0).expand(3, 4))
    assert through == [True, True]


def test_tensors_of_inference_mode_are_read_outside_of_it(through):
    with torch.inference_mode():
        x = X.clone()
    with torch.no_grad():
        torch.testing.assert_close(product(x), X @ M.T)
    assert through == [True]


def test_a_lazily_negated_tensor_is_negated(through):
    negated = torch.complex(torch.zeros_like(X), X).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(product(negated), -X @ M.T)
    torch.testing.assert_close(product(m=torch.complex(M, -M).conj().imag), X @ M.T)
    assert through == [False, False]


def test_zeros_without_memory_are_read_as_zeros(through):
    assert torch.equal(product(torch._efficientzerotensor(3, 4)), torch.zeros(3, 2))
    assert through == [False]


def test_a_tensor_that_outlived_its_transform_is_unwrapped(through):
    kept = []
    grad(lambda x: (kept.append(x), x.sum())[1])(X)
    with torch.no_grad():
        torch.testing.assert_close(product(kept[0]), X @ M.T)
    assert through == [False]


def test_a_dispatch_mode_sees_the_operator():
    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (func.name(),)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        product()
    assert "tucker_kernels::mode_dot" in seen.names


def test_a_profiler_sees_the_operator():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        product()
    assert "tucker_kernels::mode_dot" in {event.key for event in profile.key_averages()}


def test_a_subclass_sees_the_operator():
    seen = []

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    with torch.no_grad():
        y = product(X.as_subclass(Named))
    assert type(y) is Named
    assert "tucker_kernels.mode_dot.default" in seen


def test_a_function_mode_sees_the_operator():
    class Seen(torch.overrides.TorchFunctionMode):
        names = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names += (str(func),)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        product()
    assert "tucker_kernels.mode_dot.default" in seen.names


def test_fake_tensors_stay_fake(through):
    with FakeTensorMode() as mode:
        y = product(mode.from_tensor(X), mode.from_tensor(M))
    assert type(y) is not torch.Tensor
    assert y.shape == (3, 2)
    outside = product(mode.from_tensor(X), mode.from_tensor(M))
    assert type(outside) is type(y)
    assert through == [False, False]
