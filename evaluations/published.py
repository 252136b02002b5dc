"""What the papers print, and the flags that train each row. None of it was measured here.

Tables 2 to 8 and Figure 2(d) of DeepFlow (arXiv 2503.14494), and Decoupled MeanFlow's release (Lee, Yu, Shin).
"""

import dataclasses
import functools

from common.flags import shown, words_of
from models import PRESETS, model_config
from models.presets import spaced_key_layers
from models.specs import LatentSpec
from training.config import FlowMapConfig, TextTrainConfig, TrainConfig

CONFIGS = {config.kind: config for config in (TrainConfig, FlowMapConfig, TextTrainConfig)}
STEPS_PER_EPOCH = 5000  # as the papers count: 80 epochs are 400,000 steps of 256 images
SDE = {"mode": "sde", "num_steps": 250}
ALIGNED = {None: {}, "DINOv1": {"ssl_align": True, "enc_type": "dinov1-vit-b"}, "DINOv2": {"ssl_align": True}}
FLOW_FILE = "FLOW.pt"  # stands for the flow model that a flow map starts from


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row of a table: how its model is trained and sampled, and what was published for it."""

    table: str
    flags: dict  # of the program that trains it
    numbers: dict  # {metric: as printed}
    guided: bool | None = False  # None: not stated
    sampler: dict | None = None  # flags of generate*.py; None: not stated
    size: tuple | None = None  # parameters in millions, rounded down, and GFLOPS as Table 8 counts them

    @property
    def kind(self):
        """The kind of model: "flow", "flow map" or "text"."""
        return PRESETS[self.flags["model"]].kind

    @functools.cached_property
    def config(self):
        """The resolved flags of the run, with its name."""
        config = CONFIGS[self.kind](**self.flags).resolve()
        return config.named(config.resolution or 256)

    @functools.cached_property
    def options(self):
        """Constructor arguments of the model."""
        size = self.config.resolution // LatentSpec().factor
        return model_config(self.config.model, **self.config.model_flags(), input_size=size)

    @property
    def steps(self):
        return self.config.max_train_steps

    @property
    def title(self):
        return {"2d": "Figure 2(d)", "DMF": "Decoupled MeanFlow"}.get(self.table, f"Table {self.table}")

    @property
    def name(self):
        """`DeepFlow-XL/2-3T, DINOv2`."""
        branches = len(self.options["df_idxs"]) + 1
        name = self.config.model + (f"-{branches}T" if branches > 1 else "")
        aligned = getattr(self.config, "ssl_align", False) and self.config.enc_type.partition("-")[0]
        return f"{name}, {aligned.replace('dino', 'DINO')}" if aligned else name

    def words(self, given=None, without=()):
        """Flags that differ from the defaults, or from flags that are `given` already, as on a command line."""
        base = type(self.config)(**(given or {"model": self.config.model})).resolve()
        values = {name: getattr(self.config, name) for name in self.flags if name not in without}
        changed = {name: value for name, value in values.items() if value != getattr(base, name)}
        return [" ".join(words_of(shown(name), value)) for name, value in changed.items()]


def flow(table, model, *numbers, epochs=80, weighting="lognormal", alignment=None, sampler=SDE, size=None, **flags):
    """Row of a flow model; numbers: FID, or FID, sFID and Inception Score, or the distance of Figure 2(d)."""
    given = {"model": model, "weighting": weighting, "max_train_steps": epochs * STEPS_PER_EPOCH}
    if alignment and model.startswith("DeepFlow"):
        given["legacy_scaling"] = True  # as in every released file with alignment
    metrics = ("feature_distance",) if table == "2d" else ("fid", "sfid", "inception_score")
    named = dict(zip(metrics, numbers, strict=False))
    return Row(table, {**given, **ALIGNED[alignment], **flags}, named, sampler is None, sampler, size)


TABLE_2 = {  # (model, alignment): uniform t, lognormal t
    ("SiT-B/2", None): ((34.4, 6.5, 43.7), (29.7, 6.2, 51.0)),
    ("SiT-B/2", "DINOv1"): ((28.3, 6.6, 53.8), (24.4, 6.3, 62.1)),
    ("SiT-B/2", "DINOv2"): ((23.0, 6.4, 59.9), (20.4, 6.3, 72.7)),
    ("DeepFlow-B/2", None): ((28.1, 5.8, 49.8), (23.1, 5.6, 60.3)),
    ("DeepFlow-B/2", "DINOv1"): ((25.6, 6.4, 56.6), (21.7, 6.1, 66.0)),
    ("DeepFlow-B/2", "DINOv2"): ((20.0, 6.2, 70.2), (17.2, 6.0, 77.8)),
}
BY_EPOCHS = {  # {table: {(model, alignment): {epochs: numbers}}}
    "3": {  # 100 epochs are from the text
        ("SiT-XL/2", None): {80: (13.8, 5.0, 91.0), 200: (10.2, 5.3, 113.6), 800: (9.8, 7.3, 128.2)},
        ("SiT-XL/2", "DINOv2"): {80: (7.2, 5.1, 134.3), 200: (6.2, 5.3, 149.6), 800: (5.7, 6.4, 171.0)},
        ("DeepFlow-XL/2", None): {80: (10.3, 4.8, 105.2), 100: (9.8,), 200: (7.8, 4.8, 127.3), 400: (7.2, 5.1, 138.5)},
        ("DeepFlow-XL/2", "DINOv2"): {80: (6.5, 4.9, 134.9), 200: (5.4, 5.0, 151.6), 400: (5.0, 5.2, 162.0)},
    },
    "4": {  # with guidance, as 5; sampler, scale and interval are not stated
        ("SiT-XL/2", None): {1400: (2.06, 4.50, 270.3)},
        ("DeepFlow-XL/2", None): {400: (1.97, 4.39, 264.7), 600: (1.89, 4.40, 263.3)},
        ("SiT-XL/2", "DINOv2"): {800: (1.80, 4.50, 284.0)},
        ("DeepFlow-XL/2", "DINOv2"): {400: (1.77, 4.44, 271.3)},
    },
    "5": {
        ("SiT-XL/2", None): {600: (2.62, 4.18, 252.2)},
        ("DeepFlow-XL/2", None): {200: (2.59, 4.23, 231.1), 400: (2.22, 4.27, 249.4)},
        ("SiT-XL/2", "DINOv2"): {200: (2.08, 4.19, 274.6)},
        ("DeepFlow-XL/2", "DINOv2"): {160: (2.03, 4.29, 248.8), 200: (1.96, 4.28, 260.3)},
    },
}
AT_512 = {"resolution": 512, "data_dir": "data/imagenet512"}
TABLE_6 = {  # (model, aligned): FID, FD-DINOv2, Inception Score, CLIP score, GenEval; the sampler is not stated
    ("MMDiT-L/2", False): (5.38, 408.27, 31.1, 0.2954, 0.2672),
    ("MMDiT-L/2", True): (4.24, 274.19, 34.4, 0.2979, 0.3166),
    ("DeepFlow-MMDiT-L/2", False): (5.32, 343.60, 33.0, 0.2974, 0.2957),
    ("DeepFlow-MMDiT-L/2", True): (4.18, 216.20, 35.9, 0.3010, 0.3458),
}
TEXT_METRICS = ("fid", "fd_dinov2", "inception_score", "clip_score_raw", "geneval_overall")
ABLATIONS = [  # of DeepFlow-B/2: table, t, flag, {its value: FID}; SiT-B/2 comes before them
    ("7a", "uniform", "vera", {"none": 33.0, "gap": 31.1, "acceleration": 29.9, "full": 28.1}),
    ("7b", "uniform", "tg_upper_bound", {0.1: 28.9, 0.05: 28.6, 0.01: 28.1, 0.005: 28.3, 0.001: 28.5}),
    ("7c", "uniform", "acc_coeff", {0.5: 27.8, 0.75: 28.1, 1.0: 28.1, 1.25: 28.5, 1.5: 28.8}),
    ("7c", "lognormal", "acc_coeff", {0.5: 23.5, 1.0: 23.1}),
]
TABLE_8 = {  # {(size, branches): {depth: (parameters in millions, GFLOPS, FID)}}; one branch is SiT
    ("B", 1): {12: (130, 24, 29.7)},
    ("L", 1): {24: (458, 80, 16.1)},
    ("XL", 1): {28: (675, 114, 13.7)},
    ("B", 2): {10: (144, 24, 27.3), 12: (166, 28, 23.1)},
    ("L", 2): {20: (431, 72, 13.9), 22: (469, 78, 13.3), 24: (507, 84, 12.8)},
    ("XL", 2): {22: (588, 97, 11.9), 24: (636, 106, 11.7), 26: (683, 114, 11.1), 28: (731, 122, 11.1)},
    ("L", 3): {18: (433, 72, 13.3), 21: (490, 82, 12.0), 24: (547, 92, 11.9)},
    ("XL", 3): {18: (538, 89, 12.4), 21: (609, 101, 10.9), 24: (681, 113, 10.3), 27: (753, 125, 10.0)},
    ("XL", 4): {28: (822, 137, 9.7)},
}
# Figure 2(d), {(model, --vera): distance}; its models are taken to be those of Table 7a
DISTANCE = {("SiT-B/2", "full"): 7.7, ("DeepFlow-B/2", "none"): 7.2, ("DeepFlow-B/2", "full"): 2.9}
MAPS = {  # Decoupled MeanFlow: {resolution: (steps of the flow model, flags of the flow map, shift, {steps: FID})}
    256: (4_000_000, {}, 1.0, {1: 2.16, 4: 1.51}),
    512: (2_000_000, {"qk_norm": True, "g_max": 0.8, "max_train_steps": 800_000}, 1.5, {1: 2.12, 4: 1.68}),
}


def spaced(size, branches, depth):
    """(preset, flags that differ from the preset's) of a model of Table 8, whose key layers are evenly spaced."""
    preset = PRESETS[name := f"{'SiT' if branches == 1 else 'DeepFlow'}-{size}/2"]
    flags = {} if depth == preset.depth else {"trans_depth": depth}
    if branches != len(preset.df_idxs) + 1:
        flags["df_idxs"] = list(spaced_key_layers(depth, branches))
    return name, flags


def rows():
    """All rows in the order of the tables; flow models that flow maps start from come before them."""
    for (model, alignment), both in TABLE_2.items():
        for weighting, numbers in zip(("uniform", "lognormal"), both, strict=True):
            yield flow("2", model, *numbers, weighting=weighting, alignment=alignment)
    for table, models in BY_EPOCHS.items():
        given = {"3": {}, "4": {"sampler": None}, "5": {"sampler": None, **AT_512}}[table]
        for (model, alignment), by_epochs in models.items():
            for epochs, numbers in by_epochs.items():
                yield flow(table, model, *numbers, epochs=epochs, alignment=alignment, **given)
    for (model, aligned), numbers in TABLE_6.items():
        flags = {"ssl_align": True, "legacy_scaling": model.startswith("DeepFlow")} if aligned else {}
        yield Row("6", {"model": model, **flags}, dict(zip(TEXT_METRICS, numbers, strict=True)), guided=None)
    yield flow("7a", "SiT-B/2", 34.4, weighting="uniform")
    for table, weighting, name, by_value in ABLATIONS:
        for value, fid in by_value.items():
            yield flow(table, "DeepFlow-B/2", fid, weighting=weighting, **{name: value})
    yield flow("7c", "DeepFlow-B/2", 30.4, weighting="uniform", acc_mlp=[2048])
    for (size, branches), depths in TABLE_8.items():
        for depth, (millions, gflops, fid) in depths.items():
            model, flags = spaced(size, branches, depth)
            yield flow("8", model, fid, size=(millions, gflops), **flags)
    for (model, step), distance in DISTANCE.items():
        yield flow("2d", model, distance, weighting="uniform", vera=step)
    start = {"weighting": "lognormal", "ssl_align": True, "adam_beta2": 0.95}
    for resolution, (flow_steps, flags, shift, fids) in MAPS.items():
        size = AT_512 if resolution == 512 else {}
        yield Row("DMF", {"model": "SiT-XL/2", "max_train_steps": flow_steps, **start, **size}, {}, sampler=SDE)
        for steps, fid in fids.items():
            given = {"model": "DMFT-XL/2", "init_from": FLOW_FILE, **flags, **size}
            yield Row("DMF", given, {"fid": fid}, sampler={"num_steps": steps, "shift": shift})
    yield Row("DMF", {"model": "DMFT-B/2", "init_from": FLOW_FILE}, {}, sampler={"num_steps": 1})


PUBLISHED = list(rows())
