"""Weights by name: from the hub if it can be reached, else from its cache, else a one-line error within seconds."""

import contextlib
import functools
import os
import re
import threading
from pathlib import Path

from huggingface_hub import PyTorchModelHubMixin, constants, snapshot_download

from common.errors import InputError, first_line, note, system_fault

SECONDS = 3  # time limit for a site to answer
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # of an exported folder, by the hub's convention
VAE_FOLDER = "vae"  # of an exported folder with its VAE
REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(@\w[\w./-]*)?")  # user/repo or user/repo@REVISION
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")  # names that end so are files, not repositories


class HubModel(PyTorchModelHubMixin):
    """A network that `from_pretrained` reads from a folder or the hub."""

    @classmethod
    def from_pretrained(cls, source, **options):
        """As in the mixin, from a folder or the hub. Raises InputError if loading fails."""
        if os.path.isdir(source):
            return super().from_pretrained(source, **options)
        with fetching(f"the model '{source}'", source, "name a folder that models/export.py wrote"):
            return super().from_pretrained(source, **options)

    @classmethod
    def _from_pretrained(cls, *, strict=True, **kwargs):
        """The mixin's, strict by default; what config.json says of the run is left out."""
        for name in ("run", "data", "steps", "weights"):
            kwargs.pop(name, None)
        return super()._from_pretrained(strict=strict, **kwargs)


def is_on_hub(name):
    """Whether a checkpoint's name is that of a repository. A local file or folder of that name takes precedence."""
    is_name = REPOSITORY.fullmatch(str(name)) and not str(name).endswith(FILES)
    return bool(is_name) and not os.path.exists(name)


def pin(name, flag):
    """Download a repository; returns `user/repo@COMMIT`, which is printed. Raises InputError naming the flag."""
    pinned = f"{name.partition('@')[0]}@{download(name, flag).name}"
    if name != pinned:
        note(f"{name}: using {pinned}")
    return pinned


def download(name, flag="--ckpt"):
    """Download the exported folder of a repository; returns snapshots/COMMIT in the cache. Raises InputError."""
    repo, _, revision = name.partition("@")
    wanted, remedy = [CONFIG_FILE, WEIGHTS_FILE], "check the name and HF_HUB_OFFLINE, or name a local file"
    with fetching(f"{flag} {name}, which is not a local file, from the hub", name, remedy):
        patterns = [*wanted, f"{VAE_FOLDER}/*"]
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    if missing := [file for file in wanted if not (folder / file).is_file()]:
        remedy = "name one that holds an exported folder, or download the weights and name their file"
        raise InputError(f"{flag} {name}: the repository has no {missing[0]}; {remedy}")
    return folder


@contextlib.contextmanager
def fetching(what, source, remedy, url=None):
    """A context in which a library loads `what` from the path `source` or, if there is none, from the hub.

    url: where the library loads it from instead of the hub. Any failure becomes an InputError with the remedy.
    """
    site = url or constants.ENDPOINT
    is_silent = not os.path.exists(source) and not answers(site)
    try:
        if is_silent and url:
            raise ConnectionError("not in the cache")
        if is_silent:
            constants.HF_HUB_OFFLINE = True  # use only the cache: clients would retry for a minute per file
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:  # hub clients, parsers and the file system raise many types
        reason = f"no answer from {site}; {first_line(error)}" if is_silent else first_line(error)
        raise InputError(system_fault(error, what) or f"cannot load {what} ({reason[:200]}); {remedy}") from None


def load_complete(cls, place, **options):
    """A diffusers or transformers network by name or folder, for use inside `fetching`.

    Raises InputError for missing weights, which from_pretrained leaves random.
    """
    names = [path.name for path in Path(place).glob("*.*") if path.suffix in (".safetensors", ".bin")]
    variant = "fp16" if names and all(".fp16." in name for name in names) else None
    network, info = cls.from_pretrained(place, variant=variant, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"'{place}' lacks {len(missing)} weights, {missing[0]} for one; copy or download it again")
    return network


@functools.cache
def answers(url):
    """Whether a server at `url` answers within SECONDS, via the environment's proxies; False with HF_HUB_OFFLINE."""
    answered = threading.Event()

    from huggingface_hub.utils import get_session  # imports an HTTP client

    def ask():
        with contextlib.suppress(Exception):  # raised by the client in use, httpx or requests
            if get_session().head(url, timeout=SECONDS).status_code < 500:
                answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # DNS look-ups have no timeout of their own
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()
