"""Image classification data for `tdlrt train`: bytes on disk to uint8 tensors, every defect one clear sentence.

`digits` comes with scikit-learn; `mnist` and `cifar10` are read from a folder, nothing is downloaded.
"""

import gzip
import io
import math
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

NAMES = ("digits", "mnist", "cifar10")


class DataError(RuntimeError):
    """A data file is missing, damaged or of another kind; the message names it."""


@dataclass
class Dataset:
    """Train and test images (N, C, H, W) uint8 with labels (N,) int64.

    levels: what white is (a pixel divided by it lies in [0, 1]); mean, std: per channel of the train pixels in [0, 1];
    augment: whether training crops and flips at random.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int
    levels: int
    augment: bool = False
    mean: list = field(init=False)
    std: list = field(init=False)

    def __post_init__(self):
        # The moments from a histogram: exact, and without a floating-point copy of the images.
        values = torch.arange(256, dtype=torch.float64) / self.levels
        self.mean, self.std = [], []
        for channel in self.train_images.unbind(1):
            weight = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
            mean = float(weight @ values)
            self.mean.append(mean)
            self.std.append(math.sqrt(float(weight @ (values - mean) ** 2)))

    @property
    def image_shape(self):
        return tuple(self.train_images.shape[1:])

    def to(self, device):
        """Moves the (compact, uint8) images to the device of the training."""
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def pixels(self, images, dtype):
        """uint8 images as pixels in [0, 1]."""
        return images.to(dtype).div_(self.levels)

    def batches(self, batch_size, seed, epoch, dtype, start=0, rank=0, processes=1):
        """Shuffled train batches of one epoch from batch `start` on: (pixels, labels) of every `processes`-th image.

        Order and augmentation depend on (seed, epoch, batch) alone, so that a run continues anywhere, with any number
        of processes. Batch sizes differ by at most one.
        """
        order = torch.randperm(len(self.train_labels), generator=_generator(seed, epoch))
        parts = order.tensor_split(self.steps_per_epoch(batch_size))
        for index in range(start, len(parts)):
            own = slice(rank, None, processes)
            part = parts[index][own].to(self.train_images.device)
            images = self.train_images[part]
            if self.augment:
                images = crop_and_flip(images, _generator(seed, epoch, index), own, len(parts[index]))
            yield self.pixels(images, dtype), self.train_labels[part]

    def batch_length(self, batch_size, index):
        """Images in batch `index` of an epoch, over all processes."""
        steps, images = self.steps_per_epoch(batch_size), len(self.train_labels)
        return images // steps + (index < images % steps)

    def steps_per_epoch(self, batch_size):
        return math.ceil(len(self.train_labels) / batch_size)


def load(name, data_dir=None):
    """The dataset of that name. Raises ValueError for the arguments and DataError for the files."""
    if name not in NAMES:
        raise ValueError(f"data is {name!r}; allowed are {', '.join(NAMES)}")
    if name == "digits":
        return digits()
    if data_dir is None:
        raise ValueError(f"data_dir is missing; {name} is read from a folder that you name")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} {'is not a folder' if folder.exists() else 'does not exist'}")
    return {"mnist": mnist, "cifar10": cifar10}[name](folder)


def digits():
    """The 1,797 handwritten digits of 8×8 pixels that come with scikit-learn; a fifth of each class is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'tucker-kernels[train]'"
        ) from error
    bundle = load_digits()
    images, labels = bundle.images.astype(np.uint8)[:, None], bundle.target
    # A permutation of its own, the same for every seed of the training (RandomState's streams are frozen).
    random = np.random.RandomState(0)
    test = np.concatenate([random.permutation(np.flatnonzero(labels == c))[: _fifth(labels, c)] for c in range(10)])
    is_test = np.zeros(len(labels), bool)
    is_test[test] = True
    return _dataset("digits", images[~is_test], labels[~is_test], images[is_test], labels[is_test], levels=16)


def _fifth(labels, label):
    return round((labels == label).sum() / 5)


# ---- MNIST: the IDX format of yann.lecun.com/exdb/mnist ----------------------------------------------------

_MNIST = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def mnist(folder):
    """The four gzipped IDX files of MNIST (or of anything in its format and size 28×28)."""
    arrays = []
    for images_name, labels_name in _MNIST.values():
        images = read_idx(folder / images_name, dimensions=3)
        labels = read_idx(folder / labels_name, dimensions=1)
        if len(images) != len(labels):
            raise DataError(
                f"{folder / labels_name} holds {len(labels)} labels, but {images_name} holds {len(images)} images"
            )
        if images.shape[1:] != (28, 28):
            raise DataError(f"{folder / images_name} holds images of {_by(images.shape[1:])} pixels, not of 28×28")
        if not len(images):
            raise DataError(f"{folder / images_name} holds no images")
        if labels.max() > 9:
            raise DataError(f"{folder / labels_name} holds the label {labels.max()}; allowed are 0 to 9")
        arrays += [images[:, None], labels]
    return _dataset("mnist", *arrays)


def read_idx(path, dimensions):
    """A gzipped IDX file of unsigned bytes with so many dimensions, checked to the last byte."""
    raw = _read_gzip(path)
    if raw[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(
            f"{path} is not an IDX file of unsigned bytes in {dimensions} dimension{'s' * (dimensions > 1)}: it starts "
            f"with {raw[:4].hex() or 'nothing'}, not with {bytes([0, 0, 8, dimensions]).hex()}"
        )
    head = 4 + 4 * dimensions
    if len(raw) < head:
        raise DataError(f"{path} is truncated: it ends inside its header")
    shape = struct.unpack(f">{dimensions}I", raw[4:head])
    if len(raw) != head + math.prod(shape):
        raise DataError(
            f"{path} is {'truncated' if len(raw) < head + math.prod(shape) else 'longer than its header says'}: "
            f"{_by(shape)} bytes are announced, {len(raw) - head} are there"
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _read_gzip(path):
    try:
        with gzip.open(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; MNIST is the files {', '.join(sum(_MNIST.values(), ()))}") from error
    except EOFError as error:
        raise DataError(f"{path} is truncated: its gzip stream ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or not a gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _by(shape):
    return "×".join(map(str, shape))


# ---- CIFAR-10 ----------------------------------------------------------------------------------------------


def cifar10(folder):
    """CIFAR-10 from the official "binary version", or from .npz parts of lossless picture sheets."""
    if (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    if (folder / "data_batch_1.bin").exists():
        reader, train, test = _cifar_binary, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"
    elif (folder / "cifar10_train_1.npz").exists():
        reader, train, test = _cifar_sheets, [f"cifar10_train_{i}.npz" for i in range(1, 6)], "cifar10_test.npz"
    else:
        raise DataError(
            f"{folder} holds neither data_batch_1.bin (of the binary version of CIFAR-10) nor cifar10_train_1.npz"
        )
    parts = [reader(folder / name) for name in [*train, test]]
    images, labels = (np.concatenate(column) for column in zip(*parts[:5]))
    return _dataset("cifar10", images, labels, *parts[5], augment=True)


def _cifar_binary(path):
    """Records of one label byte and 3×32×32 pixel bytes; 10,000 a file."""
    raw = _read(path)
    if len(raw) != 10000 * 3073:
        raise DataError(f"{path} is {len(raw)} bytes long; a part of CIFAR-10 has {10000 * 3073}")
    records = np.frombuffer(raw, np.uint8).reshape(10000, 3073)
    return _cifar_part(path, records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])


def _cifar_sheets(path):
    """`labels`, and pictures `sheet_*` of 32-pixel-wide images one below the other."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise DataError(f"{path} needs Pillow to be read: pip install 'tucker-kernels[train]'") from error
    raw = _read(path)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            names = sorted(n for n in arrays.files if n.startswith("sheet_"))
            sheets = [np.asarray(Image.open(io.BytesIO(arrays[n].tobytes())).convert("RGB")) for n in names]
            images = np.concatenate(sheets).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
            return _cifar_part(path, np.ascontiguousarray(images), arrays["labels"])
    except DataError:
        raise
    except Exception as error:
        # zipfile, zlib, numpy and Pillow each have their own ways to say that a file is broken.
        raise DataError(f"{path} is truncated, damaged or of another kind ({type(error).__name__}: {error})") from error


def _cifar_part(path, images, labels):
    if len(images) != len(labels) or not len(labels) or labels.max() > 9:
        raise DataError(f"{path} holds {len(images)} images and {len(labels)} labels up to {max(labels, default='-')}")
    return images, labels


def _read(path):
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


# ---- shared ------------------------------------------------------------------------------------------------


def _dataset(name, train_images, train_labels, test_images, test_labels, levels=255, augment=False):
    arrays = [train_images, train_labels.astype(np.int64), test_images, test_labels.astype(np.int64)]
    tensors = [torch.from_numpy(np.array(a)) for a in arrays]
    return Dataset(name, *tensors, classes=10, levels=levels, augment=augment)


def _generator(*key):
    """A generator for (seed, epoch, …): neighbouring keys give unrelated streams."""
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state % 2**63)


def crop_and_flip(images, generator, own=slice(None), total=None, padding=4):
    """The usual CIFAR augmentation: pad by 4, crop at random, mirror every second image.

    own, total: which images of a batch of how many these are; default all of it.
    """
    n, _, height, width = images.shape
    total = n if total is None else total
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    top, left = (torch.randint(2 * padding + 1, (total,), generator=generator)[own] for _ in range(2))
    mirrored = (torch.rand(total, generator=generator) < 0.5)[own]
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.where(mirrored[:, None], torch.arange(width).flip(0), torch.arange(width))
    sample = torch.arange(n)[:, None, None]
    device = images.device
    index = sample.to(device), rows[:, :, None].to(device), columns[:, None, :].to(device)
    return padded.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2).contiguous()
