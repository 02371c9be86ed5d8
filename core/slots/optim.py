"""Optimizer slots: algorithm, learning rate and its schedule, parameter groups, clipping, EMA."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from core.errors import UserError
from core.slots.slot import Slot

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Schedule(Slot):
    """Learning rate over updates, by the names of diffusers' `get_scheduler`, and `multistep`. A function of the step
    alone.
    """

    name: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
        "multistep",
    ] = "constant"
    """Shape of the curve."""
    warmup_steps: int = 0
    """Updates of linear warm-up (not used by constant, piecewise_constant)."""
    warmup_ratio: float = 0.0
    """The same as a share of all updates. Give one of the two."""
    num_cycles: float = 0.5
    """Cosine: periods (0.5 ends at zero). cosine_with_restarts: restarts (a whole number)."""
    power: float = 1.0
    """Exponent of polynomial."""
    lr_end: float = 1e-7
    """Final rate of polynomial."""
    rules: str = ""
    """piecewise_constant: 'factor:until_step,…,last_factor', for example '1:1000,0.1:2000,0.01'."""
    milestones: tuple[int, ...] = ()
    """multistep: updates at which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """multistep: the factor."""

    def check(self) -> None:
        if self.warmup_steps < 0:
            self.refuse("warmup_steps", "must not be negative")
        if not 0.0 <= self.warmup_ratio < 1.0 or (self.warmup_ratio and self.warmup_steps):
            self.refuse("warmup_ratio", "must be in [0, 1), and stands instead of warmup_steps")
        if (self.warmup_steps or self.warmup_ratio) and self.name in ("constant", "piecewise_constant"):
            self.refuse("name", "has no warm-up; take constant_with_warmup, or set the warm-up to 0")
        if self.name == "multistep" and not self.milestones:
            self.refuse("milestones", "multistep needs at least one")
        if self.name == "piecewise_constant" and not re.fullmatch(r"([\d.eE+-]+:\d+,)+[\d.eE+-]+", self.rules):
            self.refuse("rules", "piecewise_constant needs 'factor:until_step,…,last_factor', for example '1:1000,0.1'")


class EMA(Slot):
    """Exponential moving average of the trained weights; used for validation, samples and export."""

    decay: float = 0.9999
    """Share of the old average that is kept at each update."""
    warmup: bool = True
    """Start with a smaller decay: min(decay, (1 + n) / (10 + n)) at the n-th update."""

    def check(self) -> None:
        if not 0.0 < self.decay < 1.0:
            self.refuse("decay", "must be between 0 and 1")


class ParamGroup(Slot):
    """Parameters whose name matches a pattern get a learning rate and weight decay of their own."""

    pattern: str
    """Regular expression, searched in the parameter's name; the first group that matches wins."""
    lr_scale: float = 1.0
    """Times the learning rate. 0 freezes them in place."""
    weight_decay: float | None = None
    """None: that of the optimizer."""

    def check(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            self.refuse("pattern", f"is no regular expression: {error}")


class Optim(Slot):
    """Base of the optimizers: what all of them share."""

    lr: float = 1e-4
    """Peak learning rate."""
    schedule: Schedule = Schedule()
    """Learning rate over time."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this L2 norm. None: no clipping (the norm is logged all the same)."""
    ema: EMA | None = None
    """Moving average of the weights. None: none."""
    groups: tuple[ParamGroup, ...] = ()
    """Exceptions for some parameters."""

    def check(self) -> None:
        if self.lr <= 0:
            self.refuse("lr", "must be positive")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            self.refuse("max_grad_norm", "must be positive, or None for no clipping")

    def ready(self, ranks: int) -> None:
        """Raise UserError where a library is missing, or the algorithm cannot be spread over so many ranks."""

    def build(self, groups: list[dict[str, object]], fused: bool) -> Optimizer:
        """The optimizer over parameter groups that already carry `lr` and `weight_decay`. `fused` says whether torch's
        fused kernels work here.
        """
        raise NotImplementedError


class AdamW(Optim):
    """AdamW (arXiv 1711.05101)."""

    since: ClassVar[dict[str, Any]] = {"kernels": "auto"}

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on all parameters unless a group says otherwise."""
    kernels: Literal["auto", "fused", "foreach", "loop"] = "auto"
    """One kernel for all tensors, a few for all, or a few for each. auto: fused where that works, else torch's choice.
    """

    def check(self) -> None:
        super().check()
        _check_decay(self)

    def build(self, groups: list[dict[str, object]], fused: bool) -> Optimizer:
        from torch.optim import AdamW as TorchAdamW

        if self.kernels == "fused" and not fused:
            raise UserError("optim.kernels: torch's fused kernels know no sharded weights on the CPU; take foreach")
        chosen = {"auto": (fused, None), "fused": (True, None), "foreach": (False, True), "loop": (False, False)}
        fused, foreach = chosen[self.kernels]
        return TorchAdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=fused,
            foreach=foreach,
        )


class AdamW8bit(Optim):
    """AdamW whose moments take 8 bits a number, in blocks of 256 with a scale each (arXiv 2110.02861): a quarter of the
    memory of AdamW's state. From bitsandbytes, the extra `optimizers`.

    Parameters of fewer than 4,096 numbers keep moments of 32 bits. For one process: its kernels know no weights that
    are spread over ranks.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on all parameters unless a group says otherwise."""

    def check(self) -> None:
        super().check()
        _check_decay(self)

    def ready(self, ranks: int) -> None:
        if ranks > 1:
            raise UserError(
                f"optim: bitsandbytes' 8-bit kernels know no weights that are spread over {ranks} ranks; take one "
                "process, or --optim=AdamW with --parallel.shard, which splits its state too"
            )
        _need("bitsandbytes", self)

    def build(self, groups: list[dict[str, object]], fused: bool) -> Optimizer:
        _need("bitsandbytes", self)
        from bitsandbytes.optim import AdamW8bit as Library

        return Library(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


class Lion(Optim):
    """Lion (arXiv 2302.06675): the sign of a mean of gradients, with one moment. From lion-pytorch, the extra
    `optimizers`.

    The paper takes a learning rate 3 to 10 times smaller than AdamW's, and a weight decay as many times larger.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the moment in an update, and decay rate of the moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on all parameters unless a group says otherwise."""

    def check(self) -> None:
        super().check()
        _check_decay(self)

    def ready(self, ranks: int) -> None:
        _need("lion_pytorch", self)

    def build(self, groups: list[dict[str, object]], fused: bool) -> Optimizer:
        _need("lion_pytorch", self)
        from lion_pytorch import Lion as Library

        return Library(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


def _check_decay(slot: AdamW | AdamW8bit | Lion) -> None:
    if not all(0.0 <= b < 1.0 for b in slot.betas):
        slot.refuse("betas", "must be in [0, 1)")
    if slot.weight_decay < 0:
        slot.refuse("weight_decay", "must not be negative")


def _need(module: str, slot: Optim) -> None:
    if find_spec(module) is None:
        raise UserError(
            f"optim: {type(slot).__name__} needs {module.replace('_', '-')}, which is not installed: "
            "pip install 'video-experiment-registry[optimizers]', or take --optim=AdamW"
        )
