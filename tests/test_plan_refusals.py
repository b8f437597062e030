"""What launch plans of the CUDA back end refuse: sizes that make no sense, and what kernels cannot hold or count."""

import pytest
from launch_plans import OUT, WORKSPACE, plan_of

from tucker_kernels.native import native_module

_C, _reason = native_module()
pytestmark = pytest.mark.skipif(_C is None, reason=_reason)

PROBLEMS = {
    "tangent_basis": (OUT, OUT, OUT, 9, 2, 3),
    "hosvd_truncate": (OUT, OUT, [4, 5], [True, True], [1, 1], [2, 2], 0.1),
    "rotate_bases": (OUT, OUT, OUT, 9, 4, 3, 4),
    "gram_solve": (OUT, OUT, OUT, 2, 3, 4, 5),
    "batched_qr": (OUT, OUT, OUT, 4, 5),
    "batched_svd": (OUT, OUT, OUT, OUT, 4, 5),
    "cross_gram": (OUT, OUT, OUT, 2, 3, 4, 5),
    "multi_mode_dot": (OUT, OUT, [4, 5], [1], [3], [OUT], False),
}


def is_size(entry):
    return type(entry) is int and entry != OUT


def with_one_negative(problem):
    """The problem with each of its sizes and modes negative in turn."""
    for i, entry in enumerate(problem):
        if is_size(entry):
            yield (*problem[:i], -1, *problem[i + 1 :])
        elif isinstance(entry, list):
            for k in filter(lambda k: is_size(entry[k]), range(len(entry))):
                yield (*problem[:i], [*entry[:k], -1, *entry[k + 1 :]], *problem[i + 1 :])


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_size_is_negative(name):
    plan_of(name, 0, [PROBLEMS[name]], WORKSPACE, 1, 101376)
    for problem in with_one_negative(PROBLEMS[name]):
        with pytest.raises(RuntimeError, match="out of range"):
            plan_of(name, 0, [PROBLEMS[name], problem], WORKSPACE, 1, 101376)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_of("tangent_basis", 0, [(0, 0, 0, 2000, 4, 1025)], 0, 1, 101376), "does not support"),
        (lambda: plan_of("gram_solve", 0, [(0, 0, 0, 1, 1025, 4, 4)], 0, 1, 101376), "does not support"),
        (lambda: plan_of("multi_mode_dot", 0, [(0, 0, [2], [1], [1], [0], False)], 0, 1, 101376), "out of range"),
        (
            lambda: plan_of("multi_mode_dot", 0, [(0, 0, [2, 2], [1, 1], [1, 1], [0, 0], 0)], 0, 1, 101376),
            "out of range",
        ),
        (lambda: plan_of("multi_mode_dot", 0, [(0, 0, [2**31], [0], [1], [0], False)], 0, 1, 101376), "support"),
        (lambda: plan_of("multi_mode_dot", 7, [(0, 0, [2], [0], [1], [0], False)], 0, 1, 101376), "support"),
        (lambda: plan_of("multi_mode_dot", 0, [(0, 0, [2], [], [], [], False)], 0, 1, 101376), "out of range"),
        (lambda: plan_of("rotate_bases", 0, [(0, 0, 0, 9, 5, 4, 3)], 0, 1, 101376), "out of range"),
        (lambda: plan_of("hosvd_truncate", 0, [PROBLEMS["hosvd_truncate"]], 0, 1, 101376, width=1), "out of range"),
        (lambda: plan_of("hosvd_truncate", 0, [(0, 0, [], [], [], [], 0.1)], 0, 1, 101376), "out of range"),
        (lambda: plan_of("hosvd_truncate", 0, [(0, 0, [1025], [True], [1], [2], 0.1)], 0, 1, 101376), "support"),
        (lambda: _C.tangent_basis_cuda_plan(0, 0, -1, 0, 0, 1, 101376), "out of range"),
    ],
)
def test_plans_refuse_what_they_cannot_do(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


LONG = 2**31 - 4096  # the kernels count in 32 bits, with room for a tile


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tangent_basis", lambda n: (0, 0, 0, n, 1, 1)),
        ("tangent_basis", lambda n: (0, 0, 0, 1, n, 1)),
        ("batched_qr", lambda n: (0, 0, 0, n, 1)),
        ("batched_svd", lambda n: (0, 0, 0, 0, 1, n)),
        ("gram_solve", lambda n: (0, 0, 0, 1, 1, 1, n)),
        ("gram_solve", lambda n: (0, 0, 0, n, 1, 1, 1)),
        ("rotate_bases", lambda n: (0, 0, 0, n, 1, 1, 1)),
        ("cross_gram", lambda n: (0, 0, 0, n, 1, 1, 1)),
        ("cross_gram", lambda n: (0, 0, 0, 1, 1, n, 1)),
        ("hosvd_truncate", lambda n: (0, 0, [n, 1], [0, 1], [1, 1], [1, 1], 0.1)),
        ("multi_mode_dot", lambda n: (0, 0, [1, 1], [0], [n], [0], False)),
        ("multi_mode_dot", lambda n: (0, 0, [1, 1, n], [0], [1], [0], False)),
        ("multi_mode_dot", lambda n: (0, 0, [1, 4, n // 4], [0], [1], [0], False)),
        ("multi_mode_dot", lambda n: (0, 0, [1, 1, 4], [0, 1], [n // 4] * 2, [0, 0], False)),
    ],
)
def test_what_32_bits_cannot_count_is_refused(name, problem):
    with pytest.raises(RuntimeError, match="support"):
        plan_of(name, 0, [problem(LONG)], 0, 1, 101376)
    plan_of(name, 0, [problem(LONG // 2 // 4)], 0, 1, 101376)
