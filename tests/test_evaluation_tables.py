"""Tables: parts of the FLOP count beside Table 8, results beside the paper's, sweeps."""

import json

import numpy as np
import pytest
import tiny
import torch
from evaluation_helpers import pictures, save_npz, script
from PIL import Image

from common.errors import InputError
from evaluations import count_flops, sweep, table
from evaluations.metrics.published import PUBLISHED, TABLE_8
from models import create_model
from models.flops import Part, count_parts
from models.flops import count_flops as count

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
    count_flops.main(["DeepFlow-Ti/2"])
    assert "Table 8 has no such model; 2.26 M parameters" in capsys.readouterr().out
    with pytest.raises(InputError, match="--model 'B' is unknown"):
        count_flops.main(["B"])


def test_table_8_is_whole():
    assert sum(map(len, TABLE_8.values())) == 20 and TABLE_8[("XL", 3)][24] == (681, 113)


# ------------------------------------------------------------------------------------------------ results


def result(path, model, cfg_scale=1.0, size=32, **metrics):
    manifest = {
        "model": model,
        "cfg_scale": cfg_scale,
        "mode": "sde",
        "num_steps": 250,
        "weights": "ema",
        "step": 400000,
    }
    manifest.update(guidance_low=0.0, guidance_high=0.7, model_options={"input_size": size}, latents={"factor": 8})
    path.write_text(json.dumps({"metrics": metrics, "count": 50000, "manifest": manifest}))
    return str(path)


def test_measured_rows_stand_beside_the_published_ones_of_their_kind(tmp_path, capsys):
    first = result(tmp_path / "b.json", "DeepFlow-B/2", fid=23.456789, inception_score=60.0)
    second = result(tmp_path / "xl.json", "DeepFlow-XL/2", 1.5, fid=2.0, fd_dinov2=80.5)
    table.main([first, second])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| result | model | trained | sampled | FID | sFID | IS | fd_dinov2 |"
    assert lines[2] == (
        "| b | DeepFlow-B/2 | 400000 steps | sde, 250 steps, no guidance, ema, 50000 images | 23.46 |  | 60 |  |"
    )
    papers = [line for line in lines if line.startswith("| *paper*")]
    assert len(papers) == 4 + 3  # B without guidance at 256, XL with it
    assert (
        "| *paper* | DeepFlow-B/2 | 80 epochs | sde, 250 steps, lognormal t, no guidance | 23.1 | 5.6 | 60.3 |  |"
        in papers
    )
    assert "cfg 1.5 in [0.0, 0.7]" in lines[7] and lines[8].endswith("| 1.97 | 4.39 | 264.7 |  |")


def test_flow_maps_stand_beside_their_own_paper(tmp_path, capsys):
    table.main([result(tmp_path / "map.json", "DMFT-XL/2", size=64, fid=2.5)])
    papers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| *paper*")]
    assert papers == [
        f"| *paper* | DMFT-XL/2 | 800000 steps | {steps}, no guidance | {fid} |  |  |"
        for steps, fid in (("1 step", 2.12), ("4 steps", 1.68))
    ]


def test_results_without_a_manifest_and_other_files(tmp_path, capsys):
    (tmp_path / "plain.json").write_text(json.dumps({"metrics": {"fid": 3.0}, "manifest": None}))
    table.main([str(tmp_path / "plain.json")])
    assert "| plain |  |  | no manifest | 3 |" in capsys.readouterr().out
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "none.json"):
        with pytest.raises(InputError, match=name):
            table.main([str(tmp_path / name)])


def test_published_numbers_are_those_of_the_documentation():
    page = (tiny.ROOT / "docs" / "paper.md").read_text()
    numbers = {f"{row.fid:g}" for row in PUBLISHED}
    assert len(numbers) >= 19 and all(number in page for number in numbers)


# ------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_sweep_samples_and_measures_each_setting_once(tmp_path, capfd):
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
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    sweep.main([str(flag) for flag in flags])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")} == before
    assert "computing sample" not in capfd.readouterr().out
    with pytest.raises(InputError, match=r"another num_samples \(4\); name another --out"):
        sweep.main(
            [str(flag) for flag in ["--num-samples" if f == "--num-samples" else 5 if f == 4 else f for f in flags]]
        )


def test_a_sweep_hands_the_evaluators_flags_on(tmp_path, monkeypatch):
    def run_python(processes, *command):
        calls.append([str(word) for word in command])
        if command[0] != "-m":
            (tmp_path / "samples/steps-2-cfg-1.0").mkdir(parents=True)
            (tmp_path / "samples/steps-2-cfg-1.0/a.npz").touch()
        else:
            (tmp_path / "steps-2-cfg-1.0.json").write_text('{"metrics": {"fid": 1.0}}')

    calls = []
    monkeypatch.setattr(sweep, "run_python", run_python)
    flags = ["--ckpt", "c", "--ref", "r", "--out", str(tmp_path), "--features", "f", "--other-size", "--", "--heun"]
    assert sweep.measure(sweep.Setting(2, 1.0, 0.0, 1.0), *sweep.parse(flags)).metrics == {"fid": 1.0}
    sampled, evaluated = calls
    assert sampled[0].endswith("generate.py") and evaluated[:2] == ["-m", "evaluations.evaluator"]
    assert sampled[-1] == "--heun" and "--other-size" not in sampled
    assert evaluated[-3:] == ["--features", "f", "--other-size"]


def test_settings_without_guidance_are_taken_once(tmp_path):
    np.savez(tmp_path / "ref.npz", arr_0=pictures(1, 0))
    flags = ["--ckpt", "x", "--ref", "y", "--out", "z", "--cfg-scale", "1", "1.5", "--interval", "0,1", "0.3,0.7"]
    settings = sweep.settings(sweep.parse([*flags, "--num-steps", "50", "250"])[0])
    assert [setting.name for setting in settings] == [
        f"steps-{steps}-cfg-{rest}" for steps in (50, 250) for rest in ("1.0", "1.5-0.0-1.0", "1.5-0.3-0.7")
    ]
    with pytest.raises(SystemExit):
        sweep.parse([*flags[:6], "--interval", "0.3"])
    with pytest.raises(InputError, match="--ckpt x does not exist"):
        sweep.main(flags)
