"""Tile sizes: one small, fixed table per kernel, keyed by dtype kind and padded sizes. No tuning at run time.

Every row compiles for sm_90 within 232,448 bytes of shared memory, and without spills where the channel counts are
multiples of 8 (up to 64 bytes for some sizes of the "ieee" rows); `tests/triton_backend/test_compiled.py` compiles all.

Kinds: "half" (bfloat16 and float16) and, for float32, "tf32x3", "ieee" and "tf32" (`launch.py`).
"""

MAX_RANK = 256
# Partial sums are split for this many programs whatever the device has, so that results do not depend on it.
PROGRAMS = 264
SPLIT_BYTES = 32 << 20
# Up to this many pixels the smaller tiles are used: 128 pixels to a tile would leave processors idle.
FEW_PIXELS = 128 * 132


def padded(size):
    """The power of two that a block of `size` columns takes; tensor cores want at least 16."""
    return max(16, 1 << (size - 1).bit_length()) if size > 0 else 16


def _row(*values, names):
    return dict(zip((*names, "num_warps", "num_stages"), values))


# kind -> [(largest padded rank, many pixels, few pixels)]: BM, BK, BN, warps, stages.
_CORE_EXPAND = {
    "half": [
        (32, (128, 64, 64, 4, 4), (64, 64, 64, 4, 4)),
        (64, (128, 64, 64, 4, 4), (64, 64, 64, 4, 4)),
        (128, (128, 64, 64, 8, 4), (64, 64, 64, 4, 4)),
        (256, (128, 64, 64, 8, 3), (64, 64, 64, 8, 3)),
    ],
    "tf32x3": [
        (64, (64, 32, 32, 4, 3), (64, 32, 32, 4, 3)),
        (128, (64, 32, 32, 8, 3), (64, 32, 32, 8, 3)),
    ],
    "ieee": [
        (32, (64, 16, 32, 4, 3), (64, 16, 32, 4, 3)),
        (64, (64, 32, 16, 4, 3), (64, 32, 16, 4, 3)),
        (128, (64, 32, 32, 8, 3), (64, 32, 32, 8, 3)),
        (256, (32, 32, 16, 8, 3), (32, 32, 16, 8, 3)),
    ],
    "tf32": [
        (64, (128, 32, 32, 8, 3), (64, 32, 32, 4, 3)),
        (128, (64, 32, 32, 8, 3), (64, 32, 32, 8, 3)),
        (256, (64, 16, 16, 8, 3), (64, 16, 16, 8, 3)),
    ],
}

# kind -> [(largest padded N, largest padded rank)]: BM, warps, stages. The whole of N in one program.
_PROJECT_ACCUMULATE = {
    "half": [
        ((64, 64), (128, 4, 3)),
        ((128, 32), (128, 4, 3)),
        ((128, 128), (64, 8, 3)),
        ((256, 128), (64, 8, 3)),
        ((512, 64), (64, 8, 2)),
    ],
    "tf32x3": [((64, 32), (32, 4, 2)), ((128, 32), (16, 4, 2))],
    "ieee": [((64, 32), (32, 4, 2)), ((128, 32), (32, 8, 2))],
    "tf32": [((64, 32), (32, 4, 2))],
}
# The accumulation alone, in column blocks. kind -> [(largest padded rank)]: BM, NP, warps, stages.
_ACCUMULATE = {
    "half": [(128, (64, 128, 4, 3)), (256, (64, 128, 8, 3))],
    "tf32x3": [(64, (32, 64, 4, 2)), (128, (32, 128, 8, 2))],
    "ieee": [(64, (32, 64, 4, 2)), (256, (32, 64, 8, 2))],
    "tf32": [(64, (32, 64, 4, 2)), (256, (32, 64, 8, 2))],
}

# kind -> [(largest padded channel count)]: block side, BM, warps, stages.
_WGRAD = {
    "half": [(32, (32, 128, 4, 4)), (64, (64, 128, 4, 4)), (None, (128, 64, 8, 4))],
    "tf32x3": [(32, (32, 32, 4, 3)), (None, (64, 32, 4, 3))],
    "ieee": [(32, (32, 32, 4, 3)), (None, (64, 32, 4, 3))],
    "tf32": [(32, (32, 32, 4, 3)), (None, (64, 32, 4, 3))],
}

# kind -> [(largest padded rank of the two)]: BM, BK, BO, warps, stages.
_LINEAR = {
    "half": [(64, (64, 64, 64, 4, 3)), (128, (128, 64, 64, 8, 3)), (256, (64, 64, 64, 8, 3))],
    "tf32x3": [(64, (64, 32, 32, 4, 3)), (128, (64, 16, 16, 8, 3))],
    "ieee": [(32, (64, 32, 32, 4, 3))],
    "tf32": [(64, (64, 32, 32, 4, 3)), (128, (64, 16, 16, 8, 3))],
}


def _find(table, kernel, kind, rank):
    for limit, *rows in table[kind]:
        if limit is None or rank <= limit:
            return rows
    raise ValueError(f"{kernel}: rank {rank} with {kind} products; at most {table[kind][-1][0]} fit a program")


def tucker_core_expand(kind, rank, channels, pixels):
    """Rank of the intermediate, channels of the reduction, pixels of the result."""
    many, few = _find(_CORE_EXPAND, "tucker_core_expand", kind, padded(rank))
    # Ragged rows are addressed element by element, which takes the registers that the larger tile would.
    small = pixels <= FEW_PIXELS or rank % 8 or channels % 8
    row = _row(*(few if small else many), names=("BM", "BK", "BN"))
    return row | {"BK": min(row["BK"], padded(channels))}


def project_accumulate(kind, columns, rank):
    """Both halves in one program, or None where its sums do not fit; `rank` is the larger of the two."""
    columns, rank = padded(columns), padded(rank)
    for (most_columns, most_rank), row in _PROJECT_ACCUMULATE[kind]:
        if columns <= most_columns and rank <= most_rank:
            return {"NP": columns} | _row(*row, names=("BM",))
    return None


def accumulate(kind, rank):
    return _row(*_find(_ACCUMULATE, "project_accumulate", kind, padded(rank))[0], names=("BM", "NP"))


def rank_space_wgrad(kind, rows, columns):
    """The largest channel part on either side."""
    side, *row = _find(_WGRAD, "rank_space_wgrad", kind, padded(max(rows, columns)))[0]
    blocks = {"BA": min(side, padded(rows)), "BC": min(side, padded(columns))}
    return blocks | _row(*row, names=("BM",))


def tucker_linear(kind, rank):
    """The larger of the two ranks."""
    return _row(*_find(_LINEAR, "tucker_linear", kind, padded(rank))[0], names=("BM", "BK", "BO"))


def fits_tucker_linear(kind, rank):
    return padded(rank) <= _LINEAR[kind][-1][0]


def default_kind(largest_rank):
    """How float32 is multiplied unless the caller says: three TF32 products up to rank 128, FFMA above (no spills)."""
    return "tf32x3" if padded(largest_rank) <= 128 else "ieee"


def pixel_splits(pixels, tile, blocks=1, bytes_per_split=0):
    """(tiles per run, runs) of a sum over pixels, for about `PROGRAMS` programs and at most 32 MiB of partial sums."""
    tiles = -(-pixels // tile)
    runs = max(1, min(tiles, -(-PROGRAMS // max(blocks, 1))))
    if bytes_per_split:
        runs = max(1, min(runs, SPLIT_BYTES // bytes_per_split))
    per_run = max(1, -(-tiles // runs))
    return per_run, max(1, -(-tiles // per_run))
