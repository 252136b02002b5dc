"""Slow packages are imported where they are needed: one fresh process, in which each step may import more."""

import tiny

STEPS = """
import runpy, sys
import models
assert "models.export" not in sys.modules
import models.codec
assert "diffusers" not in sys.modules
import train, generate
assert "timm" not in sys.modules
sys.argv = sys.argv[1:]
runpy.run_path("generate.py", run_name="__main__")
assert "diffusers" in sys.modules and not sys.modules.keys() & {"sklearn", "matplotlib", "timm"}
# were transformers hidden while the VAE is loaded, which would be faster, diffusers would offer only stand-ins of these
from diffusers import StableDiffusionPipeline
assert "dummy" not in StableDiffusionPipeline.__module__
"""


def test_a_picture_is_made_without_packages_that_it_does_not_need(ckpt, tmp_path):
    flags = tiny.flags(ckpt=ckpt, grid="1x1", num_steps=2, out=tmp_path / "a.png")
    done = tiny.run_python("-c", STEPS, "generate.py", *flags)
    assert done.returncode == 0 and (tmp_path / "a.png").exists(), done.stderr
