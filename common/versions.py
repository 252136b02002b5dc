"""Versions of Python and packages, for manifests and results."""

import importlib.metadata
import platform


def versions(*packages):
    """Versions of Python, numpy, Pillow and the given packages, for a manifest."""
    named = {name: importlib.metadata.version(name) for name in ("numpy", "pillow", *packages)}
    return {"python": platform.python_version(), **named}
