"""Results as JSON files: the numbers, how they were computed, and the manifest of the samples they are about."""

import dataclasses
from pathlib import Path

from common.errors import InputError, note
from common.files import check_writable, write_json
from common.flags import flag
from common.records import check_record, read_record
from common.versions import versions
from sampling.manifest import SETTINGS, manifest_path, read_manifest

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
        """Write the result, with the manifest beside the samples, to a file; None: nowhere. Raises InputError."""
        if path is None:
            return
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


def sample_labels(samples, kind, count, remedy):
    """The `count` labels in the manifest beside samples, of type `kind`, such as list[str]. Raises InputError."""
    path, manifest = manifest_path(samples), sample_manifest(samples)
    labels = check_record(kind, manifest and manifest.labels, f"{path}: labels", remedy)
    if len(labels) != count:
        raise InputError(f"{path} lists {len(labels)} labels for {count} samples; {remedy}")
    return labels


def markdown(header, rows):
    """A table as Markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


@dataclasses.dataclass(kw_only=True)
class ResultFlags:
    """Where the result goes, and whether samples may be missing."""

    json: str | None = flag(None, "write results/NAME.json", str, group="output", nargs="?", const="", empty=True)
    incomplete: bool = flag(False, "measure incomplete samples instead of refusing them", group="data")

    def check_count(self, samples, count):
        """Refuse `count` samples if the manifest beside them says another number, or if sampling is not finished."""
        manifest = sample_manifest(samples)
        said = manifest and manifest.num_fid_samples
        if said not in (None, count):
            self.refuse(f"{samples} holds {count} samples, {manifest_path(samples)} says {said}")
        if manifest is None and (Path(samples) / SETTINGS).is_file():
            self.refuse(f"sampling into {samples} is not finished ({count} samples)")

    def refuse(self, fault):
        """Raise InputError for incomplete samples; with --incomplete only warn."""
        if not self.incomplete:
            raise InputError(f"{fault}; complete them, or pass --incomplete to measure what is there")
        note(f"warning: {fault}")

    def result_path(self, samples, suffix=""):
        """Path of --json, by default results/NAME + suffix + .json for samples NAME, or None. Raises InputError."""
        if self.json is None:
            return None
        path = Path(self.json or f"results/{Path(samples).name.removesuffix('.npz')}{suffix}.json")
        check_writable(path, "--json")
        return path
