"""Rewrite the tables of the pages, and say which pages changed."""

from tests.flag_tables import pages

for path, text in pages().items():
    if path.read_text() != text:
        path.write_text(text)
        print(path.name)
