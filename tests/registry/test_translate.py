"""`translate`: every recorded command of the original systems has one of ours, and nothing that is given can hurt."""

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import registry
from core.errors import UserError
from core.slots import Launch
from core.swap import spots
from core.translate.program import Call, Machines
from core.translate.script import translate
from core.translate.shell import LONGEST, commands
from core.translate.table import read, rows
from core.verbs.translate import refusal
from tests.flag_tables import TABLES, pages

RECORDED = {
    head: body
    for head, _, body in (
        block.partition("\n")
        for block in (Path(__file__).parent / "old_commands.txt").read_text().split("=== ")
        if block
    )
}
"""System and number -> shell, as it was published."""
COMMANDS = {  # how many of ours there are in each
    "lvdm": [0, 1, 1, 1, 1, 1],
    "lvdm script": [1, 1, 1, 1],
    "ldm": [0, 1, 1, 1, 1, 1, 1, 1, 1],
    "ldm lists": [1],
    "animatediff": [0, 1, 1, 1, 1],
}


def one(text):
    """The last command of a text, and what became of its flags."""
    piece = translate(text, registry.get)[-1]
    return piece.lines[-1] if piece.lines else "", {finding.old: finding for finding in piece.findings}


def ours(text):
    """Words of ours for all commands of a text."""
    return [words for piece in translate(text, registry.get) for words in piece.new]


def test_every_published_command_is_translated_without_an_unknown_flag_and_is_a_command_here():
    found = {}
    for head, text in RECORDED.items():
        pieces = translate(text, registry.get)
        findings = [finding for piece in pieces for finding in piece.findings]
        assert [finding for finding in findings if finding.status == "unknown"] == [], head
        assert findings or head == "ldm lists"
        words = [words for piece in pieces for words in piece.new]
        found.setdefault(head.rstrip("0123456789 "), []).append(len(words))
        for command in words:
            assert refusal(command, registry.get) == ""
    assert found == COMMANDS


def test_a_command_that_says_what_the_recipe_says_needs_no_flag_but_its_places():
    (command,) = ours(RECORDED["lvdm 2"])
    assert command[:2] == ["run", "lvdm-short-sky"]
    flags = {word for word in command if word.startswith("--")}
    assert flags == {"--output-dir", "--resume", "--init-from", "--system.autoencoder.weights", "--data-root"}


@pytest.mark.parametrize(
    ("head", "recipe", "world", "batch"),
    [
        ("lvdm 4", "lvdm-short-sky", 8, 8),
        ("lvdm 5", "lvdm-text2video", 8, 64),
        ("lvdm script 2", "lvdm-text2video", 4, 32),
        ("ldm 5", "ldm-laion400m", 8, 480),
        ("ldm 9", "ldm-laion400m", 8, 480),
        ("animatediff 2", "animatediff-full", 4, 256),
        ("animatediff 4", "animatediff-lora", 1, 16),
    ],
)
def test_processes_and_the_samples_of_an_update_are_those_of_the_original(head, recipe, world, batch):
    from core.cli import parse

    ((verb, name, *flags),) = ours(RECORDED[head])
    made, launch = parse(flags, registry.get(name), Launch())
    assert (verb, name, launch.nproc, made.loop.global_batch) == ("run", recipe, world, batch)


def test_a_flag_that_is_not_given_is_what_the_program_does_without_it():
    (command,) = ours("python train_lvdm_short.py --do_train --output_dir a --num_train_epochs 2")
    given = dict(zip(command[2::2], command[3::2], strict=False))
    wanted = {"--lr": "5e-5", "--optim.schedule.name": "linear", "--epochs": "2", "--seed": "42", "--batch-size": "8"}
    assert wanted.items() <= given.items()
    (trainer, _), (by_hand, _) = (one(RECORDED[f"ldm {n}"]) for n in (2, 6))
    assert "--optim.max-grad-norm 1.0" in trainer and "max-grad-norm" not in by_hand
    assert "--checkpoint.keep None" in by_hand


def test_what_is_around_a_command_is_kept():
    line, _ = one("LR=1e-4\nCUDA_VISIBLE_DEVICES=3 nohup python -u train_lvdm_short.py --seed=$LR'' > 'my log' 2>&1 &")
    assert line.startswith("CUDA_VISIBLE_DEVICES=3 nohup python -m registry run lvdm-short-sky ")
    assert line.endswith("> 'my log' 2>&1 &") and "--seed 1e-4" in line
    line, _ = one("torchrun --nnodes=2 --nproc_per_node 8 --master_addr host1 animatediff_sft.py | tee log")
    assert line.startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint host1:29500 -m ")
    assert " --nproc 8" not in line and "--global-batch 256" in line and line.endswith("| tee log")
    line, _ = one("accelerate launch --num_processes 2 --mixed_precision fp16 train_lvdm_short.py")
    assert "--nproc 2" in line and "--precision fp16" in line


def test_held_out_data_of_another_root_and_of_a_table():
    line, _ = one("python train_lvdm_short.py --train_data_root a --eval_data_root b --eval_subset_split test")
    assert "--data-root a --validation.data=FrameFolders --validation.data.root b" in line
    assert line.endswith("--validation.data.split test")
    line, _ = one(RECORDED["lvdm 3"])
    assert "--validation.data.annotations your_data_path_to/webvid/share_datasets/val_type_data.list" in line


def test_what_is_unknown_is_named_with_the_nearest_flag():
    _, said = one("python animatediff_sft.py --learning_rat 1 --sft_type half stray --seed 1 --seed 2")
    assert "did you mean '--learning_rate'?" in said["--learning_rat 1"].new
    assert said["--sft_type half stray"].status == "unknown"
    assert said["--seed 1"].new == "given twice; the last one counts"
    _, said = one("python train_lvdm_short.py --fp16_opt_level O2 --frame_stride 4 --output_dir $OUT/$(date)")
    assert {said[key].status for key in ("--fp16_opt_level O2", "--frame_stride 4", "$OUT", "$(date)")} == {"unknown"}


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("bash scripts/text_condition/gpu/train_t2v.sh", "Open-Sora-Plan"),
        ("bash scripts/text_condition/gpu/sample_t2v_v1_3.sh", "Open-Sora-Plan"),
        ("torchrun --nnodes=1 --nproc_per_node 8 -m opensora.sample.sample --sp", "Open-Sora-Plan"),
        ("python preprocess.py", "DALLE2-video"),
        ("nohup python train_clip.py use_wandb=**** > logs/****.log &", "DALLE2-video"),
        ("nohup accelerate launch train_decoder.py train_name=**** use_wandb=**** > logs/****.log &", "DALLE2-video"),
    ],
)
def test_a_system_without_a_recipe_is_said_in_one_line(text, system):
    (piece,) = translate(text, registry.get)
    assert [finding.new for finding in piece.findings] == [f"this registry has no recipe of {system}"]
    assert piece.lines == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("python a.py 'open", "a quote ' is not closed"),
        ("cat <<EOF\nx\nEOF", "a here-document is not read"),
        ("a\0b", "zero byte"),
        ("x" * (LONGEST + 1), "characters; give the command alone"),
        (
            "A=aa;" + "".join(f"{b}=${a}${a};" for a, b in zip("ABCDEFGHIJKLMNOPQ", "BCDEFGHIJKLMNOPQR", strict=True)),
            "grow",
        ),
        ("python -m paddle.distributed.launch --gpus a,b train_lvdm_short.py", "expected numbers with commas"),
        ("torchrun --nproc_per_node many train_lvdm_short.py", "expected a whole number"),
        ("python train_lvdm_short.py --per_device_train_batch_size x", "must be whole numbers"),
        ("python generate_pipelines.py", "needs the path of a checkpoint"),
    ],
)
def test_bad_input_is_one_clear_line(text, wanted):
    with pytest.raises(UserError, match=re.escape(wanted)):
        translate(text, registry.get)


def test_the_verb_prints_a_script_and_says_with_its_exit_code_whether_all_is_known(tmp_path, capsys):
    script = tmp_path / "old.sh"
    script.write_text(RECORDED["lvdm 3"])
    assert registry.main(["translate", str(script)]) == 0
    printed = capsys.readouterr().out
    kept = [line for line in printed.splitlines() if line and not line.startswith("#")]
    assert kept[0].startswith("python -m registry run lvdm-text2video ") and all(
        line.endswith("\\") for line in kept[:-1]
    )
    shown = commands(printed)
    assert [command.words[4] for command in shown] == ["lvdm-text2video"]
    assert shown[0].words[3:] == ours(RECORDED["lvdm 3"])[0]
    assert registry.main(["translate", "python", "train_lvdm_short.py", "--lerning_rate", "1"]) == 1
    assert registry.main(["translate", "python train_lvdm_short.py --learning_rate fast"]) == 1
    assert "refused           --lr fast: expected a number" in capsys.readouterr().out
    assert registry.main(["translate", str(tmp_path)]) == 2
    assert "is a folder; give a script or a command" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the tables


def test_the_pages_show_the_tables_that_are_used():
    assert {path.name for path, text in pages().items() if path.read_text() != text} == set()


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_a_table_is_translated_with_the_values_that_it_shows(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red cloud\n")
    programs = {name: about for name, about in read("programs")["programs"].items() if about.get("table") == table}
    assert programs
    for name, about in programs.items():
        for row in rows(table).values():
            shown = row.cells[about.get("column", 0)]
            if row.page_only or shown in ("not there", "-", ""):
                continue
            value = {"required": "x", "validation_prompts_path": "prompts.txt"}.get(shown, shown.strip("()"))
            value = re.sub(r".*, lora ", "", value) if "lora " in value else value
            value = {"validation_prompts_path": "prompts.txt", "trainable_modules": value}.get(row.name, value)
            value = "x" if re.search(r"[ ,]", value) and row.name != "guidance_scales" else value
            for known in row.known or ():
                value = value if value in (row.known or ()) or value in row.recipes else known
            call = Call(name, about, {row.name: value.split()}, Machines(), registry.get)
            call.translate()
            bad = [f for f in call.findings if f.status == "unknown" and f.old.startswith(f"--{row.name}")]
            assert bad == [], name


def test_every_target_of_a_row_is_a_flag_here():
    from core.verbs.flags import EvalFlags, ImportFlags, SampleFlags, UiFlags

    launch = set(spots(Launch()))
    recipes = {name: set(spots(registry.get(name, "--optim.ema=EMA"))) for name in registry.names()}
    everywhere = set.union(launch, *recipes.values())
    verbs = {"sample": SampleFlags(), "eval": EvalFlags(), "weights": ImportFlags(), "ui": UiFlags(), "run": Launch()}
    from core.cli import ALIASES

    for name, about in read("programs")["programs"].items():
        for row in rows(about["table"]).values() if "table" in about and "verb" in about else ():
            if row.page_only or row.status or row.do in ("what", "second"):
                continue
            for target in row.targets():
                path = re.split(r"[ =]", target.lstrip("-"))[0].replace("-", "_")
                known = set(spots(verbs[about["verb"]])) | everywhere
                assert ALIASES.get(path, path) in known, (name, row.name)


# ---------------------------------------------------------------------------------------------------- nothing can hurt


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_a_value_comes_out_as_it_went_in_and_nothing_in_it_is_shell(value):
    text = f"python train_lvdm_short.py --output_dir={shlex.quote(value)}"
    (words,) = ours(text)
    given = next(
        word.partition("=")[2] or words[i + 1] for i, word in enumerate(words) if word.startswith("--output-dir")
    )
    wanted = value.capitalize() if value.lower() in ("true", "false", "none") else value
    assert given in (value, wanted) or value == ""
    line, _ = one(text)
    assert shlex.split(line)[3:] == words


WORDS = [
    *("python", "train_lvdm_short.py", "--seed", "--gpus", "torchrun", "-m", "nohup", "tee", "bash", "export", "if"),
    *("$A", "A=1", "$(x)", "${A", "`", "'", '"', "\\", "\n", " ", ">", "2>&1", "&", "|", "#", "(", ")", "--", "="),
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(WORDS),
        max_size=14,
    )
)
def test_any_words_are_translated_or_refused_in_a_line(parts):
    for join in (" ", ""):
        try:
            pieces = translate(join.join(parts), registry.get)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(shlex.split(line) for piece in pieces for line in piece.lines)
