"""Networks of which a part learns: which parameters do, and what of a network checkpoints and exports hold."""

from __future__ import annotations

import re
from typing import TypeVar

from torch import Tensor, nn

from core.errors import UserError
from core.weights.names import some

M = TypeVar("M", bound=nn.Module)


def only(module: M, pattern: str) -> M:
    """Let the parameters learn whose whole name `pattern` matches, and no others. Raises UserError for one that matches
    none.
    """
    names = [name for name, _ in module.named_parameters()]
    matched = {name for name in names if re.fullmatch(pattern, name)}
    if not matched:
        raise UserError(
            f"trainable_modules {pattern!r} matches no parameter of {type(module).__name__}; their names are like "
            f"{some(names[:: max(len(names) // 4, 1)])}"
        )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in matched)
    return module


def learnt(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def unlearnt(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that stay as they are, by name."""
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def kept(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without what is frozen in it; of one that is frozen nowhere, all of it.

    Buffers of a network that learns in part follow from its constructor, so they are left out too.
    """
    frozen = unlearnt(module)
    own = learnt(module)
    return {name: t for name, t in module.state_dict().items() if name in own or not frozen}


def exported(module: nn.Module) -> dict[str, Tensor]:
    """What an export of a trained module is made of: all of it, unless it says otherwise (`export_names`)."""
    state = module.state_dict()
    return {name: state[name] for name in (module.export_names() if hasattr(module, "export_names") else state)}  # type: ignore[operator]
