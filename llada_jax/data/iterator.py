"""The iterator that training reads: it resumes on the same data only, and ends quietly."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping
from typing import Any

import grain

from llada_jax.data.errors import DataError
from llada_jax.data.pack import Batch


class BatchIterator(grain.DatasetIterator):
    """Batches, with a state that says what data it belongs to.

    Args:
      batches: the pipeline's iterator.
      identity: what decides the batches, by name; JSON values.
    """

    def __init__(self, batches: grain.DatasetIterator, identity: Mapping[str, Any]):
        super().__init__(batches)
        self._identity = dict(identity)
        _open.add(self)

    def __next__(self) -> Batch:
        self._assert_not_closed()
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands: a JSON value."""
        return {"identity": dict(self._identity), "batches": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where another iterator of the same data stood.

        Args:
          state: what its ``get_state`` returned. The number of rows in a batch may be another.

        Raises:
          DataError: if the state belongs to other data or settings; the message names them.
        """
        stored = state.get("identity", {})
        changed = [
            name if name == "documents" else f"{name} (was {stored.get(name)!r}, is {value!r})"
            for name, value in self._identity.items()
            if stored.get(name) != value
        ]
        if changed:
            raise DataError(
                "the data cannot go on where the checkpoint stopped, for it is not the same; "
                f"changed: {', '.join(changed)}. Restore them, or start the data anew"
            )
        self._parent.set_state(state["batches"])

    def close(self) -> None:
        """Stops reading ahead."""
        super().close()
        self._parents = ()

    def __str__(self) -> str:
        return "BatchIterator"


_open: weakref.WeakSet[BatchIterator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Threads that still read ahead while Python shuts down would fail there."""
    for iterator in list(_open):
        iterator.close()
