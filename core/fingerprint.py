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
from core.weights.fit import refuse_misfit
from core.weights.lazy import State
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


def fingerprint_of_stored(module: nn.Module, state: State) -> str:
    """The `fingerprint` that a module (on the meta device) would have with these tensors, of which only the values that
    count are read. Raises UserError where they are not the module's.
    """
    refuse_misfit(module, state)
    total = hashlib.sha256()
    for name, own in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(own.shape)} {own.dtype}\n".encode())
        total.update(_bits(state[name].read(), own.dtype))
    return total.hexdigest()


def _bits(tensor: Tensor, dtype: torch.dtype | None = None) -> bytes:
    """Values at a fixed stride, which is odd, so that a walk through a matrix does not stay in some of its columns;
    cast to `dtype`.
    """
    stride = -(-tensor.numel() // VALUES) | 1
    values = tensor.reshape(-1)[::stride].to(dtype or tensor.dtype)
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def vocabulary(tokenizer: Any) -> str:
    """SHA-256 over the words of a tokenizer and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def prints(recipe: Recipe, system: System, known: Prints | None = None) -> Prints:
    """Of all that a recipe takes as it is: frozen parts, what is frozen in trained ones, and the tokenizers of trained
    ones. A collective. `known`: those of the frozen parts, where these are not loaded.
    """
    found = frozen_prints(recipe, system) if known is None else dict(known)
    for field, (place, tensors) in frozen_starts(recipe, system.trained).items():
        found[field] = {"from": place, "dtype": "float32", "tensors": fingerprint_of(tensors)}
    for i, slot in enumerate(getattr(recipe.system, "conditions", ())):
        if slot.trained and (tokenizer := getattr(system.trained[slot.component], "tokenizer", None)) is not None:
            found[f"system.conditions.{i}.tokenizer"] = {"from": slot.tokenizer, "tokenizer": vocabulary(tokenizer)}
    return found


def frozen_prints(recipe: Recipe, system: System) -> Prints:
    """Of the frozen parts alone."""
    return {f"{path}.weights": _of_frozen(slot, system.frozen[slot.component]) for path, slot in frozen_parts(recipe)}


def _of_frozen(slot: Any, module: nn.Module) -> dict[str, Any]:
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    found = {"from": slot.weights, "dtype": dtype, "tensors": fingerprint(module)}
    if isinstance(slot, Autoencoder):
        found["constants"] = list(module.constants_of(module.config))  # type: ignore[operator, arg-type]
    if (tokenizer := getattr(module, "tokenizer", None)) is not None:
        found["tokenizer"] = vocabulary(tokenizer)
    return found


def changed(then: Prints, now: Prints, used: str = "the run was trained with") -> Iterator[tuple[str, str]]:
    """Fields of the recipe at whose place something else is now, and a line on each. `used`: what it was for."""
    for field in sorted(then.keys() & now.keys()):
        if differ := _differ(then[field], now[field]):
            place = now[field]["from"]
            yield (
                field,
                f"{field}: what is at {place} is not what {used} ({' and '.join(differ)} changed)",
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
