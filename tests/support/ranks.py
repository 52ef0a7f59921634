"""Processes of the tests of a group: forks of one that has imported torch, so that each starts in milliseconds."""

from multiprocessing import get_context
from multiprocessing.context import ForkServerContext

HEAVY = [
    "hypothesis",
    "pytest",
    "raymask.api",
    "raymask.train.process_group",
    "raymask.train.fsdp",
    "raymask.train.worker",
    "torch.distributed.fsdp",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("albert", "bert", "gpt2", "llama", "qwen2")),
]


def forks() -> ForkServerContext:
    """What starts them; the process that they are forks of lives as long as the one that calls this."""
    context = get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context
