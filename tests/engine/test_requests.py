"""Which clips are wanted, and what their files are called."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.requests import prompts_in, slug, typed, wanted


@given(st.text(max_size=400))
def test_a_prompt_of_any_letters_becomes_a_file_name_that_can_be_written(tmp_path_factory, prompt):
    name = f"{slug(prompt)}-000.mp4"
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(b"x")
    assert path.read_bytes() == b"x"
    assert "/" not in name and len(name.encode()) < 100 and not name.startswith((".", "-"))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Clouds drift left", "Clouds-drift-left"),
        ("../../etc/passwd", "etc-passwd"),
        ("", "clip"),
        (" // ", "clip"),
        ("云在飘", "云在飘"),
        ("a" * 300, "a" * 80),
        ("ﬁne\u0000\n", "fine"),
    ],
)
def test_names_keep_what_can_be_read(prompt, name):
    assert slug(prompt) == name


@given(st.lists(st.text(max_size=3), max_size=6), st.integers(1, 4))
def test_clips_are_numbered_once_and_no_two_have_the_same_noise(prompts, num):
    made = wanted(prompts, num)
    assert [request.number for request in made] == list(range(num * len(prompts)))
    assert len({request.id for request in made}) == len(made)
    assert len({request.name for request in made}) == len(made)


@given(st.lists(st.text(max_size=1), max_size=6), st.integers(1, 3))
def test_prompts_that_come_one_after_the_other_are_those_that_come_together(prompts, num):
    asked = []
    for prompt in prompts:
        asked += wanted([prompt], num, before=asked)
    assert asked == wanted(prompts, num)


def test_a_file_of_prompts_is_read_without_its_mark_and_empty_lines(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n second \n")
    assert prompts_in(file) == ["first", "second"]


@pytest.mark.parametrize(("content", "why"), [(b"\n \n", "no prompt in it"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_file_without_prompts_is_refused(tmp_path, content, why):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=why):
        prompts_in(tmp_path / "p.txt")
    with pytest.raises(UserError, match="cannot be read"):
        prompts_in(tmp_path)


def test_what_is_typed_ends_with_the_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  two  \nthree"))
    assert list(typed()) == ["one", "two", "three"]
