"""Blocks that are compiled: how often, and that they compute the same. torch's own back ends that generate no code stand
for inductor, whose compiling takes minutes (tests/claims).
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from core.blocks import VARIANTS, compile_blocks
from tests.engine.compiled_ranks import Net, main
from tests.engine.processes import SERVER
from tests.tracking.servers import free_port

BLOCKS = 9


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, which it means to hide
def test_each_block_is_compiled_for_one_shape_then_for_any_and_without_gradients_anew(fresh):
    plain, net = Net(range(2, 2 + BLOCKS)), Net(range(2, 2 + BLOCKS))
    net.load_state_dict(plain.state_dict())
    counter = CompileCounter()
    compile_blocks(list(net.blocks), counter)
    graphs = []
    for training in (True, False):
        for batch, length in ((2, 6), (2, 6), (3, 9), (4, 7)):
            x = torch.randn(batch, 4, length)
            with torch.set_grad_enabled(training):
                torch.testing.assert_close(net.train(training)(x), plain.train(training)(x))
            graphs.append(counter.frame_count / BLOCKS)
    # more than 8 blocks of one class, and still each has its own: torch would count them together
    assert graphs[:4] == [1, 1, 2, 2] and graphs[-1] <= 2 * graphs[3] <= VARIANTS, graphs


def test_sharded_checkpointed_and_compiled_blocks_have_the_gradients_of_plain_ones(tmp_path):
    port = free_port()
    processes = [SERVER.Process(target=main, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        expected, got, graphs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert graphs >= 3  # a block at least one: nothing fell back to what is not compiled
        assert got.keys() == expected.keys()
        for name in got:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
