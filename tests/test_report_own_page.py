"""gpt-report writes a run's own page anew, where it may."""

from pathlib import Path

import pytest

from gpt.cli.report import main
from tests.report_runs import records, write_run


def test_a_runs_page_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "mine", records())
    assert main([str(run), "--json"]) == 0
    page = run / "report.html"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert f"wrote {page}" in capsys.readouterr().err


def test_another_place_is_the_only_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", records())
    assert main([str(run), "--html", str(tmp_path / "there.html")]) == 0
    assert (tmp_path / "there.html").exists()
    assert not (run / "report.html").exists()


def test_a_run_that_takes_no_page_is_read_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "mine", records())
    (run / "report.html").mkdir()
    assert main([str(run)]) == 0
    told = capsys.readouterr()
    assert "healthy" in told.out
    assert "wrote" not in told.err


def test_nothing_is_written_beside_other_programs_logs(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "step,loss\n" + "".join(f"{n},{5 / n}\n" for n in range(1, 40))
    )
    main([str(tmp_path / "log.csv")])
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
