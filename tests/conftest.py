"""Options, environment and fixtures that all tests share."""

import os

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", MPLBACKEND="Agg")
torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, and only those")


def pytest_collection_modifyitems(config, items):
    """Without --slow the slow tests are deselected, with it the others; gpu tests need a CUDA device."""
    wanted = config.getoption("--slow")
    chosen = [item for item in items if ("slow" in item.keywords) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    for item in chosen:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items[:] = chosen
