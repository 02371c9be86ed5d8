"""The script that measures full-size recipes, on the tiny twins and the CPU."""

import pytest

from benchmarks import gpu


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text(f"before\n\n{gpu.BEGIN}\n\nold\n\n{gpu.END}\n\nafter\n")
    return path


def test_each_recipe_gets_a_row_with_figures_and_what_does_not_fit_in_time_is_named(page, capsys):
    recipes, kinds = ["ldm-laion400m", "animatediff-full"], ["fp32 (TF32)", "compiled"]
    words = ["--device", "cpu", "--tiny", "--out", str(page), "--only", *recipes, "--rows", *kinds]
    gpu.main([*words, "--budget", str(gpu.COMPILED_S - 1)])
    before, table, after = page.read_text().partition(gpu.BEGIN)[0], page.read_text(), page.read_text()[-7:]
    assert before == "before\n\n" and after == "\nafter\n" and "old" not in table and "torch 2." in table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|") and "-tiny" in line]
    assert [row[:2] for row in rows] == [[f"{n}-tiny", what] for what in kinds for n in recipes]
    for row in rows[:2]:
        assert len(row) == len(gpu.HEAD) and float(row[3]) > 0 and row[6] == "-" and row[7].endswith("%")
        assert float(row[4]) == pytest.approx(2 / float(row[3]), rel=0.02)
    assert all(row[2:] == ["not started: no time left"] for row in rows[2:])
    assert capsys.readouterr().out.count("-tiny") == 4


def test_every_kind_of_row_is_a_recipe():
    for name, micro in gpu.MICRO.items():
        found = [gpu.chosen(name, what, micro) for what in gpu.ROWS]
        assert {recipe.loop.micro_batch for recipe in found} == {micro}
        assert len({repr(recipe) for recipe in found}) == len(found) - 1  # channels last is no field


def test_a_page_without_marks_is_left_as_it_is(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"page\.md: there is no <!-- gpu table: begin -->"):
        gpu.write(path, "table")
    assert path.read_text() == "nothing\n"
