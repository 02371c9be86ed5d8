"""Shared ground of the tests: a small sky on disk, a migrated MLflow store, few threads, no telemetry."""

import multiprocessing
import os
import shutil
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("here", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("here")

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
LONG = ("claims", "soak")
"""Marks of what takes minutes or hours."""


def pytest_collection_modifyitems(config, items):
    """`-m claims` or `-m soak` runs the long ones; without it they are left out."""
    unasked = [name for name in LONG if name not in (config.getoption("-m") or "")]
    keep, drop = [], []
    for item in items:
        (drop if any(map(item.get_closest_marker, unasked)) else keep).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep


def pytest_collection_finish(session):
    """What processes are forked from is started here, in the repository's root: a test may be in another folder."""
    multiprocessing.set_forkserver_preload(["tests.engine.preloaded"])  # the last call counts, for the whole process
    if "tests.engine.processes" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """Two, shared among the processes of the suite."""
    import torch

    torch.set_num_threads(2 if PROCESSES == 1 and (os.cpu_count() or 1) > 1 else 1)


@pytest.fixture(scope="session")
def sky(tmp_path_factory) -> Path:
    """A small synthetic sky in the real layout: 6 training and 4 test videos of 20 frames at 64 x 64. Beside it, in the
    folder clouds, as many captioned clips, and in pictures parts of 8 and 4 captioned pictures.
    """
    from data.laion import synthetic, write_part
    from data.synthetic import write_sky
    from data.synthetic_captions import write_clouds

    root = tmp_path_factory.mktemp("sky")
    write_clouds(root / "clouds", train_clips=6, test_clips=4, seed=7)
    for split, count in (("train", 8), ("test", 4)):
        (root / "pictures" / split).mkdir(parents=True)
        write_part(root / "pictures" / split / "part-00000.gz", synthetic(split, count, seed=7))
    write_sky(root / "sky", train_videos=6, test_videos=4, clips_per_video=1, frames=20, size=64, seed=7)
    return root / "sky"


@pytest.fixture(scope="session")
def _migrated_store(tmp_path_factory) -> Path:
    """A sqlite store with MLflow's tables in it: making one takes seconds, copying it nothing."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(_migrated_store, tmp_path) -> str:
    """The URI of a fresh sqlite store."""
    path = tmp_path / "mlflow.db"
    shutil.copy(_migrated_store, path)
    return f"sqlite:///{path}"
