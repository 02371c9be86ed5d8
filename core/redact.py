"""What must not be written down: tokens, passwords, keys. One function, used on every text that leaves the process.

It knows three kinds: values of environment variables that are secret by their name, texts that are secret by their
shape (`hf_…`, `AKIA…`, a password in a URI), and values that stand behind a secret's name (`--hub-token …`).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

HIDDEN = "***"
SHORTEST = 6
"""Values of secret environment variables below this length are not looked for: they would hide words of other texts."""

_NAME = (
    r"(?:[\w.-]*[_.-])?(?:token|secrets?|passw(?:or)?d|passphrase|pwd|api[_-]?key|apikey|access[_-]?key(?:[_-]?id)?"
    r"|secret[_-]?key|private[_-]?key|account[_-]?key|credentials?|signature|sig|pat)"
)
"""A name that says its value is secret: its last word is one of these. `tokenizer` and `num_tokens` are none."""

SHAPES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\bhf_[A-Za-z0-9]{16,}",  # Hugging Face
        r"\bapi_org_[A-Za-z0-9]{16,}",
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS key ids
        r"\bgh[pousr]_[A-Za-z0-9]{20,}",  # GitHub
        r"\bgithub_pat_\w{20,}",
        r"\bglpat-[\w-]{16,}",  # GitLab
        r"\bxox[abeprs]-[\w-]{10,}",  # Slack
        r"\bsk-[A-Za-z0-9_-]{20,}",  # OpenAI and others
        r"\bAIza[\w-]{30,}",  # Google
        r"\bdapi[0-9a-f]{32}",  # Databricks
        r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # JSON web tokens
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    )
)
_URI = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^/\s:@'\"]*)(?P<password>:[^/\s'\"]*)?@")
_HEADER = re.compile(r"(?i)((?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\",;]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/-]{8,}=*")
_NAMED = re.compile(rf"(?i)(?<![\w])(-{{0,2}}{_NAME}['\"]?)(\s*(?:=>|[=:])\s*)(['\"]?)(?!\s)([^\s'\"&,;)}}\]]+)")
_FLAG = re.compile(rf"(?i)((?:^|(?<=\s))--{_NAME}\s+)(['\"]?)([^\s'\"-][^\s'\"]*)")
_SECRET_NAME = re.compile(rf"(?i){_NAME}")


def redact(text: str) -> str:
    """The text with every secret in it replaced by `***`."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    for shape in SHAPES:
        text = shape.sub(HIDDEN, text)
    text = _URI.sub(_hide_credentials, text)
    text = _BEARER.sub(rf"\1{HIDDEN}", _HEADER.sub(rf"\1{HIDDEN}", text))
    return _FLAG.sub(rf"\1\2{HIDDEN}", _NAMED.sub(_hide_named, text))


def _hide_credentials(match: re.Match[str]) -> str:
    """`scheme://user:***@`; a name alone may be a token too, but for ssh, where it is `git` or a login."""
    scheme, user, password = match["scheme"], match["user"], match["password"]
    if password is None:
        return match[0] if "ssh" in scheme else f"{scheme}{HIDDEN}@"
    return f"{scheme}{user}:{HIDDEN}@"


def _hide_named(match: re.Match[str]) -> str:
    """`token=abc` without its value; `token: str = None` in a patch is code and stays."""
    name, sign, quoted, value = match.groups()
    return match[0] if not quoted and _is_code(value) else f"{name}{sign}{quoted}{HIDDEN}"


def _is_code(value: str) -> bool:
    return value in ("None", "str", "Any", "True", "False", "null", HIDDEN) or value.endswith(("(", "["))


def redact_all(value: Any, name: str = "") -> Any:
    """The same for all texts in a JSON value, and for the values behind secret names in its objects."""
    if isinstance(value, str):
        return HIDDEN if value and _SECRET_NAME.fullmatch(name) else redact(value)
    if isinstance(value, Mapping):
        return {redact(str(k)): redact_all(v, str(k)) for k, v in value.items()}
    return [redact_all(v, name) for v in value] if isinstance(value, (list, tuple)) else value


def has_secret(text: str) -> bool:
    """Whether something in the text would be hidden."""
    return redact(text) != text


def without_password(uri: str) -> str:
    """A store's URI without user and password: what may be written down and found again."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _environment_secrets() -> tuple[str, ...]:
    return _secrets_of(tuple(sorted(_secret_variables())))


def _secret_variables() -> Iterator[str]:
    for name, value in os.environ.items():
        if name != "PWD" and len(value) >= SHORTEST and _SECRET_NAME.fullmatch(name):
            yield value
        elif "@" in value and (password := _URI.search(value)) and password["password"]:
            yield password["password"].removeprefix(":")


@functools.lru_cache(maxsize=4)
def _secrets_of(values: tuple[str, ...]) -> tuple[str, ...]:
    """Longest first, each also as it looks in a URI and within JSON."""
    forms = {form for v in values if len(v) >= SHORTEST for form in (v, quote(v, safe=""), v.replace('"', r"\""))}
    return tuple(sorted(forms, key=len, reverse=True))
