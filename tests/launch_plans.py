"""A launch plan of the CUDA back end as the compiled module shows it, and what holds for every one."""

import math

import numpy as np

from tucker_kernels.native import native_module
from tucker_kernels.tables import pad

_C, _ = native_module()

WORKSPACE = 1 << 40  # an address; plans do not touch it
OUT = 1 << 50
SKIP = 0  # OnFlag in csrc/kernels/problems.h
DEVICES = {"A100": (108, 166912), "RTX 4090": (128, 101376), "H200": (132, 232448), "smallest": (1, 101376)}


def fields(name, problem):
    """The entries of a problem's struct."""
    if name == "multi_mode_dot":
        tensor, out, shape, modes, rows, matrices, transpose = problem
        return tensor, out, len(shape), len(modes), transpose, *map(pad, (shape, modes, rows, matrices))
    if name == "hosvd_truncate":
        core, new_core, shape, truncated, least, most, _ = problem
        return core, new_core, len(shape), *map(pad, (shape, truncated, least, most, [OUT] * len(shape)))
    return problem


def plan_of(name, dtype, problems, workspace, multiprocessors, shared_bytes, per_mode=False, width=4):
    rows = [list(np.hstack(fields(name, p))) for p in problems]
    table = np.array(rows, np.int64)
    rest = ()
    if name == "tangent_basis":
        rest = (OUT,)  # counts
    if name == "hosvd_truncate":
        tol = np.array([p[-1] for p in problems], np.float64)
        rest = (tol.ctypes.data, per_mode, OUT, width, OUT)
    call = getattr(_C, f"{name}_cuda_plan")
    plan = call(dtype, table.ctypes.data, len(problems), *rest, workspace, multiprocessors, shared_bytes)
    return plan | {"dtype": dtype}


def tiles_of(kernel, p):
    if kernel == "grouped_gemm":
        return math.ceil(p["m"] / 64) * math.ceil(p["n"] / 64)
    if kernel == "triangular_product":
        return math.ceil(p["m"] / 64) * math.ceil(p["n"] / 64)
    if kernel == "project_out":
        return max(1, math.ceil(p["cols"] / 16))
    if kernel == "gram":
        blocks = math.ceil(p["size"] / 64)
        return blocks * (blocks + 1) // 2 * p["splits"]
    return 1


def written(kernel, p, size):
    """Field and bytes of what a problem of numbers of this size writes."""
    n = p.get("size", 0)
    tiles = math.ceil(n / 64) * (math.ceil(n / 64) + 1) // 2
    return {
        "grouped_gemm": lambda: {"out": p["m"] * p["n"] * size, "squares": tiles_of(kernel, p) * 8},
        "project_out": lambda: {"out": p["n"] * p["cols"] * size, "work": tiles_of(kernel, p) * p["n"] * 16 * size},
        "gram": lambda: {"out": n * n * 8, "partial": p["splits"] * n * n * 8, "finished": tiles * 4},
        "semidefinite_cholesky": lambda: {
            "inverse": n * n * 8,
            "factor": n * n * size,
            "work": n * (n + 1) // 2 * 8,
            "trace": 8,
        },
        "triangular_product": lambda: {"out": p["m"] * p["n"] * size},
        "jacobi_svd": lambda: {"out": n * n * size, "factor": n * n * size, "progress": 12},
        "finish_truncation": lambda: {"work": 8},
    }[kernel]()


def regions(plan):
    """Address → bytes of the parts of the workspace that launches write, none of which reaches into the next."""
    size, found = (8 if plan["dtype"] else 4), {}
    for launch in plan["launches"]:
        own = set()
        for p in launch["problems"]:
            for name, length in written(launch["kernel"], p, size).items():
                at = p[name]
                if WORKSPACE <= at < OUT:
                    assert at not in own, f"{launch['kernel']}: {name} is written twice"
                    own.add(at)
                    # What comes in the table lies close together, and so do the parts of one sum.
                    loose = at < WORKSPACE + len(plan["table"]) or launch["kernel"] == "grouped_gemm"
                    assert loose or at % 256 == 0
                    found[at] = max(found.get(at, 0), length)
    ends = [at + length for at, length in sorted(found.items())]
    assert all(end <= begin for end, begin in zip(ends, [*sorted(found)[1:], WORKSPACE + plan["workspace"]]))
    return found


def assert_one_flag_each(plan):
    """Every problem of the operator has a flag of its own, and each kernel that may meet NaN looks at that."""
    flagged = [launch for launch in plan["launches"] if launch["kernel"] not in ("gram", "grouped_gemm")]
    flags = {tuple(p["flag"] for p in launch["problems"]) for launch in flagged}
    for own in flags:
        assert len(set(own)) == len(own)
        assert all(own)
    assert len(flags) <= 1


def check(plan, device):
    """What holds for every plan; `device` is one of those above, or what it has."""
    regions(plan)
    multiprocessors, shared = DEVICES.get(device, device)
    end = WORKSPACE + plan["workspace"]
    assert len(plan["table"]) <= plan["workspace"]
    scratch = WORKSPACE + math.ceil(len(plan["table"]) / 256) * 256
    for launch in plan["launches"]:
        assert 1 <= launch["grid"] <= 2**31 - 1
        assert launch["block"] % 32 == 0
        assert 32 <= launch["block"] <= 1024
        assert launch["shared"] + launch["static_shared"] <= shared <= 232448
        problems = launch["problems"]
        if "first_tile" in problems[0]:
            expected = 0
            for p in problems:
                assert p["first_tile"] == expected
                owned = tiles_of(launch["kernel"], p)
                assert owned > 0
                expected += owned
            assert launch["work"] == expected
            assert launch["grid"] == min(expected, 4 * multiprocessors)
        else:
            assert launch["grid"] == sum(max(p.get("meetings", 1), 1) for p in problems)
        for p in problems:
            if "resident" in p:  # rows that do not fit shared memory lie in device memory, and no others
                assert (p["work"] != 0) == (p["resident"] < p["size"])
            if "on_flag" in p and p["flag"] and p["out"] >= OUT:
                assert p["on_flag"] != SKIP, "what a caller gets is always written"
            for name in ("out", "partial", "work"):
                address = p.get(name, 0)
                assert address == 0 or address >= OUT or scratch <= address < end, f"{launch['kernel']}: {name}"
    return plan
