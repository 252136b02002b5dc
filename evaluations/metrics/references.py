"""What images are compared with: statistics in a pickle or an npz, and the size of the images they are of."""

import io
import pickle
import re
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
    if str(path).endswith(".npz"):
        metrics, size = read_statistics(path, {"fid": ("mu", "sigma")}), reference_size(path)
    else:
        content = read_pickle(path)
        size = content.pop("image_size", None)
        content.pop("num_images", None)
        metrics = {name: read_moments(value, f"--ref {path}: {name}") for name, value in content.items()}
    if not metrics:
        raise InputError(f"--ref {path} holds no statistics; make a reference of its images with `ref`")
    return metrics, size


def read_moments(value, where):
    """(mean, covariance) of {mu, sigma} in a pickle. Raises InputError."""
    if not isinstance(value, dict) or not {"mu", "sigma"} <= value.keys():
        raise InputError(f"{where} has no mu and sigma; make the reference again")
    return check_moments(np.asarray(value["mu"]), np.asarray(value["sigma"]), f"{where}: mu, sigma")


def read_pickle(path):
    """The dict in a pickle of arrays and numbers; {} of anything else. Raises InputError."""
    try:
        content = NumpyUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except FileNotFoundError:
        raise InputError(f"--ref {path} does not exist; download the file first, or make it with `ref`") from None
    except Exception as error:  # the bytes of a damaged pickle decide what fails
        raise InputError(f"--ref {path} cannot be read as a pickle of statistics ({error}); copy it again") from None
    return content if isinstance(content, dict) else {}


def reference_size(path):
    """(H, W) of the images that ADM's npz holds beside its statistics, None of one without images."""
    with np.load(path) as file:
        return NpzImages(path, "--ref").shape[:2] if "arr_0" in file.files else None


def read_statistics(path, members):
    """{kind: (mean, covariance)}, float64, of an npz by {kind: names of both}; {} of one without. Raises InputError."""
    names = [name for pair in members.values() for name in pair]
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name], np.float64) for name in names if name in file.files}
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
    if missing := [name for name in names if found and name not in found]:
        raise InputError(f"{path} holds {', '.join(found)} but not {missing[0]}; take a whole reference file")
    return {
        kind: check_moments(found[mean], found[covariance], f"{path}: {mean}, {covariance}")
        for kind, (mean, covariance) in members.items()
        if found
    }


def other_size(images, size, allowed):
    """A line where images differ from the reference's size (H, W, …), None where not, or where it is not known (None).

    Raises InputError where that is not allowed.
    """
    if size is None or tuple(size[:2]) == tuple(images.shape[:2]):
        return None
    sizes = ("x".join(map(str, shape[:2])) for shape in (images.shape, size))
    line = "samples of {} are compared with a reference of {}".format(*sizes)
    if not allowed:
        raise InputError(f"{line}; take the reference of that size, or pass --other-size")
    return line


def check_moments(mean, covariance, where):
    """Both, where they are finite and of shapes (D,) and (D, D). Raises InputError."""
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise InputError(f"{where} have shapes {mean.shape} and {covariance.shape}, not (D,) and (D, D)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{where} hold values that are not finite; make the statistics again")
    return mean, covariance
