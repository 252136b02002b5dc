"""Self-supervised encoders of SSL alignment (REPA): raw images → patch features. The networks are timm's.

    encode = Encoder("dinov2-vit-b", resolution=256)
    features = encode(images)  # uint8 (N, 3, 256, 256) → (N, 256, 768)

Letters: N images, R their side, g = R/16 patch tokens per side, T = g² of them, Z width.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import InputError, first_line, unreadable
from common.files import sha256_of_files
from models.checkpoints import check_sums, is_plain, load_strictly, read_file, strip_prefix
from models.hub import fetching
from models.layers import sincos_2d

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of each channel
CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
UNUSED = ("head.", "decoder_", "mask_token")  # prefixes of weights that are not the encoder's
STRIDE = 16  # image pixels per token for every encoder: patch-14 networks see the image at 14/16 of its side


def renamed(state, parts):
    """A state dict in whose names every key of `parts` has become its value."""
    for theirs, ours in parts.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    return state


def from_dinov2(state):
    """DINOv2: the giant's fused SwiGLU; with registers, timm adds the class token's position to the token itself."""
    state = renamed(state, {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."})
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


MISNAMED = {  # in some files
    "blocks.13.norm13.": "blocks.13.norm1.",
    "blocks.13.mlp.fc13.": "blocks.13.mlp.fc1.",
    "blocks.14.norm14.": "blocks.14.norm2.",
    "blocks.14.mlp.fc14.": "blocks.14.mlp.fc2.",
}


def from_mocov3(state):
    """MoCo v3: the base encoder's weights, four misnamed keys corrected, the position embedding for 256 pixels."""
    base = {name.removeprefix("base_encoder."): t for name, t in state.items() if name.startswith("base_encoder.")}
    base = renamed(base, MISNAMED)
    if "cls_token" in base:  # its position is 0; the rows are in the first half of the channels
        width = base["cls_token"].shape[-1]
        patches = sincos_2d(width, 256 // STRIDE).roll(width // 2, dims=2)
        base["pos_embed"] = torch.cat([torch.zeros(1, 1, width), patches], dim=1)
    return base


CLIP_NAMES = {
    "conv1.": "patch_embed.proj.",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_": ".norm",
    ".in_proj_": ".qkv.",
    ".out_proj.": ".proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_clip(state):
    """CLIP: the image tower without its projection, in fp32; a file with timm's names passes unchanged."""
    tower = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    tower = renamed(tower, CLIP_NAMES)
    tower.pop("proj", None)
    for name in tower.keys() & {"cls_token", "pos_embed"}:  # (Z,) and (1 + T, Z)
        tower[name] = tower[name].reshape(1, -1, tower[name].shape[-1])
    return tower or state


@dataclasses.dataclass(frozen=True)
class Family:
    """How one --enc-type is built, loaded, fed and read. A timm name without a tag has no weights on the hub."""

    timm_name: str
    width: int
    patch: int = 16
    final_norm: bool = True
    statistics: tuple = IMAGENET_STATISTICS
    resize_first: bool = False  # before the normalisation
    entry: str = ""  # key of the weights in the authors' file
    convert: Callable = dict  # the authors' names → timm's; dict: they are the same
    options: dict = dataclasses.field(default_factory=dict)  # for timm.create_model


dinov2 = functools.partial(Family, patch=14, convert=from_dinov2)
mocov3 = functools.partial(Family, entry="state_dict", convert=from_mocov3)
clip = functools.partial(Family, patch=14, final_norm=False, statistics=CLIP_STATISTICS, convert=from_clip)
ENCODERS = {
    "dinov2-vit-s": dinov2("vit_small_patch14_dinov2.lvd142m", 384),
    "dinov2-vit-b": dinov2("vit_base_patch14_dinov2.lvd142m", 768),
    "dinov2-vit-l": dinov2("vit_large_patch14_dinov2.lvd142m", 1024),
    "dinov2-vit-g": dinov2("vit_giant_patch14_dinov2.lvd142m", 1536),
    "dinov2reg-vit-s": dinov2("vit_small_patch14_reg4_dinov2.lvd142m", 384),
    "dinov2reg-vit-b": dinov2("vit_base_patch14_reg4_dinov2.lvd142m", 768),
    "dinov2reg-vit-l": dinov2("vit_large_patch14_reg4_dinov2.lvd142m", 1024),
    "dinov2reg-vit-g": dinov2("vit_giant_patch14_reg4_dinov2.lvd142m", 1536),
    "dinov1-vit-b": Family("vit_base_patch16_224.dino", 768),
    "mocov3-vit-s": mocov3("vit_small_patch16_224", 384, options={"img_size": 256, "num_heads": 12}),
    "mocov3-vit-b": mocov3("vit_base_patch16_224", 768, options={"img_size": 256}),
    "mocov3-vit-l": mocov3("vit_large_patch16_224", 1024, options={"img_size": 256}),
    "mae-vit-l": Family("vit_large_patch16_224.mae", 1024, final_norm=False, entry="model"),
    "clip-vit-l": clip("vit_large_patch14_clip_quickgelu_224.openai", 1024, resize_first=True),
    "jepa-vit-h": Family("vit_huge_patch14_gap_224.in1k_ijepa", 1280, patch=14, entry="encoder"),
}


def parse_enc_type(text):
    """--enc-type as a tuple of ENCODERS' names: `None` is (), commas separate several. Raises InputError."""
    names = tuple(name.strip().lower() for name in text.split(","))
    if names == ("none",):
        return ()
    for name in names:
        if name not in ENCODERS:
            raise InputError(f"--enc-type {name!r} is unknown; choose from {', '.join(ENCODERS)}, or None")
    if len(set(names)) < len(names):
        raise InputError(f"--enc-type {text} names an encoder twice; name each once")
    return names


def parse_enc_ckpt(text, names):
    """--enc-ckpt as one path per encoder; None, for an empty entry or without the flag, means the hub's weights."""
    if text is None or not names:
        return (None,) * len(names)
    paths = tuple(path.strip() or None for path in text.split(","))
    if len(paths) != len(names):
        given = f"--enc-ckpt names {len(paths)} files for {len(names)} encoders ({', '.join(names)})"
        raise InputError(f"{given}; give one for each, with commas (an empty entry means the hub's weights)")
    return paths


def check_grid(name, resolution, grid):
    """Raise InputError unless images of this resolution give grid × grid patch tokens, as the model has."""
    own = resolution / STRIDE
    if own != grid:
        fault = f"--enc-type {name} has a grid of {own:g}x{own:g} patch tokens for {resolution}x{resolution} images"
        raise InputError(f"{fault}, --model one of {grid}x{grid}; choose a --model with tokens of {STRIDE} pixels")


def weights_id(name, checkpoint=None):
    """Identity of an encoder's weights: their name on the hub, or the sha256 of the file."""
    if checkpoint is None:
        return ENCODERS[name].timm_name
    try:
        return "sha256:" + sha256_of_files(checkpoint)
    except OSError as error:
        raise unreadable(error, f"--enc-ckpt {checkpoint}", "name a weights file") from None


def load_network(name, checkpoint=None):
    """An encoder's timm network with pretrained weights from the hub or a file. Raises InputError."""
    import timm  # takes seconds, and only alignment needs it

    family = ENCODERS[name]
    if checkpoint is not None:
        network = timm.create_model(family.timm_name, num_classes=0, **family.options)
        load_strictly(network, read_weights(checkpoint, family), f"--enc-ckpt {checkpoint} (--enc-type {name})")
        return network
    if "." not in family.timm_name:
        raise InputError(f"--enc-type {name}: its weights are not on the hub; give the authors' --enc-ckpt FILE")
    what = f"the weights {family.timm_name} of --enc-type {name}"
    with fetching(what, family.timm_name, "pass timm's or the authors' file with --enc-ckpt FILE"):
        return timm.create_model(family.timm_name, pretrained=True, num_classes=0, **family.options)


def read_weights(path, family):
    """State dict with timm's names from the authors' file or timm's (also safetensors). Raises InputError."""
    content = read_torchscript(path) or read_file(path)
    content = content.get(family.entry, content) if isinstance(content, dict) else content
    entries = content.items() if isinstance(content, dict) else ()
    state = {strip_prefix(name): t for name, t in entries if isinstance(t, torch.Tensor) and is_plain(t)}
    try:
        state = {name: t.float() for name, t in family.convert(state).items() if not name.startswith(UNUSED)}
    except (LookupError, RuntimeError):  # a name or a dimension is missing
        state = {}
    if not state:
        raise InputError(f"--enc-ckpt {path} holds no weights of {family.timm_name}; give the authors' or timm's file")
    return state


def read_torchscript(path):
    """State dict of a torch.jit.save archive, such as OpenAI's CLIP; None for other files. Raises InputError."""
    if not Path(path).is_file() or not zipfile.is_zipfile(path):
        return None
    try:
        if not any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
            return None
        check_sums(path)
        return torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"--enc-ckpt {path} is unreadable or truncated ({first_line(error)}); copy it again") from None


class Encoder:
    """A frozen encoder for images of one resolution, with its position embedding resampled to their grid."""

    def __init__(self, name, resolution, checkpoint=None, device="cpu"):
        self.family = ENCODERS[name]
        if resolution % STRIDE:
            fault = f"{resolution}x{resolution} images do not divide into {STRIDE}x{STRIDE} patches"
            raise InputError(f"--enc-type {name}: {fault}; choose another resolution")
        self.side = resolution // STRIDE * self.family.patch
        network = load_network(name, checkpoint)
        network.set_input_size(img_size=(self.side, self.side))  # timm's resample_abs_pos_embed with its defaults
        if not self.family.final_norm:
            network.norm = nn.Identity()
        self.network = network.eval().requires_grad_(False).to(device)
        self.statistics = torch.tensor(self.family.statistics, device=device).view(2, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images):
        """uint8 images (N, 3, R, R) → patch features (N, T, Z); class and register tokens are dropped."""
        tokens = self.network.forward_features(self.preprocess(images))
        return tokens[:, self.network.num_prefix_tokens :]

    def preprocess(self, images):
        """uint8 (N, 3, R, R) → what the network sees, float32 (N, 3, side, side)."""
        mean, std = self.statistics
        x = images.float() / 255
        return (self.resize(x) - mean) / std if self.family.resize_first else self.resize((x - mean) / std)

    def resize(self, x):
        """Bicubic without antialiasing, as published; an image of the right size is left as it is."""
        if x.shape[-1] == self.side:
            return x
        return F.interpolate(x, size=(self.side, self.side), mode="bicubic", antialias=False)
