"""The tables of old flags on the pages of docs/ are those of core/translate. `python -m tests.flag_tables` rewrites them."""

from pathlib import Path

from core.translate.table import page_table, read

ROOT = Path(__file__).parents[2]
TABLES = (
    "lvdm.training",
    "ldm.training",
    "animatediff.training",
    "animatediff.sampling",
    "ldm.evaluation",
    "ldm.scores",
    "ldm.conversion",
)


def pages() -> dict[Path, str]:
    """Every page with its tables as they should be; the n-th table of a head is the n-th in TABLES."""
    texts: dict[Path, str] = {}
    done: dict[tuple[Path, str], int] = {}
    for name in TABLES:
        about = read(name.split(".")[0])[name.split(".")[1]]
        path, head = ROOT / about["page"], f"| {' | '.join(about['head'])} |\n"
        text = texts.get(path) or path.read_text()
        at = -1
        for _ in range(done.get((path, head), 0) + 1):
            at = text.index(head, at + 1)
        done[path, head] = done.get((path, head), 0) + 1
        end = text.find("\n\n", at)
        texts[path] = text[:at] + page_table(name) + (text[end:] if end >= 0 else "\n")
    return texts
