"""All records of a slot's parts as one table: which are of the split, what they are called, and their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from core.errors import UserError
from core.hashing import hash_of, hash_text, mix64_array
from data.formats import Format
from data.part_lists import Found, Part, find
from data.part_order import Chunks, Mixture
from data.part_reading import Latest, Place, Reader
from data.parts import Index, indices
from data.records import Record, of_line, of_tar
from data.samples import BadSample

if TYPE_CHECKING:
    from data.slots import Base64Parts

FEW = 3  # bad parts are no verdict on a data set, whatever their share
TRIED = 24  # records of a list that are tried at the start: with none of them readable, its format is wrong
SEEN = 64  # chunks of which it is known which rows are of the split
RANGE = 2.0**64  # of hashes


class Used(NamedTuple):
    """A part whose index is there, and the number of the entry that it belongs to."""

    part: Part
    indexed: Index
    entry: int


class Table(NamedTuple):
    """Every chunk of every part (C,): its part, its number in the part, its first row, how many of its rows are of the
    split, and the number of the first of those among all records.
    """

    parts: np.ndarray
    numbers: np.ndarray
    rows: np.ndarray
    sizes: np.ndarray
    firsts: np.ndarray


class Side(NamedTuple):
    """Which records are of the split: those whose hash is below `border` are held out. None: all are."""

    border: int
    held_out: bool | None

    def of(self, part: Part, first: int, behind: int) -> np.ndarray:
        """Whether each of some rows of a part is of the split."""
        if self.held_out is None:
            return np.ones(behind - first, bool)
        return (_hashes(part, first, behind) < np.uint64(self.border)) == self.held_out


class Records:
    """The records of a `Base64Parts` slot's split, from 0 on: list after list, part after part, line after line.

    Raises UserError when lists or parts are missing, or are not what was expected. It pickles without what only the
    order needs.
    """

    def __init__(self, slot: Base64Parts):
        found = find(slot)
        self.told = found.told
        self.formats = [entry.format for entry in found.entries]
        self.weights = [entry.weight for entry in found.entries]
        self.used = _used(found, slot.max_bad_share)
        self.dropped = dict(found.dropped)
        self.side = _side(slot, found, self.used)
        self.reader = Reader([used.part for used in self.used], [used.indexed for used in self.used])
        self.table = _table(self.used, self.side)
        if not len(self):
            raise UserError(_explain_share(slot))
        self._mixture: Mixture | None = None
        self._of_split: Latest[np.ndarray] = Latest(SEEN)
        for number, entry in enumerate(found.entries):
            self._try(number, entry.name)

    def __len__(self) -> int:
        return int(self.table.firsts[-1] + self.table.sizes[-1]) if len(self.table.firsts) else 0

    @property
    def fingerprint(self) -> str:
        """Of names and contents of the parts, what is read of them, and how much of each list."""
        words = [word for used in self.used for word in (used.part.name, used.indexed.digest, used.entry)]
        stated = [str(word) for words in zip(self.formats, self.weights, strict=True) for word in words]
        return f"{hash_of(*words, *stated, self.side.border, str(self.side.held_out)):016x}"

    @property
    def mixture(self) -> Mixture:
        """How the lists are drawn from; made when first asked for."""
        if self._mixture is None:
            self._mixture = self._mixed()
        return self._mixture

    def name(self, record: int) -> str:
        """`<part>:<line>`; of a shard the number of the record. Lines count from 1."""
        part, _, row = self._row(record)
        return f"{self.used[part].part.name}:{self.reader.row(part, row)[0]}"

    def record(self, record: int) -> Record:
        """Raises BadSample."""
        return self._read(*self._row(record))

    def chunk(self, record: int) -> tuple[int, int]:
        """Number of the first record of the same chunk, and how many it has."""
        chunk = self._chunk(record)
        return int(self.table.firsts[chunk]), int(self.table.sizes[chunk])

    def _chunk(self, record: int) -> int:
        """The last of those that begin at or before it: chunks without records begin where the next one does."""
        return int(np.searchsorted(self.table.firsts, record, side="right")) - 1

    def _row(self, record: int) -> tuple[int, int, int]:
        """Part, chunk in the part, and row in the part."""
        chunk = self._chunk(record)
        rows = self._of_split.get(chunk, lambda: self._rows(chunk))
        row = int(rows[record - int(self.table.firsts[chunk])])
        return int(self.table.parts[chunk]), int(self.table.numbers[chunk]), row

    def _rows(self, chunk: int) -> np.ndarray:
        """The rows of a chunk that are of the split."""
        part, number = self.used[int(self.table.parts[chunk])], int(self.table.numbers[chunk])
        first, behind = part.indexed.chunks[number : number + 2].tolist()
        return first + np.flatnonzero(self.side.of(part.part, first, behind))

    def _read(self, part: int, chunk: int, row: int) -> Record:
        form = self.formats[self.used[part].entry]
        number, *places = self.reader.row(part, row)
        name = f"{self.used[part].part.name}:{number}"
        if not form.tar:
            return of_line(name, self.reader.bytes_at(Place(part, chunk, *places)), form)
        picture, text = (self.reader.bytes_at(Place(part, chunk, *places[at : at + 2])) for at in (0, 2))
        return of_tar(name, picture, text, bool(places[4]))

    def _mixed(self) -> Mixture:
        """Lists without a record of the split are left out."""
        owners = np.array([used.entry for used in self.used])[self.table.parts]
        hashes = np.concatenate([_hashes(used.part, 0, len(used.indexed.chunks) - 1, "chunk") for used in self.used])
        lists, weights = [], []
        for entry, weight in enumerate(self.weights):
            mine = owners == entry
            if self.table.sizes[mine].sum():
                first = int(self.table.firsts[mine][0])
                lists.append(Chunks(hashes[mine], self.table.sizes[mine], first))
                weights.append(weight)
        return Mixture(lists, weights)

    def _try(self, entry: int, name: str) -> None:
        """Read the first records of an entry's first part; with none of them there, the format is not what it is said
        to be.
        """
        part = next(number for number, used in enumerate(self.used) if used.entry == entry)
        wrong = []
        for row in range(min(TRIED, int(self.used[part].indexed.chunks[1]))):
            try:
                self._read(part, 0, row)
                return
            except BadSample as fault:
                wrong.append(fault)
        raise UserError(
            f"none of the first {len(wrong)} records of {self.used[part].part.name} ({name}) can be read: {wrong[0]}. "
            f"Is its format stated ({_said(self.formats[entry])})? Say another with --data.format, or in the list, as "
            "format=caption=0,image=2."
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mixture": None}


class Names(Sequence[str]):
    """The names of records, read when asked for. A record that an epoch draws again has a number behind its name."""

    def __init__(self, records: Records):
        self.records, self.total = records, len(records)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, place: int) -> str:  # type: ignore[override]  # nobody asks for a slice of billions
        again, record = divmod(place, self.total)
        return f"{self.records.name(record)}#{again}" if again else self.records.name(record)

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(self.total))


def _hashes(part: Part, first: int, behind: int, what: str = "row") -> np.ndarray:
    """(behind - first,) uint64 that belong to rows, or chunks, of a part of this name."""
    salt = np.uint64(hash_text(f"{what} {part.name}"))
    return mix64_array(mix64_array(np.arange(first, behind, dtype=np.uint64)) ^ salt)


# ---- what is used ---------------------------------------------------------------------------------------------------


def _used(found: Found, max_bad_share: float) -> list[Used]:
    """The parts that have an index. Raises UserError where too many have none."""
    parts = [(part, number) for number, entry in enumerate(found.entries) for part in entry.parts]
    made = indices([(part, found.entries[number].format.tar) for part, number in parts])
    bad, used = list(found.missing), []
    for (part, number), index in zip(parts, made, strict=True):
        if isinstance(index, str):
            bad.append((part.name, index))
            continue
        used.append(Used(part, index, number))
        if index.fault:
            bad.append((part.name, f"{index.fault}; what comes before is used"))
        if index.too_long:
            found.dropped.add("records that are too long", part.name, index.too_long)
    for name, reason in bad:
        found.dropped.add(f"parts: {reason}", name)
    if not used or len(bad) > max(FEW, max_bad_share * (len(parts) + len(found.missing))):
        raise UserError(_explain_bad(found, bad, len(parts) + len(found.missing), max_bad_share))
    for number in set(range(len(found.entries))) - {part.entry for part in used}:
        raise UserError(f"none of the parts of {found.entries[number].name} can be used: {_examples(bad)}")
    return used


def _table(used: list[Used], side: Side) -> Table:
    columns: list[tuple[np.ndarray, ...]] = []
    for number, (part, index, _) in enumerate(used):
        count = len(index.chunks) - 1
        of_split = side.of(part, 0, int(index.chunks[-1]))
        sizes = np.add.reduceat(of_split, index.chunks[:-1], dtype=np.int32)
        columns.append((np.full(count, number, np.int32), np.arange(count, dtype=np.int32), index.chunks[:-1], sizes))
    parts, numbers, rows, sizes = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Table(parts, numbers, rows, sizes, np.cumsum(sizes, dtype=np.int64) - sizes)


def _side(slot: Base64Parts, found: Found, used: list[Used]) -> Side:
    """What is held out: the records with the lowest hashes, one at least, so that a record keeps its side when parts
    join.
    """
    if found.split or slot.split == "all" or not slot.held_out_share:
        if slot.split == slot.held_out_split and not found.split:
            raise UserError(_explain_share(slot))
        return Side(0, None)
    border, lowest = int(slot.held_out_share * RANGE), None
    for part, index, _ in used:
        here = int(_hashes(part, 0, int(index.chunks[-1])).min())
        lowest = here if lowest is None else min(lowest, here)
        if lowest < border:
            break
    return Side(min(max(border, (lowest or 0) + 1), (1 << 64) - 1), slot.split == slot.held_out_split)


# ---- explanations ---------------------------------------------------------------------------------------------------


def _explain_share(slot: Base64Parts) -> str:
    return (
        f"split {slot.split!r} has no records: nothing on disk is split, and held_out_share={slot.held_out_share} "
        "holds out none, or all. Choose another share, or split=all."
    )


def _explain_bad(found: Found, bad: list[tuple[str, str]], total: int, share: float) -> str:
    if len(bad) == total:
        return f"none of the {total} parts below {found.root} can be used: {_examples(bad)}"
    return f"{len(bad)} of {total} parts cannot be used, more than data.max_bad_share = {share}: {_examples(bad)}"


def _examples(bad: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in bad[:3])


def _said(form: Format) -> str:
    if form.tar:
        return "webdataset"
    keys = "." + "|".join(form.keys) if form.keys else ""
    return f"caption={form.caption}{keys},image={form.image}"
