"""The parts of generate*.py, and `from sampling import sample`."""


def __getattr__(name):
    """`sample`, imported on first use, because programs read their flags before they import torch."""
    if name != "sample":
        raise AttributeError(f"module 'sampling' has no attribute {name!r}")
    from sampling.library import sample

    return sample
