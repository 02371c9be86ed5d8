"""Whether frozen weights and tokenizers are still those that a run was trained with.

A recipe names them by their place, and what lies there may change: a folder is written anew, a new version of this
project ships others. Samples would then be silently wrong. So a checkpoint holds a fingerprint of each, which costs
next to nothing whatever their size: of every tensor a few values stand for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.checkpoint import numbers_of
from core.distributed import Ranks, full
from core.errors import UserError
from core.preflight import frozen_parts
from core.slots import Autoencoder, Recipe
from core.systems import System
from core.weights.start import frozen_starts

VALUES = 1024
"""Values of a tensor that are read, at most."""
FACTS = {"tensors": "tensors", "constants": "constants of the latents", "tokenizer": "vocabulary"}
"""What is compared, and its name in messages."""
Prints = dict[str, dict[str, Any]]
"""By the field of the recipe that names the place: what was there. `from` is the place, `dtype` what tensors were cast
to when they were read, without which two fingerprints say nothing of each other.
"""


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over name, shape and dtype of every tensor of a module, and the bits of at most VALUES of its values."""
    return fingerprint_of(module.state_dict())


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """The same of tensors by name; a collective for those that are spread over ranks."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(_bits(full(tensor.detach())))
    return total.hexdigest()


def _bits(tensor: Tensor) -> bytes:
    """Values at a fixed stride, which is odd, so that a walk through a matrix does not stay in some of its columns."""
    stride = -(-tensor.numel() // VALUES) | 1
    return tensor.reshape(-1)[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def vocabulary(tokenizer: Any) -> str:
    """SHA-256 over the words of a tokenizer and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def prints(recipe: Recipe, system: System) -> Prints:
    """Of all that a recipe takes as it is: frozen parts, what is frozen in trained ones, and the tokenizers of trained
    ones. A collective.
    """
    found = {f"{path}.weights": _of_frozen(slot, system.frozen[slot.component]) for path, slot in frozen_parts(recipe)}
    for field, (place, tensors) in frozen_starts(recipe, system.trained).items():
        found[field] = {"from": place, "dtype": "float32", "tensors": fingerprint_of(tensors)}
    for i, slot in enumerate(getattr(recipe.system, "conditions", ())):
        if slot.trained and (tokenizer := getattr(system.trained[slot.component], "tokenizer", None)) is not None:
            found[f"system.conditions.{i}.tokenizer"] = {"from": slot.tokenizer, "tokenizer": vocabulary(tokenizer)}
    return found


def _of_frozen(slot: Any, module: nn.Module) -> dict[str, Any]:
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    found = {"from": slot.weights, "dtype": dtype, "tensors": fingerprint(module)}
    if isinstance(slot, Autoencoder):
        found["constants"] = list(module.constants_of(module.config))  # type: ignore[operator, arg-type]
    if (tokenizer := getattr(module, "tokenizer", None)) is not None:
        found["tokenizer"] = vocabulary(tokenizer)
    return found


def changed(then: Prints, now: Prints) -> Iterator[tuple[str, str]]:
    """Fields of the recipe at whose place something else is now, and a line on each."""
    for field in sorted(then.keys() & now.keys()):
        if differ := _differ(then[field], now[field]):
            place = now[field]["from"]
            yield (
                field,
                f"{field}: what is at {place} is not what the run was trained with ({' and '.join(differ)} changed)",
            )


def _differ(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    recast = then.get("dtype") != now.get("dtype")
    compared = [fact for fact in FACTS if fact in then and fact in now and not (fact == "tensors" and recast)]
    return [FACTS[fact] for fact in compared if then[fact] != now[fact]]


def noted(checkpoint: Path) -> Prints:
    """What a checkpoint holds of them; nothing in those of older versions."""
    return numbers_of(checkpoint)["frozen"]  # type: ignore[no-any-return]


def held_against(checkpoint: Path | None, now: Prints, allow: tuple[str, ...], here: Ranks) -> None:
    """Raise UserError where ranks have read different things, or other ones than those that the run of `checkpoint` was
    trained with, but for the fields (or the slots that they are in) in `allow`. A collective.
    """
    first, *others = here.everyone(now)
    for rank, theirs in enumerate(others, 1):
        for field, _ in changed(first, theirs):
            raise UserError(f"{field}: rank {rank} reads something else from {theirs[field]['from']} than rank 0")
    for field, line in changed(noted(checkpoint), now) if checkpoint else ():
        if not any(field == name or field.startswith(f"{name}.") for name in allow):
            raise UserError(
                f"{line}: give the old with --{field} PATH, or start a run of its own with these, with --init-from for "
                f"what was trained; --allow {field} goes on all the same"
            )
