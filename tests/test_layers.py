"""Tucker layers against the dense layers they stand for."""

import copy
import io
import itertools
import pickle

import pytest
import tdlrt
import torch
from tdlrt.layers.base import mode_ranks, replace_data
from tensorly.decomposition import partial_tucker
from tensorly.tenalg import multi_mode_dot
from torch import nn

import tucker_kernels as tk

CONVOLUTIONS = [
    (tdlrt.TuckerConv1d, nn.Conv1d, (12,)),
    (tdlrt.TuckerConv2d, nn.Conv2d, (9, 8)),
    (tdlrt.TuckerConv3d, nn.Conv3d, (6, 5, 7)),
]
GEOMETRIES = [
    {"padding": 1},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"padding": "same"},
    {"padding": "same", "kernel_size": 4},  # asymmetric: one more on the right
    {"padding": "valid", "bias": False},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular", "stride": 2},
    {"padding": 1, "padding_mode": "replicate"},
]


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize(("tucker", "dense_class", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("modes", ["channels", "all"])
def test_full_rank_convolution_equals_dense(tucker, dense_class, size, geometry, modes):
    torch.manual_seed(0)
    geometry = {"kernel_size": 3, **geometry}
    dense = dense_class(4, 5, **geometry).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    layer = tucker.from_dense(dense, modes=modes)
    assert_same(layer(x), dense(x))
    assert_same(layer(x[0]), dense(x[0]))  # without a batch dimension, as nn.Conv* allows
    assert_same(layer.to_dense().weight, dense.weight)
    assert_same(layer.to_dense()(x), dense(x))
    assert_same(layer.to_sequential()(x), dense(x))


@pytest.mark.parametrize(("tucker", "dense_class", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_number_of_the_geometry_is_its_own(tucker, dense_class, size, padding_mode, groups):
    """Kernel, stride, padding and dilation that differ in every dimension, and "same" padding beside dilation."""
    torch.manual_seed(6)
    dimensions = len(size)
    x = torch.randn(2, 4, *(n + 6 for n in size), dtype=torch.float64)
    build = tdlrt.TuckerGroupedConv if groups > 1 else tucker
    for numbers in (
        {"kernel_size": (3, 2, 4), "stride": (2, 1, 3), "padding": (1, 0, 2), "dilation": (1, 3, 2)},
        {"kernel_size": (2, 4, 3), "dilation": (3, 1, 2)},
    ):
        numbers = {name: values[:dimensions] for name, values in numbers.items()}
        numbers = {"padding": "same", **numbers}
        dense = dense_class(4, 6, **numbers, groups=groups, padding_mode=padding_mode, dtype=torch.float64)
        layer = build.from_dense(dense)
        assert_same(layer(x), dense(x))
        assert_same(layer(x[1]), dense(x[1]))
        for plain in (layer.to_dense(), layer.to_sequential()):
            assert_same(plain(x), dense(x))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("modes", ["channels", "all"])
def test_core_gradient_is_the_projected_weight_gradient(geometry, modes):
    torch.manual_seed(1)
    layer = tdlrt.TuckerConv2d(4, 5, **{"kernel_size": 3, **geometry}, ranks=2, modes=modes, dtype=torch.float64)
    dense = layer.to_dense()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    y = dense(x)
    dy = torch.randn_like(y)
    (G,) = torch.autograd.grad(y, dense.weight, dy)
    bases = [
        None if f is None else torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0][:, : min(n, 3)]
        for n, f in zip(layer.weight_shape, layer.factors)
    ]
    expected = G
    for mode, basis in enumerate(bases):
        if basis is not None:
            expected = torch.tensordot(basis.T, expected, dims=([1], [mode])).movedim(0, mode)
    assert_same(layer.core_gradient(x, dy, bases), expected, 1e-11)
    assert_same(layer.core_gradient(x[0], dy[0], bases) + layer.core_gradient(x[1:], dy[1:], bases), expected, 1e-11)


@pytest.mark.parametrize(("sizes_in", "sizes_out"), [(12, 10), ((3, 4), 10), (12, (2, 5)), ((3, 2, 2), (5, 2))])
def test_full_rank_linear_equals_dense(sizes_in, sizes_out):
    torch.manual_seed(2)
    dense = nn.Linear(12, 10).double()
    layer = tdlrt.TuckerLinear.from_dense(dense, in_modes=sizes_in, out_modes=sizes_out)
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    for each in (x, x[0], x[0, 0]):
        assert_same(layer(each), dense(each))
    assert_same(layer.to_dense()(x), dense(x))
    assert_same(layer.to_sequential()(x), dense(x))
    dy = torch.randn(4, 3, 10, dtype=torch.float64)
    G = torch.einsum("abo,abi->oi", dy, x).reshape(layer.weight_shape)
    expected = G
    for mode, U in enumerate(layer.factors):
        expected = torch.tensordot(U.detach().T, expected, dims=([1], [mode])).movedim(0, mode)
    assert_same(layer.core_gradient(x, dy, list(layer.factors)), expected, 1e-11)


@pytest.mark.parametrize("tol", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("modes", ["channels", "all"])
def test_from_dense_keeps_the_tolerance(tol, modes):
    torch.manual_seed(3)
    dense = nn.Conv2d(16, 20, 3).double()
    layer = tdlrt.TuckerConv2d.from_dense(dense, tol=tol, modes=modes)
    error = torch.linalg.vector_norm(layer.weight - dense.weight) / torch.linalg.vector_norm(dense.weight)
    assert error <= tol
    assert tdlrt.orthogonality_error(layer) < 1e-14
    if tol == 0.5:
        assert layer.ranks[0] < 20


@pytest.mark.parametrize("method", ["hosvd", "hooi"])
@pytest.mark.parametrize("sizes", [(9, 7), (5, 60), (60, 5)])
def test_from_dense_at_ranks_is_nearly_the_best(sizes, method):
    torch.manual_seed(4)
    dense = nn.Linear(*sizes).double()
    layer = tdlrt.TuckerLinear.from_dense(dense, ranks=3, method=method)
    best = torch.linalg.svdvals(dense.weight)[3:].norm()  # Eckart–Young
    assert torch.linalg.vector_norm(layer.weight - dense.weight) <= best * (1 + 1e-10)
    assert tdlrt.orthogonality_error(layer) < 1e-14


def test_a_mode_longer_than_all_others_together_costs_no_square_of_it(monkeypatch):
    torch.manual_seed(4)
    dense = nn.Conv2d(2, 300, (3, 1)).double()
    largest = []
    truncate = tk.hosvd_truncate
    monkeypatch.setattr(tk, "hosvd_truncate", lambda cores, **rest: largest.append(cores) or truncate(cores, **rest))
    layer = tdlrt.TuckerConv2d.from_dense(dense, tol=1e-3, method="hooi")
    assert layer.ranks == (6, 2, 3, 1)
    assert relative_error(layer, dense) < 1e-14
    assert max(max(core.shape) for cores in largest for core in cores) == 6


def relative_error(layer, dense):
    weight = dense.weight.detach()
    return float(torch.linalg.vector_norm(layer.weight.detach() - weight) / torch.linalg.vector_norm(weight))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("modes", ["channels", "all", (0, 3)])
def test_hooi_is_no_farther_than_hosvd_and_as_near_as_tensorly(modes, seed):
    torch.manual_seed(seed)
    dense = nn.Conv2d(9, 11, 3, dtype=torch.float64)
    ranks = (4, 3, 2, 2)
    hosvd, hooi = (tdlrt.TuckerConv2d.from_dense(dense, ranks=ranks, modes=modes, method=m) for m in ("hosvd", "hooi"))
    assert hooi.ranks == hosvd.ranks
    assert tdlrt.orthogonality_error(hooi) < 1e-13
    assert relative_error(hooi, dense) < relative_error(hosvd, dense)
    own = [ranks[mode] for mode in hooi.modes]
    weight = dense.weight.detach().numpy()
    (core, factors), _ = partial_tucker(weight, own, modes=list(hooi.modes), n_iter_max=10, tol=0)
    found = torch.from_numpy(multi_mode_dot(core, factors, modes=list(hooi.modes)))
    expected = torch.linalg.vector_norm(found - dense.weight) / torch.linalg.vector_norm(dense.weight)
    assert relative_error(hooi, dense) == pytest.approx(float(expected.detach()), rel=1e-3)


def test_hooi_keeps_a_tolerance_and_exact_weights():
    torch.manual_seed(7)
    dense = nn.Conv2d(16, 12, 3)
    layer = tdlrt.TuckerConv2d.from_dense(dense, tol=0.4, method="hooi")
    assert relative_error(layer, dense) <= 0.4
    exact = tdlrt.TuckerConv2d(16, 12, 3, ranks=3, dtype=torch.float64).to_dense()
    assert relative_error(tdlrt.TuckerConv2d.from_dense(exact, ranks=3, method="hooi"), exact) < 1e-14
    matrix = nn.Linear(9, 7, dtype=torch.float64)
    same = [tdlrt.TuckerLinear.from_dense(matrix, ranks=3, method=m).weight for m in ("hosvd", "hooi")]
    assert_same(same[1], same[0])
    with pytest.raises(ValueError, match="method is 'als'; allowed are 'hosvd', 'hooi'"):
        tdlrt.TuckerLinear.from_dense(matrix, method="als")


def test_groups_of_different_ranks():
    torch.manual_seed(8)
    dense = nn.Conv2d(24, 36, 3, groups=3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        dense.weight[:12] = dense.weight[:1]  # the first group has rank 1 in its output mode
    layer = tdlrt.TuckerGroupedConv.from_dense(dense, tol=0.3)
    assert layer.groups[0].ranks[0] == 1 < layer.groups[1].ranks[0]
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    expected = torch.conv2d(x, layer.weight, layer.bias, padding=1, groups=3)
    for each in (layer, layer.to_dense(), layer.to_sequential()):
        assert_same(each(x), expected)
    assert relative_error(layer, dense) <= 0.3


def test_fresh_layers_have_the_norm_of_dense_ones():
    torch.manual_seed(5)
    layer = tdlrt.TuckerConv2d(32, 48, 3, ranks=0.25)
    dense = nn.Conv2d(32, 48, 3)
    ratio = torch.linalg.vector_norm(layer.weight) / torch.linalg.vector_norm(dense.weight)
    assert 0.97 < ratio < 1.03
    assert tdlrt.orthogonality_error(layer) < 1e-6
    assert layer.ranks == (12, 8, 3, 3)


def test_ranks_are_feasible():
    for ranks, shape in itertools.product([None, 5, 0.5, (6, 4, 1, 1)], [(12, 4, 1, 1), (3, 40, 2, 2), (8, 2, 1, 1)]):
        modes = tuple(range(4))
        result = mode_ranks(ranks, shape, modes)
        for i, r in enumerate(result):
            rest = 1
            for j, other in enumerate(result):
                rest *= other if j != i else 1
            assert 1 <= r <= min(shape[i], rest)


@pytest.mark.parametrize("modes", ["channels", "all"])
def test_state_dict_of_another_rank_loads(modes):
    source = tdlrt.TuckerConv2d(6, 8, 3, ranks=(5, 4, 2, 3), modes=modes)
    target = tdlrt.TuckerConv2d(6, 8, 3, ranks=2, modes=modes)
    x = torch.randn(2, 6, 7, 7)
    target(x).sum().backward()  # a graph with the old shapes is alive
    target.load_state_dict(source.state_dict())
    assert target.ranks == source.ranks
    assert torch.equal(target(x), source(x))
    target(x).sum().backward()
    assert target.core.grad.shape == source.core.shape


def test_state_dict_of_another_layer_is_refused():
    def conv(*sizes, ranks=2, **options):
        return tdlrt.TuckerConv2d(*sizes, ranks=ranks, bias=False, **options)

    for source, target, words in (
        (conv(6, 8, 3), conv(6, 9, 3), "factors.0"),
        (conv(6, 8, 3), conv(7, 8, 3, ranks=3), "factors.1"),
        (conv(6, 8, 3), conv(6, 8, 5), "core"),
        (conv(6, 8, 3), conv(6, 8, 3, modes="all"), "factors.2"),
        (conv(6, 8, 3, modes="all"), conv(6, 8, 3), "factors.2"),
        (tdlrt.TuckerLinear(6, 8, ranks=2), tdlrt.TuckerLinear(7, 8, ranks=2), "factors.1"),
        (tdlrt.TuckerLinear(6, 8, ranks=2), conv(6, 8, 3), "core"),
    ):
        before = target.weight.detach().clone()
        with pytest.raises(RuntimeError, match=words):
            target.load_state_dict(source.state_dict())
        assert target.weight.shape == before.shape


def test_copies_and_pickles_are_layers_of_their_own():
    model = nn.Sequential(tdlrt.TuckerConv2d(3, 8, 3, ranks=2), nn.Flatten(), tdlrt.TuckerLinear(72, 4, ranks=3))
    x = torch.randn(2, 3, 5, 5)
    y = model(x)
    optimizer = tdlrt.TDLRT(model, lr=0.1)  # its hooks must not travel with copies
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        twin(x).sum().backward()
        assert optimizer.kept.calls(model[0]) == 0
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    double = copy.deepcopy(model).double()
    assert double(x.double()).dtype == torch.float64
    assert len(repr(model).splitlines()) <= 6
    assert len(list(model.parameters())) == 8


def test_half_precision_is_for_inference():
    torch.manual_seed(0)
    model = nn.Sequential(tdlrt.TuckerConv2d(8, 8, 3, ranks=4), nn.Flatten(), tdlrt.TuckerLinear(8 * 9, 5, ranks=4))
    x = torch.randn(4, 8, 5, 5)
    y = model(x)
    optimizer = tdlrt.TDLRT(model, lr=0.1)
    model.half()
    half = model(x.half())
    assert half.dtype == torch.float16
    assert (half.float() - y).abs().max() < 0.02 * y.abs().max()
    half.float().sum().backward()
    before = model[0].core.detach().clone()
    for refused in (optimizer.step, lambda: tdlrt.TDLRT(model, lr=0.1)):
        with pytest.raises(TypeError, match=r"0 has torch.float16 parameters.*torch.autocast"):
            refused()
    assert torch.equal(model[0].core, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(tdlrt.TuckerConv2d(8, 8, 3, ranks=4), nn.Flatten(), tdlrt.TuckerLinear(8 * 9, 5, ranks=4))
    x = torch.randn(4, 8, 5, 5)
    exact = model(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    assert y.dtype == dtype
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_replacing_data_forgets_the_old_gradient_shape():
    parameter = nn.Parameter(torch.randn(3, 4))
    alive = (parameter * 2).sum()
    alive.backward()
    replace_data(parameter, torch.randn(2, 4))
    (parameter * 2).sum().backward()
    assert parameter.grad.shape == (2, 4)
    assert alive.item() is not None


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: tdlrt.TuckerConv2d(3, 4, 3, ranks=0), ValueError, "ranks is 0"),
        (lambda: tdlrt.TuckerConv2d(3, 4, 3, ranks=1.5), ValueError, r"ranks is 1.5.*\(0, 1\]"),
        (lambda: tdlrt.TuckerConv2d(3, 4, 3, ranks=(1, 2, 3)), ValueError, r"ranks is \(1, 2, 3\)"),
        (lambda: tdlrt.TuckerConv2d(3, 4, 3, modes="window"), ValueError, "modes is 'window'"),
        (lambda: tdlrt.TuckerConv2d(3, 4, 3, padding_mode="mirror"), ValueError, "padding_mode"),
        (lambda: tdlrt.TuckerLinear((3, 0), 4), ValueError, r"in_features is \(3, 0\)"),
        (lambda: tdlrt.TuckerConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2)), ValueError, "groups=2"),
        (lambda: tdlrt.TuckerConv2d.from_dense(nn.Conv1d(4, 4, 3)), TypeError, "Conv2d, got Conv1d"),
        (lambda: tdlrt.TuckerLinear.from_dense(nn.Linear(4, 4), ranks=2, tol=0.1), ValueError, "either ranks or tol"),
        (lambda: tdlrt.TuckerLinear.from_dense(nn.Linear(6, 4), in_modes=(2, 2)), ValueError, "in_modes"),
        (lambda: tdlrt.TuckerConv2d(3, 4, 3)(torch.randn(2, 5, 8, 8)), ValueError, "5 channels"),
        (lambda: tdlrt.TuckerConv2d(3, 4, 3)(torch.randn(2, 3, 2, 2)), ValueError, "smaller than the window"),
        (
            lambda: tdlrt.TuckerGroupedConv([tdlrt.TuckerConv1d(1, 2, 3)] * 3)(torch.randn(2, 2, 8)),
            *(ValueError, r"input has shape \(2, 2, 8\); its dimension -2 must be 3"),
        ),
    ],
)
def test_bad_arguments_are_named(build, error, words):
    with pytest.raises(error, match=words):
        build()


@pytest.mark.parametrize("path", ["auto", "chain", "fused", "reconstruct"])
@pytest.mark.parametrize(("dense", "shape"), [(nn.Conv2d(4, 6, 3), (2, 4, 8, 7)), (nn.Linear(4, 6), (2, 4))])
def test_shapes_on_the_meta_device(dense, shape, path):
    layer = tdlrt.tuckerize(nn.Sequential(dense), ranks=0.5, min_features=0)[0].to("meta")
    layer.path = path
    y = layer(torch.empty(shape, device="meta"))
    assert y.is_meta
    assert y.shape == dense(torch.zeros(shape)).shape
    adapted = tdlrt.adapt(nn.Sequential(copy.deepcopy(dense)), ranks=2, min_features=0).to("meta")
    assert adapted(torch.empty(shape, device="meta")).shape == y.shape
