"""Uploads to the Hugging Face hub, one commit at a time, so that a repository is never half-new.

The token is the environment's HF_TOKEN and goes nowhere but into requests. `python -m core.hub REPO public|private`
makes a repository and says whether that worked (exit code 2: it never will, 3: not now).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from core.errors import UserError
from core.redact import redact

PAUSES = (5.0, 30.0, 120.0)
"""Seconds before the second, third and fourth try."""
LATER = (408, 409, 412, 425, 429)
"""Client errors that another try may mend; the others are for good."""
REFUSED, DOWN = 2, 3
"""Exit codes of this module as a program."""

T = TypeVar("T")


class Unreachable(UserError):
    """The hub does not answer, or not with what was asked for; it may another time."""


def ready(what: str) -> str:
    """The token. Raises UserError where the environment does not allow an upload; `what` names the flag or verb."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise UserError(f"{what}: HF_TOKEN is not set; it must hold a token that may write to the repository")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{what}: HF_HUB_OFFLINE forbids it; unset it")
    return token


class Hub:
    """A model repository `repo`: NAMESPACE/NAME, or NAME of the token's user. Raises UserError without a token."""

    def __init__(self, repo: str, private: bool, what: str = "weights push", pauses: Sequence[float] = PAUSES) -> None:
        self._token = ready(what)
        self.repo, self.private, self.pauses = repo, private, pauses

    def create(self) -> None:
        """Make the repository if it is not there. Raises UserError where it is public and is to be private."""

        def make(api: Any) -> str:
            made = api.create_repo(self.repo, private=self.private, repo_type="model", exist_ok=True).repo_id
            if self.private and not api.repo_info(made).private:
                raise UserError(f"{made} is public on the hub, and was to be private: change it there, or name another")
            return str(made)

        self.repo = self._tried(make)

    def upload(self, files: Mapping[str, Path | bytes], message: str) -> str:
        """Put files (path in the repository → file or content) there in one commit. Returns its address."""
        from huggingface_hub import CommitOperationAdd

        def commit(api: Any) -> str:
            adds = [
                CommitOperationAdd(
                    path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content)
                )
                for name, content in sorted(files.items())
            ]
            return str(api.create_commit(self.repo, adds, commit_message=message).commit_url)

        return self._tried(commit)

    def _tried(self, do: Callable[[Any], T]) -> T:
        """`do` with the hub's client; again after each pause where that may help. Raises UserError, or Unreachable."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=self._token)
        for pause in (*self.pauses, None):
            try:
                return do(api)
            except UserError:
                raise
            except HfHubHTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                if 400 <= status < 500 and status not in LATER:
                    raise UserError(f"the hub refuses {self.repo}: {_said(error)}") from None
                why = _said(error)
            except ValueError as error:  # a name that cannot be one, a card that is none
                raise UserError(f"{self.repo}: {_said(error)}") from None
            except Exception as error:  # noqa: BLE001  whatever a network does: every library has classes of its own
                why = _said(error)
            if pause is None:
                raise Unreachable(f"the hub does not take {self.repo} after {len(self.pauses) + 1} tries: {why}")
            time.sleep(pause)
        raise AssertionError


def _said(error: Exception) -> str:
    """One line, without secrets."""
    return redact(" ".join(str(error).split()) or type(error).__name__)[:300]


def main(words: Sequence[str]) -> int:
    """Make the repository that the words name."""
    repo, kind = words
    try:
        hub = Hub(repo, kind == "private", "--push-to-hub", pauses=PAUSES[:1])
        hub.create()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return DOWN if isinstance(error, Unreachable) else REFUSED
    print(hub.repo)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
