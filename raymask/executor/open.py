"""Choice of the executor."""

from __future__ import annotations

from raymask.core.callbacks import CallbackList
from raymask.core.protocols import Executor
from raymask.executor.local_executor import LocalExecutor
from raymask.train.context import WorkerContext


def open_executor(context: WorkerContext, callbacks: CallbackList, address: str | None, in_process: bool) -> Executor:
    """Workers in this process or on Ray. Ray is imported only when it is used.

    Args:
        context: What every worker needs.
        callbacks: They get progress and messages. On Ray one that updates Prometheus metrics joins them.
        address: Address of a Ray cluster; None starts a private Ray.
        in_process: Whether to work in this process, without Ray.
    """
    if in_process:
        return LocalExecutor(context, callbacks)
    from raymask.executor.prometheus import PrometheusCallback
    from raymask.executor.ray_executor import RayExecutor

    callbacks.callbacks.append(PrometheusCallback(context))
    return RayExecutor(context, callbacks, address)
