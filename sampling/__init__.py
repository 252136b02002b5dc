"""What generate*.py wire, and `from sampling import sample`."""


def __getattr__(name):
    """`sample`, imported on first use: the flags of programs need no torch."""
    if name != "sample":
        raise AttributeError(f"module 'sampling' has no attribute {name!r}")
    from sampling.library import sample

    return sample
