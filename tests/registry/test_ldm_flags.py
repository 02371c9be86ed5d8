"""The page of LDM says where each flag of both old programs went, and the recipe has the values of their commands."""

import re
from pathlib import Path

import pytest

from core.cli import ALIASES
from core.swap import spots
from registry import get
from tests.test_docs import _literal

PAGE = Path(__file__).parents[2] / "docs/ldm.md"
TRAINER = """
do_train output_dir per_device_train_batch_size gradient_accumulation_steps learning_rate weight_decay max_steps lr_scheduler_type
warmup_steps logging_steps save_steps save_total_limit seed dataloader_num_workers model_name_or_path file_list num_inference_steps
model_max_length tokenizer_name
""".split()  # noqa: SIM905
"""Flags of the published command of the trainer, in its order."""
HAND_WRITTEN = """
output_dir train_batch_size gradient_accumulation_steps learning_rate adam_weight_decay max_train_steps lr_scheduler lr_warmup_steps
logging_steps save_steps seed num_workers pretrained_model_name_or_path file_list num_inference_steps model_max_length tokenizer_name
""".split()  # noqa: SIM905
SAID_OTHERWISE = {
    "gradient_accumulation_steps",  # 10 times 6 samples are a global batch of 60
    *("tokenizer_name", "file_list", "vae_name_or_path"),  # places
    *("adam_beta1", "adam_beta2"),  # two numbers in one field
    *(
        "max_grad_norm",
        "num_train_epochs",
        "fp16",
        "profiler_options",
    ),  # None or another word for the same; without effect there
}


def rows() -> dict[str, list[str]]:
    """Old flag → the value of the trainer's command, of the hand-written program's, our field."""
    table = PAGE.read_text().partition("| old flag |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("`"): row[1:4] for row in cells}


def test_every_flag_of_both_commands_has_a_row_with_the_value_that_it_was_given():
    for column, flags in enumerate((TRAINER, HAND_WRITTEN)):
        given = {name for name, row in rows().items() if not re.match(r"\(|-$", row[column])}
        assert given - {"paddle.distributed.launch --gpus"} == set(flags)


@pytest.mark.parametrize("name", ["ldm-laion400m", "ldm-laion400m-12"])
def test_the_recipe_has_the_value_of_the_old_commands_wherever_a_row_names_a_field(name):
    recipe, compared = spots(get(name)), {}
    for old, (trainer, hand_written, here) in rows().items():
        field = re.fullmatch(r"`(?:--)?([\w.-]+)`", here)
        path = ALIASES.get(field[1].replace("-", "_"), field[1].replace("-", "_")) if field else ""
        if path in recipe:
            values = {_literal(value) for value in (trainer, hand_written) if value != "-"}
            compared[old] = values <= {recipe[path].value}
    assert len(compared) > 30
    assert {old for old, same in compared.items() if not same} <= SAID_OTHERWISE
    assert {
        "learning_rate",
        "adam_weight_decay",
        "save_total_limit",
        "num_workers",
        "model_max_length",
    } <= compared.keys()


def test_the_page_s_memory_is_what_is_planned():
    from core.plan import plan

    table = PAGE.read_text().partition("## Memory")[2].partition("| | `ldm-laion400m`")[2].partition("\n\n")[0]
    said = [float(line.split("|")[2]) for line in table.splitlines()[2:]]
    planned = list(plan(get("ldm-laion400m")).memory.values())
    assert said == [round(value / 2**30, 1) for value in (*planned, sum(planned))]
