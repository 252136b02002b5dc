"""Weights by name: from the hub where it can be reached, else from its cache, else one line within seconds."""

import contextlib
import functools
import os
import threading

from huggingface_hub import constants

from common.errors import InputError, first_line, system_fault

SECONDS = 3  # for a site to answer


@contextlib.contextmanager
def fetching(what, source, remedy, url=None):
    """A context in which a library loads `what` from the path `source` or, if there is none, from the hub.

    url: where the library loads it from instead of the hub. Whatever goes wrong is an InputError with the remedy.
    """
    site = url or constants.ENDPOINT
    is_silent = not os.path.exists(source) and not answers(site)
    try:
        if is_silent and url:
            raise ConnectionError("nothing in the cache")
        if is_silent:
            constants.HF_HUB_OFFLINE = True  # only look in the cache: clients would ask again for a minute per file
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as error:  # clients of the hub, parsers and the file system raise all kinds
        reason = f"no answer from {site}; {first_line(error)}" if is_silent else first_line(error)
        raise InputError(system_fault(error, what) or f"cannot load {what} ({reason[:200]}); {remedy}") from None


@functools.cache
def answers(url):
    """Whether a server answers at `url` within SECONDS, with the environment's proxies; never with HF_HUB_OFFLINE."""
    answered = threading.Event()

    from huggingface_hub.utils import get_session  # loads an HTTP client

    def ask():
        with contextlib.suppress(Exception):  # of the client in use, httpx or requests
            if get_session().head(url, timeout=SECONDS).status_code < 500:
                answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # the look-up of a host's name has no time-out of its own
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()
