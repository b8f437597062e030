"""What one call costs before any arithmetic: microseconds per ring, on operands of a few elements.

    python bench/overhead.py            # prints the table, writes bench/results/overhead.json

Rows go from the inside out: the compiled kernel called with pointers, the back end's Python, torch's dispatcher, the
`torch.autograd.Function`, the public function with its checks, and the same where a gradient is wanted. Each column
is one operator. The last rows are what a user would write in plain torch. One thread.
"""

import harness
import torch

import tucker_kernels as tk
from tucker_kernels import cpu, functions, reference
from tucker_kernels.library import call, ops
from tucker_kernels.native import native_module

X, M = torch.randn(2, 3, 4), torch.randn(2, 3)
IMAGE, CORE = torch.randn(1, 3, 4, 4), torch.randn(2, 2, 3, 3)
FACTORS = [torch.randn(4, 2), torch.randn(3, 2), None, None]
GEOMETRY = ([1, 1], [0, 0], [1, 1])
ROWS = torch.randn(1, 3)


def wanting_gradients(tensor):
    return tensor.clone().requires_grad_()


def mode_dot():
    module = native_module()[0]
    y, grad = X.new_empty(2, 2, 4), wanting_gradients(X)
    return {
        "compiled kernel": lambda: module.mode_dot_cpu(
            0, X.data_ptr(), 2, 3, 4, M.data_ptr(), 2, False, y.data_ptr(), 1
        ),
        "back end": lambda: cpu.mode_dot(X, M, 1, False),
        "reference": lambda: reference.mode_dot(X, M, 1, False),
        "dispatcher, below autograd": lambda: call(ops.mode_dot.default, X, M, 1, False),
        "dispatcher": lambda: ops.mode_dot.default(X, M, 1, False),
        "Function": lambda: functions.ModeDot.apply(grad, M, 1, False),
        "public": lambda: tk.mode_dot(X, M, 1),
        "public, gradient wanted": lambda: tk.mode_dot(grad, M, 1),
        "torch": lambda: torch.einsum("bij,ri->brj", X, M),
        "torch, gradient wanted": lambda: torch.einsum("bij,ri->brj", grad, M),
    }


def tucker_conv():
    grad, weight = wanting_gradients(IMAGE), tk.tucker_to_tensor(CORE, FACTORS)
    operands = (IMAGE, CORE, FACTORS[0], FACTORS[1], None)
    first, last = FACTORS[1].T[:, :, None, None].contiguous(), FACTORS[0][:, :, None, None]

    def chain(x):
        return torch.conv2d(torch.conv2d(torch.conv2d(x, first), CORE), last)

    return {
        "back end": lambda: (
            cpu.tucker_conv_forward(*operands, *GEOMETRY, "chain", False)
            if hasattr(cpu, "tucker_conv_forward")
            else reference.tucker_conv_forward(*operands, *GEOMETRY, "chain", False)
        ),
        "reference": lambda: reference.tucker_conv_forward(*operands, *GEOMETRY, "chain", False),
        "dispatcher, below autograd": lambda: call(
            ops.tucker_conv_forward.default, *operands, *GEOMETRY, "chain", False
        ),
        "dispatcher": lambda: ops.tucker_conv_forward.default(*operands, *GEOMETRY, "chain", False),
        "Function": lambda: functions.TuckerConv.apply(grad, *operands[1:], *GEOMETRY, "chain", True),
        "public": lambda: tk.tucker_conv(IMAGE, CORE, FACTORS, path="chain"),
        "public, gradient wanted": lambda: tk.tucker_conv(grad, CORE, FACTORS, path="chain"),
        "torch": lambda: chain(IMAGE),
        "torch, gradient wanted": lambda: chain(grad),
        "torch, one dense convolution": lambda: torch.conv2d(IMAGE, weight),
    }


def tucker_linear():
    grad, core, factors = wanting_gradients(ROWS), CORE[:, :, 0, 0].contiguous(), FACTORS[:2]

    def chain(x):
        return x @ factors[1] @ core.T @ factors[0].T

    return {
        "public": lambda: tk.tucker_linear(ROWS, core, factors, path="chain"),
        "public, gradient wanted": lambda: tk.tucker_linear(grad, core, factors, path="chain"),
        "torch": lambda: chain(ROWS),
        "torch, gradient wanted": lambda: chain(grad),
    }


def main():
    columns = {}
    with harness.threads(1):
        for operator in (mode_dot, tucker_conv, tucker_linear):
            columns[operator.__name__] = harness.compare(operator(), repeats=61, min_time=0.0002)
    rings = dict.fromkeys(ring for times in columns.values() for ring in times)
    rows = [
        {"ring": ring} | {name: round(1e6 * times[ring], 1) if ring in times else "" for name, times in columns.items()}
        for ring in rings
    ]
    harness.print_table(rows, title="microseconds per call, one thread")
    harness.save("overhead", rows)


if __name__ == "__main__":
    main()
