"""An outage of an object store, first with Amazon's own client, then with our retries."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.builders import refused
from support.records import evaluation
from support.s3_server import S3Server

from raymask.runs import object_storage
from raymask.runs.open import open_storage
from raymask.runs.run_dir import RunDir

DRIVER = """
import sys
from raymask.runs import object_storage
from raymask.runs.open import open_storage
object_storage.HEARTBEAT_INTERVAL_S = 0.2
place = open_storage(sys.argv[1])
with place.lock():
    print("held", flush=True)
    for line in sys.stdin:
        place.append("journal", line.strip().encode())
        print("written", flush=True)
"""


def test_in_an_outage_a_line_is_written_late_and_no_driver_is_held_for_dead(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outage is longer than what Amazon's client sits out by itself, and than a driver may be without a beat.

    That client sleeps for seconds between its own attempts, a driver's too: it may be a while until its next beat.
    """
    monkeypatch.setattr(object_storage, "HEARTBEAT_INTERVAL_S", 0.2)
    monkeypatch.setattr(object_storage, "MAX_HEARTBEAT_POLLS", 8)
    uri = s3.uri(tmp_path.name)
    told: list[str] = []

    def note(text: str) -> None:
        told.append(text)
        if "held by another driver" in text:  # we are about to look
            outage.enter_context(s3.outage())
        elif len(told) > 2:
            outage.close()

    with ExitStack() as outage:
        command = [sys.executable, "-c", DRIVER, uri]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
            try:
                assert first.stdout is not None
                assert first.stdout.readline() == "held\n"
                assert "another raymask is working in it" in refused(open_storage(uri, note).lock().__enter__)
                assert first.communicate("one\n")[0] == "written\n"
            finally:
                first.kill()
        outage.enter_context(s3.outage())
        RunDir(uri, note).append(evaluation(0))
    where = uri.partition("?")[0]
    assert told[0].startswith(f"{where} is held by another driver")
    assert len(told) >= 4
    assert all(text.startswith(f"{where} answers with an error, trying again: When ") for text in told[1:])
    assert RunDir(uri).evaluations(1) == [evaluation(0)]
    assert open_storage(uri).read("journal") == b"one\n"
