"""pyproject.toml lists the modules that are there, requirements.txt what they import."""

import re

import tiny

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings its predecessor
    import tomli as tomllib

SETUPTOOLS = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def names(file):
    """Normalised names of the packages that a requirements file lists."""
    lines = (tiny.ROOT / file).read_text().splitlines()
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if not line.startswith(("#", "-")))
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def test_every_room_is_installed():
    rooms = {path.parent.relative_to(tiny.ROOT) for path in tiny.ROOT.glob("*/__init__.py")}
    rooms |= {path.parent.relative_to(tiny.ROOT) for path in tiny.ROOT.glob("*/*/__init__.py")}
    found = {".".join(room.parts) for room in rooms if room.parts[0] not in ("tests", "benchmarks", ".venv")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    assert sorted(SETUPTOOLS["py-modules"]) == sorted(path.stem for path in tiny.ROOT.glob("*.py"))


def test_constraints_name_a_version_of_every_requirement():
    assert names("requirements.txt") | names("requirements-dev.txt") <= names("constraints.txt")
    pinned = [line for line in (tiny.ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+", line) for line in pinned)
