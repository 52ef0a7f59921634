"""Callbacks: a list passes every event on."""

from __future__ import annotations

import inspect
from typing import Any

from raymask.core.callbacks import Callback, CallbackList


def test_a_list_passes_every_event_to_each_of_its_callbacks_in_their_order() -> None:
    events: list[tuple[str, str, tuple[object, ...]]] = []

    class Recording(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("on_"):
                return super().__getattribute__(name)
            return lambda *arguments: events.append((self.name, name, arguments))

    callbacks = CallbackList([Recording("first"), Recording("second")])
    handlers = {name: handler for name, handler in vars(Callback).items() if name.startswith("on_")}
    assert len(handlers) == 6
    for name, handler in handlers.items():
        arguments = tuple(inspect.signature(handler).parameters)[1:]
        getattr(callbacks, name)(*arguments)
        assert events == [("first", name, arguments), ("second", name, arguments)]
        events.clear()


def test_an_empty_list_and_a_callback_of_its_own_do_nothing() -> None:
    for callback in (Callback(), CallbackList()):
        callback.on_message("a message")
        callback.on_progress({"candidate 1": 0.5})
