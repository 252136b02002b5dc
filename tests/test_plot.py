"""Curves of runs as pictures."""

import json

import numpy as np
import programs
import pytest
from PIL import Image

from common.errors import InputError
from training import plot


def write_log(folder, *records):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_curves_are_losses_errors_gradient_norm_and_speed(tmp_path):
    first = {"step": 5, "loss": 1.5, "loss_a1": 2, "grad_norm": 3, "epoch": 0.1, "images_per_s": 7}
    of_a_map = {"error_map": 4.0, "du_dt_norm": 5.0, "log_variance": -6.0}
    log = write_log(tmp_path / "a", {**first, **of_a_map}, {"step": 10, "loss": 1.0}) / "log.jsonl"
    expected = {"step": ([5, 10], [5, 10]), "loss": ([5, 10], [1.5, 1.0]), "loss_a1": ([5], [2.0])}
    expected.update({name: ([5], [value]) for name, value in of_a_map.items()})
    assert plot.read_curves(log) == {**expected, "grad_norm": ([5], [3.0]), "images_per_s": ([5], [7.0])}


def test_the_line_of_a_change_is_no_point_of_a_curve(tmp_path):
    change = {"step": 5, "changes": {"learning_rate": [1e-3, 1e-4], "enc_type": ["", "dinov2-vit-b"]}}
    log = write_log(tmp_path / "a", {"step": 5, "loss": 2}, change, {"step": 6, "loss": 1}) / "log.jsonl"
    assert plot.read_curves(log) == {"step": ([5, 5, 6], [5, 5, 6]), "loss": ([5, 6], [2.0, 1.0])}


def test_the_final_velocity_loss_has_one_name_and_panels_one_order(tmp_path):
    branches = {f"loss_v{number}": float(number) for number in range(1, 12)}
    deep = write_log(tmp_path / "deep", {"step": 1, "grad_norm": 1, "loss_a2": 1, **branches, "loss": 3}) / "log.jsonl"
    plain = write_log(tmp_path / "plain", {"step": 1, "loss_v1": 5, "loss": 5}) / "log.jsonl"
    assert plot.read_curves(deep)[plot.FINAL] == ([1], [11]) and plot.read_curves(plain)[plot.FINAL] == ([1], [5])
    order = sorted(plot.read_curves(deep).keys() - {"step"}, key=plot.panel_order)
    assert order == ["loss", plot.FINAL, *list(branches)[:-1], "loss_a2", "grad_norm"]


def test_of_held_out_errors_the_averaged_weights_final_ones_are_drawn(tmp_path):
    velocities = {"holdout_v1": 1, "holdout_v10": 10, "holdout_raw_v10": 3, "holdout_v10_t0.0625": 4, "holdout_a1": 5}
    held_out = {"step": 2, **velocities, "holdout_error_map": 6, "holdout_raw_error_map": 7, "holdout_proj": 8}
    run = write_log(tmp_path / "a", {"step": 1, "loss": 1, "loss_v1": 2, "loss_v10": 2, "error_map": 3}, held_out)
    curves = plot.read_curves(run / "log.jsonl")
    assert curves[plot.HELD_OUT] == ([2], [10]) and curves["held-out error_map"] == ([2], [6])
    order = ["loss", plot.FINAL, plot.HELD_OUT, "held-out error_map", "loss_v1", "error_map"]
    assert sorted(curves.keys() - {"step"}, key=plot.panel_order) == order
    plot.save_curves([run], tmp_path / "curves.png")


def test_curves_over_steps_epochs_and_hours(tmp_path):
    lines = [{"step": 10, "epoch": 0.5, "steps_per_s": 0.1, "loss": 1}, {"step": 30, "loss": 1, "steps_per_s": 0.2}]
    run = write_log(tmp_path / "a", *lines)
    assert plot.read_curves(run / "log.jsonl", "hours")["loss"][0] == pytest.approx([100 / 3600, 200 / 3600])
    with pytest.raises(InputError, match=r"log\.jsonl, line 2: 'epoch' is missing; leave --x epoch out"):
        plot.save_curves([run], tmp_path / "curves.png", "epoch")


def test_a_curve_is_smoothed_by_a_running_mean():
    assert plot.smoothed([4.0, 2.0, 0.0, 1.0], 2) == [4, 3, 1, 0.5] and plot.smoothed([4.0, 2.0], 1) == [4, 2]


def test_runs_have_their_names_and_held_out_errors_are_not_smoothed(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    lines = [{"step": step, "loss": step, "loss_v1": step, "holdout_v1": step} for step in (1, 3)]
    a = write_log(tmp_path / "a", *lines)
    (tmp_path / "other").mkdir()
    twin = write_log(tmp_path / "other/a", *lines)
    plot.save_curves([a, write_log(tmp_path / "b", *lines) / "log.jsonl"], tmp_path / "curves.png", smooth=2)
    drawn = {axes.get_title(): axes.lines for axes in figures[0].axes}
    assert [line.get_label() for line in drawn["loss"]] == ["a", "b"]
    assert list(drawn["loss"][0].get_ydata()) == [1, 2] and list(drawn[plot.HELD_OUT][0].get_ydata()) == [1, 3]
    assert list(plot.named([a, twin, a])) == [str(a / "log.jsonl"), str(twin / "log.jsonl")]


def test_axes_are_logarithmic_where_values_are_positive_and_few_points_marked(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    run = write_log(tmp_path / "a", *({"step": step, "loss": -1, "loss_v1": 2, "grad_norm": 1} for step in range(1, 5)))
    plot.save_curves([run], tmp_path / "curves.png", log_axis=True)
    ((loss, final, norm),) = (figure.axes for figure in figures)
    assert [axes.get_yscale() for axes in (loss, final, norm)] == ["linear", "log", "log"]
    assert final.get_title() == plot.FINAL and final.lines[0].get_marker() == "."
    assert figures[0].legends and figures[0].get_suptitle()


def test_one_and_several_runs_make_one_picture(tmp_path, capsys):
    a = write_log(tmp_path / "a", {"step": 1, "loss": 2}, {"step": 2, "loss": 1})
    b = write_log(tmp_path / "b", *({"step": s, "loss": 3, "loss_v1": 1, "loss_v2": 1, "grad_norm": 1} for s in (1, 2)))
    sizes = []
    for runs in ([a], [a, b / "log.jsonl"]):
        plot.main([*map(str, runs), "--out", str(tmp_path / "curves.png")])
        with Image.open(tmp_path / "curves.png") as picture:
            sizes.append(picture.size)
            assert len(set(np.asarray(picture).flatten().tolist())) > 10  # something is drawn
    # one panel; four panels in rows of three; releases of matplotlib round to either side
    np.testing.assert_allclose(sizes, [(480, 420), (1440, 756)], atol=1)
    assert "curves of 2 runs" in capsys.readouterr().out


def test_starts_are_drawn(tmp_path, monkeypatch):
    run, drawn = write_log(tmp_path / "a", *({"step": step, "loss": 2, "grad_norm": 1} for step in (1, 2, 3))), []
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", lambda axes, x, **_: drawn.append(x))
    plot.save_curves([run], tmp_path / "curves.png")
    assert drawn == []  # of a run from before starts were kept
    (run / "starts.jsonl").write_text("".join(json.dumps({"step": step, "changes": {}}) + "\n" for step in (0, 2, 3)))
    for place in (run, run / "log.jsonl"):
        plot.save_curves([place], tmp_path / "curves.png")
        assert drawn == [2, 3, 2, 3]  # in both panels
        drawn.clear()
    (run / "starts.jsonl").write_text('{"step": "two"}\n')
    with pytest.raises(InputError, match=r"starts\.jsonl, line 1: 'step'"):
        plot.save_curves([run], tmp_path / "curves.png")


def test_command_draws_the_log_of_a_run(tmp_path):
    run = write_log(tmp_path / "a", {"step": 1, "loss": 2})
    done = programs.run("-m", "training.plot", run, "--out", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").stat().st_size > 1000
    done = programs.run("-m", "training.plot", tmp_path / "nowhere", "--out", tmp_path / "none.png")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere cannot be read")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"step": 1, "loss": 2}\n{"step": 2, "lo', "line 2"),
        ('{"loss": 2}\n', "line 1"),
        ("[1]\n", "line 1"),
        ('{"step": 1, "lr": 2}\n', "no line has a key"),
        (None, "cannot be read"),
    ],
)
def test_bad_logs_are_refused_by_name(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=rf"log\.jsonl.* {message}"):
        plot.save_curves([tmp_path / "log.jsonl"], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
