"""TODO docstring."""

from pathlib import Path

from common.errors import InputError
from common.files import read_json
from models.codec import LatentCodec, LatentSpec, resolve_vae, vae_family

MANIFEST = "manifest.json"
LABELS_JSON = "dataset.json"  # folder layout: {"labels": [[name, label], …]}
LABELS = "labels.npy"  # packed layout: int64 (N,)
NAMES = "names.txt"  # source name of every row, lines padded to one width, so that row i is found without reading
FORMAT = "deepflow-data"
VERSION = 1
MOMENTS, MIRROR, IMAGES, FEATURES = "vae-sd", "vae-sd-mirror", "images", "features-"
PREPARE = "prepare it with preprocessing/dataset_tools.py"
NOT_PAIRS = "'labels' is not a list of [file name, integer]"
CHECK = "python preprocessing/dataset_tools.py verify lists what is wrong"


def read_manifest(folder):
    """Manifest of a set as a dict, or None where there is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not a manifest of this project; move it away, or {PREPARE}")
    if manifest.get("version", 0) > VERSION:
        raise InputError(f"{path} has format version {manifest['version']}; this code reads {VERSION}: update the code")
    return manifest


def spec_from_manifest(manifest, folder):
    """The LatentSpec recorded in a manifest of moments."""
    try:
        return LatentSpec(**manifest["latents"])
    except (KeyError, TypeError):
        raise InputError(f"{Path(folder) / MANIFEST} does not say which VAE made the latents; encode again") from None


def spec_of_vae(name):
    """LatentSpec of a VAE by name or folder; only families that are not known by name are loaded."""
    if vae_family(resolve_vae(name)) == LatentSpec.family and not Path(resolve_vae(name)).is_dir():
        return LatentSpec(vae=resolve_vae(name))
    return LatentCodec.load(name).spec


def is_packed(manifest):
    """True where the manifest describes shards."""
    return manifest is not None and manifest.get("layout") == "packed"


def image_set(manifest):
    """Fingerprint of the images that a set was made from, or None where its manifest does not say."""
    manifest = manifest or {}
    job = manifest.get("job") or {}
    return manifest.get("images") or (job.get("source") if job.get("command") == "encode" else None)
