"""Results as JSON files: the numbers, how they were computed, and the manifest of the samples they are about."""

import dataclasses
from pathlib import Path

from common.errors import InputError, note
from common.files import check_writable, write_json
from common.flags import flag
from common.records import read_record
from common.versions import versions
from sampling.manifest import manifest_path, read_manifest

PACKAGES = ("torch", "scipy", "torch-fidelity", "timm")


@dataclasses.dataclass
class Result:
    """What a program of evaluations/ measured, as its JSON file holds it; fields that are None are left out there."""

    metrics: dict[str, float]
    samples: str = ""  # what was measured
    reference: str | None = None
    arrays: list | None = None  # lines that say which arrays served what
    warnings: list | None = None
    count: int | None = None  # of images
    clip: str | None = None  # name of the CLIP model
    images: int | None = None  # scored by it
    results: str | None = None  # file of GenEval's detector
    curves: dict | None = None  # {name: [(t, number)]}
    settings: dict | None = None
    versions: dict = dataclasses.field(default_factory=lambda: versions(*PACKAGES))
    manifest: dict | None = None  # of the samples

    @classmethod
    def read(cls, path):
        """The result in a file. Raises InputError naming it."""
        return read_record(cls, path, "pass files that the evaluators wrote")

    def write(self, path):
        """Write the file, with the manifest beside the samples. Raises InputError where it cannot be written."""
        if found := sample_manifest(self.samples):
            self.manifest = {name: value for name, value in found.to_json().items() if name != "labels"}
        content = dataclasses.asdict(self).items()
        try:
            write_json(path, {name: value for name, value in content if value is not None or name == "manifest"})
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); the numbers are printed above") from None
        weights = self.manifest and self.manifest.get("weights")  # said because REPA's text-to-image samples raw ones
        note(f"wrote {path}" + (f" (samples of the {weights} weights)" if weights else ""))


def sample_manifest(samples):
    """SampleManifest beside an npz or a folder of samples; None where there is no file. Raises InputError."""
    path = manifest_path(samples)
    return read_manifest(path) if path.is_file() else None


def sample_labels(samples, kinds, count, remedy):
    """The `labels` of the manifest beside samples: `count`, all of one of the types. Raises InputError."""
    path, manifest = manifest_path(samples), sample_manifest(samples)
    labels = manifest and manifest.labels
    if not labels or {*map(type, labels)} not in [{kind} for kind in kinds]:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{path} does not list a {names} for each sample under 'labels'; {remedy}")
    if len(labels) != count:
        raise InputError(f"{path} lists {len(labels)} labels for {count} samples; {remedy}")
    return labels


def markdown(header, rows):
    """Lines of a table."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def json_flag():
    """--json, alone or with a file, as result_path takes it."""
    help = "write the result; without FILE results/NAME….json"
    return flag(None, help, str, group="output", nargs="?", const="", metavar="FILE")


def result_path(given, samples, suffix=""):
    """Path for a --json flag: as given, or results/NAME + suffix + .json of samples NAME; None for None.

    Raises InputError where it cannot be written.
    """
    if given is None:
        return None
    path = Path(given) if given else Path("results") / f"{Path(samples).name.removesuffix('.npz')}{suffix}.json"
    check_writable(path, "--json")
    return path
