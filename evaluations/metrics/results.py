"""Results as JSON files: the numbers, how they were computed, and the manifest of the samples they are about."""

import dataclasses
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from pydantic import Field

from common.errors import InputError, note
from common.files import check_writable, sha256_of_files, write_json
from common.flags import flag
from common.records import Finite, check_record, read_record
from common.versions import versions
from models.specs import Options
from sampling.flags import GENEVAL_IMAGES
from sampling.manifest import SETTINGS, SampleManifest, manifest_path, read_manifest
from sampling.stores import GenEvalFiles, PngFiles

# Names of metrics where lower is better begin with one of these.
LOWER = ("fid", "sfid", "kid", "fd_", "kd_", "distance", "Fréchet")
LABELS = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID"}  # as ADM's evaluator prints them
LABELS |= {"precision": "Precision", "recall": "Recall", "kid": "KID", "kid_standard_error": "KID standard error"}
OTHER = {"fd": "FD", "precision": "Precision", "recall": "Recall", "kd": "KD", "kd_standard_error": "KD standard error"}
SCRIPTS = (".pt", ".pth", ".ts", ".torchscript")  # suffixes of TorchScript files
BATCHES, SPEED = "--per-proc-batch-size", "precision and speed"  # name and group of flags


@dataclasses.dataclass
class Result:
    """What a program of evaluations/ measured, as its JSON file holds it; fields that are None are left out there."""

    metrics: Annotated[dict[str, Finite], Field(min_length=1)]
    samples: str = ""  # what was measured
    reference: str | None = None
    arrays: list | None = None  # lines that say which arrays served what
    warnings: list | None = None
    count: int | None = None  # of images
    clip: str | None = None  # name of the CLIP model
    results: str | None = None  # file of GenEval's detector
    curves: dict | None = None  # {name: [(t, number)]}
    settings: dict | None = None
    versions: dict = dataclasses.field(default_factory=lambda: versions("torch", "scipy", "torch-fidelity", "timm"))
    manifest: SampleManifest | None = None  # of the samples, without their labels

    @classmethod
    def read(cls, path, remedy="pass files that the evaluators wrote"):
        """The result in a file. Raises InputError naming it."""
        result = read_record(cls, path, remedy)
        check_record(Options | None, getattr(result.manifest, "model_options", None), f"{path}: model_options", remedy)
        return result

    def write(self, path, flag="--json"):
        """Write the result, with the manifest beside the samples, to a file; None: nowhere. Raises InputError."""
        if path is None:
            return note(f"the results are not saved; {flag} FILE saves them")
        manifest = manifest_without_labels(self.samples)
        content = {name: value for name, value in vars(self).items() if value is not None}
        try:
            write_json(path, {**content, "manifest": manifest})
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); the numbers are printed above") from None
        weights = manifest and manifest.get("weights")  # printed because REPA's text-to-image sampler uses raw ones
        note(f"wrote {path}" + (f" (samples of the {weights} weights)" if weights else ""))
        note(f"next: python -m evaluations.table {path}")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, None of a single number."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, numbers):
        return cls(fmean(numbers), stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None)

    def __str__(self):
        return f"{self.mean:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")


def features_name(features):
    """Name of an extractor in results: a script's file without folder and suffix, or the model's."""
    return Path(features).stem if Path(features).suffix in SCRIPTS else features


def label(metric, features=None):
    """A metric's name as ADM's evaluator prints it; for other features, with the extractor's name."""
    other = OTHER.get(metric.removesuffix(f"_{features}"))
    return LABELS.get(metric) or (f"{other} ({features})" if other else metric)


def is_better(metric, value, than):
    """Whether `value` of a metric is better than the value `than`: lower for distances, higher for others."""
    return value < than if metric.startswith(LOWER) else value > than


def sample_manifest(samples):
    """SampleManifest beside an npz or a folder of samples; None where there is no file. Raises InputError."""
    path = manifest_path(samples)
    return read_manifest(path) if path.is_file() else None


def manifest_without_labels(samples):
    """The manifest beside samples, as results store it; None if there is no file. Raises InputError."""
    manifest = sample_manifest(samples)
    return manifest and {name: value for name, value in manifest.to_json().items() if name != "labels"}


def sample_labels(samples, kind, count, remedy):
    """The `count` labels in the manifest beside samples, of type `kind`, such as list[str]. Raises InputError."""
    path, manifest = manifest_path(samples), sample_manifest(samples)
    labels = check_record(kind, manifest and manifest.labels, f"{path}: labels", remedy)
    if len(labels) != count:
        raise InputError(f"{path} lists {len(labels)} labels for {count} samples; {remedy}")
    return labels


def lacking(folder, manifest):
    """Files missing from a finished folder of generate*.py; [] for other samples."""
    record = Path(folder) / SETTINGS
    kept_as = read_record(dict, record, "make the samples again").get("kept_as") if record.is_file() else None
    stores = (PngFiles(folder), GenEvalFiles(folder, (), manifest.images_per_prompt or GENEVAL_IMAGES))
    paths = (store.path(i) for store in stores if store.kind == kept_as for i in range(manifest.num_fid_samples))
    return [path for path in paths if not path.is_file()]


def markdown(header, rows):
    """A table as Markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


class CountedSamples:
    """Refuses samples that are incomplete or do not match the files beside them."""

    incomplete = None  # None: the program has no --incomplete

    def check_count(self, samples, count):
        """List with the fault of `count` samples that contradict the files beside them; [] if there is none.

        Raises InputError for a fault without --incomplete.
        """
        manifest = sample_manifest(samples)
        said = manifest and manifest.num_fid_samples
        if said not in (None, count):
            return self.refuse(f"{samples} holds {count} samples, {manifest_path(samples)} says {said}")
        elif said and (paths := lacking(samples, manifest)):
            return self.refuse(f"{samples} lacks {len(paths)} images, the first is {paths[0]}")
        elif manifest and manifest.npz_sha256 and Path(samples).suffix == ".npz":
            if sha256_of_files(samples) != manifest.npz_sha256:
                return self.refuse(f"{samples} is not the file that {manifest_path(samples)} describes")
        elif manifest is None and (Path(samples) / SETTINGS).is_file():
            return self.refuse(f"sampling into {samples} is not finished ({count} samples)")
        return []

    def refuse(self, fault):
        """Raise InputError for incomplete samples; with --incomplete print the fault and return it in a list."""
        if not self.incomplete:
            remedy = "" if self.incomplete is None else ", or pass --incomplete to measure what is there"
            raise InputError(f"{fault}; complete them, or make them again{remedy}")
        note(f"warning: {fault}")
        return [fault]


@dataclasses.dataclass(kw_only=True)
class SampleFlags(CountedSamples):
    """Whether incomplete samples are accepted."""

    incomplete: bool = flag(False, "measure incomplete samples instead of refusing them", group="data")


AFTER_CHECK = "next: the same command without --check-only"


@dataclasses.dataclass(kw_only=True)
class ResultFlags(SampleFlags):
    """Where the result goes, and whether to check only, before there are samples."""

    check_only: bool = flag(False, "check everything except the samples, which need not exist, and stop", group="data")
    json: str | None = flag(None, "write results/NAME.json", str, group="output", nargs="?", const="", empty=True)

    def result_path(self, samples, suffix=""):
        """Path of --json, by default results/NAME + suffix + .json for samples NAME, or None. Raises InputError."""
        if self.json is None:
            return None
        path = Path(self.json or f"results/{Path(samples).name.removesuffix('.npz')}{suffix}.json")
        check_writable(path, "--json")
        return path


@dataclasses.dataclass(kw_only=True)
class NetworkFlags:
    """The network that images are run through."""

    inception_weights: str | None = flag(None, "file; default: torch-fidelity's", str, group="features", metavar="FILE")
    features: str | None = flag(None, "timm model or TorchScript file instead", str, group="features", metavar="NAME")

    @property
    def extractor(self):
        """The name of --features in metric names, or None."""
        return self.features and features_name(self.features)


@dataclasses.dataclass(kw_only=True)
class MeasureFlags(NetworkFlags, ResultFlags):
    """Flags of the programs that compare images with a reference."""

    sqrtm: bool = flag(False, "published arithmetic of the Fréchet distance (scipy's sqrtm)", group="distances")
    other_size: bool = flag(False, "allow a reference of another resolution", group="distances")
