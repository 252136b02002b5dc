"""The pictures of docs/gallery.md are those that digits/gallery.py makes, and its commands are their rows."""

import re
import shlex

import numpy as np
import programs
import pytest
import tiny
import torch
from PIL import Image

from common.flags import parse_flags
from digits import gallery
from models import load_model
from sampling import sample
from sampling.flags import GenerateConfig

PAGE, STORED = tiny.ROOT / "docs/gallery.md", tiny.ROOT / "assets/gallery"
MAP = {"name": "DeepFlow-DMF-Ti/2", "depth": 2, "df_idxs": (1,), "dmf_depth": 1}


def make(out, *words):
    with tiny.one_thread():
        gallery.main(["--out", str(out), *map(str, words)])
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in out.iterdir()}


def stored():
    """{name: grey levels}; that of flow maps may be missing, as the repository has no weights of one."""
    found = {path.name: np.asarray(Image.open(path)).astype(int) for path in STORED.iterdir()}
    return {name: picture for name, picture in found.items() if name != "flow_map.png"}


def test_few_steps_make_every_picture(tmp_path):
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    flow_map = tiny.checkpoint(tmp_path / "map.pt", vae, **MAP, num_classes=10)
    made = make(tmp_path / "out", "--max-steps", 4, "--flow-map", flow_map)
    assert made.pop("flow_map.png").ndim == 2
    kept = stored()
    assert made.keys() == kept.keys()
    assert all(made[name].shape[0] == kept[name].shape[0] for name in kept)  # the same rows
    assert all(made[name].shape == kept[name].shape for name in kept if name != "path.png")  # a column per step


@pytest.mark.slow
def test_stored_pictures_are_what_the_program_makes(tmp_path):
    made, kept = make(tmp_path / "out"), stored()
    assert made.keys() == kept.keys()
    assert all(np.abs(made[name] - kept[name]).mean() < 2 for name in kept)  # grey levels: rounding


def test_the_page_shows_every_stored_picture():
    assert sorted(re.findall(r"assets/gallery/(\w+\.png)", PAGE.read_text())) == sorted(
        p.name for p in STORED.iterdir()
    )


def test_commands_of_the_page_make_rows_of_the_picture_above():
    sections, found = PAGE.read_text().replace("\\\n", "").split("\n## ")[1:], set()
    for section in sections:
        for command in re.findall(r"^python generate\.py (.*)$", section, re.MULTILINE):
            (picture,) = re.findall(r"assets/gallery/(\w+)\.png", section)
            rows = {**gallery.ROWS, "flow_map": gallery.MAP_ROWS}[picture].values()
            config = parse_flags(GenerateConfig, shlex.split(command))
            assert config in [as_flags(config.ckpt, **{**gallery.BASE, **row}) for row in rows], command
            found.add(picture)
    assert found >= gallery.ROWS.keys()


def as_flags(ckpt, steps, seed=0, **settings):
    """Keywords of `sample` as the flags of a row of the ten digits."""
    row = {"ckpt": ckpt, "grid": "1x10", "labels": "balanced"}
    return GenerateConfig(**row, num_steps=steps, global_seed=seed, **settings)


def test_a_class_between_two_digits_has_an_embedding_between_theirs():
    model, _ = load_model(gallery.SMALL)
    table = model.y_embedder.embedding_table.weight.clone()
    (first, second), *_ = gallery.PAIRS
    for fraction, expected in (
        (0, table[first]),
        (1, table[second]),
        (0.25, 0.75 * table[first] + 0.25 * table[second]),
    ):
        rows = gallery.mixed(model, fraction).y_embedder.embedding_table.weight
        assert torch.allclose(rows[0], expected) and torch.equal(rows[-1], table[-1])  # the null class stays
    assert torch.equal(model.y_embedder.embedding_table.weight, table)


def test_a_path_ends_at_the_sample(tmp_path):
    """Its last column is what `sample` gives, of both kinds; x_0 at t = 1 is one step's."""
    model, _ = load_model(gallery.SMALL)
    images = []
    with pytest.MonkeyPatch.context() as patch, tiny.one_thread():
        patch.setattr(gallery, "save", lambda *given: images.append(given[0]))
        gallery.save_path(model, 4, tmp_path / "path.png")
        ends, first = (sample(model, range(10), mode="ode", steps=steps)[list(gallery.TRAVELLERS)] for steps in (4, 1))
    (found,) = images
    assert all(close(found[kind::2, -1], ends) for kind in (0, 1)) and close(found[1::2, 0], first)


def close(images, others):
    """Whether they are equal up to rounding, in grey levels."""
    return np.abs(images.astype(int) - others.astype(int)).max() <= 1


@pytest.mark.parametrize("fault", ["flow model", "classes", "out"])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, fault):
    flow_map, out = gallery.SMALL, tmp_path / "out"
    if fault == "classes":
        flow_map = tiny.checkpoint(tmp_path / "map.pt", tiny.vae_folder(tmp_path / "tiny-vae"), **MAP)
    if fault == "out":
        out.write_text("a file")
    result = programs.run("-m", "digits.gallery", "--out", out, "--flow-map", flow_map)
    named = ("--out", str(out)) if fault == "out" else ("--flow-map", str(flow_map), "script/quickstart_dmf.sh")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in named)
    assert not list(tmp_path.rglob("*.png"))
