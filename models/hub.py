"""Weights by name: from the hub if it can be reached, else from its cache, else a one-line error within seconds."""

import contextlib
import functools
import os
import threading

from huggingface_hub import PyTorchModelHubMixin, constants

from common.errors import InputError, first_line, system_fault

SECONDS = 3  # time limit for a site to answer


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
