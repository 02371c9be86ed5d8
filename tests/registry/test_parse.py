"""Flags to recipes: what is accepted, what is refused, and in which words."""

import re
from pathlib import Path

import pytest

import registry
from core.cli import ALIASES, SYNONYMS, parse
from core.errors import UserError
from core.slots import EMA, AdamW, Launch, ParamGroup, Slot
from core.swap import spots

SKY, TINY = "lvdm-short-sky", "lvdm-short-sky-tiny"


class Wide(AdamW):
    """An optimizer of another class: shares lr, betas, … with AdamW, has a field of its own, and eps of another type."""

    width: int = 3
    """Its own."""
    eps: tuple[float, ...] = (1.0,)  # type: ignore[assignment]
    """Not what AdamW's is."""


class Needy(Slot):
    """Flags with every kind of type."""

    switch: bool = False
    maybe: bool | None = None
    folder: Path = Path()
    texts: tuple[str, ...] = ()
    pair: tuple[int, int] = (0, 0)
    either: int | str = 0


def refusal(*flags: str, recipe: str = SKY) -> str:
    with pytest.raises(UserError) as caught:
        registry.get(recipe, *flags)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize("name", registry.names())
def test_every_short_flag_sets_its_field_in_every_recipe_that_has_it(name):
    recipe = registry.get(name)
    values = {"lr": 0.5, "precision": "bf16", "data_root": Path("x"), "epochs": 2.5}
    for alias, path in ALIASES.items():
        if path not in spots(recipe):
            continue
        value = values.get(alias, 6)
        extra = (
            ["--global-batch", "6"]
            if alias == "batch_size"
            else ["--batch-size", "6"]
            if alias == "global_batch"
            else []
        )
        changed = registry.get(name, f"--{alias.replace('_', '-')}", str(value), *extra)
        assert spots(changed)[path].value == value


@pytest.mark.parametrize("name", registry.names())
def test_no_short_flag_is_also_a_field_of_the_recipe_or_the_launch(name):
    fields = [path for path in spots(registry.get(name), Launch()) if "." not in path]
    assert len(fields) == len(set(fields))
    assert set(fields) & set(ALIASES) == set()
    assert len(set(ALIASES.values())) == len(ALIASES)


def test_no_synonym_is_a_flag_and_each_means_one():
    fields = spots(registry.get(SKY), Launch())
    assert set(SYNONYMS) & (set(ALIASES) | {p for p in fields if "." not in p}) == set()
    assert {meant for meant in SYNONYMS.values() if ALIASES.get(meant, meant) not in fields} == set()


@pytest.mark.parametrize("flags", [["--lr", "2e-5"], ["--lr=2e-5"], ["--optim.lr=2e-5"], ["--optim.lr", "0.00002"]])
def test_a_value_may_follow_or_be_attached(flags):
    assert registry.get(SKY, *flags).optim.lr == 2e-5


def test_underscores_and_dashes_are_the_same():
    for flag in ("--system.denoiser.model-channels", "--system.denoiser.model_channels"):
        assert registry.get(SKY, flag, "64").system.denoiser.model_channels == 64


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--loop.compile"], True),
        (["--loop.compile", "True"], True),
        (["--loop.compile=false"], False),
        (["--loop.no-compile"], False),
        (["--no-loop.compile"], False),
    ],
)
def test_a_switch_is_set_in_each_of_its_forms(flags, value):
    assert registry.get(SKY, *flags).loop.compile is value


def test_tuples_are_given_as_words_or_with_commas():
    for flags in (["1", "2", "4"], ["1,2,4"], ["(1, 2, 4)"]):
        assert registry.get(SKY, "--system.denoiser.channel-mult", *flags).system.denoiser.channel_mult == (1, 2, 4)
    assert registry.get(SKY, "--system.denoiser.channel-mult=1,2").system.denoiser.channel_mult == (1, 2)
    assert registry.get(SKY, "--tracking.tags", "a=b,c", "d=e").tracking.tags == ("a=b,c", "d=e")


def test_the_home_directory_is_expanded_in_paths():
    assert registry.get(SKY, "--data-root=~/sky").data.root == Path.home() / "sky"
    assert registry.get(SKY, "--data-root=./~/sky").data.root == Path("~/sky")
    assert registry.get(SKY, "--data-root=~no-such-user/sky").data.root == Path("~no-such-user/sky")


def test_flags_of_every_plain_type_are_parsed():
    flags = [
        "--no-switch",
        "--maybe",
        "True",
        "--folder",
        "a b",
        "--texts=-x",
        "y",
        "--pair",
        "-1",
        "2",
        "--either",
        "z",
    ]
    (parsed,) = parse(flags, Needy())
    assert parsed == Needy(switch=False, maybe=True, folder=Path("a b"), texts=("-x", "y"), pair=(-1, 2), either="z")


def test_a_recipe_and_its_launch_share_one_command_line():
    recipe, launch = parse(["--dry-run", "--lr", "1", "--output-dir", "o"], registry.get(SKY), Launch())
    assert recipe.optim.lr == 1.0
    assert launch == Launch(dry_run=True, output_dir=Path("o"))


def test_overrides_may_stand_in_the_name():
    assert registry.get(f"{SKY} --lr 7e-5 --tracking.experiment 'two words'") == registry.get(
        SKY, "--lr", "7e-5", "--tracking.experiment=two words"
    )


def test_length_is_steps_or_epochs_so_setting_one_clears_the_other():
    epochs = registry.get(SKY, "--epochs", "3").loop
    steps = registry.get("lvdm-video-vae", "--max-steps", "7").loop
    assert (epochs.max_steps, epochs.epochs) == (None, 3.0)
    assert (steps.max_steps, steps.epochs) == (7, None)


# --------------------------------------------------------------------------------------------------------- class swaps


def test_a_swapped_class_keeps_the_fields_of_the_same_name_and_type():
    base = registry.get(SKY)
    optim = registry.get(SKY, "--optim=Wide").optim
    assert isinstance(optim, Wide)
    assert (optim.lr, optim.betas, optim.weight_decay) == (base.optim.lr, base.optim.betas, base.optim.weight_decay)
    assert (optim.width, optim.eps) == (3, (1.0,))


def test_a_slot_is_put_in_taken_out_and_set_on_one_command_line():
    assert registry.get(SKY, "--optim.ema", "EMA", "--optim.ema.decay", "0.5").optim.ema == EMA(decay=0.5)
    assert registry.get(TINY, "--optim.ema=None").optim.ema is None
    assert registry.get(SKY, "--system.autoencoder=None").system.autoencoder is None


def test_a_part_of_a_swapped_slot_is_swapped_too_in_any_order():
    optim = registry.get(SKY, "--optim.width=5", "--optim.ema=EMA", "--optim=Wide").optim
    assert isinstance(optim, Wide)
    assert (optim.width, optim.ema) == (5, EMA())


def test_a_tuple_of_slots_is_filled_by_class_names():
    flags = ["--optim.groups=ParamGroup,ParamGroup", "--optim.groups.0.pattern=a", "--optim.groups.1.pattern", "b"]
    assert registry.get(SKY, *flags).optim.groups == (ParamGroup(pattern="a"), ParamGroup(pattern="b"))
    assert registry.get(SKY, "--optim.groups=None").optim.groups == ()


def test_a_check_sees_only_the_final_state_of_a_swapped_slot():
    recipe = registry.get("lvdm-video-vae", "--system.denoiser=LVDMShortUNet", "--system=Diffusion")
    assert recipe.system.autoencoder == registry.get("lvdm-video-vae").system.autoencoder


# ------------------------------------------------------------------------------------------------------ what is refused

REFUSED = {
    "--optim.lrr 3": "unknown flag --optim.lrr (did you mean '--optim.lr'?)",
    "--learning-rate 3": "unknown flag --learning-rate (did you mean '--lr'?)",
    "--bs 3": "unknown flag --bs (did you mean '--batch-size'?)",
    "--seeed 3": "unknown flag --seeed (did you mean '--seed'?)",
    "--weight-decay 3": "unknown flag --weight-decay (did you mean '--optim.weight-decay'?)",
    "--optim.ema.decay 0.5": "unknown flag --optim.ema.decay (optim.ema is None: add --optim.ema=EMA)",
    "--output-dir x": "unknown flag --output-dir (it says where and how to run",
    "--out x": "unknown flag --out (it says where and how to run",
    "-x": "unknown flag -x",
    "foo": "unexpected word 'foo'",
    "--lr 1 --lr 1": "--lr is given twice",
    "--lr 1 --optim.lr 1": "--lr and --optim.lr are the same field",
    "--optim=AdamW --optim=AdamW": "--optim is given twice",
    "--loop.tf32 --loop.no-tf32": "--loop.tf32 and --loop.no-tf32 are the same field",
    "--lr": "--lr takes one value (a number), got none",
    "--lr 1 2": "--lr takes one value (a number), got 2: 1 2",
    "--lr abc": "--lr abc: expected a number",
    "--lr nan": "AdamW.lr = nan: expected a finite number",
    "--lr -1": "AdamW.lr = -1.0: must be positive",
    "--seed 1.5": "--seed 1.5: expected a whole number",
    "--precision fp61": "--precision fp61: expected one of 'fp32', 'bf16', 'fp16' (did you mean 'fp16'?)",
    "--loop.tf32 maybe": "--loop.tf32 maybe: expected True or False",
    "--loop.no-tf32 True": "--loop.no-tf32 takes no value, got 'True': give --loop.tf32 True or False",
    "--system.autoencoder.downsample 1 2": "--system.autoencoder.downsample 1 2: expected a tuple of",
    "--optim=AdmW": "--optim: 'AdmW' is no class for it (did you mean 'AdamW'?); allowed here: AdamW, AdamW8bit, Lion, Wide",
    "--optim=EMA": "--optim: 'EMA' is no class for it",
    "--optim=None": "--optim: 'None' is no class for it",
    "--optim=AdamW,Wide": "--optim takes one class",
    "--optim": "--optim: needs a class; allowed here: AdamW, AdamW8bit, Lion, Wide",
    "--optim.groups=ParamGroup": "optim.groups.0 needs pattern (a text): add --optim.groups.0.pattern VALUE",
    "--batch-size 2": "--batch-size 2 does not divide --global-batch 1 (samples an update): give both, for example --batch-size 2 --global-batch 2",
    "--batch-size 2 --global-batch 3": "Loop.global_batch = 3: must be a multiple of micro_batch = 2",
    "--epochs 1 --max-steps 1": "give max_steps or epochs, one of the two",
    "--system.denoiser.norm-num-groups 0": "LVDMShortUNet",
    "--max-steps None": "give max_steps or epochs, one of the two",
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.items())
def test_a_mistake_is_refused_in_one_line_that_says_what_to_do(flags, message):
    said = refusal(*flags.split())
    assert message in said
    assert "\n" not in said and "│" not in said


def test_a_required_slot_of_a_swapped_class_must_be_named():
    said = refusal("--system=Diffusion", recipe="lvdm-video-vae")
    assert "system needs denoiser" in said and "--system.denoiser=CLASS (one of LVDMShortUNet" in said


def test_a_global_batch_that_does_not_go_with_the_micro_batch_names_both_flags():
    said = refusal("--global-batch", "12", recipe=TINY)
    assert "--batch-size 8 does not divide --global-batch 12" in said and "--global-batch 16" in said


def test_values_of_the_wrong_kind_are_refused_for_every_number_and_switch():
    tried: set[tuple[str, object]] = set()
    for recipe in map(registry.get, registry.names()):
        for path, (hint, _) in spots(recipe).items():
            if hint in (int, float, bool) and (path, hint) not in tried:
                tried.add((path, hint))
                with pytest.raises(UserError, match=rf"--{re.escape(path)} x: expected (a|True)"):
                    parse([f"--{path}", "x"], recipe)


def test_unknown_recipe_names_are_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no recipe is called 'lvdm-short-sk' \(did you mean 'lvdm-short-sky'\?\)"):
        registry.get("lvdm-short-sk")
    with pytest.raises(UserError, match="cannot be read as a name and flags"):
        registry.get("lvdm-short-sky 'open")


def test_launch_mistakes_from_python_name_the_field():
    with pytest.raises(UserError, match=r"Launch has no field 'output_dirr' \(did you mean 'output_dir'\?\)"):
        registry.run(SKY, output_dirr="x")
