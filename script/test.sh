#!/usr/bin/env bash
# The tests, on CPU and offline after installation.
#   bash script/test.sh [--slow] [PYTEST ARGUMENTS]
# Sets up .venv and runs the tests on CPU (minutes on two cores). --slow also runs those marked slow (kill tests, long
# runs). Other arguments go to pytest, e.g. -k parity; PARITY_FIXTURES=DIR takes other reference values.
# An active environment, TORCH_INDEX_URL and PYTHON work as in script/quickstart.sh.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac # the comment above
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
# On CPU everywhere; those that need a GPU: python -m pytest -m gpu
export CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@" # one process per core, for memory at most 4
