"""Progress of a conversion in the log of a job, where there is no terminal to draw a bar on."""

from megapsft.checkpoint.convert import progress


def test_lines_say_how_far_how_fast_and_how_long(monkeypatch, capsys):
    now = iter([0.0, 10.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.open_progress(True, "import", 100_000_000, 20_000_000) as advance:
        for nbytes in (10_000_000, 10_000_000, 10_000_000, 10_000_000):
            advance(nbytes)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["import: 40.0 MB of 100.0 MB, 1.0 MB/s, 60 s left", "import: 60.0 MB of 100.0 MB, 1.0 MB/s, 40 s left"]


def test_nothing_is_written_where_it_is_not_wanted(monkeypatch, capsys):
    with progress.open_progress(False, "import", 100, 0) as advance:
        advance(100)
    assert capsys.readouterr() == ("", "")
