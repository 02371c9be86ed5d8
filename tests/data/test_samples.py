"""A sample is a pure function of (seed, epoch, id); a bad one is replaced by a chain that is too."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.hashing import hash_of
from data.samples import BadSample, Sample, Samples, collate

NAMES = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=30, unique=True)
SEED = st.integers(-(2**63), 2**63)
EPOCH = st.integers(0, 10_000)


class Numbers(Samples):
    """One random number a sample; the names in `broken` cannot be read."""

    def __init__(self, ids: list[str], broken: frozenset[str] = frozenset()):
        super().__init__(ids, fingerprint="numbers", dropped={"too small": 2})
        self.broken = broken

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        if self.ids[index] in self.broken:
            raise BadSample(f"{self.ids[index]}.txt", "broken")
        return {"value": torch.tensor(rng.random())}


@given(NAMES, SEED, EPOCH)
def test_an_epochs_order_is_the_permutation_that_sorts_the_hashes(names: list[str], seed: int, epoch: int):
    order = Numbers(names).order(seed, epoch)
    assert sorted(order) == list(range(len(names)))
    hashes = [hash_of(seed, epoch, names[index]) for index in order]
    assert hashes == sorted(hashes)


@given(NAMES, SEED, EPOCH, st.data())
def test_a_part_of_the_data_is_visited_in_the_same_relative_order(
    names: list[str], seed: int, epoch: int, data: st.DataObject
):
    part = data.draw(st.permutations(names))[: 1 + len(names) // 2]
    whole_order = [names[index] for index in Numbers(names).order(seed, epoch)]
    part_order = [part[index] for index in Numbers(part).order(seed, epoch)]
    assert part_order == [name for name in whole_order if name in part]


def test_seed_and_epoch_each_give_another_order():
    numbers = Numbers([str(i) for i in range(100)])
    orders = {tuple(numbers.order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_sample_is_first_about_equally_often():
    numbers = Numbers(list("abcd"))
    firsts = np.bincount([numbers.order(0, epoch)[0] for epoch in range(2000)], minlength=4)
    assert firsts.min() > 400


@given(NAMES, SEED, EPOCH)
def test_a_sample_depends_on_its_name_and_not_on_its_index_or_place(names: list[str], seed: int, epoch: int):
    one, other = Numbers(names), Numbers(names[::-1])
    last = len(names) - 1
    for index in range(len(names)):
        a, b = one[seed, epoch, index, 3], other[seed, epoch, last - index, 7]
        assert (a["id"], a["value"], a["place"], b["place"]) == (b["id"], b["value"], 3, 7)


def test_seed_and_epoch_each_give_other_randomness():
    numbers = Numbers(["a"])
    assert len({float(numbers[seed, epoch, 0, 0]["value"]) for seed in range(4) for epoch in range(4)}) == 16


def test_a_bad_sample_is_replaced_along_its_hash_chain_and_named():
    names = [f"n{i}" for i in range(10)]
    chain = [hash_of(1, 2, "n4", attempt) % 10 for attempt in (1, 2, 3)]
    broken = frozenset({"n4", names[chain[0]], names[chain[1]]}) - {names[chain[2]]}
    sample = Numbers(names, broken)[1, 2, 4, 0]
    good = next(index for index in chain if names[index] not in broken)
    assert sample["id"] == names[good]
    assert sample["value"] == Numbers(names)[1, 2, good, 0]["value"]
    before = [4, *chain[: chain.index(good)]]
    assert sample["bad"] == [(f"{names[index]}.txt", "broken") for index in before]


def test_nine_bad_samples_in_a_row_are_an_error_that_names_the_first_and_the_last():
    names = [f"n{i}" for i in range(50)]
    last = names[hash_of(0, 0, "n7", 8) % 50]
    with pytest.raises(UserError, match=rf"9 samples in a row.* first is n7\.txt \(broken\), the last {last}\.txt"):
        Numbers(names, frozenset(names))[0, 0, 7, 0]


def test_the_eighth_replacement_is_still_tried():
    names = [f"n{i}" for i in range(50)]
    chain = [hash_of(0, 0, "n7", attempt) % 50 for attempt in range(1, 9)]
    assert chain[7] not in chain[:7]
    sample = Numbers(names, frozenset(names) - {names[chain[7]]})[0, 0, 7, 0]
    assert (sample["id"], len(sample["bad"])) == (names[chain[7]], 8)


def test_a_batch_stacks_tensors_lists_names_and_joins_what_was_bad():
    numbers = Numbers(["a", "b"], frozenset({"a"}))
    batch = collate([numbers[0, epoch, 0, epoch] for epoch in range(20) if _replaced_by_b(epoch)])
    count = len(batch["id"])
    assert batch["value"].shape == (count,) and count > 5
    assert batch["id"] == ["b"] * count
    assert batch["place"] == [epoch for epoch in range(20) if _replaced_by_b(epoch)]
    assert set(batch["bad"]) == {("a.txt", "broken")} and len(batch["bad"]) >= count


def _replaced_by_b(epoch: int) -> bool:
    return any(hash_of(0, epoch, "a", attempt) % 2 == 1 for attempt in range(1, 9))


def test_samples_of_two_shapes_in_one_batch_are_an_error_that_names_them():
    small, large = ({"x": torch.zeros(size), "id": f"clip{size}"} for size in (2, 3))
    with pytest.raises(UserError, match=r"x of clip2 is \[2\] and of clip3 \[3\].*spatial_transform"):
        collate([small, large])


def test_a_worker_gets_no_hashes_and_draws_the_same_order():
    numbers = Numbers([f"{i:06}" for i in range(1000)])
    order, size = numbers.order(0, 0), len(pickle.dumps(numbers))
    assert size < 1000 * 12
    assert (pickle.loads(pickle.dumps(numbers)).order(0, 0) == order).all()  # noqa: S301


def test_a_bad_sample_survives_pickling():
    fault = pickle.loads(pickle.dumps(BadSample("a.jpg", "truncated")))  # noqa: S301
    assert (fault.name, fault.reason, str(fault)) == ("a.jpg", "truncated", "a.jpg: truncated")


def test_a_dataset_describes_what_it_holds_and_what_it_dropped():
    assert Numbers(["a"]).describe() == {"samples": 1, "fingerprint": "numbers", "dropped: too small": 2}
