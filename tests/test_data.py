"""Datasets: what is read is what was written, a defect is one sentence naming the file, the order is reproducible."""

import gzip
import io
import itertools
import struct

import numpy as np
import pytest
import torch
from tdlrt import data

NAMES = {
    "train-images-idx3-ubyte.gz": (12, 28, 28),
    "train-labels-idx1-ubyte.gz": (12,),
    "t10k-images-idx3-ubyte.gz": (5, 28, 28),
    "t10k-labels-idx1-ubyte.gz": (5,),
}


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist_folder(tmp_path):
    random = np.random.default_rng(0)
    for name, shape in NAMES.items():
        array = random.integers(0, 256 if len(shape) == 3 else 10, shape, np.uint8)
        (tmp_path / name).write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_mnist_files_are_read_exactly(mnist_folder):
    dataset = data.load("mnist", mnist_folder)
    random = np.random.default_rng(0)
    images, labels, test_images, test_labels = (
        random.integers(0, 256 if len(s) == 3 else 10, s, np.uint8) for s in NAMES.values()
    )
    assert np.array_equal(dataset.train_images.numpy(), images[:, None])
    assert np.array_equal(dataset.train_labels.numpy(), labels)
    assert np.array_equal(dataset.test_images.numpy(), test_images[:, None])
    assert np.array_equal(dataset.test_labels.numpy(), test_labels)
    pixels = images.astype(np.float64) / 255
    assert dataset.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert dataset.std == pytest.approx([pixels.std()], rel=1e-12)


def rewrite(name, change):
    """A defect: the decompressed contents of one file, changed."""

    def apply(folder):
        (folder / name).write_bytes(gzip.compress(change(gzip.decompress((folder / name).read_bytes()))))

    return name, apply


def cut_gzip(name):
    return name, lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
DEFECTS = {
    "missing": (IMAGES, lambda folder: (folder / IMAGES).unlink()),
    "a folder": (IMAGES, lambda folder: ((folder / IMAGES).unlink(), (folder / IMAGES).mkdir())),
    "empty": (LABELS, lambda folder: (folder / LABELS).write_bytes(b"")),
    "not gzip": (IMAGES, lambda folder: (folder / IMAGES).write_bytes(b"plain text, not gzip")),
    "gzip cut": cut_gzip(IMAGES),
    "flipped bits": (IMAGES, lambda folder: flip(folder / IMAGES)),
    "pixels cut": rewrite(IMAGES, lambda raw: raw[:-1]),
    "header cut": rewrite(IMAGES, lambda raw: raw[:9]),
    "too long": rewrite(LABELS, lambda raw: raw + b"\0"),
    "wrong magic": rewrite(LABELS, lambda raw: b"\0\0\x08\x03" + raw[4:]),
    "wrong type": rewrite(IMAGES, lambda raw: b"\0\0\x0d\x03" + raw[4:]),
    "label 10": rewrite(LABELS, lambda raw: raw[:-1] + b"\x0a"),
    "a label too few": rewrite(LABELS, lambda raw: raw[:4] + struct.pack(">I", 4) + raw[8:-1]),
    "other pixels": rewrite(IMAGES, lambda raw: raw[:8] + struct.pack(">II", 14, 56) + raw[16:]),
    "no images": rewrite(IMAGES, lambda raw: raw[:4] + struct.pack(">III", 0, 28, 28)),
}


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defective_mnist_file_is_named_in_one_sentence(mnist_folder, defect):
    name, apply = DEFECTS[defect]
    apply(mnist_folder)
    with pytest.raises(data.DataError) as caught:
        data.load("mnist", mnist_folder)
    message = str(caught.value)
    # Two files that disagree are both named.
    assert name in message or (defect == "no images" and "train-labels" in message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("imagenet", None), ValueError, "digits, mnist, cifar10"),
        (("mnist", None), ValueError, "data_dir"),
        (("mnist", "no/such/folder"), data.DataError, "no/such/folder"),
        (("cifar10", "."), data.DataError, "data_batch_1.bin"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        data.load(*arguments)


def test_digits_are_split_by_class_and_always_alike():
    first, second = data.digits(), data.digits()
    assert torch.equal(first.test_images, second.test_images)
    assert len(first.train_labels) + len(first.test_labels) == 1797
    train, test = (torch.bincount(labels, minlength=10) for labels in (first.train_labels, first.test_labels))
    assert torch.equal(test, ((train + test) / 5).round().long())
    assert first.train_images.amax() == first.levels == 16
    # Nothing of the test is trained on: together they are the bundle's images.
    from sklearn.datasets import load_digits

    together = torch.cat([first.train_images, first.test_images]).flatten(1).numpy()
    bundled = load_digits().data.astype(np.uint8)
    assert np.array_equal(np.sort(together.view("V64").ravel()), np.sort(bundled.view("V64").ravel()))


def small_dataset(augment=False):
    images = torch.arange(23 * 2 * 5 * 4, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(23, 2, 5, 4)
    images[:, 0, 0, 0] = torch.arange(23)
    return data.Dataset("small", images, torch.arange(23), images, torch.arange(23), 23, 255, augment)


def test_an_epoch_is_a_permutation_in_nearly_equal_batches():
    batches = list(small_dataset().batches(5, seed=1, epoch=0, dtype=torch.float64))
    assert sorted(len(labels) for _, labels in batches) == [4, 4, 5, 5, 5]
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels.sort().values, torch.arange(23))
    assert not torch.equal(labels, torch.arange(23))
    for pixels, own in batches:
        assert torch.equal((pixels[:, 0, 0, 0] * 255).round().long(), own)


def test_the_order_depends_on_seed_and_epoch_and_continues_anywhere():
    dataset = small_dataset(augment=True)

    def epoch(seed, number, start=0):
        return list(dataset.batches(5, seed, number, torch.float32, start))

    whole = epoch(1, 3)
    for (x, y), (u, v) in zip(whole[2:], epoch(1, 3, start=2), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    orders = [torch.cat([y for _, y in epoch(s, e)]).tolist() for s, e in itertools.product((0, 1, 2), (0, 1, 2))]
    assert len({tuple(order) for order in orders}) == 9


def test_crop_and_flip_gives_a_window_of_the_padded_image_or_its_mirror():
    images = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = data.crop_and_flip(images, torch.Generator().manual_seed(1))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    places = set()
    for before, after in zip(padded, changed.numpy()):
        found = [
            (top, left, mirrored)
            for top, left, mirrored in itertools.product(range(9), range(9), (False, True))
            if np.array_equal(before[:, top : top + 6, left : left + 5][:, :, :: -1 if mirrored else 1], after)
        ]
        assert found
        places.update(found)
    assert {mirrored for _, _, mirrored in places} == {False, True}
    assert {top for top, _, _ in places} == {left for _, left, _ in places} == set(range(9))


def test_cifar10_parts_of_picture_sheets(tmp_path):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    parts = {}
    for name in [f"cifar10_train_{i}" for i in range(1, 6)] + ["cifar10_test"]:
        pictures, labels = random.integers(0, 256, (6, 32, 32, 3), np.uint8), random.integers(0, 10, 6, np.uint8)
        sheets = {}
        for i, half in enumerate((pictures[:2], pictures[2:])):
            file = io.BytesIO()
            image.fromarray(half.reshape(-1, 32, 3)).save(file, "png")
            sheets[f"sheet_{i:02}"] = np.frombuffer(file.getvalue(), np.uint8)
        np.savez(tmp_path / f"{name}.npz", labels=labels, **sheets)
        parts[name] = pictures, labels
    dataset = data.load("cifar10", tmp_path)
    assert dataset.augment
    assert len(dataset.train_labels) == 30
    pictures, labels = parts["cifar10_train_2"]
    assert np.array_equal(dataset.train_images[6:12].permute(0, 2, 3, 1).numpy(), pictures)
    assert np.array_equal(dataset.train_labels[6:12].numpy(), labels)
    broken = tmp_path / "cifar10_train_3.npz"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(data.DataError, match=r"cifar10_train_3\.npz"):
        data.load("cifar10", tmp_path)


def test_cifar10_binary_parts(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (10000, 3073), np.uint8)
    records[:, 0] %= 10
    first = tmp_path / "data_batch_1.bin"
    first.write_bytes(records.tobytes())
    for name in [f"data_batch_{i}.bin" for i in range(2, 6)] + ["test_batch.bin"]:
        (tmp_path / name).symlink_to(first)
    dataset = data.load("cifar10", tmp_path)
    assert dataset.train_images.shape == (50000, 3, 32, 32)
    assert np.array_equal(dataset.train_images[10003].numpy().ravel(), records[3, 1:])
    assert int(dataset.train_labels[10003]) == records[3, 0]
    (tmp_path / "test_batch.bin").unlink()
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes()[:-1])
    with pytest.raises(data.DataError, match=r"test_batch\.bin"):
        data.load("cifar10", tmp_path)
