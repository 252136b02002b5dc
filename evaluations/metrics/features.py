"""Feature extractors beside InceptionV3, and the loop that runs images through them.

An extractor is called with uint8 (N, 3, H, W) on its device and returns {name: (N, D)}; "pool" is what distances are
taken between. Letters: N images, D dimensions.
"""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common.errors import InputError
from evaluations.metrics.frechet import RunningStatistics
from evaluations.metrics.images import to_tensor
from evaluations.metrics.inception import Inception
from models.encoders import IMAGENET_STATISTICS

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
            raise InputError(
                f"--features {self.name} fails on uint8 images {tuple(images.shape)} ({reason}); scripts take uint8 "
                "(N, 3, H, W) and return (N, D)"
            ) from None
        if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or len(rows) != len(images):
            raise InputError(f"--features {self.name} returns {getattr(rows, 'shape', type(rows))} and not (N, D)")
        return {"pool": rows}


def load_features(name, device="cpu"):
    """Extractor of a TorchScript file or a timm model (a name, hf-hub:NAME or local-dir:FOLDER). Raises InputError."""
    if Path(name).suffix in (".pt", ".pth", ".ts", ".torchscript"):
        return load_script(name, device)
    import timm  # seconds to import, and InceptionV3 does not need it

    network = create_pretrained(name, f"--features {name}", "timm.list_models(pretrained=True) lists the names")
    config = timm.data.resolve_model_data_config(network)
    size, mode = config["input_size"][1:], config["interpolation"]
    mode = mode if mode in ("bilinear", "bicubic") else "bicubic"
    return ImageNetwork(name, network.to(device), size, (config["mean"], config["std"]), mode)


def load_script(path, device):
    """Extractor of a TorchScript file. Raises InputError."""
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--features {path} is no TorchScript file that can be read ({reason})") from None
    return Script(Path(path).stem, network)


def create_pretrained(name, flag, remedy, **options):
    """A timm model without head, with its pretrained weights, in eval mode. Raises InputError of one line."""
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **options).eval().requires_grad_(False)
    except Exception as error:  # hub, network, file and name errors of several packages
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise InputError(f"{flag}: no such model or its weights are not at hand ({reason}); {remedy}") from None


def load_dinov2(weights=None, device="cpu", name=DINOV2):
    """DINOv2 ViT-L/14 at 224²: the class token after the final norm, D = 1024. weights: the authors' file.

    The position embedding is resampled from 37×37 as the authors' code does it, not as timm does. Raises InputError.
    """
    import timm

    overlay = (
        {} if weights is None else {"pretrained_cfg_overlay": {"file": str(weights), "hf_hub_id": None, "url": ""}}
    )
    remedy = f"download {DINOV2_URL} and pass it with --dinov2-weights"
    trained = create_pretrained(name, f"DINOv2 {weights or name}", remedy, **overlay)
    state = trained.state_dict()
    state["pos_embed"] = resample_position(state["pos_embed"], 224 // trained.patch_embed.patch_size[0])
    network = timm.create_model(name, pretrained=False, num_classes=0, img_size=224)
    network.load_state_dict(state)
    return ImageNetwork("dinov2_vitl14", network.eval().requires_grad_(False).to(device), (224, 224))


def resample_position(embedding, grid):
    """DINOv2's position embedding (1, 1 + G², D) for grid × grid patches: bicubic, not antialiased.

    The scale is (grid + 0.1)/G: an offset that the authors added against rounding, and that moves the samples a little.
    """
    of_class, of_patches = embedding[:, :1], embedding[:, 1:]
    side = round(of_patches.shape[1] ** 0.5)
    square = of_patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    square = F.interpolate(square, scale_factor=((grid + 0.1) / side,) * 2, mode="bicubic")
    return torch.cat([of_class, square.flatten(2).transpose(1, 2)], dim=1)


def load_extractor(features, inception_weights, device, spatial=True):
    """InceptionV3, or what --features names."""
    if features:
        return load_features(features, device)
    return Inception(inception_weights, device, spatial)


def extract(images, batches, extractor, processes, keep=False):
    """Run the images of `batches` (this process's arrays of indices) through the extractor.

    Returns {name: RunningStatistics} over all processes, and the "pool" rows (N, D) float32 of all processes in their
    order, on the CPU, where keep is true, else None. Raises InputError for features that are not finite.
    """
    statistics, kept = {}, []
    progress = tqdm(total=sum(map(len, batches)), unit="image", disable=processes.rank > 0, mininterval=1)
    for indices, pixels in zip(batches, images.batches(batches), strict=True):
        for name, rows in extractor(to_tensor(pixels, processes.device)).items():
            if not rows.isfinite().all():
                raise InputError(f"{images.path}: features of images {indices[0]} to {indices[-1]} are not finite")
            if name not in statistics:
                statistics[name] = RunningStatistics(rows.shape[1], processes.device)
            statistics[name].add(rows)
            if keep and name == "pool":
                kept.append(rows.float().cpu())
        progress.update(len(indices))
    progress.close()
    return finish(statistics, kept, processes, keep)


def finish(statistics, kept, processes, keep):
    """Bring together what the processes have; one may have had no images."""
    if processes.world > 1:
        widths = [None] * processes.world
        dist.all_gather_object(widths, {name: len(running.mean) for name, running in statistics.items()})
        for name, width in sorted({name: width for found in widths for name, width in found.items()}.items()):
            statistics.setdefault(name, RunningStatistics(width, processes.device)).merge_processes()
    if not keep:
        return statistics, None
    rows = torch.cat(kept) if kept else torch.empty(0, len(statistics["pool"].mean))
    return statistics, processes.gather_rows(rows.to(processes.device)).cpu()
