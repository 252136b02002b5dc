"""Flags that several programs of evaluations/ have."""

import dataclasses

from common.flags import flag


def json_flag():
    """--json, alone or with a file (results.result_path)."""
    help = "write the result; without FILE results/NAME….json"
    return flag(None, help, str, group="output", nargs="?", const="", metavar="FILE")


@dataclasses.dataclass(kw_only=True)
class MeasureFlags:
    """Flags of the programs that run images through a network."""

    inception_weights: str | None = flag(
        None, "torch-fidelity's file; default: its download", str, group="features", metavar="FILE"
    )
    features: str | None = flag(
        None, "timm model or TorchScript file in place of InceptionV3", str, group="features", metavar="NAME"
    )
    sqrtm: bool = flag(False, "published arithmetic of the Fréchet distance (scipy's sqrtm)", group="distances")
    other_size: bool = flag(False, "allow a reference of another resolution", group="distances")
    json: str | None = json_flag()
