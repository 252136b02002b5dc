"""The journal of a job."""

from preprocessing.jobs import Job, batches_of


def test_journal_survives_a_line_that_was_cut_off(tmp_path):
    job = Job(tmp_path / "dest", {"command": "x"})
    assert job.begin() and list(job.records()) == []
    job.record(0, {3: "bad"})
    job.record(1)
    (journal,) = (tmp_path / "dest/.partial").glob("done-*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-5])
    again = Job(tmp_path / "dest", {"command": "x"})
    assert again.begin() and again.unfinished(batches_of(12, 5)) == ([1, 2], 5)
    again.record(1, {7: "bad"})
    assert [record.left_out for record in again.records() if record.batch == 1] == [{7: "bad"}]
    again.finish({"a/b.txt": b"text"}, {"count": 2})
    assert not again.partial.exists() and (tmp_path / "dest/a/b.txt").read_bytes() == b"text"
    assert not Job(tmp_path / "dest", {"command": "x"}).begin()


def test_batches_cover_everything_once():
    assert [list(batch) for batch in batches_of(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]] and not batches_of(0, 3)
