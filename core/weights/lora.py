"""Files of LoRA for UNets with motion modules: read in every layout that is about, written in the two that stock
pipelines open.

A layer of a LoRA is `scale * B @ A` beside a matrix, with scale = alpha / rank. The rank shows, alpha does not: without
it diffusers takes the rank, which makes a file of rank 8 and alpha 32 four times weaker, and says nothing. Here a file
without alpha is refused unless alpha is given.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import UserError
from core.weights.folder import NAME, write_weights
from core.weights.lazy import Lazy, State
from core.weights.motion import from_original, in_motion_module, to_original
from core.weights.names import some
from core.weights.network import Network
from core.weights.stored import LIMIT, Stored, open_stored, read_json

LORA_NAME = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` looks for."""
MOTION_LORA_NAME = "motion_lora.safetensors"
HEADER = "lora_adapter_metadata"
"""Where diffusers keeps the configuration: a text of json in the header."""
CONFIG = "adapter_config.json"
"""Where PEFT keeps it."""
FILES = ("adapter_model.safetensors", "adapter_model.bin", LORA_NAME, "pytorch_lora_weights.bin")
AROUND = ("base_model.model.", "module.", "unet.")
LAYOUTS = (
    ("MotionLoRA", re.compile(r"(.+?)\.(?:processor\.)?(to_[qkv]|to_out)_lora\.(down|up)\.weight")),
    ("SWIFT or PEFT, with the adapter's name", re.compile(r"(.+)()\.lora_([AB])\.\w+\.weight")),
    ("PEFT or diffusers", re.compile(r"(.+)()\.lora_([AB])\.weight")),
    ("diffusers before PEFT", re.compile(r"(.+)()\.(?:lora|lora_linear_layer)\.(down|up)\.weight")),
    ("kohya, dotted", re.compile(r"(.+)()\.lora_(down|up)\.weight")),
)
"""Name of a layout, and its names: the layer, its last part where that is apart, which matrix."""
SIDES = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}
LAYER = re.compile(r"((down|up)_blocks\.\d+|mid_block|conv_in|conv_out|time_embedding)(\.|$)")
SWIFT_RANK, SWIFT_ALPHA = 8, 32.0
"""SWIFT's defaults, which its oldest folders do not write down."""
RENAMED_INPUT = (".proj_in", ".proj_out")
"""Layers that diffusers >= 0.31 calls with a keyword which PEFT's layer does not take."""


@dataclass(frozen=True)
class Lora:
    """A LoRA. Layers go by their names in diffusers' UNet, `down_blocks.0.motion_modules.0.proj_in`."""

    path: Path
    layout: str
    tensors: dict[str, Lazy]
    """<layer>.lora_A.weight (rank, in) and <layer>.lora_B.weight (out, rank)."""
    alphas: dict[str, float] = field(default_factory=dict)
    """By layer; scale = alpha / rank."""
    told: str = ""
    """Where alpha is from."""

    @property
    def layers(self) -> list[str]:
        return list(self.alphas)

    def pair(self, layer: str) -> tuple[Lazy, Lazy]:
        """A and B."""
        return self.tensors[f"{layer}.lora_A.weight"], self.tensors[f"{layer}.lora_B.weight"]

    def rank(self, layer: str) -> int:
        return self.pair(layer)[0].shape[0]

    def scale(self, layer: str) -> float:
        return self.alphas[layer] / self.rank(layer)

    def update(self, layer: str) -> Tensor:
        """What is added to the layer's matrix (out, in), in fp32."""
        a, b = (entry.read().float() for entry in self.pair(layer))
        return self.scale(layer) * (b @ a)


# ------------------------------------------------------------------------------------------------------------- reading


def lora_at(path: Path) -> Path | None:
    """The file of a LoRA at `path`: a file with such names, a folder of diffusers or PEFT, or SWIFT's, which has it in
    `default/`. None where it is something else, a network with a LoRA in it too.
    """
    if (path / "state.json").is_file():
        return None
    if path.is_dir():
        for folder in (path, path / "default"):
            found = next((folder / name for name in FILES if (folder / name).is_file()), None)
            if found:
                return found
        suffixed = [p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".ckpt", ".pt")]
        return lora_at(suffixed[0]) if len(suffixed) == 1 else None
    if path.suffix == ".pdparams" or not path.is_file():
        return None
    names = open_stored(path).tensors
    return path if any(map(_parsed, names)) and not any(".base_layer." in name for name in names) else None


def read_lora(path: Path, alpha: float | None = None) -> Lora:
    """Read a LoRA, or raise UserError: for names that are none, layers of other networks, halves, and no alpha."""
    file = lora_at(path)
    if file is None:
        raise UserError(f"{path}: no LoRA, no name in it is one's ({_seen(path)})")
    stored = open_stored(file)
    layout, tensors, alphas, unread = _sorted(stored)
    if not tensors:
        raise UserError(f"{file}: no LoRA of a UNet, none of its {len(stored.tensors)} names fits ({some(unread)})")
    if unread:
        raise UserError(f"{file}: {len(unread)} of its tensors are no LoRA's of a UNet: {some(unread)}")
    ranks = _ranks(file, tensors)
    found, told = _alphas(stored, layout, ranks, alphas, alpha)
    return Lora(file, layout, tensors, found, told)


def _seen(path: Path) -> str:
    try:
        return some(open_stored(path).tensors) if path.is_file() else some(sorted(p.name for p in path.iterdir()))
    except OSError as error:
        return str(error)


def _parsed(name: str) -> tuple[str, str, str] | None:
    """Layout, layer and matrix of a name."""
    for layout, pattern in LAYOUTS:
        if found := pattern.fullmatch(name):
            stem, last, side = found.groups()
            layer = _layer(".".join(filter(None, (stem, {"to_out": "to_out.0"}.get(last, last)))))
            return layout, layer, SIDES[side]
    return None


def _layer(name: str) -> str:
    """A layer's name in diffusers' UNet, whatever stands before it."""
    while prefix := next((p for p in AROUND if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return from_original(f"{name}.").removesuffix(".")


def _sorted(stored: Stored) -> tuple[str, dict[str, Lazy], dict[str, float], list[str]]:
    """Layout, matrices by name, alphas that are tensors, and names that are nothing of the kind."""
    tensors, alphas, layouts, unread = {}, {}, Counter[str](), []
    contents = {name.removeprefix("state_dict."): entry for name, entry in stored.tensors.items()}
    for name, entry in contents.items():
        parsed = _parsed(name)
        if parsed and LAYER.match(parsed[1]) and len(entry.shape) == 2:
            layout, layer, side = parsed
            tensors[f"{layer}.{side}.weight"] = entry
            layouts[layout] += 1
        elif name.endswith(".alpha") and entry.numel == 1:
            alphas[_layer(name.removesuffix(".alpha"))] = float(entry.read())
        else:
            unread.append(name)
    return (layouts.most_common(1) or [("", 0)])[0][0], tensors, alphas, unread


def _ranks(file: Path, tensors: State) -> dict[str, int]:
    """Rank by layer. Both matrices are there, and agree on it."""
    layers = sorted({name.rsplit(".", 2)[0] for name in tensors})
    ranks = {}
    for layer in layers:
        a, b = (tensors.get(f"{layer}.{side}.weight") for side in ("lora_A", "lora_B"))
        if a is None or b is None or a.shape[0] != b.shape[1] or not a.shape[0]:
            shapes = [tuple(entry.shape) if entry else None for entry in (a, b)]
            raise UserError(f"{file}: layer {layer} is no pair of (rank, in) and (out, rank): {shapes[0]}, {shapes[1]}")
        ranks[layer] = a.shape[0]
    return ranks


# --------------------------------------------------------------------------------------------------------------- alpha


def _alphas(
    stored: Stored, layout: str, ranks: Mapping[str, int], tensors: Mapping[str, float], given: float | None
) -> tuple[dict[str, float], str]:
    """Alpha by layer, and where it is from: what was given, the file, the configuration beside it, its layout."""
    if given is not None:
        return dict.fromkeys(ranks, given), "--alpha"
    if tensors:
        absent = [layer for layer in ranks if layer not in tensors]
        if absent:
            raise UserError(f"{stored.path}: no alpha of {len(absent)} layers ({some(absent)}): give --alpha")
        return {layer: _number(stored.path, "alpha", tensors[layer]) for layer in ranks}, "its tensors"
    config, place = _configuration(stored)
    if config:
        return {layer: _alpha(place, config, layer, rank) for layer, rank in ranks.items()}, place
    if layout == "MotionLoRA":
        return {layer: float(rank) for layer, rank in ranks.items()}, "its layout, in which alpha is the rank"
    if stored.path.parent.name == "default" and layout == LAYOUTS[1][0] and {*ranks.values()} == {SWIFT_RANK}:
        return dict.fromkeys(ranks, SWIFT_ALPHA), "SWIFT's defaults"
    raise UserError(
        f"{stored.path}: no alpha in it, which sets how strong it is (rank {_listed(ranks.values())}): give --alpha; "
        "diffusers would take the rank"
    )


def _configuration(stored: Stored) -> tuple[dict[str, Any], str]:
    """The adapter's configuration, from the header or the file beside, and where it was."""
    text = _header(stored).get(HEADER)
    if text:
        return _from_header(stored.path, text), "its metadata"
    beside = stored.path.parent / CONFIG
    if stored.path.name in FILES[:2] and beside.is_file():
        return read_json(beside), CONFIG
    return {}, ""


def _header(stored: Stored) -> dict[str, str]:
    if stored.form != "safetensors":
        return {}
    try:
        with safe_open(stored.path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{stored.path}: cannot be read as safetensors ({error})") from None


def _from_header(path: Path, text: str) -> dict[str, Any]:
    """Keys of a pipeline's file start with the network's name."""
    try:
        config = json.loads(text) if len(text) <= LIMIT else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {HEADER} in its header is no json ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: {HEADER} in its header: expected a json object")
    return {name.removeprefix("unet."): value for name, value in config.items()}


def _alpha(place: str, config: Mapping[str, Any], layer: str, rank: int) -> float:
    """What PEFT computes with (its LoraConfig): alpha, or that of the first pattern that ends the layer's name; with
    rank-stabilised scaling alpha / sqrt(rank) is the scale.
    """
    if config.get("use_dora"):
        raise UserError(f"{place}: a DoRA, whose layers are more than B @ A; it is not read here")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{place}: alpha_pattern: expected a json object")
    chosen = next((value for pattern, value in patterns.items() if _ends(layer, pattern)), config.get("lora_alpha"))
    alpha = _number(place, "lora_alpha", chosen)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _ends(layer: str, pattern: str) -> bool:
    """Whether a pattern of PEFT, as far as it is a plain name, ends that of a layer."""
    plain = pattern.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", plain):
        raise UserError(f"alpha_pattern {pattern!r}: only names of layers are read here: give --alpha")
    return layer == plain or (not pattern.startswith("^") and layer.endswith(f".{plain}"))


def _number(place: Any, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise UserError(f"{place}: {name} {value!r}: expected a positive number; --alpha gives another")
    return float(value)


def _listed(ranks: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(ranks))))


def lora_of(unet: Any, tensors: Mapping[str, Lazy]) -> Lora | None:
    """The LoRA that PEFT put into `unet`, from its tensors under PEFT's names, with the scales that PEFT computes with;
    None where it has none.
    """
    if not getattr(unet, "peft_config", None):
        return None
    if len(unet.peft_config) > 1:
        raise UserError(f"several LoRAs in the UNet ({', '.join(unet.peft_config)}): one can be written")
    (name,) = unet.peft_config
    own = re.compile(rf"(.+)\.(lora_[AB])\.{re.escape(name)}\.weight")
    found = {f"{m[1]}.{m[2]}.weight": entry for n, entry in tensors.items() if (m := own.fullmatch(n))}
    layers = sorted({n.rsplit(".", 2)[0] for n in found})
    modules = {layer: unet.get_submodule(layer) for layer in layers}
    alphas = {layer: float(modules[layer].scaling[name] * modules[layer].r[name]) for layer in layers}
    return Lora(Path(type(unet).__name__), "PEFT", found, alphas, "the network")


# -------------------------------------------------------------------------------------------------------- what it fits


def refuse_unfit(lora: Lora, shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise UserError where a layer is not in the network of these shapes, or is another matrix there."""
    absent = [layer for layer in lora.layers if f"{layer}.weight" not in shapes]
    if len(absent) == len(lora.layers):
        raise UserError(f"{lora.path}: none of its {len(absent)} layers is in {what} ({some(absent)})")
    if absent:
        raise UserError(
            f"{lora.path}: {len(absent)} of its {len(lora.layers)} layers are not in {what}: {some(absent)}"
        )
    for layer in lora.layers:
        a, b = lora.pair(layer)
        if shapes[f"{layer}.weight"] != (b.shape[0], a.shape[1]):
            raise UserError(
                f"{lora.path}: {layer} is for a matrix of {(b.shape[0], a.shape[1])}, in {what} it is "
                f"{shapes[f'{layer}.weight']}"
            )


def needs_merging(lora: Lora) -> list[str]:
    """Layers with which diffusers' own UNet fails when the LoRA is loaded beside it; folded in they work."""
    return [layer for layer in lora.layers if in_motion_module(layer) and layer.endswith(RENAMED_INPUT)]


# ------------------------------------------------------------------------------------------------------------- writing


def write_lora(lora: Lora, folder: Path) -> Path:
    """Write the file that `AnimateDiffPipeline.load_lora_weights` opens with its alpha."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {f"unet.{name}": value for name, value in configuration(lora).items()}
    state = {f"unet.{name}": entry for name, entry in lora.tensors.items()}
    return write_weights(folder, state, LORA_NAME, {HEADER: json.dumps(config, indent=2, sort_keys=True)})


def configuration(lora: Lora) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig. No dropout: a pipeline's motion UNet is in training mode, it would act there."""
    rank = Counter(map(lora.rank, lora.layers)).most_common(1)[0][0]
    alpha = Counter(lora.alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {f"^{layer}": lora.rank(layer) for layer in lora.layers if lora.rank(layer) != rank},
        "alpha_pattern": {f"^{layer}": _whole(a) for layer, a in lora.alphas.items() if a != alpha},
        "target_modules": sorted(lora.layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def write_motion_lora(lora: Lora, folder: Path, original: bool = False) -> Path:
    """Write the layout of the released MotionLoRAs: diffusers' on the hub, or with `original` that of the first files,
    which ComfyUI opens. They have no alpha, so B holds the scale; and no other layers than the four of attention.
    """
    other = [layer for layer in lora.layers if not in_motion_module(layer) or not _attention(layer)]
    if other:
        raise UserError(
            f"{lora.path}: {len(other)} of its {len(lora.layers)} layers have no name in MotionLoRA, which is of the "
            f"temporal attention's projections: {some(other)}"
        )
    state: dict[str, Lazy] = {}
    for layer in lora.layers:
        a, b = lora.pair(layer)
        state |= {
            _motion_name(layer, "down", original): a,
            _motion_name(layer, "up", original): _scaled(lora, layer, b),
        }
    folder.mkdir(parents=True, exist_ok=True)
    return write_weights(folder, state, MOTION_LORA_NAME if original else NAME)


def _attention(layer: str) -> bool:
    return re.search(r"\.attn[12]\.to_([qkv]|out\.0)$", layer) is not None


def _motion_name(layer: str, side: str, original: bool) -> str:
    stem, last = re.split(r"\.(?=to_)", layer.removesuffix(".0"))
    name = f"{stem}.processor.{last}_lora.{side}.weight"
    return to_original(name) if original else f"unet.{name}"


def _scaled(lora: Lora, layer: str, b: Lazy) -> Lazy:
    return Lazy(b.shape, b.dtype, functools.partial(_times, b, lora.scale(layer)))


def _times(entry: Lazy, scale: float) -> Tensor:
    return (entry.read().float() * scale).to(entry.dtype)


NETWORKS = (
    Network(
        name="LoRA",
        component="lora",
        marks=(r".+(\.lora_[AB]\.|_lora\.(down|up)\.|\.lora(_linear_layer)?\.(down|up)\.|\.lora_(down|up)\.)",),
        instead="`weights import` reads a file of nothing else",
    ),
)
