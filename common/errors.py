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

    Of several processes the first speaks at once. Where it does, the launcher ends the others before they repeat it.
    """
    try:
        yield
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def note(text):
    """Print a remark to stderr once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def say(text):
    """Print a line to stdout once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
