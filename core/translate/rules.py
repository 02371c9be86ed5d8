"""What one row of a table cannot say: flags of ours that are made of several old ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from core.errors import UserError
from core.translate.program import MOST_PROMPTS, Call, one, written
from core.translate.table import Row

Rule = Callable[[Call, Row, list[str], bool], None]


def _micro(call: Call, row: Row, values: list[str], asked: bool) -> None:
    if asked or "micro" not in call.numbers:
        call.numbers["micro"] = one(values)
    call.set(written(row.name, values), "loop.micro_batch", [call.numbers["micro"]], asked)


def _accumulation(call: Call, row: Row, values: list[str], asked: bool) -> None:
    call.numbers["accumulation"] = one(values)
    if asked:
        call.numbers["accumulation said"] = written(row.name, values)


def _betas(call: Call, row: Row, values: list[str], asked: bool) -> None:
    now = call.numbers.get("betas", " ".join(map(str, call.known["optim.betas"].value))).split()
    now[int(row.name[-1]) - 1] = one(values)
    call.numbers["betas"] = " ".join(now)
    call.set(written(row.name, values), "optim.betas", now, asked)


def _warmup(call: Call, row: Row, values: list[str], asked: bool) -> None:
    """The constant schedule has no warm-up, in the originals neither."""
    schedules = [call.table[name] for name in ("lr_scheduler", "lr_scheduler_type") if name in call.table]
    given = next((row for row in schedules if row.name in call.given), schedules[-1])
    if call.value(given) == "constant" and not re.fullmatch(r"[0.]+", one(values)):
        if asked:
            call.say("no longer needed", written(row.name, values), "the constant schedule has no warm-up")
    else:
        call.place(row, values, asked)


def _base(call: Call, row: Row, values: list[str], asked: bool) -> None:
    """A pipeline of Stable Diffusion: a folder, or an id on the hub and the parts of it."""
    place = row.words.get(one(values), one(values))
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", place) and not Path(place).exists()
    for path, part in zip(row.to, ("/unet", "/vae", ""), strict=True):
        call.set(written(row.name, values), path, [place + part if on_hub else place], asked)


def _prompts(call: Call, row: Row, values: list[str], asked: bool) -> None:
    """The lines of a file of prompts, which stand in the recipe here."""
    old, path = written(row.name, values), Path(one(values))
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()] if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"translate: {old}: cannot be read ({error})") from None
    if 0 < len(lines) <= MOST_PROMPTS:
        call.set(old, "validation.prompts", lines, asked)
    else:
        why = f"more than {MOST_PROMPTS} lines" if lines else "there is no such file here"
        call.say("unknown", old, f"{why}: give its lines to --validation.prompts")


def _validation(call: Call, row: Row, values: list[str], asked: bool) -> None:
    """Held-out data: those of the same root by themselves, or data of their own."""
    old, value = written(row.name, values), one(values)
    table = "eval_annotation_path" in call.given
    if row.name == "eval_data_root" and not table and values == call.given.get("train_data_root"):
        call.say("implied", old, "held-out data are of the same root")
        return
    assert call.recipe is not None
    call.fields["validation.data"] = [type(call.recipe.data).__name__]
    name = "annotations" if row.name == "eval_annotation_path" else "root"
    call.fields[f"validation.data.{name}"] = [value]
    call.say("mapped", old, f"--validation.data={type(call.recipe.data).__name__} --validation.data.{name} {value}")


RULES: dict[str, Rule] = {
    "micro": _micro,
    "accumulation": _accumulation,
    "betas": _betas,
    "warmup": _warmup,
    "base": _base,
    "prompts": _prompts,
    "validation": _validation,
    "what": lambda call, row, values, asked: _path(call, row, values, 0),
    "ema": lambda call, row, values, asked: _ema(call, row, values),
    "second": lambda call, row, values, asked: _path(call, row, values, 1),
}


def _ema(call: Call, row: Row, values: Sequence[str]) -> None:
    if one(values) == "True":
        call.numbers["ema"] = "True"
    call.say("mapped", written(row.name, values), "--ema")


def _path(call: Call, row: Row, values: Sequence[str], place: int) -> None:
    call.what.insert(place, one(values))
    call.say("mapped", written(row.name, values), f"weights import {one(values)}{' --as vae' if place else ''}")


def finish(call: Call) -> None:
    """What follows from all flags together: batch, processes, validation's own data, one length."""
    if call.about.get("verb") != "run":
        return
    _batch(call)
    if "validation.data" in call.fields:
        _own_validation(call)
    if call.machines.nodes == 1 and call.machines.processes > 1:
        call.fields["nproc"] = [str(call.machines.processes)]


def _batch(call: Call) -> None:
    said = call.numbers.get("accumulation said", "")
    try:
        micro, accumulation = (int(call.numbers[name]) for name in ("micro", "accumulation"))
    except ValueError:
        raise UserError(f"translate: {call.program}: batch size and accumulation must be whole numbers") from None
    whole = micro * accumulation * call.machines.world
    old = said or f"{accumulation} times {micro} samples"
    if call.machines.world > 1:
        old += f" on {call.machines.world} processes"
    call.set(old, "loop.global_batch", [str(whole)], bool(said) or call.machines.world > 1)
    if "loop.global_batch" in call.fields and "loop.micro_batch" not in call.fields:
        call.fields["loop.micro_batch"] = [str(micro)]


def _own_validation(call: Call) -> None:
    """The same clips as in training, of all rows where there is a table; then training has all rows of its own."""
    own = "validation.data"
    if f"{own}.annotations" in call.fields:
        call.fields[f"{own}.split"] = call.fields["data.split"] = ["all"]
    elif "eval_subset_split" in call.given:
        call.fields[f"{own}.split"] = call.given["eval_subset_split"]
    for name in ("num_frames", "resolution", "frame_stride"):
        if f"data.{name}" in call.fields:
            call.fields[f"{own}.{name}"] = call.fields[f"data.{name}"]
