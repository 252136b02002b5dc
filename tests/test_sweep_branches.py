"""Sweeps over what branches are used for, over several checkpoints, and of digits."""

import json

import pytest
import tiny

from common.errors import InputError
from common.flags import parse_flags
from evaluations import measuring, sweep
from evaluations.metrics.results import Result
from models.checkpoints import Checkpoint, load_checkpoint
from sampling.flags import GenerateConfig


def test_branches_are_axes(tmp_path):
    axes = ["--ckpt", "x", "--ref", "y", "--out", "z", "--cfg-scale", "1", "2", "--cfg-exit", "1", "2"]
    axes += ["--ig-scale", "1", "1.5", "--ig-branch", "1", "2", "--branch-gap", "-0.01", "dt"]
    settings = sweep.settings(sweep.parse(axes)[0])
    assert len({setting.name for setting in settings}) == len(settings) == (1 + 2) * (1 + 2) * 2
    assert settings[0].name == "steps-250-cfg-1.0-ig-scale-1.0-branch-gap--0.01"
    config = parse_flags(GenerateConfig, ["--ckpt", "x", *map(str, settings[-1].flags)])
    assert (config.cfg_scale, config.cfg_exit, config.ig_scale, config.ig_branch) == (2.0, 2, 1.5, 2)
    assert config.branch_gap == "dt"
    (exit,) = sweep.settings(sweep.parse([*axes[:6], "--exit-schedule", "0.8:1,0.3:2"])[0])
    assert exit.name == "steps-250-cfg-1.0-exit-schedule-0.8-1-0.3-2"


def test_a_small_negative_gap_is_passed_on():
    axes = ["--ckpt", "x", "--ref", "digits", "--out", "o", "--num-steps", "5", "--branch-gap=-0.00001"]
    (setting,) = sweep.settings(sweep.parse(axes)[0])
    assert parse_flags(GenerateConfig, ["--ckpt", "x", *map(str, setting.flags)]).branch_gap == -1e-5


SET = [["--num-steps", "5"], ["--cfg-scale", "2"], ["--format", "png"], ["--ckpt", "o.pt"], ["--grid", "2x2"]]


@pytest.mark.parametrize("words", SET, ids=" ".join)
def test_flags_of_generate_that_the_sweep_sets_are_refused_before_sampling(words, ckpt, tmp_path):
    own = ["--ckpt", str(ckpt), "--ref", "digits", "--out", str(tmp_path / "sweep"), "--num-fid-samples", "4"]
    with pytest.raises(InputError, match=f"^{words[0]} .*after --.*leave it out"):
        sweep.main([*own, "--", *words])
    assert not (tmp_path / "sweep/samples").exists()


def result_of(folder, name, distance, **manifest):
    """A finished setting of a sweep of digits; without `weights_sha256` it does not say of which weights."""
    folder.mkdir(exist_ok=True, parents=True)
    content = {"metrics": {"label agreement": 0.5, "Fréchet distance of digits": distance}}
    content["manifest"] = {"num_fid_samples": 40, **manifest}
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_several_checkpoints_give_means_standard_errors_and_differences(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "run_python", lambda *words: pytest.fail(f"{words} is started"))
    monkeypatch.setattr(sweep, "save_lines", lambda lines, path, **axes: drawn.update(lines))
    vae, drawn = tiny.vae_folder(tmp_path / "tiny-vae"), {}
    ckpts = [str(tiny.checkpoint(tmp_path / f"{seed}.pt", vae)) for seed in (0, 1)]
    flags = ["--ref", "digits", "--out", str(tmp_path / "out"), "--num-samples", "40", "--num-steps", "5"]
    for seed, (plain, guided) in enumerate([(1.0, 1.5), (3.0, 3.7)], 1):
        folder, cost = tmp_path / f"out/checkpoint-{seed}", {"num_steps": 5, "model_evaluations": 5}
        cost["weights_sha256"] = load_checkpoint(ckpts[seed - 1]).weights_sha256()
        result_of(folder, "steps-5-cfg-1.0-ig-scale-1.0", plain, cfg_scale=1.0, **cost)
        result_of(folder, "steps-5-cfg-1.0-ig-scale-2.0", guided, cfg_scale=1.0, ig_scale=2.0, **cost)
    sweep.main(["--ckpt", *ckpts, *flags, "--ig-scale", "1", "2"])
    assert (tmp_path / "out/table.md").read_text().splitlines() == [
        "| steps | guidance | interval | ig-scale | evaluations | label agreement | Fréchet distance of digits "
        "| difference |",
        "|---|---|---|---|---|---|---|---|",
        "| 5 | 1.0 |  | 1.0 | 5 | 0.5 ± 0 | 2 ± 1 | 0 ± 0 |",
        "| 5 | 1.0 |  | 2.0 | 5 | 0.5 ± 0 | 2.6 ± 1.1 | 0.6 ± 0.1 |",
    ]
    ((plain, guided),) = drawn.values()
    assert plain == (1.0, 2.0, pytest.approx(1.0)) and guided == (2.0, pytest.approx(2.6), pytest.approx(1.1))
    assert (tmp_path / "out/best.txt").read_text().endswith("--ig-scale=1.0\n")
    result_of(folder, "steps-5-cfg-1.0-ig-scale-2.0", 1.0, **{**cost, "ig_scale": 3.0})
    with pytest.raises(InputError, match=r"ig_scale \(3.0\).*delete it"):
        sweep.main(["--ckpt", *ckpts, *flags, "--ig-scale", "1", "2"])
    with pytest.raises(InputError, match=r"--ckpt was .*another --out"):  # in another order
        sweep.main(["--ckpt", *reversed(ckpts), *flags, "--ig-scale", "1", "2"])


def test_a_checkpoint_that_was_replaced_under_its_name_is_noticed(tmp_path, monkeypatch):
    def hash_once(checkpoint):
        hashed.append(checkpoint.path)
        return whole(checkpoint)

    hashed, whole = [], Checkpoint.weights_sha256
    monkeypatch.setattr(Checkpoint, "weights_sha256", hash_once)
    monkeypatch.setattr(measuring, "run_python", lambda *words: pytest.fail(f"{words} is started"))
    vae, out = tiny.vae_folder(tmp_path / "tiny-vae"), tmp_path / "out"
    ckpt = tiny.checkpoint(tmp_path / "a.pt", vae)
    flags = ["--ckpt", str(ckpt), "--ref", "digits", "--out", str(out), "--num-samples", "40", "--num-steps", "5", "6"]
    for steps in (5, 6):
        weights = {"weights_sha256": whole(load_checkpoint(ckpt))}
        result_of(out, f"steps-{steps}-cfg-1.0", 1.0, num_steps=steps, cfg_scale=1.0, **weights)
    sweep.main(flags)
    assert len(hashed) == 1
    tiny.checkpoint(ckpt, vae, std=0.06)
    message = r"steps-5-cfg-1\.0\.json and .*samples/steps-5-cfg-1\.0 are of weights other than .*a\.pt has now; name"
    for words in (flags, [*flags[:-2], "7", "5"]):  # before a setting that is not measured yet is sampled
        with pytest.raises(InputError, match=message):
            sweep.main(words)
    (out / "steps-5-cfg-1.0.json").unlink()
    with pytest.raises(InputError, match=r"steps-6-cfg-1\.0\.json"):
        sweep.main(flags)


def test_the_plot_is_over_what_varies(tmp_path, monkeypatch):
    def draw(*axes):
        args, _ = sweep.parse(["--ckpt", "x", "--ref", "digits", "--out", "z", "--num-steps", "5", *axes])
        result = Result({args.distance: 1.0})
        sweep.save_plot([(setting, [result]) for setting in sweep.settings(args)], args, tmp_path)
        return {label: [x for x, *_ in points] for label, points in drawn.pop().items()}

    drawn = []
    monkeypatch.setattr(sweep, "save_lines", lambda lines, path, **axes: drawn.append(lines))
    scales = ("--cfg-scale", "1", "2")
    assert draw() == {"steps 5": [1.0]}
    assert draw("--num-steps", "9", "5") == {"guidance 1.0": [5, 9]}
    both = [f"steps 5, interval [{interval}]" for interval in ("0.0, 1.0", "0.3, 0.7")]
    assert draw(*scales, "--interval", "0,1", "0.3,0.7") == {label: [1.0, 2.0] for label in both}
    assert draw("--branch-gap", "0", "dt") == {"steps 5, guidance 1.0": ["0.0", "dt"]}
    exits = [f"steps 5, interval [0.0, 1.0], cfg-exit {branch}" for branch in (1, 2)]
    assert draw(*scales, "--cfg-exit", "1", "2") == {label: [1.0, 2.0] for label in exits}


def test_digits_are_measured_by_their_report(tmp_path, monkeypatch):
    def run_python(processes, *command):
        calls.append([str(word) for word in command])
        (tmp_path / "samples/steps-5-cfg-1.0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "samples/steps-5-cfg-1.0/a.npz").touch()
        result_of(tmp_path, "steps-5-cfg-1.0", 1.0)

    calls = []
    monkeypatch.setattr(measuring, "run_python", run_python)
    args, generate = sweep.parse(["--ckpt", "c", "--ref", "digits", "--out", str(tmp_path), "--num-samples", "40"])
    assert sweep.measure(sweep.Setting(5, 1.0), args, generate).metrics[args.distance] == 1.0
    assert calls[1][:3] == ["-m", "digits.report", "--samples"] and calls[1][-1].endswith("steps-5-cfg-1.0.json")


@pytest.mark.parametrize(
    ("axis", "named"),
    [(["--exit-branch", "2", "9"], "--exit-branch.* 1 to 2"), (["--exit-schedule", "soon"], "--exit-schedule 'soon'")],
)
def test_a_setting_that_the_checkpoint_lacks_ends_a_sweep_at_once(tmp_path, monkeypatch, axis, named):
    monkeypatch.setattr(measuring, "run_python", lambda *words: pytest.fail(f"{words} is started"))
    ckpt = tiny.checkpoint(tmp_path / "0.pt", tiny.vae_folder(tmp_path / "tiny-vae"))
    with pytest.raises(InputError, match=named):
        sweep.main(["--ckpt", str(ckpt), "--ref", "digits", "--out", str(tmp_path / "out"), *axis])
