"""The table of model sizes, and `create_model`, which fills the constructor from it."""

import dataclasses
import inspect
import re

import models  # the networks are imported on first use: the table itself needs no torch
from common.errors import InputError, did_you_mean

NETWORKS = {"flow": "DeepFlow", "flow map": "FlowMap", "text": "MMDiT"}  # by kind


def kind_of(options):
    """The kind of network that takes these constructor arguments (a dict): "flow", "flow map" or "text"."""
    if options.get("dmf_depth") is not None:
        return "flow map"
    return "text" if options.get("context_dim") is not None else "flow"


@dataclasses.dataclass(frozen=True)
class Preset:
    """A row of the table. `parameters`: for these latents and 1000 classes; for text-to-image without `pos_embed`."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    df_idxs: tuple
    parameters: int
    projector_dim: int = 2048
    encoder_depth: int = 8  # models of one branch: the block whose tokens are aligned, as in REPA
    dmf_depth: int | None = None  # flow maps: number of blocks that see t
    context_dim: int | None = None  # text-to-image: width of the text features
    init: str = "dit"  # text-to-image: initialisation
    input_size: int = 32  # of the latents of 256² images, unless the data differ
    in_channels: int = 4

    @property
    def kind(self):
        """The kind of network, as `kind_of` names it."""
        return kind_of(vars(self))


IMAGENET = {"count": 1_281_167, "num_classes": 1000, "resolution": 256}  # what the papers train on
COCO = {"count": 82_783, "resolution": 256}  # text-to-image: the training images of 2014
CLIP_WIDTH = 768  # width of CLIP ViT-L/14's text features
F16 = {"input_size": 16, "in_channels": 32}  # latents of VAEs with downsampling factor 16
REPA = {"context_dim": CLIP_WIDTH, "init": "repa"}

# Ours are Ti (for laptops and tests), the S of DeepFlow and MMDiT, and patch size 1. The others are the papers'.
PRESETS = {
    #                      depth  width heads patch key layers  parameters
    "DeepFlow-Ti/2": Preset(4, 128, 4, 2, (2,), 2_262_064, projector_dim=256),
    "DeepFlow-S/2": Preset(12, 384, 6, 2, (6,), 55_366_704),
    "DeepFlow-B/2": Preset(12, 768, 12, 2, (6,), 166_201_392),
    "DeepFlow-L/2": Preset(18, 1024, 16, 2, (6, 12), 433_438_768),
    "DeepFlow-XL/2": Preset(24, 1152, 16, 2, (8, 16), 681_559_344),
    "SiT-Ti/2": Preset(4, 128, 4, 2, (), 1_434_896, projector_dim=256, encoder_depth=2),
    "SiT-S/2": Preset(12, 384, 6, 2, (), 32_957_200),
    "SiT-S/4": Preset(12, 384, 6, 4, (), 32_920_384),
    "SiT-S/8": Preset(12, 384, 6, 8, (), 33_049_600),
    "SiT-B/2": Preset(12, 768, 12, 2, (), 130_500_112, encoder_depth=4),
    "SiT-B/4": Preset(12, 768, 12, 4, (), 130_426_432, encoder_depth=4),
    "SiT-B/8": Preset(12, 768, 12, 8, (), 130_684_672, encoder_depth=4),
    "SiT-L/2": Preset(24, 1024, 16, 2, (), 458_086_416),
    "SiT-L/4": Preset(24, 1024, 16, 4, (), 457_988_160),
    "SiT-L/8": Preset(24, 1024, 16, 8, (), 458_332_416),
    "SiT-XL/2": Preset(28, 1152, 16, 2, (), 675_111_184),
    "SiT-XL/4": Preset(28, 1152, 16, 4, (), 675_000_640),
    "SiT-XL/8": Preset(28, 1152, 16, 8, (), 675_387_904),
    "DeepFlow-S/1": Preset(12, 384, 6, 1, (6,), 55_391_328, **F16),
    "DeepFlow-B/1": Preset(12, 768, 12, 1, (6,), 166_250_592, **F16),
    "DeepFlow-L/1": Preset(18, 1024, 16, 1, (6, 12), 433_504_352, **F16),
    "DeepFlow-XL/1": Preset(24, 1152, 16, 1, (8, 16), 681_633_120, **F16),
    "SiT-S/1": Preset(12, 384, 6, 1, (), 32_969_504, **F16),
    "SiT-B/1": Preset(12, 768, 12, 1, (), 130_524_704, encoder_depth=4, **F16),
    "SiT-L/1": Preset(24, 1024, 16, 1, (), 458_119_200, **F16),
    "SiT-XL/1": Preset(28, 1152, 16, 1, (), 675_148_064, **F16),
    "DMFT-Ti/2": Preset(4, 128, 4, 2, (), 1_435_153, dmf_depth=3),
    "DMFT-S/2": Preset(12, 384, 6, 2, (), 32_957_457, dmf_depth=8),
    "DMFT-B/2": Preset(12, 768, 12, 2, (), 130_500_369, dmf_depth=8),
    "DMFT-L/2": Preset(24, 1024, 16, 2, (), 458_086_673, dmf_depth=16),
    "DMFT-XL/2": Preset(28, 1152, 16, 2, (), 675_111_441, dmf_depth=20),
    "DeepFlow-DMF-Ti/2": Preset(4, 128, 4, 2, (2,), 2_262_321, projector_dim=256, dmf_depth=2),
    "DeepFlow-DMF-S/2": Preset(12, 384, 6, 2, (6,), 55_366_961, dmf_depth=6),
    "DeepFlow-DMF-B/2": Preset(12, 768, 12, 2, (6,), 166_201_649, dmf_depth=6),
    "DeepFlow-DMF-L/2": Preset(18, 1024, 16, 2, (6, 12), 433_439_025, dmf_depth=12),
    "DeepFlow-DMF-XL/2": Preset(24, 1152, 16, 2, (8, 16), 681_559_601, dmf_depth=16),
    "MMDiT-Ti/2": Preset(4, 128, 4, 2, (), 2_345_488, projector_dim=256, encoder_depth=2, **REPA),
    "MMDiT-S/2": Preset(12, 384, 12, 2, (), 62_768_656, **REPA),
    "MMDiT-L/2": Preset(24, 768, 24, 2, (), 505_070_608, **REPA),
    "DeepFlow-MMDiT-Ti/2": Preset(4, 128, 4, 2, (2,), 3_172_656, projector_dim=256, context_dim=CLIP_WIDTH),
    "DeepFlow-MMDiT-S/2": Preset(12, 384, 12, 2, (6,), 85_178_160, context_dim=CLIP_WIDTH),
    "DeepFlow-MMDiT-L/2": Preset(24, 768, 24, 2, (8, 16), 571_330_608, context_dim=CLIP_WIDTH),
}
CLASS_MODELS, FLOW_MAPS, TEXT_MODELS = (
    tuple(name for name, preset in PRESETS.items() if preset.kind == kind) for kind in NETWORKS
)


def parse_df_idxs(text):
    """Key layers from the command line: `[8,16]`, `8,16` and `8 16` (one string or several) → (8, 16)."""
    joined = " ".join(map(str, text)) if isinstance(text, list | tuple) else str(text)
    numbers = re.findall(r"-?\d+", joined)
    if not re.fullmatch(r"\s*\[?[\d\s,-]*\]?\s*", joined) or any(len(number) > 9 for number in numbers):
        raise InputError(f"--df-idxs {joined[:100]!r} is not a list of block numbers; write [8,16] or '8 16'")
    return tuple(map(int, numbers))


def spaced_key_layers(depth, num_branches):
    """Key layers that divide `depth` blocks into `num_branches` equal branches, or InputError."""
    if depth % num_branches:
        raise InputError(f"--trans-depth {depth} does not divide into {num_branches} branches; pass --df-idxs as well")
    return tuple(range(depth // num_branches, depth, depth // num_branches))


def network_of(kind):
    """The class of the networks of a kind."""
    return getattr(models, NETWORKS[kind])


def constructor_defaults(kind):
    """{argument: default} of the networks of a kind."""
    arguments = {**inspect.signature(models.DeepFlow).parameters, **inspect.signature(network_of(kind)).parameters}
    defaults = {name: a.default for name, a in arguments.items() if a.default is not a.empty}
    if kind == "text":
        del defaults["num_classes"]
    return defaults


def model_config(name, **overrides):
    """All constructor arguments of a preset with overrides (None: not given), checked.

    `depth` without `df_idxs` spaces the preset's number of branches evenly. Raises InputError.
    """
    if name not in PRESETS:
        raise InputError(f"model {name!r} is unknown; {did_you_mean(name, PRESETS)}choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    config = constructor_defaults(preset.kind)
    given = {key: value for key, value in overrides.items() if value is not None}
    if unknown := given.keys() - config.keys():
        raise TypeError(f"unknown model option {min(unknown)!r}")
    config |= {key: getattr(preset, key) for key in config if hasattr(preset, key)} | given
    if config["depth"] < 1:
        raise InputError(f"--trans-depth {config['depth']} is below 1; a model needs a block")
    if "depth" in given and "df_idxs" not in given:
        config["df_idxs"] = spaced_key_layers(config["depth"], len(preset.df_idxs) + 1)
    config["df_idxs"] = parse_df_idxs(config["df_idxs"])
    if name.startswith("SiT-") and config["df_idxs"]:
        raise InputError(f"--df-idxs is not for --model {name}, which has one branch; use a --model DeepFlow-SIZE/2")
    config["z_dims"] = tuple(config["z_dims"])
    return config


def create_model(name, **overrides):
    """Build a freshly initialised model: `create_model("DeepFlow-XL/2")` is the paper's. Raises InputError."""
    return build(model_config(name, **overrides))


def build(options):
    """The freshly initialised model with these constructor arguments, as `model_config` returns them."""
    return network_of(kind_of(options))(**options)
