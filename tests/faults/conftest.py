"""Fixtures of the fault tests: a cluster of two nodes and an S3 server, which nobody kills."""

from collections.abc import Iterator

import pytest
from support.clusters import LocalCluster, local_cluster
from support.s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """One CPU a node; metrics come every second."""
    with local_cluster(RAY_metrics_report_interval_ms="1000") as found:
        yield found


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server
