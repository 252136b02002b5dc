"""A bounded number of attacks of each kind; `python tests/attack.py` makes as many as wanted."""

import programs
import pytest


@pytest.mark.slow
def test_every_attempt_is_right_or_ends_in_one_clear_line():
    program = programs.start("tests/attack.py", "--seed", 0, "--attempts", 2)
    code = program.wait(900)
    assert code == 0, program.stdout.read_text() + program.stderr.read_text()
