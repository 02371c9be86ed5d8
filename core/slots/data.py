"""The kind of the data slots; the slots themselves are in `data/slots.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from core.slots.slot import Slot

if TYPE_CHECKING:
    from pathlib import Path


class Data(Slot):
    """Where samples come from, and how a clip is cut from them."""

    many_shapes: ClassVar[bool] = False
    """Whether samples differ in shape. Its dataset then has updates of its own (core/positions.py)."""
    source: str = ""
    """Where the data were published; shown when they are missing."""
    fetch: str = ""
    """The command that gets them."""

    def build(self) -> Any:
        """The map-style dataset (`data.samples.Samples`). Raises UserError when the files are not there."""
        raise NotImplementedError

    def held_out(self) -> Self:
        """The slot that validation reads when it has none of its own."""
        raise NotImplementedError

    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a sample in pixels."""
        raise NotImplementedError

    def needs(self) -> Path | None:
        """The path that must exist before a run starts; None where the data make themselves."""
        return None
