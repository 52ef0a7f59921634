"""`raymask export` as a user types it."""

from __future__ import annotations

from pathlib import Path

from support.cli import refused_command, typed

from raymask.export.formats import export_run


def test_every_line_of_an_export_is_printed(finished: Path, tmp_path: Path) -> None:
    done = typed("export", finished, "--to", "hf", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{line}\n" for line in export_run(finished, "hf", tmp_path / "out"))


def test_options_reach_the_format_that_has_them(finished: Path, tmp_path: Path) -> None:
    done = typed("export", finished, "--to", "sparse", "--out", tmp_path / "out", "--values", "fp16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"Everything is in {tmp_path / 'out'}\n")
    assert "rounded to fp16" in done.stdout


def test_formats_and_options_that_there_are_not_are_refused(finished: Path) -> None:
    assert "known are hf" in refused_command("export", finished, "--to", "zip")
    assert "--shrink: --to hf has no options" in refused_command("export", finished, "--to", "hf", "--shrink")
