"""The documentation is true: its Python runs, its commands are commands, its flags, fields, files and links exist.

Each page is held against the project by a process of its own (`hold`), because pages register recipes and slots. There the files that a
page shows are written to a folder, its package is installed there as pip would, and everything on the page is tried.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.processes import SERVER, begin

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README.md")])
SLOTS = ("data", "system", "optim", "loop", "parallel", "validation", "checkpoint", "tracking")
FOLDERS = ("core/", "data/", "recipes/", "tests/", "docs/", "benchmarks/")


# ------------------------------------------------------------------------------------------------- what a page holds


def fences(page: str, *languages: str) -> list[str]:
    """The code blocks in one of these languages."""
    return [
        body for language, body in re.findall(r"^ *```(\w+)\n(.*?)^ *```$", page, re.M | re.S) if language in languages
    ]


def spans(page: str) -> list[str]:
    """The texts in backticks outside code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", page, flags=re.M | re.S))


def file_of(block: str) -> str | None:
    """The file that a block is, where its first line is a comment that names it."""
    named = re.match(r"# ([\w./-]+\.(?:py|toml))\n", block)
    return named[1] if named else None


def commands(page: str) -> list[list[str]]:
    """Words after `python -m registry` of every command that is no pattern like `VERB` or `NAME`."""
    lines = [
        line for block in fences(page, "bash", "sh", "console") for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [span for span in spans(page) if not re.search(r"\b[A-Z]{2,}\b|[<…]", span)]
    found = (re.search(r"(?:^|\s)-m registry\b(.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


# ----------------------------------------------------------------------------------- the process that holds one page


def hold(page: Path, folder: Path) -> list[tuple[str, str]]:
    """Everything on the page that is not true, as (what, why)."""
    text = page.read_text()
    files = list(_write_files(text, folder))
    import registry

    failures = [_tried(name, lambda name=name: _load(name, folder)) for name in files if name.startswith(FOLDERS)]
    failures += [_tried("the package of the page", registry.names)]
    failures += [
        _tried(name, lambda name=name: importlib.import_module(_module(name))) for name in files if name.endswith(".py")
    ]
    for block in fences(text, "python"):
        if file_of(block) is None:
            failures.append(
                _tried(block, lambda block=block: exec(compile(block, page.name, "exec"), {"__name__": "page"}))
            )
    failures += [_tried(shlex.join(words), lambda words=words: _try_command(words)) for words in commands(text)]
    failures += [_tried(span, lambda span=span: _known_span(span)) for span in dict.fromkeys(spans(text))]
    return [failure for failure in failures if failure]


def _tried(what: str, do: Callable[[], object]) -> tuple[str, str] | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            do()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # what a page shows can fail in any way, and all is reported
        return what, "".join(traceback.format_exception_only(error)).strip()
    return None


def _write_files(text: str, folder: Path) -> Iterator[str]:
    """Write the files that the page shows, and install its package if it has one. Yields their names."""
    for block in fences(text, "python", "toml"):
        if (name := file_of(block)) is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
        yield name
    if (folder / "pyproject.toml").exists():
        _install(folder, tomllib.loads((folder / "pyproject.toml").read_text())["project"])


def _install(folder: Path, project: dict) -> None:
    """What `pip install --editable` would leave: metadata with the entry points."""
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = (
        "\n".join([f"[{group}]", *(f"{name} = {module}" for name, module in entries.items())])
        for group, entries in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups) + "\n")


def _module(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".")


def _load(name: str, folder: Path) -> None:
    """Import a file as the module of this project that it would be."""
    module = _module(name)
    spec = importlib.util.spec_from_file_location(module, folder / name)
    assert spec and spec.loader
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])


def _try_command(words: list[str]) -> None:
    """Run a cheap command for real; have the command line's own parser read the others, down to batch sizes and ranks."""
    import registry

    cheap = (
        not words or words[0] in ("list", "show", "--help", "-h", "--version") or {"--help", "--dry-run"} & set(words)
    )
    if cheap or (words[0] == "diff" and not any(re.search(r"^run:|^[^ ]*[/.@]", side) for side in words[1:3])):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = registry.main(words)
        assert code in ((0, 1) if words[:1] == ["diff"] else (0,)), said.getvalue()
    else:
        _parse(*words)


def _parse(verb: str, what: str = "", *flags: str) -> None:
    from core.build import check_batch
    from core.cli import parse
    from core.recipe_source import refuse_name
    from core.slots import Launch
    from core.verbs.data import FLAGS as DATA
    from core.verbs.data import read as read_data
    from core.verbs.flags import DoctorFlags, EvalFlags, MeasureFlags, RunsFlags, SampleFlags, StoreFlags, UiFlags
    from core.verbs.launch import launch as launch_job
    from core.verbs.translate import translate
    from core.verbs.weights_words import read as read_weights
    from registry import get

    match verb:
        case "run":
            recipe, launch = parse(flags, get(what), Launch())
            recipe.parallel.mesh(launch.nproc)
            check_batch(recipe, launch.nproc)
        case "launch":
            assert launch_job(flags, get(what)) == 0
        case "resume":
            parse(flags, get("lvdm-short-sky-tiny"), Launch())
        case "sample":
            parse(flags, SampleFlags())
        case "eval":
            parse(flags, EvalFlags())
        case "measure-latents":
            parse(flags, get(what), MeasureFlags())
        case "weights":
            *_, given = read_weights([what, *flags])
            assert not getattr(given, "recipe", None) or get(given.recipe)
        case "data" if what in ("check", "plan", "cache"):
            parse(flags[1:], get(flags[0]), DATA[what]())
        case "data":
            read_data([what, *flags])
        case "diff":
            parse(flags[1:], StoreFlags())
        case "translate" if what.endswith(".sh"):
            pass  # a script of the reader's
        case "translate":
            assert translate([what, *flags], get) == 0
        case "sync":
            parse(flags, StoreFlags())
        case "runs":
            parse([what, *flags] if what else [], RunsFlags())
        case "promote":
            refuse_name(flags[flags.index("--as") + 1])
        case "doctor":
            parse([what, *flags] if what else [], DoctorFlags())
        case "ui":
            parse([what, *flags] if what else [], UiFlags())
        case _:
            raise AssertionError(f"{verb!r} is no verb")


def _known_span(span: str) -> None:
    """A flag, a field by its path, or a file that is named in the text."""
    if re.match(r"--[a-z]", span):
        name = re.split(r"[= ]", span)[0].removeprefix("--").replace("-", "_")
        known = name in ("help", "json", "debug", "version", "as", "for")
        assert known or {name, name.removeprefix("no_")} & _known_names(), "no such flag"
    elif re.fullmatch(rf"({'|'.join(SLOTS)})(\.[a-z_0-9]+)+", span):
        assert span in _known_names(), "no recipe has such a field"
    elif test := re.fullmatch(r"(tests/[\w./]+\.py)::(\w+)", span):
        assert f"\ndef {test[2]}(" in (ROOT / test[1]).read_text(), "no such test"
    elif re.fullmatch(r"[\w./-]+", span) and (span.startswith(FOLDERS) or span in ("registry.py", "Makefile")):
        assert (ROOT / span).exists(), "no such file"


@functools.cache
def _known_names() -> set[str]:
    """Every flag of every recipe and verb, with underscores."""
    from core.cli import ALIASES
    from core.slots import DPMSolverMultistep, Launch
    from core.swap import spots
    from core.verbs.data import FLAGS
    from core.verbs.flags import DoctorFlags, EvalFlags, MeasureFlags, SampleFlags, UiFlags
    from core.verbs.launch import ClusterFlags
    from core.verbs.weights_words import FLAGS as WEIGHTS
    from registry import get, names

    parts = [
        Launch(),
        ClusterFlags(),
        SampleFlags(sampler=DPMSolverMultistep()),
        EvalFlags(),
        MeasureFlags(),
        UiFlags(),
        DoctorFlags(),
        *(kind() for kind in (*WEIGHTS.values(), *FLAGS.values())),
    ]
    parts += [get(name, "--validation.data=FrameFolders", "--optim.ema=EMA") for name in names()]
    parts += [get("lvdm-short-sky-tiny", "--data=Base64Parts"), get("ldm-laion400m-tiny", "--data=BucketedVideos")]
    return set(ALIASES).union(*(spots(part) for part in parts))


# -------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_that_a_page_shows_works(page, tmp_path):
    process = SERVER.Process(target=_hold, args=(page, tmp_path))
    process.start()
    process.join(300)
    process.kill()
    failures = json.loads((tmp_path / "failures.json").read_text())
    assert not failures, "\n\n".join(f"{what}\n    {why}" for what, why in failures)


def _hold(page: Path, folder: Path) -> None:
    """In a process of its own: `hold`, with the folder as the place of other packages."""
    os.chdir(folder)
    sys.path.insert(1, str(folder))
    os.environ["REGISTRY_CACHE"] = str(folder / "cache")
    begin(folder / "said", threads=1)
    failures = hold(page, folder)
    (folder / "failures.json").write_text(json.dumps(failures))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_found(page):
    """The regular expressions above would make all of this pass by finding nothing."""
    text = page.read_text()
    shown = [line for block in fences(text, "bash") for line in block.splitlines() if "-m registry" in line]
    assert len(commands(text)) >= len(shown)
    assert text.count("```") == 2 * len(re.findall(r"^ *```.*?^ *```$", text, re.M | re.S))


# ------------------------------------------------------------------------------------------- old flags of LVDM's page

OLD_ARGUMENTS = """
task_type pretrained_model_name_or_path tokenizer_name_or_path vae_type vae_name_or_path text_encoder_name_or_path text_encoder_config_file
is_text_encoder_trainable unet_name_or_path unet_config_file scheduler_beta_start scheduler_beta_end scheduler_num_train_timesteps
eval_scheduler_num_inference_steps use_ema enable_xformers_memory_efficient_attention scale_factor shift_factor loss_type latents_path
use_paddle_conv_init if_numpy_genarator_random_alignment numpy_genarator_random_seed set_seed_for_alignment image_logging_steps
train_data_root eval_data_root train_annotation_path eval_annotation_path train_subset_split eval_subset_split resolution video_length
dataset_name frame_stride spatial_transform temporal_transform clip_step output_dir overwrite_output_dir do_train do_eval eval_steps
label_names per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps
warmup_ratio max_steps num_train_epochs weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon logging_steps save_steps
save_total_limit seed dataloader_num_workers fp16 fp16_opt_level bf16 recompute resume_from_checkpoint report_to
"""
"""The arguments of train_lvdm_short.py and train_lvdm_text2video.py: their own, and those of the trainer that matter to them."""


def old_flags(column: int = 1) -> dict[str, tuple[str, str]]:
    """Old name -> value of a script (column 1: short, 2: text2video), our field."""
    table = (ROOT / "docs/lvdm.md").read_text().partition("| old flag |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0].strip("`"): (row[column], row[3]) for row in rows}


def test_the_table_of_lvdm_has_a_row_for_every_argument_of_the_old_scripts():
    assert set(OLD_ARGUMENTS.split()) - set(old_flags()) == set()


SAID_OTHERWISE = {
    *("vae_type", "unet_config_file"),  # a name there, a slot here
    *("train_data_root", "eval_data_root"),  # places; None is the held-out part
    *("do_eval", "max_grad_norm"),  # an interval instead of a switch; None instead of 0
    *("adam_beta1", "adam_beta2"),  # two numbers in one field
    *("num_train_epochs", "numpy_genarator_random_seed"),  # without effect in the old commands
    "frame_stride",  # no argument of the short script
    "eval_subset_split",  # the one that is meant to differ: validation is on the test split
}


SAID_OTHERWISE_OF_TEXT = SAID_OTHERWISE | {
    "loss_type",  # l2 is called mse
    *("text_encoder_name_or_path", "train_annotation_path"),  # places
    *("train_subset_split", "dataset_name"),  # ignored beside an annotation file; no argument of that script
    "gradient_accumulation_steps",  # 2 times 4 samples is a global batch of 8
}


@pytest.mark.parametrize(
    ("name", "column", "otherwise"),
    [("lvdm-short-sky", 1, SAID_OTHERWISE), ("lvdm-text2video", 2, SAID_OTHERWISE_OF_TEXT)],
)
def test_the_recipe_has_the_value_of_the_old_script_wherever_a_row_names_a_field(name, column, otherwise):
    from core.cli import ALIASES
    from core.swap import spots
    from registry import get

    recipe = spots(get(name))
    compared = {}
    for old, (value, here) in old_flags(column).items():
        field = re.fullmatch(r"`(?:--)?([\w.-]+)`", here)
        path = ALIASES.get(field[1].replace("-", "_"), field[1]) if field else ""
        if path in recipe:
            compared[old] = (_literal(value), recipe[path].value)
    assert len(compared) > 40
    assert {old for old, (before, now) in compared.items() if before != now} == otherwise


def _literal(cell: str) -> object:
    text = cell.strip("()")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
