"""Runs a program as where a package is not installed, for tests: python tests/without.py PACKAGE train.py FLAGS."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import programs


class Without:
    """What finds modules, but none of a package."""

    def __init__(self, package, finders):
        self.package, self.finders = package, finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            return None
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)

    def find_distributions(self, context):
        if context.name != self.package:
            for finder in self.finders:
                yield from getattr(finder, "find_distributions", lambda _: ())(context)


if __name__ == "__main__":
    package = sys.argv[1]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.meta_path[:] = [Without(package, list(sys.meta_path))]
    programs.run_here(sys.argv[2:])
