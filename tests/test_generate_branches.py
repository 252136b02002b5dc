"""Sampling from the branches end to end: what a flag changes, where it is written down, and what it costs."""

import contextlib
import json

import captioned
import numpy as np
import programs
import pytest
import tiny
import torch

from common.errors import InputError
from models.layers import Block
from sampling.flags import BRANCH_FLAGS

USED = {  # flags: the settings in the manifest, words of the name, model evaluations of 4 SDE steps with 2 branches
    "internal guidance": ({"ig_scale": 2.0, "ig_low": 0.3}, "ig-scale-2.0-ig-low-0.3", 4),
    "its branch": ({"ig_scale": 1.5, "ig_branch": 1}, "ig-scale-1.5-ig-branch-1", 4),
    "cheap guidance": ({"cfg_scale": 2.0, "cfg_exit": 1}, "cfg-2.0-cfg-exit-1", 6),
    "in an interval": (
        {"cfg_scale": 2.0, "cfg_exit": 1, "guidance_low": 0.5},  # of t = 1, 0.68, 0.36, 0.04
        "cfg-2.0-interval-0.5-1.0-cfg-exit-1",
        5,
    ),
    "exit": ({"exit_branch": 1}, "exit-branch-1", 2),
    "schedule": ({"exit_schedule": "0.9:1,0.3:2"}, "exit-schedule-0.9-1-0.3-2", 3.5),
    "gap": ({"branch_gap": -0.1}, "branch-gap--0.1", 4),
    "the step's gap": ({"branch_gap": "dt"}, "branch-gap-dt", 4),
}


@contextlib.contextmanager
def blocks_run():
    """List that fills with the rows of every block that runs."""
    rows = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: rows.append(len(inputs[0])) if isinstance(module, Block) else None
    )
    with hook:
        yield rows


@pytest.mark.parametrize("case", USED)
def test_a_flag_changes_the_images_and_is_written_down(reference, ckpt, tmp_path, case, capsys):
    flags, words, evaluations = USED[case]
    with blocks_run() as rows:
        folder, array, manifest = tiny.run_generate(ckpt, tmp_path, **flags)
    assert not np.array_equal(array, reference[1])
    assert manifest["model_evaluations"] == evaluations == sum(rows) / (5 * 4)  # 5 images, 4 blocks
    found = {name: manifest[name] for name in BRANCH_FLAGS if name in manifest}
    assert found == {name: flags[name] for name in flags if name in BRANCH_FLAGS}
    assert found.items() <= json.loads((folder / "settings.json").read_text()).items()
    assert folder.name == f"tiny-0000003-sde-4-{words}-seed-0"
    printed = capsys.readouterr().out
    assert f"{evaluations} model evaluations each" in printed
    assert all(f"{name.replace('_', '-')} {value}" in printed.splitlines()[0] for name, value in found.items())


def test_thirds_of_a_pass_are_counted(vae, tmp_path, capsys):
    path = tiny.checkpoint(tmp_path / "three.pt", vae, depth=3, df_idxs=(1, 2))
    flags = {"cfg_scale": 2.0, "cfg_exit": 1, "mode": "ode", "heun": True, "branch_gap": 0.01}
    with blocks_run() as rows:
        _, _, manifest = tiny.run_generate(path, tmp_path / "out", **flags)
    assert manifest["model_evaluations"] == pytest.approx(7 * (1 + 1 / 3)) == pytest.approx(sum(rows) / (5 * 3))
    assert "9.33 model evaluations each (46.67 in all)" in capsys.readouterr().out


SAME = {
    "no effect": {"ig_scale": 1.0, "ig_branch": 1, "ig_low": 0.5, "cfg_exit": 1, "branch_gap": "0.0"},
    "exit after the last": {"exit_branch": 2},
    "schedule of the last": {"exit_schedule": "0.5:2"},
}


@pytest.mark.parametrize("case", SAME)
def test_flags_that_ask_for_plain_sampling_give_its_pixels(reference, ckpt, tmp_path, case):
    _, array, manifest = tiny.run_generate(ckpt, tmp_path, **SAME[case])
    assert np.array_equal(array, reference[1])
    assert case != "no effect" or manifest == reference[2]


def test_a_full_unconditional_half_gives_the_pixels_of_plain_guidance(ckpt, tmp_path):
    _, plain, _ = tiny.run_generate(ckpt, tmp_path / "plain", cfg_scale=2.0)
    _, full, manifest = tiny.run_generate(ckpt, tmp_path / "full", cfg_scale=2.0, cfg_exit=2)
    assert np.array_equal(plain, full) and manifest["model_evaluations"] == 8


def test_plain_sampling_writes_nothing_about_branches(reference):
    folder, _, manifest = reference
    settings = json.loads((folder / "settings.json").read_text())
    assert not BRANCH_FLAGS.keys() & {*manifest, *settings}
    assert isinstance(manifest["model_evaluations"], int)


def test_an_interrupted_result_goes_on_and_other_settings_are_refused(ckpt, tmp_path):
    flags = {"ig_scale": 2.0, "branch_gap": "dt"}
    folder, array, _ = tiny.run_generate(ckpt, tmp_path, **flags)
    (folder / "000003.png").unlink()
    assert np.array_equal(tiny.run_generate(ckpt, tmp_path, **flags)[1], array)
    (tmp_path / "other").mkdir()
    for own, others in (("tiny-0000003-sde-4-seed-0", "--ig-scale"), (folder.name.replace("2.0", "3.0"), "--ig-scale")):
        target = folder.rename(tmp_path / "other" / own)
        now = {**flags, "ig_scale": 3.0} if "3.0" in own else {}
        with pytest.raises(InputError, match=f"other settings: {others} was .*--sample-dir"):
            tiny.run_generate_only(ckpt, tmp_path / "other", **now)
        folder = target


def test_a_grid_says_what_it_cost(ckpt, tmp_path, capsys):
    out = tmp_path / "grid.png"
    tiny.run_generate_only(ckpt, tmp_path, grid="1x2", out=out, exit_branch=1, num_steps=3)
    assert "1.5 model evaluations each" in capsys.readouterr().out
    assert json.loads(out.with_suffix(".json").read_text())["exit_branch"] == 1


def test_prompts(tmp_path):
    path = captioned.checkpoint(tmp_path / "t2i.pt", tmp_path)
    _, plain, _ = captioned.run_generate(path, tmp_path / "plain", "a cat")
    _, array, manifest = captioned.run_generate(path, tmp_path / "out", "a cat", cfg_exit=1, ig_scale=1.5)
    assert not np.array_equal(array, plain)
    assert (manifest["cfg_exit"], manifest["ig_scale"]) == (1, 1.5)
    assert manifest["model_evaluations"] < 2 * manifest["num_steps"]


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture(scope="module")
def files(vae, tmp_path_factory):
    """{kind: checkpoint} of models without branches that predict velocities."""
    folder = tmp_path_factory.mktemp("files")
    flow_map = {"name": "DeepFlow-DMF-Ti/2", "depth": 2, "df_idxs": (1,), "dmf_depth": 1}
    return {
        "one": tiny.checkpoint(folder / "one.pt", vae, "SiT-Ti/2"),
        "map": tiny.checkpoint(folder / "map.pt", vae, **flow_map),
    }


@pytest.mark.parametrize(
    "flags",
    [
        {"ig_scale": 1.5},
        {"ig_branch": 1},
        {"cfg_exit": 1},
        {"exit_branch": 1},
        {"exit_schedule": "0.5:1"},
        {"branch_gap": "dt"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "why"), [("one", "no key layers"), ("map", "flow map")])
def test_a_model_without_such_branches_is_refused(files, tmp_path, kind, why, flags):
    (name,) = flags
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')}.*{why}.*leave it out"):
        tiny.run_generate_only(files[kind], tmp_path, **flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"ig_scale": 0.5}, "--ig-scale 0.5"),
        ({"ig_scale": 2, "ig_branch": 2}, "--ig-branch.* 1 to 1"),
        ({"ig_branch": 0}, "--ig-branch 0"),
        ({"ig_scale": 2, "ig_low": 0.8, "ig_high": 0.2}, "--ig-low 0.8 and --ig-high 0.2"),
        ({"ig_scale": 2, "exit_branch": 1}, "--exit-branch.*--ig-scale"),
        ({"cfg_scale": 2, "cfg_exit": 3}, "--cfg-exit.* 1 to 2"),
        ({"exit_branch": 3}, "--exit-branch.* 1 to 2"),
        ({"exit_branch": 1, "exit_schedule": "0.5:1"}, "--exit-branch and --exit-schedule"),
        ({"exit_schedule": "soon"}, "--exit-schedule 'soon'"),
        ({"exit_schedule": "0.5:3"}, "--exit-schedule.* 1 to 2"),
        ({"branch_gap": "step"}, "--branch-gap step"),
        ({"branch_gap": 1.5}, "--branch-gap 1.5"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(ckpt, tmp_path, flags, named):
    with pytest.raises(InputError, match=named) as caught:
        tiny.run_generate_only(ckpt, tmp_path, **flags)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_mistake_ends_the_program_in_one_line(ckpt, tmp_path):
    done = programs.run("generate.py", *tiny.generate_flags(ckpt, tmp_path, exit_branch=9))
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "--exit-branch" in line
