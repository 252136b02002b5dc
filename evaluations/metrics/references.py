"""What images are compared with: statistics in a pickle or an npz, and the size of the images they are of."""

import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np

from common.errors import InputError
from evaluations.metrics.images import READ_ERRORS, NpzImages, unreadable


class NumpyUnpickler(pickle.Unpickler):
    """Unpickler that knows the few names that arrays and numbers of numpy need, and refuses all others."""

    CORE = "numpy.core" if np.__version__.startswith("1.") else "numpy._core"  # renamed in numpy 2
    ARRAYS = re.compile(r"numpy\._?core\.(multiarray (_reconstruct|scalar)|numeric _frombuffer)")
    OTHERS = ("numpy ndarray", "numpy dtype", "_codecs encode")  # the last: old protocols write bytes as text

    def find_class(self, module, name):
        if self.ARRAYS.fullmatch(f"{module} {name}"):
            module = f"{self.CORE}.{module.rsplit('.', 1)[1]}"
        elif f"{module} {name}" not in self.OTHERS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not loaded: it could run code")
        return super().find_class(module, name)


def read_reference(path):
    """({metric: (mean, covariance)}, (H, W) of its images or None) of a .pkl or .npz. Raises InputError."""
    size = None
    if str(path).endswith(".npz"):
        metrics = read_statistics(path, {"fid": ("mu", "sigma")})
        if "arr_0.npy" in zipfile.ZipFile(path).namelist():
            size = NpzImages(path, "--ref").shape[:2]
    else:
        content = read_pickle(path)
        size, _ = content.pop("image_size", None), content.pop("num_images", None)
        metrics = {name: moments(value, "mu", "sigma", f"--ref {path}: {name}") for name, value in content.items()}
    if not metrics:
        raise InputError(f"--ref {path} holds no statistics; make a reference of its images with `ref`")
    return metrics, size


def read_pickle(path):
    """The dict in a pickle of arrays and numbers; {} of anything else. Raises InputError."""
    try:
        content = NumpyUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except FileNotFoundError:
        raise InputError(f"--ref {path} does not exist; download the file first, or make it with `ref`") from None
    except Exception as error:  # the bytes of a damaged pickle decide what fails
        raise InputError(f"--ref {path} cannot be read as a pickle of statistics ({error}); copy it again") from None
    return content if isinstance(content, dict) else {}


def read_statistics(path, members):
    """{kind: (mean, covariance)} of an npz by {kind: names of both}; {} of one without. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for pair in members.values() for name in pair if name in file.files}
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
    return {kind: moments(found, *names, path) for kind, names in members.items()} if found else {}


def moments(held, mean, covariance, where):
    """Two arrays of a dict, by name, float64: finite, of shapes (D,) and (D, D). Raises InputError."""
    if not isinstance(held, dict) or not {mean, covariance} <= held.keys():
        raise InputError(f"{where} does not hold both {mean} and {covariance}; take a whole reference file")
    mu, sigma = (np.asarray(held[name], np.float64) for name in (mean, covariance))
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        shapes = f"{mu.shape} and {sigma.shape}, not (D,) and (D, D)"
        raise InputError(f"{where}: {mean}, {covariance} have shapes {shapes}; take another reference")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{where}: {mean}, {covariance} are not finite; make the statistics again")
    return mu, sigma


def other_size(images, size, allowed):
    """A line where images differ from the reference's size (H, W, …; None: not known), else None.

    Raises InputError where that is not allowed.
    """
    if size is None or tuple(size[:2]) == tuple(images.shape[:2]):
        return None
    line = "samples of {}x{} are compared with a reference of {}x{}".format(*images.shape[:2], *size[:2])
    if not allowed:
        raise InputError(f"{line}; take the reference of that size, or pass --other-size")
    return line
