"""torchrun for the recipes: if a program ends with an `error:` line, this is the last line of all.

python -m common.launch --standalone --nproc-per-node 8 train.py --exp-name first
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def error_line(failed):
    """The `error:` line of the process that failed first, "" if it left none (errors.py writes it)."""
    message = failed.get_first_failure()[1].message
    line = message["message"] if isinstance(message, dict) else message
    return line if line.startswith("error: ") else ""


if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as failed:
        if line := error_line(failed):
            sys.exit(line)  # printed last, with torchrun's exit code 1
        raise
