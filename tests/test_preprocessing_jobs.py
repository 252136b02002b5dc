"""The journal of a job."""

from preprocessing.jobs import Job, split


def test_journal_survives_a_line_that_was_cut_off(tmp_path):
    job = Job(tmp_path / "dest", {"command": "x"})
    assert job.begin() and job.finished() == {}
    job.record(0, side=8)
    job.record(1, side=8)
    (journal,) = (tmp_path / "dest/.partial").glob("done-*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-5])
    again = Job(tmp_path / "dest", {"command": "x"})
    assert again.begin() and set(again.finished()) == {0}
    again.record(1, side=4)
    assert again.finished()[1]["side"] == 4
    again.finish({"a/b.txt": b"text"}, {"count": 2})
    assert not again.partial.exists() and (tmp_path / "dest/a/b.txt").read_bytes() == b"text"
    assert not Job(tmp_path / "dest", {"command": "x"}).begin()


def test_split_covers_everything_once():
    assert [list(batch) for batch in split(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]] and split(0, 3) == []
