"""Results as JSON files: the numbers, how they were computed, and the manifest of the samples they are about."""

import json
from pathlib import Path

from common.errors import InputError, note
from common.files import check_writable, write_json
from common.versions import versions


def manifest_path(samples):
    """The JSON file beside an npz or a folder of samples."""
    is_npz = str(samples).endswith(".npz")
    return Path(samples).with_suffix(".json") if is_npz else Path(f"{samples}".rstrip("/") + ".json")


def sample_manifest(samples):
    """What generate.py wrote beside an npz or a folder of samples, without its list of labels; None where it is not."""
    path = manifest_path(samples)
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise InputError(f"{path} beside the samples is no JSON; move it away or make the samples again") from None
    return {key: value for key, value in manifest.items() if key != "labels"} if isinstance(manifest, dict) else None


def result_path(given, samples, suffix=""):
    """Path for a --json flag: as given, or results/NAME + suffix + .json of samples NAME; None for None.

    Raises InputError where it cannot be written.
    """
    if given is None:
        return None
    path = Path(given) if given else Path("results") / f"{Path(samples).name.removesuffix('.npz')}{suffix}.json"
    check_writable(path, "--json")
    return path


def write_result(path, samples, metrics, **settings):
    """Write the JSON of a measurement; metrics: {name: number}."""
    packages = versions("torch", "scipy", "torch-fidelity", "timm")
    content = {"metrics": metrics, "samples": str(samples), **settings, "versions": packages}
    manifest = sample_manifest(samples)
    try:
        write_json(path, {**content, "manifest": manifest})
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); the numbers stand above") from None
    note(f"wrote {path}")


def read_result(path):
    """Content of a result file. Raises InputError naming it."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); pass files that the evaluators wrote") from None
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise InputError(f"{path} has no 'metrics'; pass files that the evaluators wrote")
    return content
