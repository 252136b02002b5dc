"""What is said to the user: remarks, and the one kind of exception for a mistake with the one way it ends a command."""

import contextlib
import os
import sys
import time


class InputError(ValueError):
    """A mistake in flags, files or data. The message is one line: the culprit (file or flag) and the remedy."""


@contextlib.contextmanager
def exit_on_input_error():
    """End the command with one line on stderr and exit code 2 on an InputError; anything else keeps its traceback.

    The first process prints it at once; the others wait, so that the launcher ends them before they repeat it.
    """
    try:
        yield
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def first_line(error):
    """One line about an exception: the first of its text, else its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def note(text):
    """Print a remark to stderr once, whatever the number of processes."""
    say(text, sys.stderr)


def say(text, file=None):
    """Print a line to stdout once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file, flush=True)
