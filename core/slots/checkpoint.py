"""The checkpoint slot."""

from __future__ import annotations

from core.slots.slot import Slot


class Checkpoint(Slot):
    """How often the state is saved, and how many are kept. The end of a run always saves."""

    every: int = 5000
    """Updates between checkpoints. 0: only at the end."""
    keep: int | None = 3
    """The newest this many are kept. None: all."""

    def check(self) -> None:
        if self.every < 0:
            self.refuse("every", "must not be negative")
        if self.keep is not None and self.keep < 1:
            self.refuse("keep", "must be at least 1, or None to keep all")
