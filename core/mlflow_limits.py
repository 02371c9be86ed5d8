"""What MLflow refuses or spoils, made into what it takes. The journal keeps everything as it was."""

from __future__ import annotations

import hashlib
import math
import posixpath
import re

PARAM_LIMIT = 6000
TAG_LIMIT = 8000
NAME_LIMIT = 250
METRICS, PARAMS = 1000, 100
"""Items of one request: metrics; params, or tags."""


def name(text: str) -> str:
    """A name of letters, digits, `_-. :/` that is no odd path. One that must change ends in a hash of what it was, so
    that two names stay two.
    """
    fitted = re.sub(r"[^\w\-. :/]", "_", text, flags=re.ASCII)
    fitted = posixpath.normpath(fitted).lstrip("/") if fitted else ""
    fitted = "_" + fitted.lstrip("./") if fitted.startswith("..") or fitted in ("", ".") else fitted
    if fitted == text and len(text) <= NAME_LIMIT:
        return text
    return f"{fitted[: NAME_LIMIT - 7]}.{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def cut(text: str, limit: int) -> str:
    """A text within the limit. A longer one says its length and a hash of the whole, so that a change shows."""
    if len(text) <= limit:
        return text
    end = f" … ({len(text):,} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
    return text[: limit - len(end)] + end


def value(number: float) -> float:
    """A number for a chart. MLflow makes 1.8e308 of infinity, which flattens every other point of the chart; as NaN it
    is a gap.
    """
    return math.nan if math.isinf(number) else number
