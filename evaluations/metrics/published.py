"""Numbers of the papers, DeepFlow's (arXiv 2503.14494) but where it says so. None was measured here."""

import dataclasses

# Table 8: {(size, branches): {depth: (parameters in millions, GFLOPS as printed)}}; one branch is SiT
TABLE_8 = {
    ("B", 1): {12: (130, 24)},
    ("L", 1): {24: (458, 80)},
    ("XL", 1): {28: (675, 114)},
    ("B", 2): {10: (144, 24), 12: (166, 28)},
    ("L", 2): {20: (431, 72), 22: (469, 78), 24: (507, 84)},
    ("XL", 2): {22: (588, 97), 24: (636, 106), 26: (683, 114), 28: (731, 122)},
    ("L", 3): {18: (433, 72), 21: (490, 82), 24: (547, 92)},
    ("XL", 3): {18: (538, 89), 21: (609, 101), 24: (681, 113), 27: (753, 125)},
    ("XL", 4): {28: (822, 137)},
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of a paper's tables on ImageNet."""

    model: str
    epochs: int | None
    fid: float
    sfid: float | None = None
    inception_score: float | None = None
    weighting: str = ""
    alignment: str = ""
    guided: bool = False
    resolution: int = 256
    sampled: str = "sde, 250 steps"
    steps: int | None = None  # of training, where epochs are not stated


PUBLISHED = [
    Published("SiT-B/2", 80, 34.4, 6.5, 43.7, "uniform"),
    Published("SiT-B/2", 80, 29.7, 6.2, 51.0, "lognormal"),
    Published("DeepFlow-B/2", 80, 28.1, 5.8, 49.8, "uniform"),
    Published("DeepFlow-B/2", 80, 23.1, 5.6, 60.3, "lognormal"),
    Published("DeepFlow-B/2", 80, 21.7, 6.1, 66.0, "lognormal", "DINOv1"),
    Published("DeepFlow-B/2", 80, 17.2, 6.0, 77.8, "lognormal", "DINOv2"),
    *(Published("SiT-XL/2", epochs, fid) for epochs, fid in ((80, 13.8), (200, 10.2), (800, 9.8))),
    *(Published("DeepFlow-XL/2", epochs, fid) for epochs, fid in ((80, 10.3), (200, 7.8), (400, 7.2))),
    Published("DeepFlow-XL/2", 80, 6.5, alignment="DINOv2"),
    Published("DeepFlow-XL/2", 200, 5.4, alignment="DINOv2"),
    Published("DeepFlow-XL/2", 400, 5.0, alignment="DINOv2"),
    Published("DeepFlow-XL/2", 400, 1.97, 4.39, 264.7, guided=True),
    Published("DeepFlow-XL/2", 600, 1.89, guided=True),
    Published("DeepFlow-XL/2", 400, 1.77, alignment="DINOv2", guided=True),
    Published("DeepFlow-XL/2", 200, 2.59, guided=True, resolution=512),
    Published("DeepFlow-XL/2", 400, 2.22, guided=True, resolution=512),
    Published("DeepFlow-XL/2", 160, 2.03, alignment="DINOv2", guided=True, resolution=512),
    Published("DeepFlow-XL/2", 200, 1.96, alignment="DINOv2", guided=True, resolution=512),
    *(  # Decoupled MeanFlow (Lee, Yu, Shin); guidance is trained in
        Published("DMFT-XL/2", None, fid, resolution=size, sampled=sampled, steps=steps)
        for size, steps, numbers in ((256, 400_000, (2.16, 1.51)), (512, 800_000, (2.12, 1.68)))
        for fid, sampled in zip(numbers, ("1 step", "4 steps"), strict=True)
    ),
]
