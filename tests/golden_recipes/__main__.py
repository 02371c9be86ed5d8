"""Rewrite the golden texts, and say which changed."""

from tests.golden_recipes import rewrite

for path in rewrite():
    print(path.name)
