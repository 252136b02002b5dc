"""Tables: parts of the FLOP count beside Table 8, results beside the paper's, sweeps."""

import csv
import json
import types
from pathlib import Path

import numpy as np
import programs
import pytest
import tiny
import torch
from evaluation_helpers import pictures, save_npz, script
from PIL import Image

from common.errors import InputError
from evaluations import count_flops, evaluator, measuring, sweep, table
from evaluations.metrics.results import Result
from evaluations.published import CONFIGS, TABLE_8
from models import PRESETS, create_model, model_config
from models.flops import Part, count_parts
from models.flops import count_flops as count
from models.specs import TRAINING

# ------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(("name", "aligned"), [("DeepFlow-Ti/2", False), ("DeepFlow-Ti/2", True), ("SiT-Ti/2", False)])
def test_parts_sum_to_the_whole(name, aligned):
    with torch.device("meta"):
        model = create_model(name, ssl_align=aligned)
    parts, whole = count_parts(model), count(model)
    total = sum(parts.values(), Part())
    assert total.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert total.layer_macs + total.attention_macs == whole.total_macs
    assert total.layer_macs - parts.get("df_blocks.cross_attention", Part()).layer_macs == whole.paper_macs
    assert ("projectors" in parts) == aligned


def test_parts_by_hand():
    """Ti at 256 tokens: width 128, 4 blocks."""
    with torch.device("meta"):
        parts = count_parts(create_model("DeepFlow-Ti/2"))
    tokens, d = 256, 128
    assert parts["blocks.mlp"] == Part(4 * (8 * d * d + 5 * d), 4 * tokens * 8 * d * d, 0)
    assert parts["blocks.attn"] == Part(4 * (4 * d * d + 4 * d), 4 * tokens * 4 * d * d, 4 * 2 * tokens * tokens * d)
    assert parts["df_blocks.cross_attention"].attention_macs == 2 * tokens * tokens * d
    assert parts["pos_embed"] == Part(tokens * d, 0, 0)


def test_the_paper_stands_beside(capsys):
    count_flops.main(["DeepFlow-B/2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| all | 166.20 |")
    assert "Table 8 prints 166 M parameters, 28 GFLOPS; here 166.20 M" in lines[-1]
    for other in ("DeepFlow-Ti/2", "MMDiT-L/2", "DMFT-L/2"):  # the last two have the size and depth of SiT-L
        count_flops.main([other])
        assert "Table 8 has no such model; " in capsys.readouterr().out
    with pytest.raises(InputError, match="model 'B' is unknown"):
        count_flops.main(["B"])


def test_table_8_is_whole():
    assert sum(map(len, TABLE_8.values())) == 20 and TABLE_8[("XL", 3)][24] == (681, 113, 10.3)


# ------------------------------------------------------------------------------------------------ results


def result(path, model="DeepFlow-B/2", size=32, options=None, training=(), metrics=None, **changes):
    """A result of 50,000 samples of a published run, with changes; returns the file's name.

    training: changed flags of the run; None: a published file, whose training is not known.
    """
    options = model_config(model, **{"input_size": size, **(options or {})})
    manifest = {"model": model, "run": "ours", "cfg_scale": 1.0, "mode": "sde", "num_steps": 250, "weights": "ema"}
    manifest |= {"step": 400_000, "model_options": options, "latents": {"factor": 8}, "training": None}
    if training is not None:
        flags = {} if model.startswith("DMFT") else {"weighting": "lognormal"}
        run = CONFIGS[PRESETS[model].kind](model=model, **{**flags, **dict(training)}).resolve()
        manifest["training"] = {name: getattr(run, name) for name in TRAINING if hasattr(run, name)}
        manifest["training"]["changes"] = changes.pop("changes", [])
    manifest |= {"guidance_low": 0.0, "guidance_high": 0.7, **changes}
    path.write_text(json.dumps({"metrics": metrics or {"fid": 23.456789}, "count": 50000, "manifest": manifest}))
    return str(path)


def papers(capsys):
    """Rows of the printed table that papers state, or that say that none does."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| *")]


def test_a_result_stands_beside_the_published_rows_about_the_same(tmp_path, capsys):
    first = result(tmp_path / "b.json", metrics={"fid": 23.456789, "inception_score": 60.0})
    guided = {"cfg_scale": 1.5, "mode": "ode", "step": 2_000_000, "metrics": {"fid": 2.0, "fd_dinov2": 80.5}}
    second = result(tmp_path / "xl.json", "DeepFlow-XL/2", **guided)
    table.main([first, second])
    assert capsys.readouterr().out.splitlines() == [
        "| result | model | trained | sampled | FID | sFID | IS | fd_dinov2 |",
        "|---|---|---|---|---|---|---|---|",
        "| b | DeepFlow-B/2 | 400000 steps | sde, 250 steps, no guidance, ema, 50000 images | 23.46 |  | 60 |  |",
        "| *paper, Table 2* | DeepFlow-B/2-2T | 400000 steps | sde, 250 steps, no guidance | 23.1 | 5.6 | 60.3 |  |",
        "| xl | DeepFlow-XL/2 | 2000000 steps | ode, 250 steps, cfg 1.5 in [0.0, 0.7], ema, 50000 images "
        "| 2 |  |  | 80.5 |",
        "| *paper, Table 4* | DeepFlow-XL/2-3T | 2000000 steps | sampler not stated, guided | 1.97 | 4.39 | 264.7 |  |",
    ]


def test_samples_from_the_branches_stand_beside_no_published_row(tmp_path, capsys):
    table.main([result(tmp_path / "b.json", ig_scale=1.5, branch_gap="dt")])
    assert "sde, 250 steps, no guidance, ig scale 1.5, branch gap dt, ema, 50000 images" in capsys.readouterr().out
    table.main([result(tmp_path / "b.json", exit_branch=1)])
    assert papers(capsys) == ["| *no published row* |  |  |  |  |  |  |"]


def test_kid_has_its_columns_where_it_is_measured(tmp_path, capsys):
    table.main([result(tmp_path / "b.json", metrics={"fid": 23.5, "kid": 0.00123456, "kid_standard_error": 0.0001})])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| FID | sFID | IS | KID | KID s.e. |") and lines[2].endswith("| 0.001235 | 0.0001 |")


XL = {"model": "DeepFlow-XL/2", "step": 400_000}
ALIGNED = {"ssl_align": True, "enc_type": "dinov2-vit-b"}


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        (XL, [10.3]),
        ({**XL, "options": {"depth": 18}}, [12.4]),
        ({**XL, "options": {"depth": 28, "df_idxs": (7, 14, 21)}}, [9.7]),
        ({**XL, "options": {"df_idxs": (6, 18)}}, []),
        ({**XL, "step": 1_001_000}, [7.8]),
        ({**XL, "step": 1_100_000}, []),
        ({**XL, "training": ALIGNED, "options": {"ssl_align": True}}, [6.5]),
        ({"training": {**ALIGNED, "enc_type": "mocov3-vit-b"}, "options": {"ssl_align": True}}, []),
        ({"training": {"weighting": "uniform"}}, [28.1]),
        ({"training": {"weighting": "uniform", "tg_upper_bound": 0.1}}, [28.9]),
        ({"training": {"acc_coeff": 0.5}}, [23.5]),
        ({"training": {"scale_weight": [0.2, 1.0]}}, [23.1]),
        ({"training": {"scale_weight": [1.0, 1.0]}}, []),
        ({"training": {"learning_rate": 2e-4}}, []),
        ({"training": {"batch_size": 512}}, []),
        ({"training": {"mirror": True}}, []),
        ({"training": {"adam_beta1": 0.8}}, []),
        ({"training": {"adam_weight_decay": 0.1}}, []),
        ({"training": {"max_grad_norm": 0.1}}, []),
        ({"training": {"seed": 1, "holdout": "0.01", "mixed_precision": "fp16"}}, [23.1]),  # papers do not state them
        ({"changes": [{"step": 1, "changes": {"weighting": ["uniform", "lognormal"]}}]}, []),
        ({"training": {"weighting": "uniform", "tg_upper_bound": 0.0}, "options": {"vera": "none"}}, [33.0]),
        ({"num_steps": 50}, []),
        ({"path_type": "cosine"}, []),
        ({"weights": "raw"}, []),
        ({"mode": "ode"}, []),
        ({"cfg_scale": 1.5}, []),
        ({"size": 64}, []),
        ({"latents": {"factor": 8, "family": "other"}}, []),
        ({"latents": {"factor": 8, "scale": [1.0, 1.0, 1.0, 1.0]}}, []),
        ({"options": {"num_classes": 10}}, []),
        ({"model": "SiT-XL/2"}, [13.8, 13.7]),
        ({"metrics": {"clip_score_raw": 0.3}}, []),
        ({"model": "DMFT-XL/2", "mode": "euler", "num_steps": 1, "shift": 1.0}, [2.16]),
        (
            {"model": "DMFT-XL/2", "mode": "euler", "num_steps": 1, "shift": 1.0, "training": {"init_from": "a.pt"}},
            [2.16],
        ),
        ({"model": "DeepFlow-B/2", "training": {"init_from": "a.pt"}}, []),
        ({"model": "DMFT-XL/2", "mode": "restart", "num_steps": 4, "shift": 1.0}, [1.51]),
        ({"model": "DMFT-XL/2", "mode": "euler", "num_steps": 4, "shift": 1.5}, []),
        ({"model": "DMFT-XL/2", "num_steps": 1, "shift": 1.0, "training": {"g_type": "distill"}}, []),
        ({"model": "DMFT-XL/2", "mode": "euler", "num_steps": 1, "shift": 1.0, "training": {"P_mean_r": 0.0}}, []),
        ({"model": "DMFT-XL/2", "mode": "euler", "num_steps": 1, "shift": 1.0, "training": {"from_scratch": True}}, []),
        ({"training": None, "step": None, "options": {"ssl_align": True}, "model": "DeepFlow-XL/2"}, [6.5, 5.4, 5.0]),
    ],
)
def test_what_a_published_row_must_share(changes, numbers, tmp_path, capsys):
    path = result(tmp_path / "a.json", **changes)
    assert [row.numbers["fid"] for row in table.counterparts(Result.read(path))] == numbers
    table.main([path])
    assert len(papers(capsys)) == max(1, len(numbers))


def test_results_are_sorted_and_written_with_all_digits(tmp_path, capsys):
    values = {"a": (3.0, 0.5), "b": (1.23456789, 0.25), "c": (2.0, None)}
    paths = [
        result(tmp_path / f"{name}.json", metrics={"fid": fid, **({"precision": value} if value else {})})
        for name, (fid, value) in values.items()
    ]
    for metric, order in (("fid", "bca"), ("FID", "bca"), ("precision", "abc")):
        table.main([*paths, "--sort", metric])
        rows = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()[2:]]
        assert [row for row in rows if row in values] == list(order)
    table.main([*paths, "--sort", "fid", "--csv", str(tmp_path / "t.csv")])
    assert "t.csv" in capsys.readouterr().err
    header, first, *_, last = csv.reader((tmp_path / "t.csv").read_text().splitlines())
    assert header[:2] == ["result", "model"] and first[0] == "b" and "1.23456789" in first
    assert last[0].startswith("paper, Table")
    with pytest.raises(InputError, match="--sort recall: no result has it; choose one of fid, precision"):
        table.main([*paths, "--sort", "recall"])
    with pytest.raises(InputError, match=r"--csv .* is a folder"):
        table.main([*paths, "--csv", str(tmp_path)])


def test_no_match_says_so(tmp_path, capsys):
    table.main([result(tmp_path / "a.json", options={"depth": 8})])
    assert papers(capsys) == ["| *no published row* |  |  |  |  |  |  |"]


def test_what_was_sampled_otherwise_is_told_apart(tmp_path):
    same = table.made(Result.read(result(tmp_path / "a.json")))
    for changes in ({"mode": "ode", "heun": True}, {"label_mode": "balanced"}, {"shift": 1.5, "mode": "euler"}):
        other = {**changes, **{name: None for name in changes if name != "mode"}}
        texts = [table.made(Result.read(result(tmp_path / "b.json", **given))) for given in (changes, other)]
        assert len({same, *texts}) == 3 - ("mode" not in changes)
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**content, "reference": "/refs/own.npz"}))
    assert table.made(Result.read(tmp_path / "c.json")) == f"{same}, against own.npz"


def test_plots_hold_the_published_curves_and_the_runs(tmp_path, capsys):
    xl = [result(tmp_path / f"{k}.json", "DeepFlow-XL/2", step=k * 1000, metrics={"fid": 100 - k}) for k in (10, 20)]
    guided = result(tmp_path / "guided.json", cfg_scale=1.5)
    results = {path: Result.read(path) for path in (*xl, guided)}
    lines = table.curves(results, *table.PLOTS["plot_epochs"][:3])
    ours = "ours: sde, 250 steps, no guidance, ema, 50000 images"
    assert lines[ours] == [pytest.approx((k * 256_000 / 1_281_167, 100 - k)) for k in (10, 20)]
    drawn = [(round(x), fid) for x, fid in lines["paper: DeepFlow-XL/2-3T"]]
    assert drawn == [(80, 10.3), (100, 9.8), (200, 7.8), (400, 7.2)] and len(lines) == 5
    assert "guided.json is not drawn" in capsys.readouterr().err
    lines = table.curves(results, *table.PLOTS["plot_parameters"][:3])
    assert [(int(x), fid) for x, fid in lines["paper: DeepFlow-XL/2-4T"]] == [(822, 9.7)]
    assert {int(x) for x, _ in lines[ours]} == {681}
    plots = [tmp_path / "epochs.png", tmp_path / "parameters.png"]
    table.main([*xl, "--plot-epochs", str(plots[0]), "--plot-parameters", str(plots[1])])
    assert all(Image.open(path).size[0] > 300 for path in plots)


def test_results_without_a_manifest_and_other_files(tmp_path, capsys):
    (tmp_path / "plain.json").write_text(json.dumps({"metrics": {"fid": 3.0}, "manifest": None}))
    table.main([str(tmp_path / "plain.json")])
    assert "| plain |  |  | no manifest | 3 |" in capsys.readouterr().out
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "none.json"):
        with pytest.raises(InputError, match=name):
            table.main([str(tmp_path / name)])


# ------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_sweep_samples_and_measures_each_setting_once(tmp_path, capfd, monkeypatch):
    def run_python(processes, *command):
        done = programs.run(*command)
        assert (processes, done.returncode) == (1, 0), done.stderr
        print(done.stdout)

    monkeypatch.setattr(measuring, "run_python", run_python)
    vae = tiny.vae_folder(tmp_path / "tiny-vae")
    ckpt = tiny.checkpoint(tmp_path / "0000003.pt", vae)
    reference, features = save_npz(tmp_path / "ref.npz", pictures(8, 1)), script(tmp_path / "corners.pt")
    out = tmp_path / "sweep"
    flags = ["--ckpt", ckpt, "--ref", reference, "--out", out, "--num-samples", 4, "--features", features]
    flags += ["--num-steps", 2, "--cfg-scale", 1, 2, "--", "--mode", "ode"]
    sweep.main([str(flag) for flag in flags])
    printed = capfd.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "table.md").read_text().splitlines()]
    assert rows[0][:5] == ["steps", "guidance", "interval", "evaluations", "FD (corners)"]
    assert [row[:4] for row in rows[2:]] == [["2", "1.0", "", "2"], ["2", "2.0", "[0.0, 1.0]", "4"]]
    results = {path.stem: json.loads(path.read_text()) for path in out.glob("steps-*.json")}
    assert {name: content["manifest"]["cfg_scale"] for name, content in results.items()} == {
        "steps-2-cfg-1.0": 1.0,
        "steps-2-cfg-2.0-0.0-1.0": 2.0,
    }
    assert all(content["manifest"]["mode"] == "ode" and content["count"] == 4 for content in results.values())
    assert Image.open(out / "plot.png").size[0] > 300 and "FD (corners)" in printed
    lowest = min(results.values(), key=lambda content: content["metrics"]["fd_corners"])["manifest"]["cfg_scale"]
    best = f"--num-steps 2 --cfg-scale {lowest} --guidance-low 0.0 --guidance-high 1.0"
    assert (out / "best.txt").read_text() == f"{best}\n" and f"lowest: {best}" in printed
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    sweep.main([str(flag) for flag in flags])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")} == before
    assert "computing sample" not in capfd.readouterr().out
    with pytest.raises(InputError, match=r"--num-fid-samples was 4, is now 5; name another --out"):
        sweep.main(
            [str(flag) for flag in ["--num-samples" if f == "--num-samples" else 5 if f == 4 else f for f in flags]]
        )


SWEEP = ["--ckpt", "ckpt.pt", "--ref", "ref.npz", "--out", "out", "--num-steps", "2", "--cfg-scale", "1", "2"]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A finished sweep of two settings in the current folder; what checks and starts programs is noted."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "run_python", lambda processes, *words: calls.append(words))
    monkeypatch.setattr(evaluator, "check_inputs", lambda args, processes: calls.append(args))
    model = types.SimpleNamespace(kind="flow", num_branches=1)
    checkpoint = types.SimpleNamespace(model=model, weights_sha256=lambda: "a")
    monkeypatch.setattr(sweep, "open_checkpoint", lambda config: (checkpoint,))
    for name in ("ckpt.pt", "ref.npz"):
        (tmp_path / name).touch()
    (tmp_path / "out").mkdir()
    for name, scale in (("1.0", 1.0), ("2.0-0.0-1.0", 2.0)):
        manifest = {"num_steps": 2, "cfg_scale": scale, "num_fid_samples": 5000, "weights_sha256": "a"}
        content = {"metrics": {"fid": scale}, "manifest": manifest}
        (tmp_path / f"out/steps-2-cfg-{name}.json").write_text(json.dumps(content))
    return calls


def test_a_finished_sweep_is_only_read(measured, capsys):
    sweep.main(SWEEP)
    (checked,) = measured
    assert (checked.reference, checked.features) == ("ref.npz", None)
    assert "lowest: --num-steps 2 --cfg-scale 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text[: len(text) // 2], "not JSON.*delete it"),
        (lambda text: "\0" * len(text), "not JSON.*delete it"),
        (lambda text: text.replace('"fid"', '"sfid"'), "holds no fid.*delete it"),
        (lambda text: text.replace('{"fid": 2.0}', "{}"), "metrics.*delete it"),
        (lambda text: text.replace('"fid": 2.0', '"fid": NaN'), "metrics.*delete it"),
        (lambda text: text.replace('"cfg_scale": 2.0', '"cfg_scale": 3.0'), r"cfg_scale \(3.0\).*delete it"),
        (lambda text: text.replace("5000", "50"), r"num_fid_samples \(50\).*delete it"),
        (lambda text: text.replace('"a"', '"b"'), "weights other than --ckpt.*another --out"),
    ],
    ids=["cut", "zeroed", "other metrics", "no metrics", "nan", "other setting", "fewer samples", "other weights"],
)
def test_a_measured_setting_is_read_before_it_is_skipped(measured, change, match):
    path = Path("out/steps-2-cfg-2.0-0.0-1.0.json")
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=match):
        sweep.main(SWEEP)


@pytest.mark.parametrize(
    ("changes", "flag"), [(["--cfg-scale", "1", "0.5"], "--cfg-scale"), (["--interval", "1,0"], "low")]
)
def test_a_setting_that_cannot_be_sampled_ends_a_sweep_at_once(measured, changes, flag):
    with pytest.raises(InputError, match=flag):
        sweep.main([*SWEEP, *changes])
    assert measured == []


def test_a_sweep_hands_the_evaluators_flags_on(tmp_path, monkeypatch):
    def run_python(processes, *command):
        calls.append([str(word) for word in command])
        if command[0] != "-m":
            (tmp_path / "samples/steps-2-cfg-1.0").mkdir(parents=True)
            (tmp_path / "samples/steps-2-cfg-1.0/a.npz").touch()
        else:
            (tmp_path / "steps-2-cfg-1.0.json").write_text('{"metrics": {"fd_f": 1.0}}')

    calls = []
    monkeypatch.setattr(measuring, "run_python", run_python)
    flags = ["--ckpt", "c", "--ref", "r", "--out", str(tmp_path), "--features", "f", "--other-size", "--", "--heun"]
    assert sweep.measure(sweep.Setting(2, 1.0, 0.0, 1.0), *sweep.parse(flags)).metrics == {"fd_f": 1.0}
    sampled, evaluated = calls
    assert sampled[0].endswith("generate.py") and evaluated[:2] == ["-m", "evaluations.evaluator"]
    assert sampled.index("--heun") < sampled.index("--num-steps") and "--other-size" not in sampled
    assert evaluated[-5:-2] == ["--features", "f", "--other-size"]


def test_settings_without_guidance_are_taken_once(tmp_path):
    np.savez(tmp_path / "ref.npz", arr_0=pictures(1, 0))
    flags = ["--ckpt", "x", "--ref", "y", "--out", "z", "--cfg-scale", "1", "1.5", "--interval", "0,1", "0.3,0.7"]
    settings = sweep.settings(sweep.parse([*flags, "--num-steps", "50", "250"])[0])
    assert [setting.name for setting in settings] == [
        f"steps-{steps}-cfg-{rest}" for steps in (50, 250) for rest in ("1.0", "1.5-0.0-1.0", "1.5-0.3-0.7")
    ]
    with pytest.raises(InputError, match="--interval"):
        sweep.parse([*flags[:6], "--interval", "0.3"])
    with pytest.raises(InputError, match="--ckpt x does not exist"):
        sweep.main(flags)
