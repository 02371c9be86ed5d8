"""What networks that are diffusers' own but for their forward pass have in common: the stock name in their config."""

from __future__ import annotations

import json
from typing import ClassVar


class StockConfig:
    """Goes before a class of diffusers: its config is written under `stock`, which opens without this project."""

    stock: ClassVar[str]

    def to_json_string(self) -> str:
        """The config with the name of the stock class."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        return json.dumps(config | {"_class_name": self.stock}, indent=2) + "\n"
