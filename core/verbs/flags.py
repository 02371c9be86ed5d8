"""Flags of the verbs, beside the recipe's and the launch's. Slots, so that they are typed, checked and in the help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError
from core.slots.launch import REPO
from core.slots.sampler import DDIM, Sampler
from core.slots.slot import Slot


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """The value of `--flag` among words that cannot be parsed yet, because what they mean depends on it."""
    from core.cli import read_flags

    return next((" ".join(found.values) for found in read_flags(words) if found.path == flag), None)


def taken(words: list[str], flag: str) -> str | None:
    """The value of `flag`, which is taken out of the words with it; None where it is not there. For the verbs that
    answer without tyro. Raises UserError for a flag without a value, or given twice.
    """
    places = [i for i, word in enumerate(words) if word == flag or word.startswith(f"{flag}=")]
    if len(places) > 1:
        raise UserError(f"{flag} is given twice")
    if not places:
        return None
    _, attached, value = words.pop(places[0]).partition("=")
    if attached:
        return value
    if places[0] == len(words) or words[places[0]].startswith("--"):
        raise UserError(f"{flag} takes one value, got none")
    return words.pop(places[0])


class VerbFlags(Slot):
    """Flags of a verb that hands them on to one function."""

    debug: bool = False
    """Show tracebacks."""

    def arguments(self) -> dict[str, Any]:
        """The flags by name, for the function behind the verb."""
        return {name: value for name, value in vars(self).items() if name != "debug"}


class GenerateFlags(VerbFlags):
    """Flags of the verbs that make clips."""

    seed: int = 0
    """Seed of the noise: the same seed gives the same clips of a prompt."""
    steps: int | None = None
    """Denoising steps. None: as many as the recipe's validation uses."""
    sampler: Sampler = DDIM()
    """How noise becomes samples. Default: the recipe's validation's; another class keeps steps and guidance."""
    raw: bool = False
    """Use the weights as they are, not their moving average (EMA)."""
    recipe: str | None = None
    """The recipe of an exported folder that has none written in it."""
    weights: str | None = None
    """With a recipe's name: the trained networks, as a folder, a checkpoint file, a hub id or run:<id>."""
    batch_size: int | None = None
    """Clips made at a time. None: as in the recipe's validation."""
    log: bool = True
    """Log what comes out to the MLflow run that the weights are from."""
    nproc: int = 1
    """Processes on this machine (torchrun), which share the work."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    store: str | None = None
    """MLflow tracking URI. Default: that of the run, $MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db."""

    def check(self) -> None:
        self.at_least_one("steps", "batch_size", "nproc")
        if self.seed < 0:
            self.refuse("seed", "must not be negative")

    def at_least_one(self, *names: str) -> None:
        """Refuse a number below 1; None is none."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                self.refuse(name, "must be at least 1")


class SampleFlags(GenerateFlags):
    """Flags of `sample`."""

    prompt: tuple[str, ...] = ()
    """Texts of the clips. None given: the prompts of the recipe's validation."""
    prompts: Path | None = None
    """A text file with a prompt a line."""
    interactive: bool = False
    """Read prompts from the terminal (or a pipe), one a line, and make the clips of each before the next is read."""
    num: int | None = None
    """Clips of each prompt. None: 1, and 4 where the recipe is told no text."""
    frames: int | None = None
    """Frames of a clip. None: as in training."""
    height: int | None = None
    """Height in pixels. None: as in training."""
    width: int | None = None
    """Width in pixels. None: as in training."""
    fps: int | None = None
    """Frames a second of the files. None: as in the recipe's validation."""
    eta: float | None = None
    """DDIM's share of fresh noise, 0 to 1. None: as in the recipe's validation."""
    guidance_scale: float | None = None
    """Guidance by the text: 1 is none. None: as in the recipe's validation."""
    negative_prompt: str | None = None
    """What guidance leads away from. None: as in the recipe's validation."""
    merge_lora: bool = False
    """Fold a LoRA into its layers first: fewer products a step, the same clips up to rounding."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """What networks are held and computed in. None: weights as they are, computed in the recipe's precision."""
    offload: bool = False
    """Keep the networks in the host's memory; each is on the device only while it works."""
    vae_slicing: bool = False
    """Decode frame by frame, where the autoencoder is one of pictures: the least memory."""
    formats: tuple[Literal["mp4", "gif", "png"], ...] = ("mp4", "gif", "png")
    """Files of each clip and of the grid; png is a strip of frames. A picture is a png."""
    output_dir: Path | None = None
    """Where the clips go. Default: a new folder in samples/ of the run, or of the working directory."""

    def check(self) -> None:
        super().check()
        self.at_least_one("num", "frames", "height", "width", "fps")
        if not self.formats:
            self.refuse("formats", "name mp4, gif or png")
        if self.guidance_scale is not None and self.guidance_scale < 0:
            self.refuse("guidance_scale", "must not be negative")


class EvalFlags(GenerateFlags):
    """Flags of `eval`."""

    captions: Path | None = None
    """A text file with a caption a line, or a .csv or .tsv with a column of them. None: those of the held-out data."""
    guidance_scale: tuple[float, ...] = ()
    """One or several scales, each with the same noise a caption. None given: that of the recipe's validation."""
    num: int | None = None
    """Captions that are taken, the first ones. None: all of the file, or 256 of the held-out data."""
    inception: Path | None = None
    """Local Inception-v3 weights (torchvision's or pytorch-fid's): FID and KID of pictures."""
    i3d: Path | None = None
    """Local I3D weights, a state dict: FVD and KVD of clips."""
    clip: Path | None = None
    """Local CLIP folder of transformers: the CLIP score."""
    real: Literal["held_out", "training"] = "held_out"
    """The recipe's data that are held against: training is what published FVD is over."""
    statistics: Path | None = None
    """An npz with mu and sigma of the real set's features, instead of the recipe's data."""
    write_statistics: Path | None = None
    """Write mu and sigma of the real set's features to this npz."""
    output_dir: Path | None = None
    """Where the set and its scores go; a set that is there already is gone on with. Default: samples/ of the run."""
    restart: bool = False
    """Remove the set that is there and begin anew."""

    def check(self) -> None:
        super().check()
        self.at_least_one("num")
        if self.num is not None and self.num < 2:
            self.refuse("num", "a distance needs at least 2 items")
        if any(not 0 <= scale < float("inf") for scale in self.guidance_scale):
            self.refuse("guidance_scale", "must not be negative")
        if len({f"{scale:g}" for scale in self.guidance_scale}) < len(self.guidance_scale):
            self.refuse("guidance_scale", "names a scale twice")
        if self.inception and self.i3d:
            self.refuse("i3d", "give --inception (pictures) or --i3d (clips), not both")
        for name in ("statistics", "write_statistics"):
            if getattr(self, name) and not (self.inception or self.i3d):
                self.refuse(name, "they are of a network's features: give --inception or --i3d")


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


class RunsFlags(StoreFlags):
    """Flags of `runs`."""

    recipe: str | None = None
    """Only runs of the recipe of this name."""
    limit: int = 30
    """Runs at most, the newest first."""
    json: bool = False
    """Print a list of objects instead of a table."""

    def check(self) -> None:
        if not 1 <= self.limit <= 1000:
            self.refuse("limit", "must be between 1 and 1000")
        if self.recipe is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.recipe):
            self.refuse("recipe", "expected the name of a recipe: lower-case letters, digits, dots and dashes")


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


class InfoFlags(VerbFlags):
    """Flags of `weights info`."""

    json: bool = False
    """Print it as json."""


class ImportFlags(VerbFlags):
    """Flags of `weights import`."""

    to: Path | None = None
    """Folder to write; each network gets a folder of its own in it."""
    component: Literal["unet", "transformer", "vae", "text_encoder", "motion_adapter"] | None = None
    """Also --as. The one network to import. None: all that are recognised."""
    recipe: str | None = None
    """Also --for. The recipe whose networks these are. None: told by names and shapes of the tensors."""
    ema: bool = False
    """Take the moving average."""
    raw: bool = False
    """Take the weights as they are. This is the default."""
    partial: bool = False
    """Import what fits; what is missing or misshapen stays fresh."""
    alpha: float | None = None
    """Of a LoRA: its alpha (scale = alpha / rank). None: as its file or the configuration beside it says."""

    def check(self) -> None:
        if self.ema and self.raw:
            self.refuse("ema", "give --ema or --raw, not both")
        _positive(self)


def _positive(flags: ImportFlags | MergeFlags | ExportFlags) -> None:
    if flags.alpha is not None and flags.alpha <= 0:
        flags.refuse("alpha", "must be positive")


class MergeFlags(VerbFlags):
    """Flags of `weights merge`."""

    to: Path | None = None
    """Folder to write, which MotionAdapter.from_pretrained opens."""
    replace_if_exists: bool = False
    """Replace the MotionAdapter folder that is there."""
    alpha: float | None = None
    """Alpha of the LoRA (scale = alpha / rank). None: as its file or the configuration beside it says."""

    def check(self) -> None:
        _positive(self)


class PushFlags(StoreFlags):
    """Flags of `weights push`."""

    repo: str | None = None
    """Repository on the hub, NAMESPACE/NAME; it is made if it is not there."""
    private: bool = False
    """The repository is private; nothing goes to one that is public."""
    every: bool = False
    """Of a run: every checkpoint there is, each in a folder of its own, and the newest at the root too."""
    inside: str | None = None
    """Folder in the repository. None: its root."""
    raw: bool = False
    """Push the weights as they are, not their moving average (EMA)."""

    def check(self) -> None:
        if self.repo is not None and not re.fullmatch(REPO, self.repo):
            self.refuse("repo", "expected NAMESPACE/NAME, of letters, digits, dots, dashes and underscores")
        if self.inside is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", self.inside):
            self.refuse("inside", "expected a folder of letters, digits, dots, dashes and underscores")
        if self.inside and self.every:
            self.refuse("inside", "--every names the folders itself")


class ExportFlags(StoreFlags):
    """Flags of `weights export`."""

    to: Path | None = None
    """Folder to write; it must be new or empty."""
    raw: bool = False
    """Write the weights as they are, not their moving average (EMA)."""
    layout: Literal["adapter", "comfyui", "lora", "motion-lora", "comfyui-lora"] | None = None
    """Of motion modules: adapter (folder of a MotionAdapter, a LoRA folded in) or comfyui (one file in the original's
    names). Of a LoRA: lora (diffusers, with its alpha), motion-lora or comfyui-lora (layouts of the released
    MotionLoRAs). None: the folders of a pipeline."""
    alpha: float | None = None
    """With --layout, of a LoRA's file that does not say it: its alpha."""

    def check(self) -> None:
        _positive(self)
        if self.alpha is not None and self.layout is None:
            self.refuse("alpha", "goes with --layout")
