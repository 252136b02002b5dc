"""Feature extractors beside InceptionV3, and the loop that runs images through them.

An extractor is called with uint8 (N, 3, H, W) on its device and returns {name: (N, D)}; "pool" is what distances are
taken between. Letters: N images, D dimensions.
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import InputError, first_line, system_fault
from common.progress import Progress
from evaluations.metrics.frechet import RunningStatistics
from evaluations.metrics.results import SCRIPTS, features_name
from models.checkpoints import check_sums
from models.encoders import IMAGENET_STATISTICS
from models.hub import fetching

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"


@dataclasses.dataclass
class ImageNetwork:
    """A network with its preprocessing: resize straight to `size` without rounding, scale to 0..1, normalise."""

    name: str
    network: torch.nn.Module
    size: tuple
    statistics: tuple = IMAGENET_STATISTICS  # mean and std of each channel
    mode: str = "bicubic"

    @torch.no_grad()
    def __call__(self, images):
        x = F.interpolate(images.float(), self.size, mode=self.mode, antialias=True) / 255
        mean, std = (x.new_tensor(values)[:, None, None] for values in self.statistics)
        return {"pool": self.network((x - mean) / std).flatten(1)}


@dataclasses.dataclass
class Script:
    """A TorchScript file that takes uint8 (N, 3, H, W) and returns (N, D)."""

    name: str
    network: torch.nn.Module

    @torch.no_grad()
    def __call__(self, images):
        try:
            rows = self.network(images)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"--features {self.name} cannot take uint8 {tuple(images.shape)} ({reason})") from None
        if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != len(images):
            raise InputError(f"--features {self.name} returns {getattr(rows, 'shape', type(rows))} and not (N, D)")
        return {"pool": rows}


def load_features(name, device="cpu"):
    """Extractor of a TorchScript file or a timm model (a name, hf-hub:NAME or local-dir:FOLDER). Raises InputError."""
    if Path(name).suffix in SCRIPTS:
        try:
            check_sums(name)  # torch does not verify them
            return Script(features_name(name), torch.jit.load(name, map_location=device).eval())
        except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            fault = system_fault(error) or f"it is not a readable TorchScript file ({first_line(error)})"
            raise InputError(f"--features {name}: {fault}") from None
    import timm  # seconds to import, and InceptionV3 does not need it

    remedy = "pass a TorchScript file, local-dir:FOLDER, or a name of timm.list_models(pretrained=True)"
    network = create_pretrained(name, f"--features {name}", remedy, name.removeprefix("local-dir:"))
    config = timm.data.resolve_model_data_config(network)
    mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return ImageNetwork(name, network.to(device), config["input_size"][1:], (config["mean"], config["std"]), mode)


def create_pretrained(name, what, remedy, source, **options):
    """A timm model without head, with its pretrained weights, in eval mode; arguments as for `fetching`."""
    import timm

    with fetching(what, source, remedy):
        if zipfile.is_zipfile(source):
            check_sums(source)
        return timm.create_model(name, pretrained=True, num_classes=0, **options).eval().requires_grad_(False)


def load_dinov2(weights=None, device="cpu", name=DINOV2):
    """DINOv2 ViT-L/14 at 224²: the class token after the final norm, D = 1024. weights: the authors' file.

    The position embedding is resampled from 37×37 as the authors' code does it, not as timm does. Raises InputError.
    """
    overlay = None if weights is None else {"file": str(weights), "hf_hub_id": None, "url": ""}
    remedy = f"download {DINOV2_URL} and pass it with --dinov2-weights"
    source = weights or name
    network = create_pretrained(name, f"DINOv2 {source}", remedy, source, pretrained_cfg_overlay=overlay)
    position = resample_position(network.pos_embed, 224 // network.patch_embed.patch_size[0])
    network.set_input_size((224, 224))
    network.pos_embed.copy_(position)
    return ImageNetwork("dinov2_vitl14", network.to(device), (224, 224))


def resample_position(embedding, grid):
    """DINOv2's position embedding (1, 1 + G², D) for grid × grid patches: bicubic, not antialiased.

    The scale is (grid + 0.1)/G: an offset that the authors added against rounding, and that moves the samples a little.
    """
    of_class, of_patches = embedding[:, :1], embedding[:, 1:]
    side = round(of_patches.shape[1] ** 0.5)
    square = of_patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    square = F.interpolate(square, scale_factor=((grid + 0.1) / side,) * 2, mode="bicubic")
    return torch.cat([of_class, square.flatten(2).transpose(1, 2)], dim=1)


def check_widths(extractor, size, device, moments, where):
    """Try the extractor on an image of size (H, W). Raises InputError if {name: (mean, covariance)} do not fit it."""
    for name, rows in extractor(torch.zeros(1, 3, *size, dtype=torch.uint8, device=device)).items():
        if name in moments and moments[name][0].shape != rows.shape[1:]:
            found = f"it holds statistics of {moments[name][0].shape}, the network gives {tuple(rows.shape[1:])}"
            raise InputError(f"{where} does not fit {name}: {found}; use a reference made with this network")


def extract(images, batches, extractor, processes, keep=False):
    """Run the images of `batches` (arrays of this process's indices, possibly empty) through the extractor.

    Returns {name: RunningStatistics} over all processes, and the "pool" rows (N, D) float32 of all processes in their
    order, on the CPU, where keep is true, else None. Raises InputError for features that are not finite.
    """
    # a process without images runs one to know the features, and counts none of its rows
    batches = [batch for batch in batches if len(batch)]
    batches, counted = (batches, None) if batches else ([np.arange(1)], 0)
    statistics, kept = {}, []
    progress = Progress(total=sum(map(len, batches)), unit="image", disable=processes.rank > 0)
    for indices, pixels in zip(batches, images.batches(batches), strict=True):
        features = extractor(torch.from_numpy(pixels).to(processes.device).permute(0, 3, 1, 2))
        for name, rows in features.items():
            rows = rows[:counted]
            if not rows.isfinite().all():
                raise InputError(f"{images.path}: features of images {indices[0]} to {indices[-1]} are not finite")
            if name not in statistics:
                statistics[name] = RunningStatistics(rows.shape[1], processes.device)
            statistics[name].add(rows)
        if keep:
            kept.append(features["pool"][:counted].float().cpu())
        progress.update(len(indices))
    progress.close()
    if processes.world > 1:
        for running in statistics.values():
            running.merge_processes()
    return statistics, processes.gather_rows(torch.cat(kept)) if keep else None
