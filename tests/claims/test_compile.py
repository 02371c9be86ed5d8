"""That compiled blocks train as plain ones do. Minutes of compiling, so it is no part of the suite."""

import pytest

from tests.engine.running import losses, run_here, short

pytestmark = pytest.mark.claims


def test_compiled_blocks_give_the_losses_of_plain_ones(sky, store, tmp_path):
    by = {}
    for compiled in ("False", "True"):
        recipe = short("lvdm-short-sky-tiny", sky, f"--max-steps 4 --loop.compile {compiled}")
        by[compiled] = losses(run_here(recipe, tmp_path / compiled, store).output_dir)
    assert by["True"] == pytest.approx(by["False"], rel=1e-3)
