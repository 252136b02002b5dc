"""The judge of 32×32 images of CIFAR-10's classes: a small CNN, trained on the training images, that is no Inception.

1. Label agreement: how often it finds the requested class.
2. Fréchet and kernel distance to the training images in its features, fd_cifar10_cnn and kd_cifar10_cnn.

Letters: N images, D = 128 features.
"""

from pathlib import Path

import torch
from torch import nn

from common.errors import InputError
from common.flags import ROOT
from evaluations.metrics.frechet import frechet_distance, statistics
from evaluations.metrics.kernel import kernel_distance
from models.checkpoints import read_weights_file

WEIGHTS = "judge.safetensors"
CLASSES, RESOLUTION = 10, 32
PATCHES, WIDTHS = 24, (32, 128, 128)
NAME = "cifar10_cnn"
BATCH = 250


def group(inputs, outputs):
    """Two 3×3 convolutions that halve the size; pooling comes before the normalisation, where it costs less."""
    first, second = (nn.Conv2d(width, outputs, 3, padding=1, bias=False) for width in (inputs, outputs))
    for layer in (first, second):
        nn.init.dirac_(layer.weight.data[: layer.in_channels])  # these channels begin as copies of the inputs
    return [first, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs), nn.ReLU()]


class Judge(nn.Module):
    """CNN of 0.5 M parameters after Jordan (2024, arXiv 2404.00498); images are uint8 (N, 3, 32, 32)."""

    def __init__(self):
        super().__init__()
        widths = zip((PATCHES, *WIDTHS), WIDTHS, strict=False)
        self.patches = nn.Conv2d(3, PATCHES, 2, bias=False).requires_grad_(False)
        groups = (layer for pair in widths for layer in group(*pair))
        self.body = nn.Sequential(self.patches, nn.ReLU(), *groups, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(WIDTHS[-1], CLASSES)
        self.to(memory_format=torch.channels_last)  # a fifth faster on a CPU

    def forward(self, images):
        """Features (N, D) of images as they are."""
        return self.body((images / 127.5 - 1).contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def judge(self, images):
        """uint8 (N, 32, 32, 3) → features (N, D), the means of an image's and its mirror image's, and classes (N,)."""
        batches = torch.as_tensor(images).permute(0, 3, 1, 2).split(BATCH)
        features = torch.cat([(self(batch) + self(batch.flip(-1))) / 2 for batch in batches])
        return features, self.head(features).argmax(dim=1)


def find_judge(folder):
    """The weights of the judge in a folder, which may also be relative to the repository."""
    return Path(folder if Path(folder).is_dir() else ROOT / folder, WEIGHTS)


def load_judge(folder):
    """(Judge, what its features are compared with: mean (D,), covariance (D, D), rows (M, D)). Raises InputError."""
    path, judge = find_judge(folder), Judge().eval()
    content = {name: tensor.float() for name, tensor in read_weights_file(path).items()}
    try:
        reference = [content.pop(name) for name in ("mean", "covariance", "rows")]
        judge.load_state_dict(content)
    except (KeyError, RuntimeError):
        raise InputError(f"{path} is no judge; name a folder that studies.train_judge made") from None
    return judge, reference


def measure(judge, reference, images, labels):
    """{metric: number} of images, uint8 (N, 32, 32, 3), under requested labels (N,); N is at least 4."""
    (mean, covariance, rows), (features, classes) = reference, judge.judge(images)
    distance, error = kernel_distance(rows, features)
    return {
        "label agreement": (classes == torch.as_tensor(labels)).double().mean().item(),
        f"fd_{NAME}": frechet_distance(*statistics(features), mean, covariance),
        f"kd_{NAME}": distance,
        f"kd_{NAME}_standard_error": error,
    }
