"""Checkpoints under bad conditions: damage, a full disk, a write that fails."""

import json
import resource
import signal
import subprocess

import pytest
import torch

from core import checkpoint, manifest
from core.distributed import Ranks
from core.saver import Saver

HERE = Ranks(torch.device("cpu"), 0, 1, None)
NUMBERS = {name: {} for name in checkpoint.NUMBERS}


def save(folder, step, elements=1000, keep=None, told=None):
    """Save one tensor; returns why it failed, or None."""
    saver = Saver(
        folder, HERE, keep, lambda path, at, about: (told if told is not None else []).append((path.name, at))
    )
    saver.save({"weights.a": torch.full((elements,), float(step))}, NUMBERS | {"step": step}, "{}")
    saver.join()
    return saver.failure()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_is_told_of_when_it_is_whole_and_nothing_else_is_left(tmp_path):
    told = []
    assert save(tmp_path, 3, told=told) is None
    assert told == [("step-00000003", 3)] and names(tmp_path) == ["step-00000003"]
    assert manifest.damage(tmp_path / "step-00000003") is None
    assert {"manifest.json", "recipe.json", "state.json"} < set(names(tmp_path / "step-00000003"))


def test_what_is_saved_is_the_state_of_the_moment_not_that_of_the_writing(tmp_path):
    weight = torch.zeros(4_000_000)
    saver = Saver(tmp_path, HERE, None, lambda path, step, about: None)
    saver.save({"weights.a": weight}, NUMBERS | {"step": 1}, "{}")
    weight.fill_(7)
    saver.save({"weights.a": weight}, NUMBERS | {"step": 2}, "{}")
    weight.fill_(9)
    saver.join()
    found = {step: torch.zeros(4_000_000) for step in (1, 2)}
    for step, tensor in found.items():
        checkpoint.load(tmp_path / f"step-{step:08d}", {"weights.a": tensor}, HERE)
    assert {float(t.min()) for t in found.values()} == {0.0, 7.0} and float(found[1].max()) == 0.0


@pytest.mark.parametrize("file", ["state.json", "manifest.json", "recipe.json", "safetensors"])
@pytest.mark.parametrize("how", ["gone", "short", "flipped", "empty"])
def test_any_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(tmp_path, file, how):
    for step in (1, 2):
        save(tmp_path, step)
    path = next(p for p in (tmp_path / "step-00000002").iterdir() if p.name.endswith(file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    {
        "gone": path.unlink,
        "short": lambda: path.write_bytes(path.read_bytes()[:-1]),
        "flipped": lambda: path.write_bytes(bytes(content)),
        "empty": lambda: path.write_bytes(b""),
    }[how]()
    found, damaged = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(damaged) == 1 and damaged[0].startswith(f"{tmp_path / 'step-00000002'}: ")
    assert path.name in damaged[0] or file == "manifest.json"


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"files": []}', '{"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}', "[" * 100_000],
)
def test_a_manifest_that_is_none_is_damage_and_leads_nowhere(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").write_text(content)
    assert "manifest.json cannot be read" in manifest.damage(tmp_path / "step-00000001")


def test_rotation_counts_what_was_saved_now_and_before_never_what_lies_ahead(tmp_path):
    for step in (2, 4, 9):
        save(tmp_path, step)
    (tmp_path / "step-00000009" / "state.json").unlink()  # damaged: a run goes on from step 4
    assert save(tmp_path, 6, keep=1) is None
    assert names(tmp_path) == ["step-00000006", "step-00000009"]


def test_leftovers_of_a_kill_are_cleared_by_the_next_save(tmp_path):
    for left in (".partial-step-00000007", ".old-step-00000001"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "shard.safetensors").write_bytes(b"x")
    assert save(tmp_path, 8) is None
    assert names(tmp_path) == ["step-00000008"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    before = (tmp_path / "step-00000001" / "manifest.json").read_text()
    save(tmp_path, 1, elements=5)
    assert (tmp_path / "step-00000001" / "manifest.json").read_text() != before and names(tmp_path) == ["step-00000001"]


def test_a_write_that_fails_is_said_and_the_last_good_one_stays(tmp_path):
    save(tmp_path, 1, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        failure = save(tmp_path, 2, elements=100_000, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "step-00000002 could not be written" in failure and "File too large" in failure
    assert names(tmp_path) == ["step-00000001"] and checkpoint.newest(tmp_path)[0].name == "step-00000001"
    assert save(tmp_path, 3, keep=1) is None and names(tmp_path) == ["step-00000003"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs rights that are not given here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_without_room_is_found_before_anything_is_written_or_removed(small_disk):
    assert save(small_disk, 1, elements=100_000, keep=1) is None
    failure = save(small_disk, 2, elements=200_000, keep=1)
    assert "it needs 0.8 MiB and the disk has 0.6 MiB free" in failure
    assert names(small_disk) == ["step-00000001"] and manifest.damage(small_disk / "step-00000001") is None
    assert json.loads((small_disk / "step-00000001" / "state.json").read_text())["step"] == 1
