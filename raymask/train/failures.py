"""System failures: errors of the machine, not of the candidate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class SystemFailure(Exception):  # noqa: N818 - Ray's word for it
    """The machine failed: it is out of memory, or a device or connection is broken.

    It says nothing about the candidate. Another worker may succeed with the same work.
    """


SYSTEM_ERROR_MARKERS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "/gloo/",
)
"""Parts of the messages by which a RuntimeError of torch is a system failure. After one a CUDA process is unusable."""


@contextmanager
def classify_failures() -> Iterator[None]:
    """Run a block and raise the machine's errors as SystemFailure; other errors pass unchanged.

    Raises:
        SystemFailure: Memory ran out, a device failed, or the connection to another process did.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise SystemFailure(f"out of memory: {error}") from error
    except dist.DistError as error:
        raise SystemFailure(str(error)) from error
    except RuntimeError as error:
        if any(marker in str(error) for marker in SYSTEM_ERROR_MARKERS):
            raise SystemFailure(str(error)) from error
        raise
