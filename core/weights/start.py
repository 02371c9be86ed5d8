"""What a trained network starts from: a UNet of pictures, motion modules that are added to it. And what it has learnt,
back from an export, a checkpoint or a run.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from core.distributed import put
from core.errors import UserError
from core.models.partly import learnt, unlearnt
from core.preflight import Origin, origins
from core.slots import Recipe
from core.weights.fit import Misfit
from core.weights.load import component_state, load_component, locate, split_kind
from core.weights.names import without_peft
from core.weights.stored import open_stored


def start_names(recipe: Recipe, trained: nn.ModuleDict) -> set[str]:
    """Names in `trained` of the parameters that `load_start` fills."""
    filled = {id(p) for origin in origins(recipe) if origin.slot.weights for p in _for(origin, trained).values()}
    return {name for name, p in trained.named_parameters() if id(p) in filled}


def load_start(recipe: Recipe, trained: nn.ModuleDict, frozen_alone: bool = False) -> None:
    """Fill trained networks with the weights that their slots name, each rank its own part; with `frozen_alone` only
    what does not learn, because the rest comes from elsewhere.

    Raises UserError for what is not there or does not fit, and where something frozen would start from nothing.
    """
    for origin in origins(recipe):
        frozen, wanted = _frozen(origin, trained), _for(origin, trained)
        if origin.slot.weights is None:
            if frozen:
                raise UserError(f"{origin.path}.weights is not set: a part of it is frozen and needs trained weights")
        elif tensors := frozen if frozen_alone else wanted:
            try:
                _fill(trained[origin.network], tensors, origin.slot.weights, origin.component)
            except UserError as error:
                raise UserError(f"{origin.path}.weights: {error}") from None


def frozen_starts(recipe: Recipe, trained: nn.ModuleDict) -> dict[str, tuple[str | None, dict[str, Tensor]]]:
    """What is frozen in trained networks, by the field of the recipe that names the place it is from: the place, and
    the tensors.
    """
    found = {f"{origin.path}.weights": (origin.slot.weights, _frozen(origin, trained)) for origin in origins(recipe)}
    return {field: (place, tensors) for field, (place, tensors) in found.items() if tensors}


def load_learnt(module: nn.Module, spec: str, name: str) -> None:
    """Fill what a trained network has learnt from what `spec` names: all of it, motion modules, or LoRA. `name` is that
    of the network in checkpoints. Raises UserError for what does not fit.
    """
    kind = getattr(module, "written_as", name)
    if kind == name:
        load_component(module, spec, name)
    else:
        _fill(module, dict(learnt(module)), spec, kind)


def _for(origin: Origin, trained: nn.ModuleDict) -> dict[str, Tensor]:
    """The parameters that come from there, by their names there."""
    module = trained[origin.network]
    return module.starts(origin.component) if hasattr(module, "starts") else dict(module.named_parameters())  # type: ignore[operator, no-any-return]


def _frozen(origin: Origin, trained: nn.ModuleDict) -> dict[str, Tensor]:
    ours = {id(p) for p in unlearnt(trained[origin.network]).values()}
    return {name: p for name, p in _for(origin, trained).items() if id(p) in ours}


def _fill(module: nn.Module, wanted: Mapping[str, Tensor], spec: str, kind: str) -> None:
    """Copy what is wanted, all of it. What is stored besides must be of such a network: a whole UNet may bring motion
    modules, and those bring tables of positions.
    """
    stored, averaged = open_stored(locate(spec, kind)), split_kind(spec)[1]
    # in a checkpoint of this project, and in files of LoRA, all names begin with the network's
    state = component_state(stored, "unet" if stored.checkpoint or kind == "lora" else kind, averaged)
    state = {without_peft(name): tensor for name, tensor in state.items()}
    own = {without_peft(name): tensor for name, tensor in wanted.items()}
    known = {without_peft(name) for name in module.state_dict()}
    wrong = Misfit(
        missing=[name for name in own if name not in state],
        unused=[name for name in state if name not in known and (kind != "unet" or "motion_modules" not in name)],
        misshapen=[
            f"{name} {state[name].shape} for {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tuple(tensor.shape)
        ],
    )
    if any(wrong):
        hint = "; motion.mid_block says whether there is one in the middle" if "mid_block.motion" in str(wrong) else ""
        raise UserError(f"{spec} does not fit {type(module).__name__} ({len(own)} tensors): {wrong}{hint}")
    for name, tensor in own.items():
        put(tensor.detach(), state[name].read())
