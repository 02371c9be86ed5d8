"""`python -m benchmarks [start data captions parts plans engine optimizers scaling caches tracking saving]`: ratios,
each to a limit of its run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

from benchmarks.measure import Row

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def parts() -> dict[str, Callable[[], Iterable[Row]]]:
    """The parts of the table by name; each imports what it needs."""
    from benchmarks import caches, captions, data, engine, optimizers, parts, plans, saving, scaling, start, tracking

    return {
        "start": start.rows,
        "data": data.rows,
        "captions": captions.rows,
        "parts": parts.rows,
        "plans": plans.rows,
        "engine": engine.rows,
        "optimizers": optimizers.rows,
        "scaling": scaling.rows,
        "caches": caches.rows,
        "tracking": tracking.rows,
        "saving": saving.rows,
    }


def main(wanted: list[str]) -> None:
    known = parts()
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    print(f"{'what':<52}{'this':>12}{'limit':>12}{'ratio':>8}  {'goal':>6}")
    for name in wanted or known:
        for row in known[name]():
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
