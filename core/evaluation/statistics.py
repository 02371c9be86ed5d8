"""Mean and covariance of features in the usual npz (`mu`, `sigma`): of real sets, those of others and our own."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import whole


def read_statistics(file: Path, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """`mu` (D,) and `sigma` (D, D). Raises UserError for a file that is none, or of features of another length."""
    try:
        with np.load(file, allow_pickle=False) as held:
            mu, sigma = (np.asarray(held[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--statistics {file}: expected an npz with mu and sigma ({why})") from None
    if mu.shape != (dimension,) or sigma.shape != (dimension, dimension):
        raise UserError(
            f"--statistics {file}: mu {mu.shape} and sigma {sigma.shape}, but the features here have {dimension}"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"--statistics {file}: it holds numbers that are not finite")
    return mu, sigma


def write_statistics(file: Path, mu: np.ndarray, sigma: np.ndarray) -> None:
    """The same form."""
    if file.suffix != ".npz":
        raise UserError(f"--write-statistics {file}: expected a name that ends in .npz")
    with whole(file) as partial:
        np.savez(partial, mu=mu, sigma=sigma)
