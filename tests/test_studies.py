"""Studies: the file, what is started and what is not, the statistics, table and plots."""

import dataclasses
import glob
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time

import programs
import pytest
import tiny

from common.errors import InputError
from evaluations.metrics.results import Result
from studies import run, summary
from studies.study import read_study

FILE = """
baseline = "sit"
seeds = [0, 1]
fields = ["loss_v*"]

[flags]
data-dir = "{data}"
trans-depth = 2
batch-size = 4
max-train-steps = 4
log-every = 2
sampling-steps = 0

[variants.sit]
model = "SiT-Ti/2"

[variants.full]
model = "DeepFlow-Ti/2"
df-idxs = [1]

[measure]
distance = ["python -m evaluations.feature_distance --ckpt {ckpt} --num-samples 2 --num-steps 2 --block 1 --out {out}"]
"""
RUNS = ["sit-seed0", "sit-seed1", "full-seed0", "full-seed1"]


@pytest.fixture(autouse=True)
def signals():
    """The handlers that a command installs for the rest of its life."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_forks(patch):
    """The list that fills with the lines that studies.run runs, here in forks of a warm process instead of a shell."""
    started, lock = [], threading.Lock()

    def fork(shell, line, output):
        started.append(line)
        for command in line.split(" && "):
            words = [found for word in shlex.split(command) for found in glob.glob(word) or [word]]
            with lock:
                program = programs.start(*words[1:])
            code = program.wait()
            with open(output, "a") as file:
                file.write(program.stdout.read_text() + program.stderr.read_text())
            if code:
                break
        return code

    patch.setattr(run.Shell, "run", fork)
    return started


@pytest.fixture
def lines(monkeypatch):
    return in_forks(monkeypatch)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The study above, with data."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(FILE.replace("{data}", str(tiny.data_folder(folder / "data"))))
    return folder / "study.toml"


@pytest.fixture(scope="module")
def finished(file):
    """Folder of the finished study."""
    out = file.parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        started = in_forks(patch)
        run.main([str(file), "--out", str(out), "--jobs", "2"])
    assert sorted(line.split()[3] for line in started if "train.py" in line) == sorted(RUNS) and len(started) == 8
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "out")


def edited(file, folder, *changes):
    """The study file with pairs (old, new) of texts replaced."""
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "edited.toml").write_text(text)
    return folder / "edited.toml"


def results(out):
    return json.loads((out / "results.json").read_text())


# ------------------------------------------------------------------------------------------------- running


def test_numbers_are_those_of_the_run_folders(finished):
    found = results(finished)
    assert found["not finished"] == {} and len(found["runs"]) == len(RUNS)
    for name, of in zip(RUNS, found["runs"], strict=True):
        assert f"{of['variant']}-seed{of['seed']}" == name
        field = "loss_v1" if of["variant"] == "sit" else "loss_v2"
        log = tiny.log_lines(finished / name)
        assert of["numbers"]["loss_v*"] == log[-1][field]
        assert [(step, number) for step, _, number in of["curves"]["loss_v*"]] == [(r["step"], r[field]) for r in log]
        (path,) = (finished / name / "measured/0000004").glob("distance-*.json")
        metrics = Result.read(path).metrics
        assert metrics == {m: of["numbers"][f"distance: {m}"] for m in metrics} and metrics
    means, pairs = found["tables"].values()
    losses = [of["numbers"]["loss_v*"] for of in found["runs"]]
    assert [row["variant"] for row in means] == ["sit", "full"] and [row["variant"] for row in pairs] == ["full"]
    assert means[0]["loss_v*"]["mean"] == pytest.approx((losses[0] + losses[1]) / 2)
    assert pairs[0]["loss_v*"]["mean"] == pytest.approx((losses[2] + losses[3] - losses[0] - losses[1]) / 2)
    flops = {of["variant"]: of["numbers"]["training FLOPs"] for of in found["runs"]}
    assert flops["full"] > flops["sit"] > 0
    pictures = {path.name for path in finished.glob("*.png")}
    assert pictures == {"loss_v-over-steps.png", "loss_v-over-training-FLOPs.png"}
    table = (finished / "table.md").read_text()
    assert "| full | 2 |" in table and "±" in table and "Not finished" not in table


def test_what_is_finished_is_left_alone_and_the_rest_made_again(file, out, lines, capsys):
    before = results(out)
    run.main([str(file), "--out", str(out), "--print"])
    assert capsys.readouterr().out == ""
    run.main([str(file), "--out", str(out)])
    assert lines == []
    shutil.rmtree(out / "full-seed1")
    next((out / "sit-seed0").glob("measured/*/*.json")).write_text("{")
    run.main([str(file), "--out", str(out)])
    assert [line.split()[1:4] for line in lines] == [
        ["-m", "evaluations.feature_distance", "--ckpt"],
        ["train.py", "--exp-name", "full-seed1"],
        ["-m", "evaluations.feature_distance", "--ckpt"],
    ]
    for old, new in zip(before["runs"], results(out)["runs"], strict=True):
        assert {**old["numbers"], "hours": 0} == {**new["numbers"], "hours": 0}


def test_samples_of_edited_commands_have_a_folder_of_their_own(file, tmp_path):
    def folders(*lines):
        old = "[measure]\n"
        path = edited(file, tmp_path, (old, old + "".join(f"{line}\n" for line in lines)))
        _, (first, *_) = read_study(path, tmp_path / "out")
        stages = {name: shlex.split(line) for name, line, _ in first.stages()}
        return [stages[name][stages[name].index("--sample-dir") + 1] for name in ("a", "b")]

    sample = '["python generate.py --ckpt {{ckpt}} --sample-dir {{samples}} --num-steps {}", "python -m {} {{out}}"]'
    assert len({*folders(f"a = {sample.format(5, 'x')}", f"b = {sample.format(5, 'y')}")}) == 1
    assert len({*folders(f"a = {sample.format(5, 'x')}", f"b = {sample.format(6, 'x')}")}) == 2


def test_runs_of_another_machine_count_as_finished(file, finished, lines, tmp_path, capsys):
    more, out, known = edited(file, tmp_path, ("seeds = [0, 1]", "seeds = [0, 1, 2]")), tmp_path / "out", finished
    words = [str(more), "--out", str(out), "--known", str(known / "results.json")]
    run.main([*words, "--print"])
    assert ["seed2" in line for line in capsys.readouterr().out.splitlines()] == [True, True]
    run.main([*words, "--report"])
    assert lines == [] and list(results(out)["not finished"]) == ["sit-seed2", "full-seed2"]
    assert results(out)["runs"] == results(known)["runs"] and results(out)["tables"] == results(known)["tables"]
    changed = edited(file, tmp_path, ("batch-size = 4", "batch-size = 8"))
    with pytest.raises(InputError, match=r"--known .*results\.json: its study has other flags"):
        run.main([str(changed), *words[1:]])


@pytest.mark.parametrize("path", sorted(tiny.ROOT.glob("assets/studies/*/results.json")), ids=lambda p: p.parent.name)
def test_results_of_the_repository_are_of_its_studies(path, tmp_path):
    study, runs = read_study(tiny.ROOT / f"studies/{path.parent.name}.toml", tmp_path)
    known = summary.read_known(study, [path])
    assert known and known.keys() <= {of.key for of in runs}


def test_the_failure_of_a_run_does_not_stop_the_others(file, out, lines, tmp_path, capsys):
    broken = 'baseline = "sit"', 'baseline = "sit"\nvariants.broken = {model = "SiT-Ti/2", batch-size = 100}'
    shutil.rmtree(out / "full-seed1")
    with pytest.raises(InputError, match="2 of 6 runs"):
        run.main([str(edited(file, tmp_path, broken)), "--out", str(out)])
    assert ["full-seed1" in line for line in lines].count(True) == 2
    said = capsys.readouterr().out
    assert "- broken-seed0: train ended with 2: error: " in said and "- broken-seed1: " in said
    assert results(out)["not finished"].keys() == {"broken-seed0", "broken-seed1"}
    assert len(results(out)["runs"]) == 4
    run.main([str(edited(file, tmp_path, broken)), "--out", str(out), "--report"])
    assert "- broken-seed0: " in capsys.readouterr().out


def test_a_measurement_without_a_result_is_a_failure(file, out, lines, tmp_path, capsys):
    path = edited(file, tmp_path, (" --out {out}", ""), ("seeds = [0, 1]", "seeds = [0]"))
    with pytest.raises(InputError, match="2 of 2 runs"):
        run.main([str(path), "--out", str(out)])
    assert len(lines) == 2  # other commands: not the measurement of before
    assert "- sit-seed0: distance: " in capsys.readouterr().out


def test_runs_of_other_flags_are_refused(file, out, lines, tmp_path, capsys):
    path = edited(file, tmp_path, ("batch-size = 4", "batch-size = 3"), ("seeds = [0, 1]", "seeds = [0]"))
    run.main([str(path), "--out", str(out), "--report"])
    assert "--batch-size 4, now 3" in capsys.readouterr().out
    with pytest.raises(InputError, match="2 of 2 runs"):
        run.main([str(path), "--out", str(out)])
    assert "batch_size" in capsys.readouterr().out.replace("-", "_") and len(lines) == 2
    free = edited(file, tmp_path, ("log-every = 2", "log-every = 3"))
    run.main([str(free), "--out", str(out), "--print"])
    assert capsys.readouterr().out == ""


def test_print_gives_a_line_for_each_run(file, tmp_path, capsys):
    path = edited(file, tmp_path, ("[variants.sit]", "[axis]\nlearning-rate = [1e-3, 2e-3]\n[variants.sit]"))
    run.main([str(path), "--out", f"{tmp_path}/a b", "--print"])
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 8 and len({*found}) == 8
    train, _, measure = (shlex.split(part) for part in found[6].partition(" && "))
    assert train[:2] == ["python", "train.py"] and measure[:3] == ["python", "-m", "evaluations.feature_distance"]
    assert train[train.index("--exp-name") + 1] == "full-learning-rate0.001-seed1"
    for words in (["--learning-rate", "0.001"], ["--seed", "1"], ["--df-idxs", "1"], ["--resume", "auto"]):
        assert " ".join(words) in " ".join(train)
    assert f"{tmp_path}/a b/full-learning-rate0.001-seed1/checkpoints/0000004.pt" in measure


def test_hours_follow_from_the_flops_of_all_runs(file, finished, capsys):
    run.main([str(file), "--hours-on", "H100"])
    total = sum(of["numbers"]["training FLOPs"] for of in results(finished)["runs"])
    assert f"4 runs, {total:.3g} training FLOPs" in capsys.readouterr().out


def test_a_shell_runs_lines_and_passes_a_signal_on(tmp_path):
    shell, codes = run.Shell(), []
    assert shell.run("echo one; echo two >&2; exit 3", tmp_path / "said") == 3
    assert (tmp_path / "said").read_text() == "one\ntwo\n"
    script = "trap 'echo saved; exit' TERM; echo ready; while :; do sleep 0.01; done"
    line = f"bash -c {shlex.quote(script)} && echo next"
    thread = threading.Thread(target=lambda: codes.append(shell.run(line, tmp_path / "said")))
    thread.start()
    while "ready" not in (tmp_path / "said").read_text():
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt):
        shell.stop()
    thread.join(60)
    said = (tmp_path / "said").read_text()
    assert codes == [75] and said.endswith("saved\n") and "next" not in said


@pytest.mark.slow
def test_a_killed_study_goes_on(file, finished, tmp_path):
    """With real shells and processes: SIGTERM while the first run trains."""
    long = edited(file, tmp_path, ("max-train-steps = 4", "max-train-steps = 100000"), ("[0, 1]", "[0]"))
    program = programs.start("-m", "studies.run", long, "--out", tmp_path / "out")
    log = tmp_path / "out/sit-seed0/log.jsonl"
    while program.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    os.kill(program.process.pid, signal.SIGTERM)
    assert program.wait() == 130, program.stderr.read_text()
    (ckpt,) = log.parent.glob("checkpoints/*.pt")
    steps = tiny.load(ckpt)["steps"]
    short = edited(file, tmp_path, ("max-train-steps = 4", f"max-train-steps = {steps + 1}"), ("[0, 1]", "[0]"))
    done = programs.run("-m", "studies.run", short, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| sit | 1 |" in done.stdout and len((log.parent / "starts.jsonl").read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seeds = [0, 1]", 'seeds = [0, "1"]', "'seeds.1'"),
        ("seeds = [0, 1]", "seeds = []", "'seeds'"),
        ("seeds = [0, 1]", "", "'seeds'"),
        ("seeds = [0, 1]", "seeds = [0, 1]\nsteps = 3", "'steps'"),
        ("seeds = [0, 1]", "seeds = [0, 1", "not TOML"),
        ('"sit"', '"dit"', "baseline 'dit'"),
        ("[measure]", "[axis]\nseed = [1]\ncfg-prob = [1]\n[measure]", "'axis'"),
        ("[measure]", "[measure]\nfid = 'python'", "'measure.fid"),
        ("batch-size = 4", "batch-size = {}", "'flags.batch-size"),
        ("batch-size = 4", "batch-size = nan", "'flags.batch-size"),
        ("batch-size = 4", "batch-size = -4", "--batch-size -4"),
        ("batch-size = 4", "batch-sice = 4", "--batch-sice"),
        ("batch-size = 4", "seed = 4", "--seed"),
        ("SiT-Ti/2", "SiT-Ty/2", "SiT-Ty/2"),
    ],
)
def test_bad_files_are_refused_by_name_and_key(file, tmp_path, old, new, named):
    path = edited(file, tmp_path, (old, new))
    with pytest.raises(InputError) as caught:
        run.main([str(path), "--out", str(tmp_path / "out")])
    assert str(path) in str(caught.value) and named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml"):
        run.main([str(tmp_path / "none.toml")])


@pytest.mark.parametrize("path", sorted(tiny.ROOT.glob("studies/*.toml")), ids=lambda path: path.stem)
def test_studies_of_the_repository_are_whole(path, tmp_path):
    study, runs = read_study(path, tmp_path)
    values = len(next(iter(study.axis.values()), [None]))
    assert len(runs) == len(study.variants) * len(study.seeds) * values
    for of in runs:
        assert sum(1 for _ in of.stages()) >= 2 and "{" not in "".join(line for _, line, _ in of.stages())


def test_the_ladder_on_digits_has_the_flags_of_the_quickstart(tmp_path):
    _, runs = read_study(tiny.ROOT / "studies/digits_ladder.toml", tmp_path)
    (full,) = (of for of in runs if of.name == "full-learning-rate0.004-seed0")
    text = (tiny.ROOT / "script/quickstart.sh").read_text()
    free = {
        "exp-name",
        "output-dir",
        "data-dir",
        "holdout",
        "holdout-every",
        "resume",
        "max-train-steps",
        "checkpointing-steps",
        "ema-decay",
        "sampling-steps",
    }
    words = shlex.split(text[text.index("train train.py") : text.index("sample generate.py")].partition("\nstep")[0])
    given = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
    config = vars(full.config)
    for name, value in given.items():
        if (name := name[2:]) not in free:
            found = config[name.replace("-", "_")]
            assert found == type(found)(value), name


# ------------------------------------------------------------------------------------------------- statistics


def test_mean_and_standard_error():
    assert summary.Estimate.of([4.0]) == summary.Estimate(4.0, None) and str(summary.Estimate.of([4.0])) == "4"
    found = summary.Estimate.of([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3 and found.error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert str(found) == "3 ± 1.1" and str(summary.Estimate.of([2.0, 2.0])) == "2 ± 0"


def made(variant, rate, seed, loss):
    return summary.Measured(variant, {"rate": rate}, seed, {"loss": loss}, {"loss": [(1, 10.0, loss), (2, 20.0, 0.0)]})


@pytest.fixture
def groups():
    """Differences of b from a at rate 1: 1 and 3, as a lacks seed 2; at rate 2: -1."""
    return {
        ("a", 1): [made("a", 1, 0, 10.0), made("a", 1, 1, 20.0)],
        ("a", 2): [made("a", 2, 0, 5.0)],
        ("b", 1): [made("b", 1, 2, 100.0), made("b", 1, 0, 11.0), made("b", 1, 1, 23.0)],
        ("b", 2): [made("b", 2, 0, 4.0)],
    }


def test_differences_are_paired_by_seed(groups):
    rows = summary.rows_of(groups, ["loss"], "a")
    assert rows == [
        {"variant": "b", "rate": 1, "seeds": 2, "loss": summary.Estimate(2.0, 1.0)},
        {"variant": "b", "rate": 2, "seeds": 1, "loss": summary.Estimate(-1.0, None)},
    ]
    assert [row["seeds"] for row in summary.rows_of(groups, ["loss"])] == [2, 1, 3, 1]
    assert summary.rows_of({key: runs for key, runs in groups.items() if key[0] == "b"}, ["loss"], "a") == []


def test_each_variant_at_its_best(groups):
    groups["b", 3] = [made("b", 3, 0, 3.0)]
    best = summary.at_best(groups, "loss")
    assert summary.rows_of(best, ["loss"], "a") == [
        {"variant": "b", "rate": 3, "seeds": 1, "loss": summary.Estimate(-2.0, None)}
    ]


def test_errors_over_t_are_paired_by_seed():
    def made(variant, seed, by_time):
        return summary.Measured(variant, {}, seed, {}, {}, by_time)

    groups = {
        "sit": [made("sit", seed, {1: {0.5: 2.0 + seed, 0.25: 1.0}}) for seed in (0, 1)],
        "full": [
            made("full", 1, {1: {0.5: 7.0, 0.25: 1.0}, 2: {0.5: 5.0, 0.25: 1.5}}),
            made("full", 0, {1: {0.5: 2.0, 0.25: 1.0}, 2: {0.5: 2.0, 0.25: 1.5}}),
            made("full", 2, {}),  # without held-out errors
        ],
    }
    from_baseline, from_first = summary.lines_by_time(groups, "sit")
    assert from_baseline == {"sit": [], "full": [(0.25, 0.5, 0.0), (0.5, 1.0, 1.0)]}  # at t = 0.5: 2 - 2 and 5 - 3
    assert from_first == {"sit": [], "full": [(0.25, 0.5, 0.0), (0.5, -1.0, 1.0)]}


def test_curves_are_means_at_common_steps():
    assert summary.mean_curve([{3: 1.0, 1: 10.0, 2: 0.0}, {}, {1: 20.0, 2: 0.0}]) == [(1, 15.0, 5.0), (2, 0.0, 0.0)]
    assert summary.mean_curve([{1: 10.0}, {2: 20.0}]) == []


def test_seeds_without_common_steps_have_no_curve(groups, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(summary, "save_lines", lambda lines, path, **_: drawn.update({path.name: lines}))
    groups["a", 1][1].curves["loss"] = [(3, 30.0, 1.0)]
    study = dataclasses.make_dataclass("Study", ["axis", "fields", "baseline"])({"rate": [1, 2]}, ["loss"], "a")
    summary.save_plots(study, groups, summary.rows_of(groups, ["loss"]), ["loss"], tmp_path)
    assert drawn["loss-over-steps-rate-1.png"] == {"b": [(1, 134 / 3, pytest.approx(27.8, abs=0.1)), (2, 0.0, 0.0)]}
    assert [x for x, *_ in drawn["loss-over-training-FLOPs-rate-2.png"]["a"]] == [10.0, 20.0]


def test_the_star_is_the_last_branch():
    records = [{"step": step, "loss_v2": 2.0, "loss_v10": 10.0 + step, "loss_a11": 0.0} for step in (1, 2, 3)]
    records.append({"step": 3, "held_v1_t0.5": 5.0})
    assert summary.curve_of(records, "loss_v*", 2, 1) == [(1, 11.0), (2, 12.0)]
    assert summary.curve_of(records, "held_v*_t0.5", 3, 1) == [(3, 5.0)]
    for field in ("loss_v", "held_v*", "held_v*_t0x5"):
        assert summary.curve_of(records, field, 3, 1) == []


def test_means_that_a_stop_cut_become_one():
    """Ten steps logged as 8 and 2, and a held-out line, which is not a mean; whole lines stay as they are."""
    lines = [(10, 5.0), (18, 1.0), (20, 2.0)]
    records = [{"step": step, "loss_v1": loss, "steps_per_s": 3.0} for step, loss in lines]
    assert summary.curve_of([*records, {"step": 20, "loss_v1": 9.0}], "loss_v1", 20, 10) == [
        *((10, 5.0), (20, pytest.approx(1.2))),
        (20, 9.0),
    ]


def test_an_axis_may_be_of_models(tmp_path):
    axis = '[axis]\nmodel = ["SiT-Ti/2", "DeepFlow-Ti/2"]\n[variants.a]\n'
    (tmp_path / "s.toml").write_text(f'baseline = "a"\nseeds = [0]\nfields = ["loss"]\n{axis}')
    _, runs = read_study(tmp_path / "s.toml", tmp_path)
    assert [run.name for run in runs] == ["a-modelSiT-Ti_2-seed0", "a-modelDeepFlow-Ti_2-seed0"]


def test_a_field_that_no_log_has_is_named(file, out, tmp_path, capsys):
    path = edited(file, tmp_path, ('["loss_v*"]', '["loss_v*", "loss_w"]'))
    run.main([str(path), "--out", str(out), "--report"])
    assert "sit-seed0/log.jsonl has no field loss_w; correct `fields`" in capsys.readouterr().out


def test_the_last_errors_over_t_are_read_by_branch():
    records = [{"step": step, "holdout_v1_t0.5": step, "holdout_v2_t0.5": 0.0, "holdout_v2": 9.0} for step in (2, 4)]
    records.append({"step": 4, "holdout_raw_v1_t0.5": 9.0, "holdout_v1_t0.0625": 1.0, "loss_v1": 9.0})
    assert summary.errors_by_time(records, 4) == {1: {0.5: 4, 0.0625: 1.0}, 2: {0.5: 0.0}}
    assert summary.errors_by_time(records, 3) == {}


def test_the_array_script_runs_its_line(tmp_path):
    (tmp_path / "lines.txt").write_text("echo one\ntrue && echo 'two'; exit 3\n")
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "2"}
    command = ["bash", str(tiny.ROOT / "script/slurm/study.sh"), "lines.txt"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, "two\n")
