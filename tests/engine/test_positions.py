"""Which samples make which update."""

from itertools import chain

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.hashing import hash_of
from core.loader import batches
from core.positions import Plan, Position
from data.samples import Samples


class Numbered:
    """A dataset of `n` samples whose order is a hash of (seed, epoch, index)."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.argsort([hash_of(seed, epoch, i) for i in range(self.n)])


shapes = st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))


def walk(plan: Plan, start: Position, updates: int):
    position, out = start, []
    for _ in range(updates):
        keys, position = plan.update(position)
        out.append(keys)
    return out, position


@given(shapes)
def test_every_sample_is_seen_exactly_once_an_epoch(shape):
    n, micro, ranks, accumulation, seed = shape
    plan = Plan(Numbered(n), seed, micro * ranks * accumulation, micro)
    updates, _ = walk(plan, Position(), 2 * n)
    seen = [(key.epoch, key.item) for key in chain(*updates)]
    last = seen[-1][0]
    for epoch in range(last):
        assert sorted(i for e, i in seen if e == epoch) == list(range(n))
    assert len(set(seen)) == len(seen)


@given(shapes, st.integers(0, 10))
def test_a_prefix_and_the_rest_from_its_end_are_the_whole(shape, cut):
    n, micro, ranks, accumulation, seed = shape
    plan = Plan(Numbered(n), seed, micro * ranks * accumulation, micro)
    whole, _ = walk(plan, Position(), 12)
    first, position = walk(plan, Position(), cut)
    rest, _ = walk(Plan(Numbered(n), seed, micro * ranks * accumulation, micro), position, 12 - cut)
    assert first + rest == whole


@given(shapes)
def test_the_ranks_share_out_the_update_without_overlap(shape):
    n, micro, ranks, accumulation, seed = shape
    plan = Plan(Numbered(n), seed, micro * ranks * accumulation, micro)
    whole, _ = walk(plan, Position(), 3)
    parts = [list(plan.rank(r, ranks, Position(), 3)) for r in range(ranks)]
    for update in range(3):
        mine = [keys for part in parts for keys in part[update * accumulation : (update + 1) * accumulation]]
        assert sorted(chain(*mine), key=lambda k: k.place) == whole[update]
        assert all(len(keys) == micro for keys in mine)


@given(shapes)
def test_the_samples_of_an_update_do_not_depend_on_the_micro_batch(shape):
    n, micro, ranks, accumulation, seed = shape
    total = micro * ranks * accumulation
    assert walk(Plan(Numbered(n), seed, total, micro), Position(), 3) == walk(
        Plan(Numbered(n), seed, total, total), Position(), 3
    )


def test_another_seed_or_epoch_is_another_order():
    plan = lambda seed: [k.item for k in Plan(Numbered(30), seed, 30, 30).update(Position())[0]]  # noqa: E731
    assert plan(1) != plan(2)
    first, second = walk(Plan(Numbered(30), 1, 30, 30), Position(), 2)[0]
    assert [k.item for k in first] != [k.item for k in second]


def test_a_far_position_costs_no_replay():
    plan = Plan(Numbered(10), 0, 4, 2)
    keys, after = plan.update(Position(1_000_000, 8))
    assert [k.epoch for k in keys] == [1_000_000] * 2 + [1_000_001] * 2
    assert after == Position(1_000_001, 2)


class Counted(Samples):
    """Numbers as samples; counts what is asked of it."""

    def __init__(self, n: int) -> None:
        super().__init__([str(i) for i in range(n)], fingerprint="")
        self.asked: list[tuple[str, int]] = []

    def order(self, seed: int, epoch: int) -> np.ndarray:
        self.asked.append(("order", epoch))
        return super().order(seed, epoch)

    def read(self, index: int, rng: np.random.Generator) -> dict:
        self.asked.append(("read", index))
        return {"pixel_values": torch.zeros(())}


def test_a_resume_far_on_asks_the_dataset_for_no_more_than_a_start():
    asked = []
    for position in (Position(), Position(100_000 * 4 // 50, 100_000 * 4 % 50)):
        dataset = Counted(50)
        plan = Plan(dataset, 0, 4, 2)
        stream = batches(dataset, plan.rank(0, 1, position, 3), workers=0, pin=False)
        assert len(list(stream)) == 6
        asked.append(dataset.asked)
    begun, resumed = ([kind for kind, _ in each] for each in asked)
    assert resumed == begun == ["order"] + ["read"] * 12
    assert asked[1][0] == ("order", 8000)
