"""CLIP score, GenEval's aggregation, captions and prompts of the digits with their report."""

import json

import captioned
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from common.files import sha256_of_files
from digits import report
from digits.captions import WORDS, digit_of, split_phrases, vocabulary, write_all
from digits.data import load_digits_split, upsample, write_image_folder
from evaluations import clip_score, geneval
from evaluations.clip_score import ClipScorer, conventions, read_prompts, score
from evaluations.metrics.images import FolderImages
from evaluations.metrics.results import ResultFlags
from models.text import TextEncoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return captioned.clip_folder(tmp_path_factory.mktemp("clip"))


def images(folder, count=4):
    """A folder of random images."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:06d}.png")
    return FolderImages(folder, "samples")


def test_three_conventions_of_known_cosines():
    cosines, prefixed = torch.tensor([0.5, -0.1]), torch.tensor([0.4, -0.2])
    found = conventions(cosines, prefixed)
    expected = {"clip_score_raw": 0.2, "clip_score_clipscore": 0.5, "clip_score_torchmetrics": 25.0}
    assert found == pytest.approx(expected)


def test_conventions_are_ordered(clip, tmp_path):
    found = score(images(tmp_path / "s"), ["a cat", "a cup", "", "a rocket"], ClipScorer(clip), batch_size=3)
    raw, own, hundred = (found[f"clip_score_{name}"] for name in ("raw", "clipscore", "torchmetrics"))
    assert -1 <= raw <= 1
    assert 0 <= own <= 2.5
    assert 100 * raw - 1e-6 <= hundred <= 100


def test_cosines_are_those_of_transformers(clip, tmp_path):
    scorer, data = ClipScorer(clip), images(tmp_path / "s")
    pixels, prompts = np.stack([data.read(i) for i in range(4)]), ["a cat", "a cup", "a", "a rocket"]
    ids = scorer.tokens(prompts)
    with torch.no_grad():
        out = scorer.model(input_ids=ids, pixel_values=scorer.pixels(pixels))
    expected = (out.image_embeds * out.text_embeds).sum(dim=1)
    torch.testing.assert_close(scorer.cosines(pixels, prompts), expected)


def test_a_matching_prompt_scores_higher_than_another_order(clip, tmp_path):
    data, scorer = images(tmp_path / "s"), ClipScorer(clip)
    prompts = ["a cat", "a cup of tea", "two red buses", "x"]
    one, other = score(data, prompts, scorer), score(data, prompts[::-1], scorer)
    assert one["clip_score_raw"] != other["clip_score_raw"]


def test_clip_score_names_its_model_in_the_result(clip, tmp_path, capsys):
    images(tmp_path / "s")
    (tmp_path / "s.json").write_text(json.dumps({"labels": ["a", "b", "c", "d"], "step": 7, "weights": "raw"}))
    clip_score.main([str(tmp_path / "s"), "--clip", str(clip), "--json", str(tmp_path / "r.json"), "--device", "cpu"])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["clip"] == str(clip)
    assert (result["manifest"]["step"], result["manifest"]["weights"]) == (7, "raw")
    printed = capsys.readouterr()
    assert str(clip) in printed.out and "r.json (samples of the raw weights)" in printed.err
    assert set(result["metrics"]) == {"clip_score_raw", "clip_score_clipscore", "clip_score_torchmetrics"}


def test_prompts_that_cannot_be_read(clip, tmp_path):
    data = images(tmp_path / "s")
    with pytest.raises(InputError, match="--prompts"):
        read_prompts(tmp_path / "s", 4)
    (tmp_path / "s.json").write_text(json.dumps({"labels": [1, 2]}))
    with pytest.raises(InputError, match="--prompts"):
        read_prompts(tmp_path / "s", 4)
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert read_prompts(tmp_path / "s", 2, tmp_path / "p.txt") == ["one", "two"]
    with pytest.raises(InputError, match="4 images for 2 prompts"):
        score(data, ["one", "two"], ClipScorer(clip))
    with pytest.raises(InputError, match="--clip"):
        ClipScorer(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------------- GenEval


def results(right, total):
    """Detections of each tag: `right[tag]` correct ones of `total[tag]`."""
    return [geneval.Detection(tag, i < right[tag]) for tag in geneval.TAGS for i in range(total[tag])]


def test_the_overall_score_is_the_mean_of_the_tags_not_of_the_images():
    total = dict(zip(geneval.TAGS, (320, 396, 320, 376, 400, 400), strict=True))
    right = dict(zip(geneval.TAGS, (320, 99, 80, 188, 0, 100), strict=True))
    scores = geneval.aggregate(results(right, total))
    assert scores["overall"] == pytest.approx((1 + 0.25 + 0.25 + 0.5 + 0 + 0.25) / 6)
    micro = sum(right.values()) / sum(total.values())
    assert abs(scores["overall"] - micro) > 0.01


def test_results_that_cannot_be_aggregated(tmp_path):
    total = dict.fromkeys(geneval.TAGS, 1)
    with pytest.raises(InputError, match="no image of the tag counting"):
        geneval.aggregate([found for found in results(total, total) if found.tag != "counting"])
    unknown = b'{"tag": "shapes", "correct": true}'
    for content, message in ((b"", "empty"), (b"\n{", "line 2"), (b"\xff", "not UTF-8"), (unknown, "line 1")):
        (tmp_path / "r.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=message):
            geneval.main(["score", str(tmp_path / "r.jsonl")])


def detections(prompts=2, images=4):
    """Lines of the detector: the given number of prompts of each tag, numbered in order."""
    return [
        {"filename": f"s/{number:05d}/samples/{i:04d}.png", "tag": tag, "prompt": f"{tag} {number}", "correct": i == 0}
        for number, tag in enumerate(geneval.TAGS * prompts)
        for i in range(images)
    ]


def score_lines(folder, lines, *flags):
    (folder / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    geneval.main(["score", str(folder / "r.jsonl"), *map(str, flags)])


def test_whole_results_are_scored_with_their_counts(tmp_path, capsys):
    lines = detections()
    prompts = [{"tag": line["tag"], "prompt": line["prompt"]} for line in lines[::4]]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    score_lines(tmp_path, lines, "--metadata", tmp_path / "m.jsonl", "--json", tmp_path / "out.json")
    printed = capsys.readouterr().out
    assert "counting       0.2500  8 images of 2 prompts" in printed
    assert "overall        0.2500  48 images of 12 prompts" in printed
    assert json.loads((tmp_path / "out.json").read_text())["count"] == 48
    with pytest.raises(InputError, match=r"'colors: colors 9' has 0 images instead of 4"):
        score_lines(
            tmp_path, [line for line in lines if line["prompt"] != "colors 9"], "--metadata", tmp_path / "m.jsonl"
        )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda lines: lines[:-1], r"prompt '00011' has 3 images instead of 4"),
        (lambda lines: lines[:8] + lines[12:], r"1 prompts are missing, the first is 00002"),
        (lambda lines: lines + lines[3:4], r"00000/samples/0003.png is there 2 times"),
        (lambda lines: [line for line in lines if "0000.png" in line["filename"]], r"has 1 images instead of 4"),
        (lambda lines: [{**line, "filename": "", "prompt": ""} for line in lines], r"without a file name"),
    ],
    ids=["an image lacks", "a prompt lacks", "one twice", "one of each prompt", "no names"],
)
def test_results_that_are_not_whole_are_refused(change, fault, tmp_path, capsys):
    with pytest.raises(InputError, match=rf"r\.jsonl: .*{fault}.*--incomplete"):
        score_lines(tmp_path, change(detections()))
    score_lines(tmp_path, change(detections()), "--incomplete")
    printed = capsys.readouterr()
    assert "warning: " in printed.err and "overall" in printed.out
    if "twice" in fault:
        assert "0.2500  48 images" in printed.out  # the duplicate counts once


def test_images_that_were_not_scored_are_refused(tmp_path):
    for line in detections():
        path = tmp_path / line["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    score_lines(tmp_path, detections(), "--samples", tmp_path / "s")
    with pytest.raises(InputError, match=r"00000/samples/0003\.png is not there"):
        score_lines(tmp_path, detections(images=3), "--samples", tmp_path / "s", "--images-per-prompt", 3)


def test_samples_that_are_not_whole_are_refused(tmp_path, capsys):
    flags = ResultFlags(json=None)
    flags.check_count(tmp_path / "s", 3)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/settings.json").write_text("{}")
    with pytest.raises(InputError, match=r"sampling into .*s is not finished.*--incomplete"):
        flags.check_count(tmp_path / "s", 3)
    (tmp_path / "s.json").write_text('{"num_fid_samples": 4}')
    flags.check_count(tmp_path / "s", 4)
    with pytest.raises(InputError, match=r"holds 3 samples, .*s\.json says 4.*--incomplete"):
        flags.check_count(tmp_path / "s", 3)
    (fault,) = ResultFlags(incomplete=True).check_count(tmp_path / "s", 3)
    assert "holds 3 samples" in fault
    assert "warning" in capsys.readouterr().err


def test_an_image_that_another_stands_for_is_noticed(tmp_path):
    images(tmp_path / "s", count=4)
    (tmp_path / "s/settings.json").write_text('{"kept_as": "png"}')
    (tmp_path / "s.json").write_text('{"num_fid_samples": 4}')
    ResultFlags().check_count(tmp_path / "s", 4)
    (tmp_path / "s/000002.png").rename(tmp_path / "s/copy.png")
    with pytest.raises(InputError, match=r"lacks 1 images, the first is .*000002\.png.*--incomplete"):
        ResultFlags().check_count(tmp_path / "s", 4)


def test_an_npz_that_its_manifest_is_not_about_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "s.json").write_text(json.dumps({"num_fid_samples": 4, "npz_sha256": sha256_of_files(path)}))
    ResultFlags().check_count(path, 4)
    np.savez(path, arr_0=np.ones((4, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"s\.npz is not the file that .*s\.json"):
        ResultFlags().check_count(path, 4)


def test_check_only_needs_no_samples(clip, tmp_path, capsys):
    clip_score.main([str(tmp_path / "none"), "--clip", str(clip), "--check-only"])
    with pytest.raises(InputError, match="--clip"):
        clip_score.main([str(tmp_path / "none"), "--clip", str(tmp_path / "nothing"), "--check-only"])
    (tmp_path / "m.jsonl").write_text('{"tag": "counting", "prompt": "a"}\n')
    geneval.main(["score", str(tmp_path / "none"), "--metadata", str(tmp_path / "m.jsonl"), "--check-only"])
    with pytest.raises(InputError, match=r"m\.jsonl, line 1"):
        (tmp_path / "m.jsonl").write_text("{\n")
        geneval.main(["score", str(tmp_path / "none"), "--metadata", str(tmp_path / "m.jsonl"), "--check-only"])


def test_a_folder_for_geneval_with_faults(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match="does not exist"):
        geneval.check_layout(tmp_path / "s", tmp_path / "m.jsonl")
    for number in (0, 7):
        (tmp_path / f"s/{number:05d}/samples").mkdir(parents=True)
    (tmp_path / "s/00000/metadata.jsonl").write_text('{"prompt": "b"}\n')
    for k in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"s/00000/samples/{k:04d}.png")
    (tmp_path / "s/00000/samples/0003.png").write_bytes(b"x")
    faults = geneval.check_layout(tmp_path / "s", tmp_path / "m.jsonl")
    expected = ["00000/samples/0003.png is missing or damaged"]
    expected += [f"00001/samples/000{k}.png is missing or damaged" for k in range(4)]
    expected += ["00000/metadata.jsonl is not the record", "00001/metadata.jsonl cannot be read", "00007 belongs to no"]
    assert [part for part, fault in zip(expected, faults, strict=True) if part not in fault] == []
    for content, fault in ((b"", "is empty"), (b"{", "line 1"), (2 * b'{"prompt": "a"}\n', "not the record")):
        (tmp_path / "s/00000/metadata.jsonl").write_bytes(content)
        assert fault in geneval.check_layout(tmp_path / "s", tmp_path / "m.jsonl")[5]
    (tmp_path / "s/00000/metadata.jsonl").unlink()
    assert "metadata.jsonl cannot be read" in geneval.check_layout(tmp_path / "s", tmp_path / "m.jsonl")[5]
    with pytest.raises(SystemExit) as ended:
        geneval.main(["check", str(tmp_path / "s"), str(tmp_path / "m.jsonl")])
    assert ended.value.code == 1


# -------------------------------------------------------------------------------------------------------- digits


def test_every_digit_has_ten_phrases_and_ten_others_in_the_same_words():
    trained, held_out = zip(*(split_phrases(digit) for digit in range(10)), strict=True)
    everything = {text for group in trained for text in group}
    assert len(everything) == 100
    assert not everything & {text for group in held_out for text in group}
    words = {word for text in everything for word in text.split()}
    assert {word for group in held_out for text in group for word in text.split()} <= words
    for digit in range(10):
        assert {digit_of(text) for text in (*trained[digit], *held_out[digit])} == {digit}
    with pytest.raises(InputError, match="names no digit"):
        digit_of("a cat")


def test_every_word_of_the_vocabulary_can_be_read():
    tokens, merges = vocabulary(["the digit 7", "a seven"])
    assert "seven</w>" in tokens
    assert all("".join(merge.split()) in tokens for merge in merges)
    assert len(set(tokens)) == len(tokens)


def test_captions_encoder_and_prompts_of_the_digits(tmp_path):
    train, _ = load_digits_split()
    write_image_folder(train.take(np.arange(30)), tmp_path / "digits")
    assert write_all(tmp_path / "digits", tmp_path / "text") == 90
    captions = json.loads((tmp_path / "text/captions.json").read_text())
    assert {digit_of(text) == int(name[0]) for name, group in captions.items() for text in group} == {True}
    prompts = (tmp_path / "text/prompts.txt").read_text().splitlines()
    assert [digit_of(prompt) for prompt in prompts] == [d for d in range(10) for _ in range(10)]
    encode = TextEncoder(tmp_path / "text/encoder")
    features = encode([*prompts, "the digit 7", "the digit 3"])
    assert features.shape == (102, 16, 64)
    assert (features[-1] - features[-2]).abs().max() > 0.1
    with pytest.raises(InputError, match="--digits"):
        write_all(tmp_path / "nothing", tmp_path / "text")


def test_report_on_samples_of_prompts(tmp_path, capsys):
    _, held_out = load_digits_split()
    samples = held_out.take(np.arange(0, 400, 10))
    np.savez(tmp_path / "s.npz", arr_0=upsample(samples.images))
    labels = [f"a handwritten {WORDS[label]}" for label in samples.labels]
    (tmp_path / "s.json").write_text(json.dumps({"labels": labels}))
    out = ["--out", str(tmp_path / "r.json"), "--grid", str(tmp_path / "g.png")]
    report.main(["--samples", str(tmp_path / "s.npz"), *out])
    assert json.loads((tmp_path / "r.json").read_text())["agreement"]["samples"]["agree"] >= 38
    assert "of 40 carry their label" in capsys.readouterr().out
    (tmp_path / "s.json").write_text(json.dumps({"labels": labels[1:]}))
    with pytest.raises(InputError, match="39 labels for 40 samples"):
        report.main(["--samples", str(tmp_path / "s.npz")])
