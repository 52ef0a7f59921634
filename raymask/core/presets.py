"""Presets, and which keys of a spec identify a run."""

from __future__ import annotations

from typing import Any

from raymask.core.spec import Spec

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "levels": {"sparsities": [0.54, 0.83, 0.92, 0.9375]},
        "mask": {"allocation": "uniform", "pattern": "unstructured", "score": "magnitude"},
        "candidates": {"count": 8, "exponent": 5.0, "sampling_ratios": [5e-5, 1e-4, 8e-5, 3e-4]},
        "early_eval": {
            "epochs": 1.0,
            "batch_size": 64,
            "learning_rate": 2e-4,
            "warmup": 0.1,
            "eval_steps": 50,
            "score_window": 10,
            "max_rows": 2000,
            "rungs": [1.0],
            "repeats": 1,
            "score": "metric",
        },
        "select": {"keep": 1, "beam": False},
        "finetune": {"epochs": 10.0, "batch_size": 64, "learning_rate": 5e-5, "warmup": 0.1},
        "imp": {"run": True, "epochs": 15.0},
        "dense": {"distill_epochs": 1.0},
        "distill": True,
        "precision": "fp32",
    },
}
"""Settings by name; the spec's own keys override them.

`paper` has the reference's settings, the task metric as score included. docs/method.md lists what still differs.
"""


MUTABLE_KEYS = tuple(("workers", key) for key in ("count", "timeout", "max_retries", "scale_up_timeout"))
"""Keys that a resumed search may change: they affect how long it takes and what fails, never a candidate's result."""


def fingerprint(spec: Spec) -> dict[str, Any]:
    """The spec as a flat mapping `section.key` -> JSON value, without MUTABLE_KEYS."""
    flat: dict[str, Any] = {}

    def flatten(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(inner, (*path, key))
        elif path not in MUTABLE_KEYS:
            flat[".".join(path)] = value

    flatten(spec.model_dump(mode="json"), ())
    return flat
