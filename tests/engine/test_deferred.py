"""A module built without weights and filled later is the module that its constructor makes."""

import copy
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.deferred import recording
from core.errors import UserError
from core.fresh import Fresh
from core.models.lvdm_unet import zeroed
from registry import get
from tests.engine.deferred_models import BUILDS, Assorted, filled, ordinary, recorded, tensors
from tests.engine.deferred_ranks import CPU, SEED, Tied, whole
from tests.engine.running import REPO


@pytest.mark.parametrize("name", BUILDS)
def test_the_whole_tape_played_with_one_seed_is_the_constructor_bit_for_bit(name):
    tape, module, _ = recorded(BUILDS[name])
    regions = {key: tape.region(t) for key, t in tensors(module).items()}
    everything = range(len(tape.ops))
    memory = tape.play(everything, {r.storage for r in regions.values()}, {0: SEED})
    reference = tensors(ordinary(BUILDS[name]))
    assert regions.keys() == reference.keys()
    assert [key for key, r in regions.items() if not torch.equal(r.on(memory[r.storage]), reference[key])] == []


@pytest.mark.parametrize("name", BUILDS)
def test_filled_values_are_distributed_as_those_of_an_ordinary_construction(name):
    module, reference = filled(BUILDS[name]), tensors(ordinary(BUILDS[name]))
    mine, buffers = tensors(module), dict(module.named_buffers())
    same = {key for key, value in reference.items() if value.numel() == 1 or value.float().std() == 0}
    for key, value in reference.items():
        here = mine[key]
        layout = (value.shape, value.stride(), value.dtype, value.requires_grad)
        assert (here.shape, here.stride(), here.dtype, here.requires_grad) == layout, key
        if (key in same and "scale" not in key) or (key in buffers and "parametrizations" not in key):
            assert torch.equal(here, value), key
            continue
        # six standard errors of the difference; a normal's std has one of std / sqrt(2 n)
        x, y = here.detach().double().flatten(), value.detach().double().flatten()
        error, spread = 6 / math.sqrt(len(y)), max(y.std(), y.abs().max() / math.sqrt(len(y)))
        assert (x.std() / y.std()).log().abs() < error, key
        assert (x.mean() - y.mean()).abs() < 1.5 * error * spread, key


def test_a_plain_tensor_attribute_is_filled_like_a_buffer():
    assert torch.equal(filled(Assorted).mask, ordinary(Assorted).mask)


def test_values_depend_on_seed_and_name_alone():
    def alone():
        return nn.ModuleDict({"b": nn.Linear(5, 5)})

    def beside_others():
        return nn.ModuleDict({"a": nn.Conv2d(3, 3, 3), "b": nn.Linear(5, 5), "c": nn.Linear(5, 5)})

    first, second = tensors(filled(alone)), tensors(filled(beside_others))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(second["b.weight"], second["c.weight"])
    assert not torch.equal(first["b.weight"], tensors(filled(alone, seed=SEED + 1))["b.weight"])


def test_a_part_filled_alone_has_the_values_that_it_has_in_the_whole():
    build = BUILDS["BertModel"]
    reference = tensors(filled(build))
    _, module, fresh = recorded(build)
    fresh.fill(module.encoder, SEED, CPU, prefix="encoder.")
    for key, value in module.encoder.named_parameters():
        assert torch.equal(value, reference[f"encoder.{key}"])
        assert torch.equal(fresh.value(f"encoder.{key}", SEED), value)
    assert module.embeddings.word_embeddings.weight.is_meta


def test_the_callers_random_state_is_untouched():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    filled(Assorted)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_parameters_stay_one_parameter_seeded_by_the_first_name():
    def build():
        module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
        module["c"].weight = module["a"].weight
        return module

    module = filled(build)
    assert module["c"].weight is module["a"].weight
    assert torch.equal(module["c"].weight, filled(lambda: nn.ModuleDict({"a": nn.Linear(4, 4)}))["a"].weight)
    assert not torch.equal(module["c"].bias, module["a"].bias)


def test_a_tie_that_to_empty_tore_is_tied_again():
    _, module, fresh = recorded(Tied)
    module.to_empty(device=CPU)
    assert module.head.weight is not module.embed.weight
    fresh.fill(module, SEED, CPU)
    assert module.head.weight is module.embed.weight and module.head.weight[0].sum() == 0


def test_copies_have_the_values_of_what_they_copy():
    def build():
        student = nn.Linear(4, 4)
        module = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student), "other": nn.Linear(4, 4)})
        with torch.no_grad():
            module["other"].weight.copy_(student.weight * 2)
            nn.init.normal_(student.bias)  # after the copy: the teacher keeps the old one
        module.register_buffer("sum", student.weight.data + module["teacher"].bias.data)
        return module

    module = filled(build)
    assert torch.equal(module["student"].weight, module["teacher"].weight)
    assert torch.equal(module["student"].weight * 2, module["other"].weight)
    assert not torch.equal(module["student"].bias, module["teacher"].bias)
    assert torch.equal(module["student"].weight + module["teacher"].bias, module.sum)


def test_what_was_overwritten_is_not_drawn():
    tape, module, _ = recorded(lambda: zeroed(nn.Linear(4, 4)))
    ops = [tape.ops[i] for i in tape.needed(tape.region(module.weight).storage)]
    assert [op.name for op in ops] == ["aten.zero_.default"]


def test_marks_on_a_parameter_and_whether_it_learns_are_kept():
    def build():
        module = nn.Linear(2, 2).requires_grad_(False)
        module.bias.requires_grad_().decay = False
        return module

    module = filled(build)
    assert module.bias.decay is False and module.bias.requires_grad and not module.weight.requires_grad


def test_what_is_skipped_is_memory_without_a_draw():
    def build():
        module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        module["a"].unset = nn.Parameter(torch.empty(3))
        module["b"].again = module["a"].unset
        return module

    _, module, fresh = recorded(build)
    fresh.fill(module, SEED, CPU, skip={"b.again"})
    assert module["b"].again is module["a"].unset and not module["a"].unset.is_meta
    assert isinstance(module["a"].unset, nn.Parameter)
    assert torch.equal(module["a"].weight, filled(lambda: nn.ModuleDict({"a": nn.Linear(4, 4)}))["a"].weight)


def test_a_module_cast_after_the_recording_keeps_its_dtype():
    _, module, fresh = recorded(lambda: nn.Linear(3, 3))
    fresh.fill(module.to(torch.bfloat16), SEED, CPU)
    assert torch.equal(module.weight, fresh.value("weight", SEED).bfloat16())


def test_a_module_cast_and_emptied_after_the_recording_is_filled_in_place():
    _, module, fresh = recorded(BUILDS["AutoencoderKL"])
    module.to(torch.bfloat16).to_empty(device=CPU)
    before = [p.data_ptr() for p in module.parameters()]
    fresh.fill(module, SEED, CPU)
    assert [p.data_ptr() for p in module.parameters()] == before
    reference = tensors(filled(BUILDS["AutoencoderKL"]))
    assert all(torch.equal(value, reference[key].bfloat16()) for key, value in tensors(module).items())


class Curious(nn.Module):
    """Asks for values while it is built."""

    def __init__(self):
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, 0.5, 4)] + torch.arange(3.0, device="cpu").tolist()
        table = np.outer(torch.arange(4.0).numpy(), np.asarray(torch.tensor([1.0, 2.0])))
        grid = torch.arange(9.0).view(3, 3)
        kept = grid[grid > 3] if bool((grid > 3).any()) else grid
        picked = torch.cat([grid[[0, 2], [1, 1]], grid[np.array([0, 1])].flatten(), grid[(0, 1), 2]])
        grid[grid > 7] = -1
        grid.as_strided((3, 3), (1, 1)).zero_()  # as many elements as the storage, some of them twice
        odd = torch.linalg.svd(grid.cos())[2][:, :2] + torch.fft.rfft2(grid.sin()).abs()  # columns first on the CPU
        for key, value in {"picked": picked, "grid": grid, "odd": odd}.items():
            self.register_buffer(key, value)
        for key, value in {"rates": torch.tensor(rates), "table": torch.as_tensor(table), "kept": kept}.items():
            self.register_buffer(key, value)
        self.register_buffer("like", self.rates.new_tensor([1, 2]) + torch.tensor([0.5], device=self.rates.device))
        array = np.arange(3.0)
        self.register_buffer("before", torch.from_numpy(array) * 2)
        array += 1
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)).conj())
        self.register_buffer("sines", self.turns.imag)
        real = torch.zeros(2).cpu().to("cpu")
        self.register_buffer("real", real.copy_(torch.arange(2)))


def test_a_constructor_may_look_at_values_that_are_not_random():
    mine, reference = tensors(filled(Curious)), tensors(Curious())
    assert all(torch.equal(mine[key], value) for key, value in reference.items())
    assert {key: value.dtype for key, value in mine.items()} == {key: v.dtype for key, v in reference.items()}


def of_parameter(make):
    """A constructor of a module whose only parameter `weight` comes from `make`."""

    def build():
        module = nn.Module()
        module.weight = nn.Parameter(make())
        return module

    return build


def cast(module):
    module.nested = [torch.ones(2)]
    return module


def aliased():
    module = nn.Linear(2, 2)
    module.other = nn.Parameter(module.weight[:1])
    return module


REAL = torch.zeros(2)
OUTSIDE = torch.empty(3, device="meta")
IMPOSSIBLE = {
    "random item": (lambda: torch.randn(1).item(), r"aten\._local_scalar_dense.*drawn at random by aten\.randn"),
    "random list": (
        lambda: torch.randn(3).tolist(),
        r"tolist asks for the values.*drawn at random by aten\.randn.*test_deferred",
    ),
    "random numpy": (lambda: torch.rand(2).numpy(), r"numpy asks for the values.*drawn at random by aten\.rand"),
    "draw on real": (lambda: REAL.normal_(), r"aten\.normal_.* draws random numbers for a tensor that"),
    "own seed": (lambda: torch.manual_seed(3), "a constructor seeds torch"),
    "sparse": (lambda: torch.eye(3).to_sparse() * 2, "cannot be recorded"),
}
UNMADE = {
    "generator": (of_parameter(lambda: torch.empty(3).normal_(generator=torch.Generator())), "aten.normal_.*its own"),
    "outside": (of_parameter(lambda: OUTSIDE * 2), "made outside of the recording"),
    "unset": (of_parameter(lambda: torch.empty(3)), "left unset by its constructor .aten.empty"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_constructor_that_needs_what_is_not_there_is_told_so_with_the_operation(case):
    act, message = IMPOSSIBLE[case]
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=message), recording():
        act()
    torch.set_rng_state(state)


@pytest.mark.parametrize("case", UNMADE)
def test_a_tensor_that_cannot_be_replayed_is_named_with_the_operation(case):
    build, message = UNMADE[case]
    with pytest.raises(UserError, match=f"weight .*{message}"):
        filled(build)


def test_tensors_that_would_be_left_behind_are_named():
    with pytest.raises(UserError, match=r"two parameters, \(2, 2\) and \(1, 2\), are views of one memory"):
        recorded(aliased)
    with pytest.raises(UserError, match=r"nested holds tensors in a list"):
        recorded(lambda: cast(nn.Linear(2, 2)))
    _, module, fresh = recorded(lambda: nn.Linear(2, 2))
    module.late = nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(UserError, match=r"late was not there when the module was recorded"):
        fresh.fill(module, SEED, CPU)


def test_what_a_constructor_leaves_unwritten_is_zero_and_not_what_the_memory_held():
    def build():
        table = torch.empty(100_000)
        table[:5] = 1
        return nn.ParameterDict({"table": table})

    torch.full((100_000,), 7.0)  # freed at once, and often given out again
    assert filled(build)["table"].sum() == 5


def test_a_tape_holds_to_the_default_dtype_of_its_time():
    def build():
        torch.set_default_dtype(torch.float64)
        try:
            return nn.ParameterDict({"w": torch.arange(3) * 0.1})
        finally:
            torch.set_default_dtype(torch.float32)

    assert torch.equal(filled(build)["w"], build()["w"]) and filled(build)["w"].dtype == torch.float64


VIEWS = (
    lambda t: t,
    lambda t: t[1:],
    lambda t: t[:, ::2],
    lambda t: t.T,
    lambda t: t.to("cpu").flatten(),
)
CHANGES = (
    lambda t, u: t.mul_(3),
    lambda t, u: t.zero_(),
    lambda t, u: t.fill_(u.sum() % 7),
    lambda t, u: t.copy_(u.flatten()[3].clone()),
    lambda t, u: t.add_(u.mean()),
    lambda t, u: t.view_as(t).clamp_(max=11),
    lambda t, u: u.data.copy_(u.flip(0).clone()),
    lambda t, u: setattr(t, "data", u.clone()),
)
STEPS = st.lists(st.tuples(*(st.integers(0, n - 1) for n in (3, 3, len(VIEWS), len(CHANGES)))), max_size=12)


@settings(max_examples=60)
@given(STEPS)
def test_any_order_of_views_changes_and_copies_replays_exactly(steps):
    def build():
        module = nn.ParameterDict({key: torch.arange(16.0).view(4, 4) + i for i, key in enumerate("xyz")})
        pool = list(module.values())
        with torch.no_grad():
            for target, source, view, change in steps:
                CHANGES[change](pool[target] if change == 7 else VIEWS[view](pool[target]), pool[source])
        return module

    mine, reference = filled(build), build()
    assert all(torch.equal(mine[key], reference[key]) for key in "xyz")


def test_a_full_size_network_is_recorded_without_memory_and_gives_single_tensors():
    for name in ("lvdm-short-sky", "lvdm-video-vae"):
        with recording() as tape:
            system = get(name).system.build()
        assert all(p.is_meta for p in system.trained.parameters())
        fresh = Fresh(tape, system.trained, system.frozen)
        last = [key for key in tensors(system.trained) if key.endswith("weight")][-4:]
        assert all(torch.isfinite(fresh.value(key, SEED)).all() for key in last)
        assert (
            sum(p.numel() for p in system.trained.parameters())
            == {"unet": 548_904_580, "vae": 19_446_759}[next(iter(system.trained))]
        )


def test_two_processes_fill_their_shards_with_the_values_of_one_and_hold_one_whole_parameter_at_most(tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.engine.deferred_ranks"]
    variables = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path)], cwd=REPO, env=variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    modules = whole()
    tied, reference = modules["tied"], tensors(modules)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert {re.sub("^emptied", "tied", key) for key in found["values"]} == reference.keys()
        for key, value in found["values"].items():
            assert torch.equal(value, reference[re.sub("^emptied", "tied", key)]), key
        for output in found["outputs"]:
            torch.testing.assert_close(output, tied(torch.arange(5)[None]))
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report.pop("ties") == [True, True]
        for part in report.values():
            # beside the shards that stay: one parameter, and its shard twice while it is copied
            assert part["peak"] <= part["kept"] + 2.1 * part["largest"] and part["peak"] < 0.8 * part["all"]
