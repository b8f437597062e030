"""Which path computes a Tucker convolution: operation counts, nothing measured.

    chain        per pixel  2 (n_in r_in q + r_in r_out k + r_out n_out)   (q input pixels per output pixel)
    reconstruct  per pixel  2 n_in n_out k, and once 2 r_in k n_out (r_out + n_in) for the weight

with k the number of window taps.
"""

import math

PATHS = ("chain", "fused", "reconstruct")


def tucker_conv_flops(path, pixels_in, pixels_out, n_out, n_in, r_out, r_in, window):
    """Multiply-adds times two of one forward pass over `pixels_in` input and `pixels_out` output pixels."""
    taps = math.prod(window)
    if path == "reconstruct":
        weight = 2 * taps * r_in * n_out * (r_out + n_in)
        return 2 * pixels_out * n_in * n_out * taps + weight
    first = 0 if r_in == n_in else 2 * pixels_in * n_in * r_in
    last = 0 if r_out == n_out else 2 * pixels_out * r_out * n_out
    return first + 2 * pixels_out * r_in * r_out * taps + last


def choose_tucker_conv_path(pixels_in, pixels_out, n_out, n_in, r_out, r_in, window):
    """The path with the fewest operations; the chain on a tie, which needs less memory."""
    sizes = (pixels_in, pixels_out, n_out, n_in, r_out, r_in, window)
    return min(("chain", "reconstruct"), key=lambda path: tucker_conv_flops(path, *sizes))
