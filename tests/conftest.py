"""Options, environment and fixtures that all tests share."""

import gc
import os

gc.disable()  # until all is imported, whose objects it would look through again and again

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", MPLBACKEND="Agg")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes starts for longer than kernels take
torch.set_num_threads(1)  # tiny models lose time with more, the more so on a busy machine


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    """Without --slow the slow tests are deselected; gpu tests need a CUDA device."""
    slow = [item for item in items if "slow" in item.keywords and not config.getoption("--slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    gc.freeze()  # what is imported stays
    gc.enable()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Folder of a tiny VAE."""
    import tiny  # reads the environment that is set above, as does all that it imports

    return tiny.vae_folder(tmp_path_factory.mktemp("vae") / "tiny-vae")


@pytest.fixture(scope="module")
def ckpt(vae, tmp_path_factory):
    """Checkpoint of a tiny flow model of its latents."""
    import tiny

    return tiny.checkpoint(tmp_path_factory.mktemp("ckpt") / "0000003.pt", vae)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """Checkpoint of a tiny flow model to start a flow map from."""
    import tiny

    return tiny.flow_file(tmp_path_factory.mktemp("flow") / "0000003.pt")


@pytest.fixture(scope="module")
def reference(ckpt, tmp_path_factory):
    """(folder, arr_0, manifest) of five images in batches of two."""
    import tiny

    return tiny.run_generate(ckpt, tmp_path_factory.mktemp("samples"))
