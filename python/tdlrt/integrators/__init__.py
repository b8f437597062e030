"""The integrators: how the gradient of the augmented core is obtained.

Each is a function (optimizer, closure) -> (loss, expansions) that leaves every layer with a gradient at its augmented
point and the gradient of the augmented core in `core.grad`, or changes nothing and raises. What follows is the same for
all: the base optimiser steps the cores and all other parameters, and the cores are truncated.
"""

from tdlrt.integrators.one_pass import one_pass
from tdlrt.integrators.parallel import parallel
from tdlrt.integrators.standard import standard
from tdlrt.integrators.two_pass import two_pass

INTEGRATORS = {"one_pass": one_pass, "two_pass": two_pass, "standard": standard, "parallel": parallel}
# These contract the kept pairs (input, grad_output); the others evaluate the closure more than once.
FROM_PAIRS = ("one_pass", "parallel")
