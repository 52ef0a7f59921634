"""raymask: distributed search for the best sparse version of a Transformer.

result = raymask.search({"model": "bert-base-uncased", "task": "glue/mrpc"}, run="runs/mrpc")

mask = raymask.draw_mask(model, density=1 / 16, seed=7)      # masks alone, in any training loop, without Ray
raymask.apply_mask(model, mask)                              # after every optimizer step
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raymask.version import __version__

if TYPE_CHECKING:
    from raymask.api import apply_mask, draw_mask, search
    from raymask.core.callbacks import Callback
    from raymask.core.errors import UserError
    from raymask.core.records import Result
    from raymask.core.spec import Spec
    from raymask.export.sparse import load_sparse

__all__ = ["Callback", "Result", "Spec", "UserError", "__version__", "apply_mask", "draw_mask", "load_sparse", "search"]

MODULES = {
    "search": "raymask.api",
    "draw_mask": "raymask.api",
    "apply_mask": "raymask.api",
    "load_sparse": "raymask.export.sparse",
    "Callback": "raymask.core.callbacks",
    "UserError": "raymask.core.errors",
    "Result": "raymask.core.records",
    "Spec": "raymask.core.spec",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import raymask` alone loads neither torch nor Ray."""
    if name not in MODULES:
        raise AttributeError(f"module 'raymask' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    """The public names, for help and completion."""
    return __all__
