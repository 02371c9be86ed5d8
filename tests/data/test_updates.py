"""Updates of one bucket each: what holds for any set of shapes, any sizes, any ranks."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UserError
from core.hashing import mix64_array
from core.positions import START, Bucketed
from data.plan.updates import Updates, costs, micro_of, update_sizes
from data.slots import Buckets


class Set:
    """Samples of given buckets; the first bucket holds images. `drawn`: another bucket for some, epoch by epoch."""

    def __init__(self, counts: list[int], drawn: bool = False) -> None:
        self.own = np.repeat(np.arange(len(counts)), counts)
        self.shapes = np.array([[1 + 4 * n, 32 + 32 * n, 64] for n in range(len(counts))])
        self.fixed = not drawn

    def hashes(self) -> np.ndarray:
        return mix64_array(np.arange(len(self.own), dtype=np.uint64))

    def images(self) -> np.ndarray:
        return np.arange(len(self.shapes)) == 0

    def buckets(self, seed: int, epoch: int) -> np.ndarray:
        if self.fixed:
            return self.own
        moved = np.random.default_rng([seed, epoch]).random(len(self.own)) < 0.5
        return np.where(moved, -1, self.own)

    def item(self, number: np.ndarray, bucket: int) -> np.ndarray:
        return number + len(self.own) * (bucket + 1)


def stream(found: Updates, updates: int, position: tuple[int, int] = (0, 0)) -> list[list[Any]]:
    out = []
    for _ in range(updates):
        keys, position = found.update(position)
        out.append(keys)
    return out


def made(data: Set, size: int, seed: int = 0, **fields: Any) -> Updates:
    slot = Buckets(**fields)
    tokens = data.shapes.prod(axis=1) // 256
    return Updates(data, slot, np.full(len(data.shapes), size), costs(slot, tokens), seed)


COUNTS = st.lists(st.integers(0, 23), min_size=1, max_size=5).filter(any)
REMAINDERS = st.sampled_from(["carry", "drop", "short"])
few = settings(max_examples=40, deadline=None)


@few
@given(COUNTS, st.integers(1, 9), st.integers(0, 3), REMAINDERS)
def test_an_update_is_of_one_bucket_and_a_sample_comes_at_most_once_an_epoch(counts, size, seed, remainder):
    data = Set(counts)
    found = made(data, size, seed, remainder=remainder)
    if remainder == "drop" and max(counts) < size:
        with pytest.raises(UserError, match=r"data\.buckets\.remainder"):
            found.update((0, 0))
        return
    updates = stream(found, 60)
    for keys in updates:
        assert len({key[2] // len(data.own) for key in keys}) == 1
        assert [key[3] for key in keys] == list(range(len(keys)))
        assert all(data.own[key[2] % len(data.own)] == found.bucket_of(keys) for key in keys)
        assert len(keys) == size or remainder == "short"
    seen = Counter((key[1], key[2]) for keys in updates for key in keys)
    assert max(seen.values()) == 1


@few
@given(COUNTS, st.integers(1, 9))
def test_with_carry_no_sample_of_an_epoch_is_lost(counts, size):
    found = made(Set(counts), size)
    position, keys = (0, 0), []
    while position[0] < 4:
        new, position = found.update(position)
        keys += new
    assert {key[2] % sum(counts) for key in keys if key[1] == 2} == set(range(sum(counts)))


@few
@given(COUNTS, st.integers(1, 6), st.integers(0, 25), REMAINDERS.filter(lambda r: r != "drop"))
def test_a_run_goes_on_from_any_position_with_what_it_would_have_seen(counts, size, stop, remainder):
    found, position = made(Set(counts), size, remainder=remainder), (0, 0)
    whole = stream(found, stop + 5)
    for _ in range(stop):
        _, position = found.update(position)
    assert stream(made(Set(counts), size, remainder=remainder), 5, position) == whole[stop:]


@few
@given(COUNTS, st.integers(1, 3), st.sampled_from([1, 2, 4, 8]), st.integers(1, 9))
def test_ranks_share_an_update_without_overlap_and_hold_one_shape_each_time(counts, groups, ranks, held):
    data = Set(counts)
    found = made(data, groups * 8, multiple=8)
    micro = micro_of(Buckets(rank_budget=held * 40), 1)
    plan = Bucketed(found, micro, ranks)
    of_rank = [list(plan.rank(rank, ranks, START, 6)) for rank in range(ranks)]
    assert len({len(batches) for batches in of_rank}) == 1  # equal steps
    for together in zip(*of_rank, strict=True):
        assert len({(len(keys), found.bucket_of(keys)) for keys in together}) == 1
        cost = found.cost[found.bucket_of(together[0])]
        assert len(together[0]) * cost <= held * 40 or len(together[0]) == 1
    keys = sorted((key for batches in of_rank for keys in batches for key in keys), key=str)
    assert keys == sorted((key for keys in stream(found, 6) for key in keys), key=str)


def test_epochs_and_seeds_have_orders_of_their_own():
    def epoch(seed: int, number: int) -> list[int]:
        found, position, items = made(Set([30, 40]), 5, seed), (number, 0), []
        while position[0] == number:
            keys, position = found.update(position)
            items += [key[2] for key in keys]
        return items[:70]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(0, 0)), tuple(epoch(0, 1)), tuple(epoch(1, 0))}) == 3


@few
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 0.9), st.integers(0, 3))
def test_images_and_videos_come_at_the_share_that_was_set(images, videos, share, epoch):
    found = made(Set([images, videos // 2, videos - videos // 2]), 1, image_share=share, remainder="drop")
    plan = found.epoch(epoch)
    drawn = int((plan.bucket == 0).sum())
    total = min(images / share, videos / (1 - share))
    assert abs(drawn - total * share) <= 0.5 and abs(len(plan.bucket) - drawn - total * (1 - share)) <= 0.5


def test_samples_in_excess_of_the_share_change_from_epoch_to_epoch():
    found = made(Set([100, 10]), 1, image_share=0.5, remainder="drop")
    seen = {key[2] for epoch in range(40) for keys in stream(found, 20, (epoch, 0)) for key in keys}
    assert len(seen) > 100


def test_where_buckets_are_drawn_each_epoch_nothing_is_carried():
    data = Set([40, 40], drawn=True)
    with pytest.raises(UserError, match=r"data\.buckets\.remainder = carry"):
        made(data, 4)
    updates = stream(made(data, 4, remainder="drop"), 60)
    assert max(Counter((key[1], key[2]) for keys in updates for key in keys).values()) == 1
    for keys in updates:
        drawn = data.buckets(0, keys[0][1])
        assert len({drawn[key[2] % 80] for key in keys}) == 1


def test_sizes_come_from_a_table_or_from_a_budget():
    cost, shapes = np.array([880.0, 21120.0]), ["1x352x640", "93x352x640"]
    by_tokens = Buckets(batch="tokens", budget=200_000, multiple=4)
    assert update_sizes(by_tokens, shapes, cost, 1, None).tolist() == [224, 8]
    table = Buckets(batch="table", sizes=("1x*=64", "*=8"), multiple=8)
    assert update_sizes(table, shapes, cost, 1, None).tolist() == [64, 8]
    assert micro_of(Buckets(bytes_per_token=1e6, reserve_gb=10), 1, 80 * 2**30)(21120.0) == 3
    with pytest.raises(UserError, match=r"93x352x640 cost: 84480"):
        update_sizes(Buckets(batch="tokens", budget=50_000, multiple=4), shapes, cost, 1, None)
    with pytest.raises(UserError, match="has no entry for 93x352x640"):
        update_sizes(Buckets(batch="table", sizes=("1x*=64",)), shapes, cost, 1, None)
    with pytest.raises(UserError, match=r"cannot be shared by 3 ranks"):
        found = made(Set([8]), 4)
        found.micro_batch(found.update((0, 0))[0], 3, micro_of(Buckets(), 1))
