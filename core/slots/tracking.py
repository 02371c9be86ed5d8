"""The tracking slot: how a run is filed in MLflow. Where the store is belongs to the launch."""

from __future__ import annotations

from core.slots.slot import Slot


class Tracking(Slot):
    """The MLflow experiment of a recipe."""

    experiment: str = "video-diffusion"
    """Name of the MLflow experiment."""
    tags: tuple[str, ...] = ()
    """Further tags, each key=value."""

    def check(self) -> None:
        if not self.experiment.strip():
            self.refuse("experiment", "must not be empty")
        if any("=" not in tag or tag.startswith("=") for tag in self.tags):
            self.refuse("tags", "each must be key=value")
