"""Fixtures of the tests that start processes: one S3 server."""

from collections.abc import Iterator

import pytest
from support.s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server
