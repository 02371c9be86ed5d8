"""`.pdparams` files as the versions of Paddle write them, and files that are attacks: nothing in them runs."""

import builtins
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.errors import UserError
from core.weights.paddle import matrices, paddle_state, read_pdparams

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/parity/golden/lvdm-vae3d-paddle/model_state.pdparams"


def _write(path, value, protocol=4):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


def _arrays():
    rng = np.random.default_rng(0)
    return {
        "linear.weight": rng.standard_normal((40, 60)).astype("f4"),  # long enough to stay in the file
        "fortran": np.asfortranarray(rng.standard_normal((3, 4, 5))),
        "big_endian": np.arange(6, dtype=">i4").reshape(2, 3),
        "short": np.float32(0.5) * np.ones(2, "f4"),
        "empty": np.zeros((0, 3), "f4"),
        "scalar": np.array(3.5, "f2"),
        "flags": np.array([True, False]),
        "bytes": np.arange(5, dtype="u1"),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol_are_read_with_their_values_and_dtypes(tmp_path, protocol):
    arrays = _arrays()
    content = arrays | {"StructuredToParameterName@@": {"linear.weight": "linear_0.w_0"}, "epoch": 3}
    state = read_pdparams(_write(tmp_path / "a.pdparams", content, protocol))
    assert state.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        assert (state[name].shape, state[name].dtype) == (tuple(array.shape), expected.dtype)
        assert torch.equal(state[name].read(), expected), name


@pytest.mark.parametrize("protocol", [2, 4])
def test_pairs_ordered_dicts_and_dicts_within_dicts_are_read(tmp_path, protocol):
    class Tensor:
        """Pickled as Paddle pickles a tensor outside a state dict: a call of tuple with (name, array)."""

        def __reduce__(self):
            return tuple, (("linear_0.w_0", np.arange(4.0)),)

    content = {"model": OrderedDict(a=Tensor(), b=("linear_0.b_0", np.ones(2))), "epoch": 3, "names": ["x"]}
    data = pickle.dumps(content, protocol=protocol)
    (tmp_path / "a.pdparams").write_bytes(data)
    state = read_pdparams(tmp_path / "a.pdparams")
    assert {name: entry.read().tolist() for name, entry in state.items()} == {
        "model.a": [0, 1, 2, 3],
        "model.b": [1, 1],
    }


@pytest.mark.parametrize("protocol", [2, 3])
def test_arrays_that_were_cut_are_whole_again(tmp_path, protocol):
    whole = np.arange(24, dtype="f4").reshape(2, 3, 4)
    parts = {f"big@@.{i}": part for i, part in enumerate(np.split(whole.flatten(), [10, 20]))}
    info = {"big": {"OriginShape": whole.shape, "slices": list(parts)}}
    path = _write(tmp_path / "a.pdparams", parts | {"small": np.ones(2), "UnpackBigParamInfor@@": info}, protocol)
    state = read_pdparams(path)
    assert list(state) == ["small", "big"]
    assert torch.equal(state["big"].read(), torch.from_numpy(whole))
    info["big"]["OriginShape"] = (2, 3, 5)
    _write(path, parts | {"UnpackBigParamInfor@@": info}, protocol)
    with pytest.raises(UserError, match="the slices of big do not make up its shape"):
        read_pdparams(path)


@pytest.mark.parametrize("order", ["C", "F"])
def test_bfloat16_comes_from_its_bits(tmp_path, order):
    values = torch.arange(12).reshape(3, 4).bfloat16() / 7
    bits = np.array(values.view(torch.int16).numpy().view(np.uint16), order=order)
    (entry,) = read_pdparams(_write(tmp_path / "a.pdparams", {"a": bits})).values()
    assert entry.dtype == torch.bfloat16
    assert torch.equal(entry.read(), values)


def test_only_the_matrices_of_linear_layers_are_transposed(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3), nn.Conv1d(3, 3, 1))
    state = {name: t.numpy() for name, t in module.state_dict().items()}
    state["0.weight"] = state["0.weight"].T
    read = paddle_state(_write(tmp_path / "a.pdparams", state), module)
    assert matrices(module) == {"0.weight"}
    assert all(torch.equal(read[name], t) for name, t in module.state_dict().items())


# ------------------------------------------------------------------------------------------------------------- attacks


class _Call:
    def __init__(self, what, *args):
        self.what, self.args = what, args

    def __reduce__(self):
        return self.what, self.args


class _Builds:
    """Calls through the state setter, where some unpicklers do not look."""

    def __reduce__(self):
        return dict, (), None, None, iter([("x", _Call(os.system, "touch executed"))])


def _raw(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


MARK = "touch executed"
ATTACKS = {
    "system": (pickle.dumps({"a": _Call(os.system, MARK)}), "posix.system"),
    "eval": (pickle.dumps({"a": _Call(eval, "open('executed', 'w')")}), "builtins.eval"),
    "exec": (pickle.dumps(_Call(exec, "open('executed', 'w')")), "builtins.exec"),
    "popen": (pickle.dumps({"a": _Call(subprocess.Popen, ["touch", "executed"])}), "subprocess.Popen"),
    "getattr": (pickle.dumps(_Call(getattr, 1, "real")), "builtins.getattr"),
    "import": (pickle.dumps(_Call(builtins.__import__, "os")), "builtins.__import__"),
    "in a state": (pickle.dumps([_Builds()]), "builtins.dict"),
    "old global": (_raw(b"cos\nsystem\nU\x0etouch executed\x85R"), "os.system"),
    "instance": (_raw(b"(U\x0etouch executedios\nsystem\n"), "os.system"),
    "object": (_raw(b"(cos\nsystem\nU\x0etouch executedo"), "os.system"),
    "numpy's loader": (_raw(b"cnumpy\nload\nU\x08executed\x85R"), "numpy.load"),
    "dotted": (_raw(b"cnumpy\ncore.os.system\nU\x0etouch executed\x85R"), "numpy.core.os.system"),
    "object array": (pickle.dumps({"a": np.array([{"x": 1}], dtype=object)}), "'O8'"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_name_and_not_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, says = ATTACKS[name]
    (tmp_path / "evil.pdparams").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_pdparams(tmp_path / "evil.pdparams")
    assert says in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pdparams"]


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
BOMBS = {
    "a claimed length": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "a claimed frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "a memo of 2^32 places": _raw(b"Nr", struct.pack("<I", 2**32 - 1)),
    "an array of 2^40 places": _raw(
        RECONSTRUCT + b"cnumpy\nndarray\n\x8a\x06", (2**40).to_bytes(6, "little"), b"\x85U\x01b\x87R"
    ),
    "millions of sets": b"\x80\x04(" + b"\x8f" * 3_000_000 + b"l.",
    "a list copied a million times": _raw(
        b"](" + b"N" * 100_000 + b"eq\x00", b"c__builtin__\ntuple\nq\x01", b"h\x01h\x00\x85R" * 300_000
    ),
    "ordered pairs over and over": _raw(
        b"](" + b"(K\x01K\x02t" * 20_000 + b"eq\x00", b"ccollections\nOrderedDict\nq\x01", b"h\x01h\x00\x85R0" * 5_000
    ),
    "dicts within dicts": None,
    "a tower of tuples as a key": _raw(b"}N" + b"\x85" * 500_000 + b"Ns"),
    "a number of a million digits": _raw(b"I" + b"9" * 1_000_000 + b"\n"),
}


def _laughs():
    """Ten levels, a hundred references each: 100^10 entries in a kilobyte."""
    level = {"a": np.ones(1)}
    for _ in range(10):
        level = {f"k{i}": level for i in range(100)}
    return pickle.dumps(level)


def test_bombs_take_neither_memory_nor_time(tmp_path):
    """In one process that may have 1.2 GiB beyond what the libraries took, and two minutes."""
    for name, content in BOMBS.items():
        (tmp_path / name).write_bytes(content or _laughs())
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom core.weights.paddle import read_pdparams\n"
        "from core.errors import UserError\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 1200 * 2**20,) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (120, 120))\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try:\n        print(path.name, '| read', len(read_pdparams(path)))\n"
        "    except UserError as error:\n        print(path.name, '| refused', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert said.keys() == BOMBS.keys()
    for name, what in said.items():
        assert what.startswith("refused"), (name, what)
        # of what a file only claims, the standard library's reader asks the system first
        assert "MemoryError" not in what or "claimed" in name, (name, what)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_file_is_a_user_s_error_whatever_the_damage(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pdparams"
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        for entry in read_pdparams(path).values():
            assert entry.read().shape == entry.shape
    except UserError as error:
        assert "\n" not in str(error)


SEEDS = [pickle.dumps({"a": np.ones((2, 3), "f4"), "b": OrderedDict(c=np.arange(3))}, protocol=p) for p in (2, 3, 4, 5)]


def test_the_seeds_of_the_fuzzing_use_most_opcodes():
    used = {op.name for seed in SEEDS for op, _, _ in pickletools.genops(seed)}
    assert {"REDUCE", "BUILD", "GLOBAL", "STACK_GLOBAL", "MEMOIZE", "BINPUT", "SETITEMS", "BYTEARRAY8"} <= used


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"PK\x03\x04", b"version https://git-lfs", pickle.dumps([1]), pickle.dumps({})]
)
def test_what_is_no_paddle_file_is_one_line_or_empty(tmp_path, content):
    (tmp_path / "a.pdparams").write_bytes(content)
    if content == pickle.dumps({}):
        assert read_pdparams(tmp_path / "a.pdparams") == {}
    else:
        with pytest.raises(UserError, match=r"a\.pdparams: cannot be read as a \.pdparams file \("):
            read_pdparams(tmp_path / "a.pdparams")


def test_one_array_at_a_time_is_in_memory(tmp_path):
    """400 MB of arrays, read one after the other."""
    path = tmp_path / "big.pdparams"
    with path.open("wb") as file:
        pickle.dump({f"a{i}": np.zeros(10_000_000, "f4") for i in range(10)}, file, protocol=4)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom core.weights.paddle import read_pdparams\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "state = read_pdparams(Path(sys.argv[1]))\n"
        "assert [e.read().sum().item() for e in state.values()] == [0.0] * 10\n"
        "anonymous = next(l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('RssAnon'))\n"
        "print(int(anonymous.split()[1]) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 450  # of which the libraries take about 250
    path.unlink()
