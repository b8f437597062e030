"""The executor finds planted mistakes: each one is caught, by the right means, and the right kernel passes.

Plain, a mistake shows as an error of the executor or as a wrong result in some order of the threads. With a
sanitizer, the process ends with a report, so those cases run in a process of their own.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from emu import emulator

pytestmark = pytest.mark.sanitize
ROWS, THREADS = 3, 64
EXECUTOR_SAYS = {
    "overrun": "outside shared memory",
    "wrong_mask": "mask leaves it out",
    "source_outside": "outside its mask",
    "divergent_barrier": "different barriers",
    "early_exit": "not every thread reaches",
}
RESULT_SHOWS = ("missing_barrier", "off_by_one", "racing_blocks")
SANITIZER_SAYS = {
    "address": {
        "off_by_one": "AddressSanitizer: use-after-poison",
        "overrun": "AddressSanitizer: use-after-poison",
    },
    "thread": {
        "missing_barrier": "ThreadSanitizer: data race",
        "shuffle_as_barrier": "ThreadSanitizer: data race",
        "racing_blocks": "ThreadSanitizer: data race",
    },
}


def problem():
    return np.arange(ROWS * THREADS, dtype=np.float32).reshape(ROWS, THREADS)


def right(x, result):
    mirrored, total = result
    return np.array_equal(mirrored, x[:, ::-1]) and np.array_equal(total, x.sum(1))


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_right_kernel_passes(order):
    emulator.set_thread_order(order)
    x = problem()
    assert right(x, emulator.mirror_and_sum("none", x))


@pytest.mark.parametrize("mistake", EXECUTOR_SAYS)
def test_executor_reports(mistake):
    if mistake in SANITIZER_SAYS.get(emulator.sanitizer(), {}):
        return assert_sanitizer_reports(mistake)
    emulator.set_thread_order("ascending")
    with pytest.raises(emulator.EmulationError, match=EXECUTOR_SAYS[mistake]) as caught:
        emulator.mirror_and_sum(mistake, problem())
    assert "mirror_and_sum" in str(caught.value)
    x = problem()
    assert right(x, emulator.mirror_and_sum("none", x)), "the executor must work on after an error"


@pytest.mark.parametrize("mistake", RESULT_SHOWS)
def test_result_shows(mistake):
    if mistake in SANITIZER_SAYS.get(emulator.sanitizer(), {}):
        return assert_sanitizer_reports(mistake)
    x = problem()
    wrong = []
    for order in emulator.ORDERS:
        emulator.set_thread_order(order)
        wrong.append(not right(x, emulator.mirror_and_sum(mistake, x)))
    assert any(wrong)


def test_shuffle_does_not_order_memory():
    """Only ThreadSanitizer can see this one: the executor's own shuffle happens to wait for every lane."""
    if emulator.sanitizer() == "thread":
        return assert_sanitizer_reports("shuffle_as_barrier")
    x = problem()
    assert right(x, emulator.mirror_and_sum("shuffle_as_barrier", x))


def assert_sanitizer_reports(mistake):
    program = f"from emu.test_planted import *; emulator.mirror_and_sum({mistake!r}, problem())"
    path = os.pathsep.join(filter(None, [str(emulator.ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert process.returncode != 0
    assert SANITIZER_SAYS[emulator.sanitizer()][mistake] in process.stderr
