"""The efficient algorithm of the paper, and the oracle for one-pass: a second evaluation at the augmented point."""

from tdlrt.expansion import enter, expand
from tdlrt.integrators.checks import core_gradients, refuse_nonfinite
from tdlrt.integrators.replay import Replay


def two_pass(optimizer, closure):
    evaluate = Replay(optimizer, closure)
    loss = evaluate()
    expansions = expand(optimizer.layers_with_gradient(), optimizer)
    refuse_nonfinite(core_gradients(expansions) + optimizer.dense_gradients(), optimizer.reducer)
    # Where no basis grew, this evaluation has given the gradient already.
    second_pass(optimizer, expansions, evaluate if any(e.grew for e in expansions) else None)
    return loss, expansions


def second_pass(optimizer, expansions, evaluate):
    """Moves all layers to their augmented points and evaluates there, if need be; moves them back if that fails."""
    enter(expansions, optimizer.state)
    if evaluate is None:
        return
    try:
        evaluate()
        refuse_nonfinite(core_gradients(expansions) + optimizer.dense_gradients(), optimizer.reducer)
    except BaseException:
        for e in expansions:
            e.leave(optimizer.state)
        raise
