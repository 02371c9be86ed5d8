"""Ratios against the bare limit, measured in one run: `make bench`."""
