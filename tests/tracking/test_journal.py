"""The journal: whole lines whatever happens, every number as it was, no point twice."""

import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.journal import FILE_NAME, InUse, Journal, in_use, mend, read

ROOT = Path(__file__).parents[2]


def written(path: Path) -> list[dict]:
    return [event for event, _ in read(path)]


@given(st.dictionaries(st.text(min_size=1, max_size=9), st.floats(), min_size=1, max_size=5))
def test_every_number_comes_back_bit_for_bit_from_lines_of_valid_json(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("journal") / FILE_NAME
    journal = Journal(path)
    journal.metrics(values, 7)
    journal.close()
    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (event,) = written(path)
    assert event["step"] == 7 and event["values"].keys() == values.keys()
    assert [_bits(v) for v in event["values"].values()] == [_bits(v) for v in values.values()]


def _bits(value: float) -> str:
    return "nan" if math.isnan(value) else float(value).hex()


def test_a_journal_torn_at_any_byte_keeps_every_whole_line_and_the_next_line_is_whole(tmp_path):
    path = tmp_path / FILE_NAME
    journal = Journal(path)
    for step in range(3):
        journal.metrics({"loss": 1.0 / (step + 1)}, step)
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = Journal(path)
        again.append("tags", values={"after": "the crash"})
        again.close()
        events = written(path)
        complete = sum(size >= end - 1 for end in ends)  # a line that lacks its line end alone is whole
        assert [event["step"] for event in events[:-1]] == list(range(complete)), size
        assert events[-1]["values"] == {"after": "the crash"}
        assert path.read_bytes().count(b"\n") == complete + 1


def test_zeros_that_a_power_cut_leaves_at_the_end_are_cut_off(tmp_path):
    path = tmp_path / FILE_NAME
    path.write_bytes(b'{"event": "state", "time": 1, "status": "RUNNING"}\n' + bytes(70_000))
    assert mend(path) == 70_000 and len(written(path)) == 1


def test_a_step_that_is_computed_again_is_not_noted_again_and_each_metric_has_its_own_mark(tmp_path):
    path = tmp_path / FILE_NAME
    journal = Journal(path)
    journal.metrics({"loss": 0.5, "val/loss": 0.7}, 4)
    journal.metrics({"loss": 0.4}, 6)
    journal.close()
    again = Journal(path)  # the checkpoint was of step 3
    for step in (4, 5, 6, 7):
        again.metrics({"loss": 9.0, "val/loss": 8.0}, step)
    again.picture("a.png", "samples", 5)
    again.picture("b.png", "samples", 5)
    again.close()
    points = [
        (key, e["step"], value) for e in written(path) if e["event"] == "metrics" for key, value in e["values"].items()
    ]
    assert [p for p in points if p[0] == "loss"] == [("loss", 4, 0.5), ("loss", 6, 0.4), ("loss", 7, 9.0)]
    assert [step for key, step, _ in points if key == "val/loss"] == [4, 5, 6, 7]
    assert [e["path"] for e in written(path) if e["event"] == "picture"] == ["a.png"]


WRITER = """
import sys
from pathlib import Path
from core.journal import Journal
journal = Journal(Path(sys.argv[1]))
for step in range(10**9):
    journal.metrics({"loss": 1.0 / (step + 1)}, step)
    print(step, flush=True)
"""


def test_kill_9_loses_no_point_that_was_written_and_frees_the_journal(tmp_path):
    path = tmp_path / FILE_NAME
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if int(line) == 500:
                assert in_use(path)
                with pytest.raises(InUse):
                    Journal(path)
                process.kill()
        said = int(line)
    assert process.returncode == -signal.SIGKILL and said >= 500
    journal = Journal(path, patience=5.0)
    assert not journal.mended or journal.mended < 100
    assert journal.latest["loss"].step >= said
    assert [e["step"] for e in written(path)][: said + 1] == list(range(said + 1))
    journal.close()
    assert not in_use(path)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from core.journal import Journal
from core.tracker import Tracker
from core.replica import Replica
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
tracker = Tracker(Journal(folder / "journal.jsonl"), Replica(folder, "sqlite:////nowhere"), "cpu")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(100):
    tracker.metrics({"loss": 0.25}, step)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tracker.metrics({"loss": 0.5}, 100)
"""


def test_a_full_disk_is_said_once_ends_nothing_and_the_line_after_it_is_whole(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the journal cannot be written") == 1 and "Traceback" not in done.stderr
    steps = [event["step"] for event in written(tmp_path / FILE_NAME)]
    assert steps == [*range(len(steps) - 1), 100] and len(steps) > 5
    assert (tmp_path / FILE_NAME).stat().st_size > 1000
