"""Every twin on four ranks, as two machines of two: sharded within a machine, replicated across them."""

import pytest
import torch

from tests.engine.processes import run_ranks
from tests.engine.running import TWINS, losses, short
from tests.engine.test_distributed import LENGTH, exported

pytestmark = pytest.mark.claims


@pytest.mark.parametrize("name", TWINS)
def test_four_ranks_as_two_by_two_give_the_losses_and_weights_of_one(sky, store, tmp_path, name):
    words = f"{LENGTH} --batch-size 1 --parallel.shard None --parallel.shard-frozen-from 0"
    one = run_ranks(short(name, sky, words), 1, tmp_path / "one", store)
    four = run_ranks(short(name, sky, words), 4, tmp_path / "four", store, timeout=1000.0, local=2)
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    mine, reference = exported(four), exported(one)
    assert mine.keys() == reference.keys()
    for key in mine:
        assert torch.allclose(mine[key], reference[key], atol=1e-5), key
    parts = {path.parent.name for path in four.glob("checkpoints/*/*.safetensors")}
    assert len(list(four.glob("checkpoints/*/*.safetensors"))) >= 2 and len(parts) == 1
