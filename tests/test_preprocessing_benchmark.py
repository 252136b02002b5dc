"""benchmarks/data.py runs from beginning to end and reports every row."""

import sys

import pytest
import torch

from benchmarks import data


@pytest.mark.slow
def test_benchmark_reports_every_row(tmp_path, monkeypatch, capsys):
    small = ["--count", "600", "--images", "20", "--repeats", "1", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["data", *small])
    monkeypatch.setattr(data, "IMAGENET", 100_000)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    data.main()
    printed = capsys.readouterr().out
    rows = ["2 workers", "batches of 16", "| packed |", "| folder |", "DataLoader, 2 workers", "100,000 entries"]
    rows += ["100,000 images listed"]
    assert all(row in printed for row in rows)
    assert not list(tmp_path.iterdir())
