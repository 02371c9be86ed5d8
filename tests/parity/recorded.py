"""Recorded runs of the reference implementations: tiny models with random weights, their inputs, outputs and gradients."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

# Absolute tolerances on the CPU: two threads instead of one already move outputs by 5e-6 and gradients by 4e-5.
OUTPUT = {"rtol": 0.0, "atol": 5e-5}
FAINT = {"rtol": 0.0, "atol": 2e-4}
GRADIENT = {"rtol": 0.0, "atol": 5e-4}


class Case(NamedTuple):
    """One folder: the reference's configuration, its weights by their own names, and inputs and outputs by variant."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def recorded(name: str) -> Case:
    tensors = load_file(GOLDEN / name / "tensors.safetensors")
    groups = [_under(tensors, prefix) for prefix in ("weights.", "input.", "output.")]
    return Case(json.loads((GOLDEN / name / "config.json").read_text()), *groups)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
