"""Flags of the verbs, beside the recipe's and the launch's. Slots, so that they are typed, checked and in the help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from core.slots.slot import Slot


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """The value of `--flag` among words that cannot be parsed yet, because what they mean depends on it."""
    from core.cli import read_flags

    return next((" ".join(found.values) for found in read_flags(words) if found.path == flag), None)


class VerbFlags(Slot):
    """Flags of a verb that hands them on to one function."""

    debug: bool = False
    """Show tracebacks."""

    def arguments(self) -> dict[str, Any]:
        """The flags by name, for the function behind the verb."""
        return {name: value for name, value in vars(self).items() if name != "debug"}


class SampleFlags(VerbFlags):
    """Flags of `sample`."""

    prompt: tuple[str, ...] = ()
    """Texts of the clips, in turn. None given: the prompts of the recipe's validation, else the empty text."""
    num: int = 4
    """Clips to make."""
    seed: int = 0
    """Seed of the noise: the same seed gives the same clips."""
    steps: int | None = None
    """Denoising steps. None: as many as the recipe's validation uses."""
    output_dir: Path | None = None
    """Where the clips go. Default: samples/ in the run's own directory."""
    raw: bool = False
    """Use the weights as they are, not their moving average (EMA)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    store: str | None = None
    """MLflow tracking URI. Default: $MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db."""

    def check(self) -> None:
        if self.num < 1:
            self.refuse("num", "must be at least 1")
        if self.seed < 0:
            self.refuse("seed", "must not be negative")
        if self.steps is not None and self.steps < 1:
            self.refuse("steps", "must be at least 1")


class MeasureFlags(VerbFlags):
    """Flags of `measure-latents`, beside the recipe's."""

    clips: int = 256
    """Training clips to measure."""
    weights: str | None = None
    """Weights to measure instead of the recipe's, e.g. run:<id> of an autoencoder recipe."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    write: bool = False
    """Store the constants in the config.json beside the weights, where training finds them."""

    def check(self) -> None:
        if self.clips < 1:
            self.refuse("clips", "must be at least 1")


class StoreFlags(VerbFlags):
    """Flags of verbs that only look into the store."""

    store: str | None = None
    """MLflow tracking URI. Default: $MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db."""


class DoctorFlags(StoreFlags):
    """Flags of `doctor`."""

    fix: bool = False
    """Close runs that say RUNNING and are dead, and send what MLflow lacks of their journals."""
    suspected: bool = False
    """With --fix: close also those on other machines that have been silent for --stale-minutes."""
    stale_minutes: float = 15.0
    """Silence after which a run on another machine is suspected. A living one gives a sign every half minute."""

    def check(self) -> None:
        if self.stale_minutes <= 0:
            self.refuse("stale_minutes", "must be positive")


class UiFlags(StoreFlags):
    """Flags of `ui`."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 opens it to the network, where anyone can read and delete runs."""
    port: int = 5000
    """Port to listen on."""

    def check(self) -> None:
        if not 0 < self.port < 65536:
            self.refuse("port", "must be between 1 and 65535")


class ImportFlags(VerbFlags):
    """Flags of `weights import`."""

    to: Path | None = None
    """Folder to write; each network gets a folder of its own in it."""
    component: Literal["unet", "vae", "text_encoder"] | None = None
    """Also --as. The one network to import. None: all that are recognised."""
    recipe: str | None = None
    """Also --for. The recipe whose networks these are. None: told by names and shapes of the tensors."""
    ema: bool = False
    """Take the moving average."""
    raw: bool = False
    """Take the weights as they are. This is the default."""
    partial: bool = False
    """Import what fits; what is missing or misshapen stays fresh."""

    def check(self) -> None:
        if self.ema and self.raw:
            self.refuse("ema", "give --ema or --raw, not both")


class ExportFlags(StoreFlags):
    """Flags of `weights export`."""

    to: Path | None = None
    """Folder to write; it must be new or empty."""
    raw: bool = False
    """Write the weights as they are, not their moving average (EMA)."""
