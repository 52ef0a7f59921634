"""The worker's device: precision, name, and isolated, deterministic torch state."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from raymask.core.spec import Spec
from raymask.train import trainer


def autocast_factory(precision: str, device: torch.device) -> trainer.Autocast:
    """A factory of context managers: bf16 autocast, or none.

    Args:
        precision: The spec's precision: "auto", "fp32" or "bf16".
        device: The device to compute on.
    """
    enabled = computes_bf16(precision, device)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def computes_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bf16: for "bf16" always, for "auto" if the device multiplies bf16 natively."""
    return native_bf16(device) if precision == "auto" else precision == "bf16"


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 natively, so that it is faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # not in every torch version
    return device.type == "cpu" and bool(supported())


def worker_name(device: torch.device, spec: Spec) -> str:
    """A worker's name in records: host, process id, device, GPU name or threads, and precision."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{spec.workers.threads} threads"
    precision = "bf16" if spec.model.dtype == "bf16" or computes_bf16(spec.precision, device) else "fp32"
    return f"{platform.node()}/{os.getpid()} {device.type} {hardware} {precision}"


def free_memory() -> int:
    """Bytes of memory that this machine can still give, by Linux's own estimate; all it has where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def isolated_torch_state(spec: Spec, device: torch.device) -> Iterator[None]:
    """Run a block with the spec's threads, and on a GPU with deterministic kernels; then restore torch's state.

    The caller's random state does not change either.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.workers.threads)
    on_gpu = device.type == "cuda"
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []), deterministic() if on_gpu else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def deterministic() -> Iterator[None]:
    """Run a block with deterministic kernels where torch has them.

    Attention uses the math kernel, the only one with a deterministic backward pass. It may multiply in bf16, as all
    other operations do. Allocated memory is not filled first.
    """
    memory: Any = torch.utils.deterministic
    attention: Any = torch.backends.cuda
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, reduced = memory.fill_uninitialized_memory, attention.fp16_bf16_reduction_math_sdp_allowed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    attention.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        memory.fill_uninitialized_memory = fill
        attention.allow_fp16_bf16_reduction_math_sdp(reduced)
