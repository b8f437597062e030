"""Everything public is annotated: a type checker otherwise takes `padding=0` for an int and refuses a tuple."""

import inspect

import pytest
import tdlrt

import tucker_kernels as tk

FUNCTIONS = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (tk, tdlrt)
    for name in package.__all__
    if name not in ("functions", "NonFiniteError")  # a module, and an exception like any other
}
METHODS = {
    f"{name}.{method}": getattr(owner, method)
    for name, owner in FUNCTIONS.items()
    if inspect.isclass(owner)
    for method in (
        "forward",
        "from_dense",
        "to_dense",
        "to_sequential",
        "merge",
        "step",
        "zero_grad",
        "load_state_dict",
        "add_param_group",
        "freeze_bases",
        "active_ranks",
        "compact",
    )
    if method in {m for c in owner.__mro__ if c.__module__.startswith("tdlrt") for m in vars(c)}
}


@pytest.mark.parametrize("name", {**FUNCTIONS, **METHODS})
def test_every_argument_and_result_is_annotated(name):
    thing = {**FUNCTIONS, **METHODS}[name]
    constructor = inspect.isclass(thing)
    signature = inspect.signature(thing.__init__ if constructor else thing)
    arguments = [p for p in signature.parameters.values() if p.name != "self"]
    bare = [p.name for p in arguments if p.annotation is p.empty]
    assert not bare
    if not constructor:
        assert signature.return_annotation is not signature.empty
