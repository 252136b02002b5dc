"""common/launch.py: torchrun whose last line is the program's `error:` line."""

import programs
import pytest

PROGRAM = """
from common.errors import InputError, exit_on_input_error
with exit_on_input_error():
    raise {error}
"""
LINE = "error: --x 1 is wrong; pass 2"


@pytest.mark.parametrize(("error", "is_ours"), [("InputError('--x 1 is wrong; pass 2')", True), ("KeyError", False)])
def test_the_error_line_is_the_last_one(tmp_path, error, is_ours):
    """One without an error line ends as under torchrun, which has the same exit code."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(error=error))
    done = programs.run(*programs.launcher(1, "common.launch"), program)
    assert done.returncode == 1
    assert (done.stderr.splitlines()[-1] == LINE) == is_ours
    assert ("ChildFailedError" in done.stderr) != is_ours
