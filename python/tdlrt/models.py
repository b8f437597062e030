"""Networks of `tdlrt train`. They take pixels in [0, 1]: the data's mean and deviation are their first layer."""

from collections import OrderedDict

import torch
from torch import nn

NAMES = ("lenet5", "vgg16", "resnet18")


class Normalize(nn.Module):
    """(x − mean) / std per channel, kept with the network so that a checkpoint or an export is complete."""

    def __init__(self, mean, std):
        super().__init__()
        shape = (1, len(mean), 1, 1)
        self.register_buffer("mean", torch.tensor(mean).reshape(shape))
        self.register_buffer("std", torch.tensor(std).reshape(shape))

    def forward(self, x):
        return (x - self.mean) / self.std


def build(name, image_shape, classes, mean, std):
    """The dense network of that name for images (channels, height, width).

    Raises ValueError for an unknown name or images that are too small.
    """
    if name not in NAMES:
        raise ValueError(f"model is {name!r}; allowed are {', '.join(NAMES)}")
    channels, height, width = image_shape
    smallest = {"lenet5": 8, "vgg16": 32, "resnet18": 8}[name]
    if min(height, width) < smallest:
        raise ValueError(f"model is {name!r}, which needs images of at least {smallest}×{smallest} pixels")
    network = {"lenet5": _lenet5, "vgg16": _vgg16, "resnet18": _resnet18}[name]
    layers = network(channels, height, width, classes)
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), **layers))


def _lenet5(channels, height, width, classes):
    """LeNet5 as distributed with Caffe (20 and 50 channels, 500 hidden units): the variant of the low-rank literature.

    431,080 parameters on 28×28 images. Smaller images get a padding of 2, so that two 5×5 convolutions fit.
    """
    padding = 0 if min(height, width) >= 28 else 2

    def after_convolution_and_pool(size):
        return (size + 2 * padding - 4) // 2

    pixels = 1
    for size in (height, width):
        pixels *= after_convolution_and_pool(after_convolution_and_pool(size))
    return {
        "conv1": nn.Conv2d(channels, 20, 5, padding=padding),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(20, 50, 5, padding=padding),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(50 * pixels, 500),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(500, classes),
    }


def _vgg16(channels, height, width, classes):
    """VGG16 for small images: batch norm after each of the 13 convolutions, one linear layer (Simonyan & Zisserman)."""
    layers = {}
    for block, (features, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1):
        for index in range(1, depth + 1):
            layers[f"conv{block}_{index}"] = nn.Conv2d(channels, features, 3, padding=1, bias=False)
            layers[f"norm{block}_{index}"] = nn.BatchNorm2d(features)
            layers[f"relu{block}_{index}"] = nn.ReLU(inplace=True)
            channels = features
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    return {**layers, "average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(512, classes)}


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around which the input (1×1-convolved where the shape changes) is added."""

    def __init__(self, inputs, features, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != features:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, features, 1, stride, bias=False), nn.BatchNorm2d(features))

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def _resnet18(channels, height, width, classes):
    """ResNet18 for small images: a 3×3 stem without pooling, four stages of two blocks (He et al.)."""
    layers = {
        "conv1": nn.Conv2d(channels, 64, 3, padding=1, bias=False),
        "norm1": nn.BatchNorm2d(64),
        "relu1": nn.ReLU(),
    }
    inputs = 64
    for stage, features in enumerate((64, 128, 256, 512), start=1):
        first = BasicBlock(inputs, features, stride=1 if stage == 1 else 2)
        layers[f"stage{stage}"] = nn.Sequential(first, BasicBlock(features, features, stride=1))
        inputs = features
    return {**layers, "average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(512, classes)}
