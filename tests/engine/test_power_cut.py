"""What the disk has when the power goes: the order in which a checkpoint is synced, named, and the old one removed."""

import os
import shutil
from pathlib import Path

import pytest

from tests.engine.test_saver import save


@pytest.fixture
def journal(monkeypatch):
    """Every sync, rename and removal, in order: (what, inode or paths). All are done as ever."""
    told: list[tuple] = []
    fsync, replace, rmtree = os.fsync, Path.replace, shutil.rmtree

    def syncing(handle):
        fsync(handle)
        told.append(("sync", os.fstat(handle).st_ino))

    def renaming(path, target):
        told.append(("rename", path.name, Path(target).name))
        return replace(path, target)

    def removing(path, *args, **kwargs):
        told.append(("remove", Path(path).name))
        return rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", renaming)
    monkeypatch.setattr(shutil, "rmtree", removing)
    return told


def test_everything_is_on_the_disk_before_it_has_its_name_and_before_anything_is_removed(tmp_path, journal):
    save(tmp_path, 1, keep=1)
    journal.clear()
    assert save(tmp_path, 2, keep=1) is None
    folder = tmp_path / "step-00000002"
    named = journal.index(("rename", ".partial-step-00000002", "step-00000002"))
    synced = {entry[1] for entry in journal[:named] if entry[0] == "sync"}
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= synced
    manifest = journal.index(("sync", (folder / "manifest.json").stat().st_ino))
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert all(journal.index(("sync", path.stat().st_ino)) < manifest for path in files)
    removed = journal.index(("rename", "step-00000001", ".old-step-00000001"))
    assert ("sync", tmp_path.stat().st_ino) in journal[named:removed]
    assert not any(entry[0] == "remove" for entry in journal[:removed])
