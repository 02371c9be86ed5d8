"""Each tiny twin, killed at random moments again and again: `make soak`. Prints what was survived, and restart times."""

import os
import random
import statistics
from collections import Counter

import pytest

from tests.engine.faults import MOMENTS
from tests.engine.running import TWINS
from tests.engine.test_faults import assert_the_same, undisturbed_and_under_fire

pytestmark = pytest.mark.soak
KILLS = int(os.environ.get("KILLS", "40"))
"""Kills of a twin: half of them with data read in the process, half with two workers."""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", TWINS)
def test_a_run_survives_every_kill_bit_for_bit(name, workers, sky, store, tmp_path):
    wanted = max(1, KILLS // 2)
    seed = int(os.environ.get("SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
    moments = random.Random(seed).choices(MOMENTS, k=wanted)
    steps = 14 + 4 * wanted  # a kill comes after six updates at most, and costs those since the last checkpoint
    print(f"\n{name}, {workers} workers, {steps} updates, SOAK_SEED={seed}")
    calm, fire, kills = undisturbed_and_under_fire(
        name, sky, store, tmp_path, moments, seed, workers, steps, patience=30.0 * steps
    )
    print(f"  {len(kills.moments)} kills survived: {dict(Counter(kills.moments).most_common())}")
    if kills.restart_s:
        middle, most = statistics.median(kills.restart_s), max(kills.restart_s)
        print(f"  from start to the first update: median {middle:.1f} s, longest {most:.1f} s")
    assert_the_same(calm, fire, store, steps)
    assert len(kills.moments) == wanted
