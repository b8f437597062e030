"""Launch plans of the CUDA back end: pure host functions, tested over all sizes without a GPU.

Every tile of every problem has exactly one owner, launches stay inside every device's limits, and what a plan writes
lies inside its workspace or its outputs.
"""

import itertools
import math

import cuda_resources
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from launch_plans import DEVICES, OUT, WORKSPACE, assert_one_flag_each, check, plan_of, regions

from tucker_kernels import reference
from tucker_kernels.native import native_module

_C, _reason = native_module()
pytestmark = pytest.mark.skipif(_C is None, reason=_reason)

devices = st.sampled_from(sorted(DEVICES))
dtypes = st.sampled_from([0, 1])
quick = settings(max_examples=100, deadline=None)


def multi_mode_dot(dtype, problems, device):
    return check(plan_of("multi_mode_dot", dtype, problems, WORKSPACE, *DEVICES[device]), device)


@st.composite
def chains(draw):
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda s: math.prod(s) < 10**7))
    modes = draw(st.lists(st.sampled_from(range(len(shape))), min_size=1, max_size=4, unique=True))
    rows = draw(st.lists(st.integers(1, 40), min_size=len(modes), max_size=len(modes)))
    assume(math.prod(shape) * math.prod(rows) < 2**30)  # else 32 bits may not count what is between two products
    return OUT, OUT, shape, modes, rows, [OUT] * len(modes), draw(st.booleans())


def steps(problem, order):
    """(elements of the result, length of the sums) of every product, in this order."""
    _, _, shape, modes, rows, *_ = problem
    now = list(shape)
    for k in order:
        depth, now[modes[k]] = now[modes[k]], rows[k]
        yield math.prod(now), depth


@quick
@given(dtypes, st.lists(chains(), min_size=1, max_size=5), devices)
def test_multi_mode_dot_multiplies_every_mode_once_in_the_cheapest_order(dtype, problems, device):
    plan = multi_mode_dot(dtype, problems, device)
    assert len(plan["launches"]) == max(len(p[3]) for p in problems)
    found = [[] for _ in problems]
    for step, launch in enumerate(plan["launches"]):
        living = [at for p, at in zip(problems, found) if step < len(p[3])]
        for at, p in zip(living, launch["problems"], strict=True):
            at.append((p["m"] * p["n"], p["depth"]))
    for problem, at in zip(problems, found):
        possible = [list(steps(problem, order)) for order in itertools.permutations(range(len(problem[3])))]
        assert at in possible
        assert sum(map(math.prod, at)) == min(sum(map(math.prod, p)) for p in possible)


def test_multi_mode_dot_leaves_out_empty_results_and_keeps_empty_sums():
    empty = [(OUT, OUT, [0, 4], [1], [3], [OUT], False), (OUT, OUT, [4, 0], [0], [3], [OUT], False)]
    assert multi_mode_dot(0, empty, "A100")["launches"] == []
    plan = multi_mode_dot(0, [*empty, (OUT, OUT, [5, 0], [1], [3], [OUT], False)], "A100")
    assert [p["depth"] for p in plan["launches"][0]["problems"]] == [0]


@quick
@given(dtypes, *[st.integers(1, 3000)] * 2, *[st.integers(1, 300)] * 2, devices)
def test_cross_gram_cuts_the_sum_completely(dtype, outer, inner, rows, cols, device):
    problem = (OUT, 2 * OUT, 4 * OUT, outer, inner, rows, cols)
    plan = check(plan_of("cross_gram", dtype, [problem], WORKSPACE, *DEVICES[device]), device)
    products, *sums = plan["launches"]
    assert sum(p["depth"] for p in products["problems"]) == outer * inner
    size = 8 if dtype else 4
    begins = [OUT + at * size for at in _begins(outer, inner, rows, products["problems"])]
    assert [p["a"] for p in products["problems"]] == begins
    if sums:
        assert sums[0]["problems"][0]["depth"] == len(products["problems"])


def _begins(outer, inner, rows, problems):
    """Where each part of `a` (outer, rows, inner) begins, if parts follow each other."""
    done = 0
    for p in problems:
        yield done * rows if outer > 1 else done
        done += p["depth"]


@st.composite
def tangents(draw):
    n = draw(st.integers(0, 1024))
    return OUT, OUT, OUT, n, draw(st.integers(0, 1024)), draw(st.integers(1, 1024))


@quick
@given(dtypes, st.lists(tangents(), min_size=1, max_size=6), devices)
@example(0, [(OUT, OUT, OUT, 0, 0, 5), (OUT, OUT, OUT, 9, 2, 3)], "A100")
def test_tangent_basis_launches_as_often_whatever_the_list(dtype, problems, device):
    plan = check(plan_of("tangent_basis", dtype, problems, WORKSPACE, *DEVICES[device]), device)
    kernels = [launch["kernel"] for launch in plan["launches"]]
    assert len(kernels) <= (12 if dtype else 8)
    assert kernels.count("semidefinite_cholesky") == (3 if dtype else 2)
    for launch in plan["launches"]:
        if launch["kernel"] == "semidefinite_cholesky":
            assert [p["size"] for p in launch["problems"]] == [p[5] for p in problems]
            for p in launch["problems"]:
                assert p["size"] * 16 + p["resident"] * (p["resident"] + 1) * 4 <= launch["shared"]
                assert p["resident"] >= min(p["size"], 130)


@st.composite
def rotations(draw):
    size = draw(st.integers(1, 1500))
    rank = draw(st.integers(0, size))
    return OUT, OUT, OUT, draw(st.integers(1, 3000)), size, rank, draw(st.integers(rank, size))


@quick
@given(dtypes, st.lists(rotations(), min_size=1, max_size=5), devices)
def test_rotate_bases_is_three_launches(dtype, problems, device):
    plan = check(plan_of("rotate_bases", dtype, problems, WORKSPACE, *DEVICES[device]), device)
    living = [p for p in problems if p[5] > 0]
    kernels = [launch["kernel"] for launch in plan["launches"]]
    assert kernels == (["grouped_gemm", "gram", "triangular_product"] if living else [])
    for launch in plan["launches"]:
        assert len(launch["problems"]) == len(living)


@st.composite
def divisions(draw):
    outer, inner, rows = (draw(st.integers(0, most)) for most in (40, 40, 2000))
    return OUT, OUT, OUT, outer, draw(st.integers(0, 1024)), inner, rows


@quick
@given(dtypes, st.lists(divisions(), min_size=1, max_size=5), devices)
def test_gram_solve_is_four_launches(dtype, problems, device):
    plan = check(plan_of("gram_solve", dtype, problems, WORKSPACE, *DEVICES[device]), device)
    assert_one_flag_each(plan)
    living = [p for p in problems if p[4] > 0 and p[6] > 0]
    kernels = [launch["kernel"] for launch in plan["launches"]]
    wanted = ["gram", "semidefinite_cholesky", "triangular_product", "triangular_product"]
    assert kernels == (wanted if living else [])
    for launch in plan["launches"]:
        assert len(launch["problems"]) == len(living)
    if living:
        assert [p["depth"] for p in plan["launches"][0]["problems"]] == [p[3] * p[5] for p in living]


@st.composite
def truncations(draw, fixed):
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    cut = [draw(st.booleans()) for _ in shape]
    most = [draw(st.integers(1, 10)) for _ in shape]
    least = most if fixed else [draw(st.integers(1, m)) for m in most]
    tol = -1.0 if fixed else draw(st.floats(0, 1))
    return OUT, OUT, shape, cut, least, most, tol


@quick
@given(dtypes, truncations(fixed=True), devices)
def test_given_ranks_are_cut_as_the_reference_cuts_them(dtype, problem, device):
    plan = check(plan_of("hosvd_truncate", dtype, [problem], WORKSPACE, *DEVICES[device]), device)
    _, _, shape, cut, _, ranks, _ = problem
    core = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = reference.hosvd_truncate([core], cut, [-1.0], ranks, ranks, False)[2][0].tolist()
    found = [p for launch in plan["launches"] if launch["kernel"] == "jacobi_svd" for p in launch["problems"]]
    wanted = [r for r, mode in zip(expected, cut) if mode]
    assert [p["min_rank"] for p in found] == [p["max_rank"] for p in found] == wanted


@quick
@given(dtypes, st.lists(truncations(fixed=False), min_size=1, max_size=4), st.booleans(), devices)
def test_truncation_bounds_are_ordered_and_within_the_sizes(dtype, problems, per_mode, device):
    plan = check(plan_of("hosvd_truncate", dtype, problems, WORKSPACE, *DEVICES[device], per_mode), device)
    for launch in plan["launches"]:
        if launch["kernel"] == "jacobi_svd":
            for p in launch["problems"]:
                assert 1 <= p["min_rank"] <= p["max_rank"] <= p["size"]
    residual = [launch for launch in plan["launches"] if launch["kernel"] == "finish_truncation"]
    assert len(residual) == 1
    assert len(residual[0]["problems"]) == len(problems)


@quick
@given(dtypes, truncations(fixed=False), devices)
def test_the_worst_infeasible_rank_has_room_to_be_cut(dtype, problem, device):
    """As FinishProblem says, over all ranks that can be found; a smaller part of a larger room would not show."""
    plan = check(plan_of("hosvd_truncate", dtype, [problem], WORKSPACE, *DEVICES[device]), device)
    _, _, shape, cut, *_ = problem
    found = [p for launch in plan["launches"] if launch["kernel"] == "jacobi_svd" for p in launch["problems"]]
    bounds = iter((p["min_rank"], p["max_rank"]) for p in found)
    possible = [range(low, high + 1) for low, high in (next(bounds) if c else (n, n) for c, n in zip(cut, shape))]
    needed = 0
    for ranks in itertools.product(*possible):
        for rank, n, c in zip(ranks, shape, cut):
            others = math.prod(ranks) // rank
            if c and rank > others:
                needed = max(needed, (rank + n + 3) * others)
    work = plan["launches"][-1]["problems"][0]["work"]
    assert (work != 0) >= (needed > 0)
    if needed:
        ends = [at for at in (*regions(plan), WORKSPACE + plan["workspace"]) if at > work]
        assert min(ends) - work >= needed * 8


@quick
@given(dtypes, st.lists(st.tuples(*[st.integers(1, 200)] * 2), min_size=1, max_size=5))
def test_factorisations_have_a_flag_for_each_matrix(dtype, sizes):
    for name, count in (("tangent_basis", 3), ("batched_qr", 3), ("batched_svd", 4)):
        problems = [(*[OUT] * count, m, *[0] * (name == "tangent_basis"), n) for m, n in sizes]
        plan = check(plan_of(name, dtype, problems, WORKSPACE, *DEVICES["A100"]), "A100")
        assert_one_flag_each(plan)
        products = [launch for launch in plan["launches"] if launch["kernel"] == "grouped_gemm"]
        if name == "batched_qr":
            assert [p["flag"] for p in products[0]["problems"]] == [p["flag"] for p in plan["launches"][0]["problems"]]


@quick
@given(dtypes, *[st.integers(1, 1500)] * 2, devices)
def test_qr_and_svd_plans(dtype, m, n, device):
    for name, count in (("batched_qr", 3), ("batched_svd", 4)):
        problem = (*[OUT] * count, m, n)
        if min(m, n) > 1024:
            with pytest.raises(RuntimeError, match="does not support"):
                plan_of(name, dtype, [problem], WORKSPACE, *DEVICES[device])
        else:
            check(plan_of(name, dtype, [problem], WORKSPACE, *DEVICES[device]), device)


@quick
@given(dtypes, st.lists(st.integers(1, 1024), min_size=1, max_size=6), devices)
def test_blocks_share_the_matrices_that_one_cannot_hold(dtype, sizes, device):
    problems = [(*[OUT] * 4, n, n) for n in sizes]
    plan = check(plan_of("batched_svd", dtype, problems, WORKSPACE, *DEVICES[device]), device)
    (launch,) = (launch for launch in plan["launches"] if launch["kernel"] == "jacobi_svd")
    size, most, blocks, counters = (8 if dtype else 4), DEVICES[device][1] - launch["static_shared"], 0, []

    def bytes_of(columns, rows):  # with two elements and a double for each
        return columns * ((rows + 2) * size + 8)

    for p, n in zip(launch["problems"], sizes, strict=True):
        assert p["size"] == n
        assert p["first_block"] == blocks
        blocks += max(p["meetings"], 1)
        width = p["width"]
        assert (width == 0) == (bytes_of(n, n) <= most)
        assert max(bytes_of(2 * width or n, n), bytes_of(n, 0)) <= launch["shared"]
        if width:
            assert width in (4, 8, 16, 32)
            assert width == 32 or bytes_of(4 * width, n) > most
            assert 2 * width * (p["meetings"] - 1) < n <= 2 * width * p["meetings"]
            counters += [p["progress"] + 4 * i for i in range(3)]
        else:
            assert p["meetings"] == p["progress"] == 0
    assert launch["grid"] == blocks
    assert len(set(counters)) == len(counters), "every matrix has its own"
    for at in counters:
        assert plan["table"][at - WORKSPACE :][:4] == bytes(4)


@quick
@given(dtypes, *[st.integers(1, 1024)] * 2, st.sampled_from(["tangent_basis", "batched_svd"]))
def test_a_block_may_have_all_that_a_device_gives_and_no_more(dtype, m, n, name):
    """What a launch takes is enough for it, to the byte; with one less another plan fits."""
    problem = (OUT, OUT, OUT, m, 1, n) if name == "tangent_basis" else (*[OUT] * 4, m, n)
    plan = plan_of(name, dtype, [problem], WORKSPACE, *DEVICES["H200"])
    for i, launch in enumerate(plan["launches"]):
        taken = launch["shared"] + launch["static_shared"]
        if taken > 48 * 1024:  # which every device has
            again = plan_of(name, dtype, [problem], WORKSPACE, 132, taken)["launches"][i]
            assert again["shared"] == launch["shared"]
            check(plan_of(name, dtype, [problem], WORKSPACE, 132, taken - 1), (132, taken - 1))


def compiled_shared_bytes():
    """Shared memory that each kernel declares, by the compiler's word: the most of all architectures and types."""
    declared = {}
    for table in (v for v in cuda_resources.expected().values() if isinstance(v, dict)):
        for name, found in table.items():
            kernel = name.split("<")[0]
            declared[kernel] = max(declared.get(kernel, 0), found["shared"])
    return declared


@pytest.mark.parametrize("device", sorted(DEVICES))
@pytest.mark.parametrize("dtype", [0, 1])
def test_declared_and_dynamic_shared_memory_fit_a_block(dtype, device):
    """Over all sizes, hence also where the dynamic part takes all that is left: the driver refuses a byte more."""
    declared, dynamic, limit = compiled_shared_bytes(), {}, DEVICES[device][1]
    plans = [
        *(plan_of("tangent_basis", dtype, [(OUT, OUT, OUT, n, 1, 1)], 0, 1, limit) for n in range(1, 4000)),
        *(plan_of("batched_svd", dtype, [(OUT, OUT, OUT, OUT, n, n)], 0, 1, limit) for n in range(1, 1025)),
    ]
    for launch in (launch for plan in plans for launch in plan["launches"]):
        kernel = launch["kernel"]
        dynamic[kernel] = max(dynamic.get(kernel, 0), launch["shared"])
        assert declared[kernel] <= launch["static_shared"]
        assert launch["static_shared"] + launch["shared"] <= limit
    for kernel in ("project_out", "semidefinite_cholesky", "jacobi_svd"):  # and little is wasted
        assert dynamic[kernel] + declared[kernel] > 0.97 * limit


def test_a_plan_is_a_function_of_its_arguments():
    problems = [(OUT, OUT, OUT, 512, 64, 64), (OUT, OUT, OUT, 9, 3, 3)]
    first, second = (plan_of("tangent_basis", 0, problems, WORKSPACE, 132, 232448) for _ in range(2))
    assert first == second
    empty = plan_of("tangent_basis", 0, problems, 0, 132, 232448)
    assert empty["workspace"] == first["workspace"]


def resnet18(fraction):
    """(U, D) sizes of the factorised modes of a ResNet18: output and input channels of its 20 convolutions."""
    layers = [(64, 3)] + [(64, 64)] * 4 + [(128, 64), (128, 64)] + [(128, 128)] * 3
    layers += [(256, 128), (256, 128)] + [(256, 256)] * 3 + [(512, 256), (512, 256)] + [(512, 512)] * 3
    return [(max(1, int(fraction * n_out)), max(1, int(fraction * n_in))) for n_out, n_in in layers]


def launches(plan):
    """All launches of a plan, those that store its table included."""
    return len(plan["launches"]) + len(plan["stores"])


def unpacked(plan):
    """The table that its pieces bring to the device, and how often each group of 32 words is written."""
    groups = -(-len(plan["table"]) // 128)
    table, written = np.zeros((groups, 32), np.uint32), np.zeros(groups, int)
    for piece in plan["stores"]:
        assert len(piece) <= 32764 - 8, "a kernel's parameters, beside a pointer"
        first, count, *_ = (words := np.frombuffer(piece, np.uint32))
        words = words[2:]
        for g in range(count):
            present = words[2 * g] >> np.arange(32) & 1 == 1
            begin = words[2 * g + 1]
            table[first + g, present] = words[begin : begin + present.sum()]
            written[first + g] += 1
    return table.tobytes()[: len(plan["table"])], written


@pytest.mark.parametrize("count", [1, 7, 200, 2000])
def test_tables_arrive_whole_without_their_zeros(count):
    generator = np.random.default_rng(count)
    sizes = generator.integers(1, 200, (count, 3)).tolist()
    address = generator.integers(1 << 40, 1 << 47)
    problems = [(int(address), OUT, OUT + 1, *size) for size in sizes]
    plan = plan_of("tangent_basis", 0, problems, WORKSPACE, *DEVICES["H200"])
    table, written = unpacked(plan)
    assert table == plan["table"]
    assert (written == 1).all()
    assert len(plan["stores"]) <= math.ceil(0.75 * len(plan["table"]) / 32728)


@pytest.mark.parametrize(("modes", "most"), [(2, 24), (4, 29)])
@pytest.mark.parametrize("fraction", [1 / 8, 1 / 4, 1 / 2])
def test_a_resnet18_step_takes_few_launches(fraction, modes, most):
    """Kernels run once for all layers and modes, so that only the table grows with depth."""
    ranks = [r for pair in resnet18(fraction) for r in pair]
    OUT = (1 << 50) + 0x12345600  # as addresses are: neither of the two words is zero
    tangent = [(OUT, OUT, OUT, int(r / fraction), r, r) for r in ranks]
    rotated = [(OUT, OUT, OUT, int(r / fraction), 2 * r, r, 2 * r) for r in ranks]
    truncated = [1] * modes + [0] * (4 - modes)
    cores = [
        (OUT, OUT, shape, truncated, [1, 1, 1, 1], shape, 0.1)
        for shape in [[2 * a, 2 * b, 3, 3] for a, b in resnet18(fraction)]
    ]

    def plans(layers):
        return (
            check(plan_of("tangent_basis", 0, tangent[: 2 * layers], WORKSPACE, *DEVICES["H200"]), "H200"),
            check(plan_of("hosvd_truncate", 0, cores[:layers], WORKSPACE, *DEVICES["H200"]), "H200"),
            check(plan_of("rotate_bases", 0, rotated[: 2 * layers], WORKSPACE, *DEVICES["H200"]), "H200"),
        )

    whole, shallow = plans(len(cores)), plans(1)
    assert [len(p["launches"]) for p in whole] == [len(p["launches"]) for p in shallow] == [8, 6 + 2 * modes, 3]
    assert sum(map(launches, whole)) <= most  # without momentum; see the next test


@pytest.mark.parametrize("modes", [2, 4])
@pytest.mark.parametrize("fraction", [1 / 8, 1 / 4, 1 / 2])
def test_momentum_adds_six_calls_to_a_resnet18_step(fraction, modes):
    """What momentum.py and transport.py call, at full capacity; tests/test_step_launches.py sees that it is that."""
    OUT = (1 << 50) + 0x12345600
    sizes = [(int(r / fraction), r) for pair in resnet18(fraction) for r in pair]
    shapes = [[a, b, 3, 3] for a, b in resnet18(fraction)]
    places = [(s, mode, math.prod(s[:mode]), math.prod(s[mode + 1 :])) for s in shapes for mode in range(2)]
    crossed = [(OUT, OUT, OUT, n, 1, r, r) for n, r in sizes]
    divided = [(OUT, OUT, OUT, outer, s[mode], inner, s[mode]) for s, mode, outer, inner in places]
    blocks = [(OUT, OUT, s, [mode], [s[mode]], [OUT], False) for s, mode, *_ in places]
    buffers = [
        (OUT, OUT, [2 * a, 2 * b, 3, 3], list(range(modes)), [a, b, 3, 3][:modes], [OUT] * modes, True)
        for a, b, *_ in shapes
    ]
    thin = [(OUT, OUT, [n, r], [1], [r], [OUT], True) for n, r in sizes]
    brought_in = [("cross_gram", crossed), ("gram_solve", divided), ("multi_mode_dot", blocks)]
    carried_on = [("multi_mode_dot", buffers + thin), ("cross_gram", crossed), ("multi_mode_dot", thin)]
    plans = [
        check(plan_of(name, 0, problems, WORKSPACE, *DEVICES["H200"]), "H200")
        for name, problems in (*brought_in, *carried_on)
    ]
    assert [len(plan["launches"]) for plan in plans] == [1, 4, 1, modes, 1, 1]
    assert sum(map(launches, plans)) == 14 + modes  # each of the six brings its table


KERNELS = {
    "tangent_basis": ["project_out", "gram", "semidefinite_cholesky", "triangular_product"] * 2,
    "batched_qr": ["project_out"] + ["gram", "semidefinite_cholesky", "triangular_product"] * 2 + ["grouped_gemm"],
}


def test_which_kernels_run():
    """In particular nothing between them: projections, norms and the sums of a split Gram matrix are part of these."""
    tangent = plan_of("tangent_basis", 0, [(OUT, OUT, OUT, 5000, 64, 64)], WORKSPACE, *DEVICES["H200"])
    qr = plan_of("batched_qr", 0, [(OUT, OUT, OUT, 5000, 64)], WORKSPACE, *DEVICES["H200"])
    assert tangent["launches"][1]["problems"][0]["splits"] > 1
    for name, plan in (("tangent_basis", tangent), ("batched_qr", qr)):
        assert [launch["kernel"] for launch in plan["launches"]] == KERNELS[name]
