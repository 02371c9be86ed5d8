"""FLOPs counted without values are those of a real run, and shares of them what they say."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core import flops
from core.blocks import checkpoint_blocks
from core.build import load_frozen
from core.draw import Draw
from core.flops import Utilisation, count, data_sheet, shapes_for, shapes_of
from core.validate import fixed_keys
from tests.engine.running import journal, run_here, short

ON = "--loop.activation-checkpointing True"
CPU = torch.device("cpu")


def really(recipe, batch, *, checkpointed=False, kernel=SDPBackend.FLASH_ATTENTION):
    """FLOPs forward and backward of a batch on the CPU, with values, and with torch's attention for the CPU."""
    system = recipe.system.build()
    load_frozen(recipe, system)
    system.mode(training=True)
    if checkpointed:
        checkpoint_blocks(system, recipe.loop)
    with sdpa_kernel([kernel, SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
        loss, _ = system.loss(batch, Draw.training(0, 0, batch["place"], len(batch["place"])))
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("lvdm-video-vae-tiny", ()),
        ("lvdm-text2video-tiny", ("attention",)),
        ("ldm-laion400m-tiny", ("products", "convolutions")),
    ],
)
def test_forward_backward_and_recomputation_are_those_of_a_real_run(sky, name, keep):
    # two samples: of a single one the CPU convolves a copy as well, which is faster; few pixels
    recipe = short(name, sky, f"{ON} --data.resolution 32")
    recipe = recipe.but(loop=recipe.loop.but(recompute_keep=keep))
    dataset = recipe.data.build()
    batch = dataset.collate([dataset[key] for key in fixed_keys(dataset, 2)])
    counted = count(recipe, shapes_of(batch))
    assert set(shapes_for(recipe)) - set(shapes_of(batch)) <= {("caption", 2)}  # a video has none
    assert (counted.forward, counted.backward) == really(recipe, batch, kernel=SDPBackend.MATH)
    # a kernel of its own computes its products again in the backward pass, so only the difference can be compared
    forward, backward = really(recipe, batch)
    again = really(recipe, batch, checkpointed=True)
    assert again[0] == forward == counted.forward and counted.again == again[1] - backward
    assert 0 < counted.again < counted.forward


def test_the_rate_is_of_all_micro_batches_by_their_shapes_and_starts_anew_after_a_log(sky):
    recipe = short("lvdm-video-vae-tiny", sky, "--loop.mfu True")
    one, two = (short("lvdm-video-vae-tiny", sky, f"--batch-size {n}") for n in (1, 2))
    said = []
    speed = Utilisation(recipe, CPU, said.append)
    for each in (one, two, two):
        speed.add({k: torch.empty(v[0]) if isinstance(v, tuple) else [0] * v for k, v in shapes_for(each)})
        speed.end_update(2.0)
    values = speed.values()
    assert values["tflops_per_s"] == pytest.approx(5 * count(one, shapes_for(one)).model / 6.0 / 1e12)
    peak = flops.measured(CPU, "fp32", True, torch.get_num_threads())
    assert values["mfu/measured"] == values["tflops_per_s"] * 1e12 / peak
    assert "mfu/data_sheet" not in values and speed.values() == {}
    assert [line.partition(": ")[0] for line in said] == [
        f"a micro-batch of pixel_values {n}x3x16x32x32" for n in (1, 2)
    ]


def test_the_data_sheet_knows_dense_figures_by_precision_and_no_figure_of_a_part():
    assert data_sheet("NVIDIA H200", "bf16", True) == data_sheet("NVIDIA H100 80GB HBM3", "fp16", False) == 989.4e12
    assert data_sheet("NVIDIA A100-SXM4-80GB", "fp32", True) == 156e12
    assert data_sheet("NVIDIA A100-SXM4-80GB", "fp32", False) == 19.5e12
    assert data_sheet("NVIDIA A10", "bf16", True) == 125e12
    assert data_sheet("cpu", "fp32", True) is data_sheet("NVIDIA H200 MIG 1g.18gb", "bf16", True) is None


def test_a_run_logs_its_share_of_what_the_device_can_do_at_every_log(sky, store, tmp_path):
    recipe = short("lvdm-video-vae-tiny", sky, "--max-steps 4 --loop.log-every 2 --loop.mfu True")
    out = run_here(recipe, tmp_path / "run", store).output_dir
    lines = [line for line in journal(out) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        counted = 2 * count(recipe, shapes_for(recipe)).model  # two micro-batches an update
        assert line["tflops_per_s"] * line["time/step_s"] == pytest.approx(counted / 1e12, rel=1e-6)
        assert line["mfu/measured"] > 0 and "mfu/data_sheet" not in line
    assert "TFLOP forward" in (out / "run.log").read_text()
