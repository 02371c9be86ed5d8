"""Command-line flags to slots, in three passes: class swaps, short names, then tyro.

tyro alone gives typed flags for every nested field. What it does not give is here: choosing the class of a slot, short
names for what is typed daily, one-line errors that name the nearest right flag, and a refusal of anything given twice.
A mistyped flag must never train on the default without a word. tyro is imported only when there is a flag to parse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVarTuple, cast, get_args, get_origin

from core.errors import UserError, did_you_mean
from core.slots.launch import Launch
from core.slots.slot import Slot, describe_type, field_types, fit, named_like
from core.swap import Spot, allowed_classes, class_names, item_kinds, options, rebuilt, slot_kinds, spots, swapped

ALIASES = {
    "lr": "optim.lr",
    "batch_size": "loop.micro_batch",
    "global_batch": "loop.global_batch",
    "max_steps": "loop.max_steps",
    "epochs": "loop.epochs",
    "seed": "loop.seed",
    "precision": "loop.precision",
    "num_workers": "loop.num_workers",
    "resolution": "data.resolution",
    "num_frames": "data.num_frames",
    "data_root": "data.root",
}
"""Short flag → field. A short flag exists where its field does; it is printed in the help."""

SYNONYMS = {
    "accumulation": "global_batch",
    "batch": "batch_size",
    "bs": "batch_size",
    "bf16": "precision",
    "clip": "optim.max_grad_norm",
    "data_dir": "data_root",
    "data_path": "data_root",
    "dataset": "data_root",
    "epoch": "epochs",
    "fp16": "precision",
    "frames": "num_frames",
    "gpus": "nproc",
    "gradient_accumulation_steps": "global_batch",
    "grad_clip": "optim.max_grad_norm",
    "image_size": "resolution",
    "iterations": "max_steps",
    "learning_rate": "lr",
    "lr_rate": "lr",
    "max_train_steps": "max_steps",
    "micro_batch": "batch_size",
    "mixed_precision": "precision",
    "name": "run_name",
    "nproc_per_node": "nproc",
    "num_epochs": "epochs",
    "num_gpus": "nproc",
    "num_train_epochs": "epochs",
    "out": "output_dir",
    "out_dir": "output_dir",
    "output": "output_dir",
    "per_device_train_batch_size": "batch_size",
    "random_seed": "seed",
    "size": "resolution",
    "steps": "max_steps",
    "total_batch_size": "global_batch",
    "tracking_uri": "store",
    "train_batch_size": "batch_size",
    "workers": "num_workers",
}
"""What people type, and the flag that they mean. Only ever a hint in an error: no synonym is accepted."""

Ts = TypeVarTuple("Ts")


@dataclasses.dataclass
class Flag:
    """One flag as it was typed, with the field that it means."""

    typed: str
    path: str
    values: list[str]


def parse(argv: Sequence[str], *parts: *Ts) -> tuple[*Ts]:
    """The slots `parts` with the flags of `argv` applied. Their fields share one namespace (a recipe's, the launch's).

    Raises UserError (one line) for anything that is unknown, doubled, of the wrong type or refused by a slot.
    """
    slots = cast("tuple[Slot, ...]", parts)
    slots, flags = _prepare(argv, slots)
    known = spots(*slots)
    _refuse_missing(flags, known)
    if flags:
        slots = _through_tyro(slots, flags, known)
    return cast("tuple[*Ts]", tuple(map(rebuilt, slots)))


def _prepare(argv: Sequence[str], slots: tuple[Slot, ...]) -> tuple[tuple[Slot, ...], list[Flag]]:
    """Passes one and two: the slots with swapped classes, and the flags that are left for tyro, in their full names."""
    flags, rest = read_flags(argv), []
    top = {name for slot in slots for name in field_types(type(slot))}
    for flag in flags:
        if flag.path not in top:
            flag.path = ALIASES.get(flag.path, flag.path)
    for flag in sorted(flags, key=lambda f: f.path.count(".")):  # a parent's class before that of its parts
        spot = spots(*slots).get(flag.path)
        if spot and (slot_kinds(spot.hint) or item_kinds(spot.hint)):
            slots = tuple(_swap_in(slot, flag) for slot in slots)
        else:
            rest.append(flag)
    known = spots(*slots)
    for flag in rest:
        _locate(flag, known, slots)
    _refuse_doubled(flags)
    for flag in rest:
        _normalise(flag, known[flag.path].hint)
    rest += _length_is_one_of_two(rest, known)
    _batches_divide(rest, known)
    return slots, rest


# ------------------------------------------------------------------------------------------------------ reading words


def read_flags(argv: Sequence[str]) -> list[Flag]:
    """`--flag value`, `--flag=value`, `--flag v1 v2`, underscores or dashes; negative numbers are values."""
    flags: list[Flag] = []
    for word in argv:
        if _is_flag(word):
            typed, attached, value = word.partition("=")
            flags.append(Flag(typed, typed.lstrip("-").replace("-", "_"), [value] if attached else []))
        elif flags:
            flags[-1].values.append(word)
        else:
            raise UserError(f"unexpected word {word!r}: flags look like --lr 6e-5")
    return flags


def _is_flag(word: str) -> bool:
    return word.startswith("--") or bool(re.match(r"-[A-Za-z](?!nf$|an$)", word))


def _refuse_doubled(flags: Iterable[Flag]) -> None:
    first: dict[str, Flag] = {}
    for flag in flags:
        other = first.setdefault(flag.path, flag)
        if other is not flag and flag.typed == other.typed:
            raise UserError(f"{flag.typed} is given twice")
        if other is not flag:
            raise UserError(f"{other.typed} and {flag.typed} are the same field: give one of them")


def _locate(flag: Flag, known: dict[str, Spot], slots: tuple[Slot, ...]) -> None:
    """Check that the flag's field exists; `--no-x` and `--a.no-x` become `--x False`."""
    if flag.path in known:
        return
    head, _, last = flag.path.rpartition(".")
    for path in (flag.path.removeprefix("no_"), f"{head}.{last.removeprefix('no_')}".lstrip(".")):
        if path != flag.path and known.get(ALIASES.get(path, path), Spot(None, None)).hint is bool:
            if flag.values:
                name = dashed(path)
                raise UserError(f"{flag.typed} takes no value, got {flag.values[0]!r}: give --{name} True or False")
            flag.path, flag.values = ALIASES.get(path, path), ["False"]
            return
    raise UserError(f"unknown flag {flag.typed}{_hint(flag.path, known, slots)}")


def _hint(name: str, known: dict[str, Spot], slots: tuple[Slot, ...]) -> str:
    """What may have been meant by an unknown flag, in brackets."""
    meant = SYNONYMS.get(name, "")
    if meant in known or ALIASES.get(meant) in known:
        return f" (did you mean '--{dashed(meant)}'?)"
    parents = [path for path in known if name.startswith(f"{path}.") and slot_kinds(known[path].hint)]
    if parents and known[parents[-1]].value is None:
        classes = allowed_classes(known[parents[-1]].hint)
        return f" ({parents[-1]} is None: add --{dashed(parents[-1])}={classes[0]})"
    if not any(isinstance(slot, Launch) for slot in slots) and not field_types(Launch).keys().isdisjoint((name, meant)):
        return " (it says where and how to run, so it belongs to run, not to the recipe)"
    same_end = [path for path in known if path.rpartition(".")[2] == name]
    if same_end:
        return f" (did you mean {' or '.join(repr('--' + dashed(path)) for path in same_end[:3])}?)"
    if len(name) == 1:
        return ""
    names = [*known, *(alias for alias, path in ALIASES.items() if path in known), "json", "help", "debug"]
    return did_you_mean(f"--{dashed(name)}", [f"--{dashed(n)}" for n in names])


def dashed(path: str) -> str:
    """A field's path as it is written in a flag."""
    return path.replace("_", "-")


# ------------------------------------------------------------------------------------------------ pass 1: class swaps


def _swap_in(slot: Slot, flag: Flag) -> Slot:
    return swapped(slot, flag.path, flag.values, flag.typed) if flag.path in spots(slot) else slot


def _refuse_missing(flags: list[Flag], known: dict[str, Spot]) -> None:
    """A class that was swapped in may have required fields that nothing has filled."""
    given = {flag.path for flag in flags}
    for path, (hint, value) in known.items():
        if type(value).__module__.startswith("tyro") and path not in given:
            owner, _, field = path.rpartition(".")
            value_word = f"=CLASS (one of {', '.join(allowed_classes(hint))})" if slot_kinds(hint) else " VALUE"
            raise UserError(f"{owner} needs {field} ({describe_type(hint)}): add --{dashed(path)}{value_word}")


# -------------------------------------------------------------------------------------- pass 2: values, short flags


def _normalise(flag: Flag, hint: Any) -> None:
    """The flag's values in the words that tyro takes."""
    is_tuple = any(get_origin(o) is tuple for o in options(hint))
    if hint is bool:
        flag.values = [_boolean(flag)]
    elif not is_tuple and len(flag.values) != 1:
        got = f"got {len(flag.values)}: {' '.join(flag.values)}" if flag.values else "got none"
        raise UserError(f"{flag.typed} takes one value ({describe_type(hint)}), {got}")
    if len(flag.values) == 1 and any(get_origin(o) is tuple and str not in get_args(o) for o in options(hint)):
        flag.values = [v.strip() for v in flag.values[0].strip("()[]").split(",") if v.strip()]
    if Path in options(hint):
        # not Path.expanduser, which takes ./~x for ~x, and raises for a user that does not exist
        flag.values = [os.path.expanduser(v) for v in flag.values]  # noqa: PTH111


def _boolean(flag: Flag) -> str:
    word = " ".join(flag.values) or "True"
    if word.lower() not in ("true", "false"):
        raise UserError(f"{flag.typed} {word}: expected True or False, or {flag.typed} alone for True")
    return word.capitalize()


def _length_is_one_of_two(flags: list[Flag], known: dict[str, Spot]) -> list[Flag]:
    """`--max-steps` on a recipe that counts in epochs takes the epochs away, and the reverse."""
    given = {flag.path: flag.values for flag in flags}
    for one, other in (("loop.max_steps", "loop.epochs"), ("loop.epochs", "loop.max_steps")):
        if given.get(one, ["None"]) != ["None"] and other not in given and known[other].value is not None:
            return [Flag(f"--{dashed(other)}", other, ["None"])]
    return []


def _batches_divide(flags: list[Flag], known: dict[str, Spot]) -> None:
    """One of the two batch sizes was given, and does not go with the other: name both flags."""
    pair = ("loop.micro_batch", "loop.global_batch")
    given = {flag.path: flag.values[0] for flag in flags if flag.path in pair}
    if len(given) != 1 or not all(value.isdecimal() for value in given.values()):
        return
    micro, whole = (int(given.get(path, known[path].value)) for path in pair)
    if micro > 0 and whole % micro:
        fits = max(1, round(whole / micro)) * micro
        raise UserError(
            f"--batch-size {micro} does not divide --global-batch {whole} (samples an update): "
            f"give both, for example --batch-size {micro} --global-batch {fits}"
        )


# ------------------------------------------------------------------------------------------------------- pass 3: tyro


def _command(slots: tuple[Slot, ...]) -> type:
    """A dataclass with the slots side by side, their fields without a prefix."""
    import tyro

    unprefixed = tyro.conf.arg(name="")
    fields = [(f"part{i}", Annotated[type(s), unprefixed], dataclasses.field(default=s)) for i, s in enumerate(slots)]
    return dataclasses.make_dataclass("Flags", fields)


def _tyro_words(flag: Flag, hint: Any) -> list[str]:
    name = f"--{dashed(flag.path)}"
    if hint is bool:
        head, _, last = dashed(flag.path).rpartition(".")
        return [name if flag.values == ["True"] else f"--{head}{'.' if head else ''}no-{last}"]
    if any(get_origin(o) is tuple for o in options(hint)):
        return [f"{name}={flag.values[0]}", *flag.values[1:]] if flag.values else [name]
    return [f"{name}={flag.values[0]}"]


def _through_tyro(slots: tuple[Slot, ...], flags: list[Flag], known: dict[str, Spot]) -> tuple[Slot, ...]:
    import tyro

    words = [word for flag in flags for word in _tyro_words(flag, known[flag.path].hint)]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), _wide_terminal():
            made: Any = tyro.cli(_command(slots), args=words, config=(tyro.conf.AvoidSubcommands,), prog="registry")
    except SystemExit:
        raise UserError(_one_line(box.getvalue(), flags, known)) from None
    return tuple(named_like(slot, getattr(made, f"part{i}")) for i, slot in enumerate(slots))


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """tyro wraps its errors at the terminal's width; unwrapped they need no guessing."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _one_line(box: str, flags: list[Flag], known: dict[str, Spot]) -> str:
    """tyro's error box as one line; in our words where it is about a flag's value or a slot's own refusal."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in plain.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─")), len(lines))
    text = " ".join(" ".join(lines[:rule] or lines).split())
    if refusal := re.match(r"Error parsing (?!--)[\w.]+: (.+)", text):
        return refusal[1]
    for flag in flags:
        if re.search(rf"--{re.escape(dashed(flag.path))}(?![\w.-])", text):
            return f"{flag.typed} {' '.join(flag.values)}: expected {_expected(known[flag.path].hint, flag.values)}"
    return text


def _expected(hint: Any, values: list[str]) -> str:
    if any(get_origin(o) is tuple for o in options(hint)):
        return describe_type(hint)
    try:
        fit(hint, values[0])
    except ValueError as error:
        return str(error)  # with the nearest choice
    return describe_type(hint)


# --------------------------------------------------------------------------------------------------------------- help


def print_help(argv: Sequence[str], page: str, *parts: Slot) -> None:
    """Print `page`, the short flags, the slots whose class can be chosen, and every flag. `argv` may hold overrides."""
    slots, _ = _prepare([word for word in argv if word not in ("-h", "--help")], parts)
    known = spots(*slots)
    print("\n".join([page, "", *_short_flags(known), *_slot_flags(known), _tyro_page(slots)]))


class _Page(io.StringIO):
    """Text that tyro colours as if it went to the terminal, where stdout is one."""

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _tyro_page(slots: tuple[Slot, ...]) -> str:
    """tyro's boxes of flags, without its usage line."""
    import tyro

    with contextlib.redirect_stdout(_Page()) as page, contextlib.suppress(SystemExit):
        tyro.cli(
            _command(slots), args=["--help"], config=(tyro.conf.AvoidSubcommands,), prog="registry", description=""
        )
    text = page.getvalue()
    return (text.partition("\n\n")[2] if text.startswith("usage:") else text).rstrip()


def _short_flags(known: dict[str, Spot]) -> list[str]:
    here = {name: path for name, path in ALIASES.items() if path in known}
    rows = [f"  --{dashed(name):<14} {'--' + dashed(path):<20} {known[path].value}" for name, path in here.items()]
    return ["short flags, the field that each sets, and its value here:", *rows, ""] if rows else []


def _slot_flags(known: dict[str, Spot]) -> list[str]:
    rows = []
    for path, (hint, value) in known.items():
        allowed = allowed_classes(hint)
        if len(allowed) > 1:
            rows.append(f"  {f'--{dashed(path)}={class_names(value)}':<40} {', '.join(allowed)}")
    head = "slots whose class can be chosen, and from what; fields of the same name are kept:"
    return [head, *rows, ""] if rows else []
