"""Captioned pictures in parts: lines of a caption and a picture in base64, as LAION-400M is kept in (LDM sheet §5), and
tar shards in webdataset's manner. A picture is a clip of one frame.

The original streams: where a stream stood is lost at a stop, parts are lost by division, and where there are more
workers than parts it hangs. Here an index says where each record is: map-style, any step, and no worker can be empty.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data.part_order import Order
from data.part_table import Names, Records
from data.pictures import WEB_FORMATS, decoded, random_crop
from data.samples import Sample, Samples

if TYPE_CHECKING:
    from data.slots import Base64Parts


class PartRecords(Samples):
    """The dataset of a `Base64Parts` slot.

    A sample: `pixel_values` float32 (3, 1, R, R) in [-1, 1] and `caption` (str). Raises UserError when lists or parts
    are missing or not what was expected; what is wrong with a record shows when it is read.
    """

    def __init__(self, slot: Base64Parts):
        self.slot = slot
        self.records = Records(slot)
        super().__init__(Names(self.records), fingerprint=self.records.fingerprint, dropped=self.records.dropped)

    def order(self, seed: int, epoch: int) -> Any:
        """Computed where it is read: of hundreds of millions of records, no list is kept."""
        return Order(self.records.mixture, seed, epoch)

    def read(self, index: int, rng: np.random.Generator) -> Sample:
        """The caption, and a random crop of the picture. Raises BadSample for one that is smaller than the crop."""
        record = self.records.record(index % len(self))
        size = self.slot.resolution
        image = decoded(io.BytesIO(record.picture), record.name, least=size, formats=WEB_FORMATS)
        pixels = random_crop(image, int(size / self.slot.crop_share), size, rng)  # (R, R, 3) uint8
        clip = np.ascontiguousarray(pixels.transpose(2, 0, 1)[:, None], np.float32)  # (3, 1, R, R)
        clip /= 127.5  # in numpy: torch's threads cost more than they save on a picture
        clip -= 1.0
        return {"pixel_values": torch.from_numpy(clip), "caption": record.caption}

    def stand_in(self, index: int, chance: int) -> int:
        """Every other time of the same chunk, which is at hand; else any record, should a whole part be bad."""
        if chance & 1:
            return (chance >> 1) % len(self)
        first, count = self.records.chunk(index % len(self))
        return first + (chance >> 1) % count

    def describe(self) -> dict[str, str | int]:
        """The base's figures, and which lists or parts were found."""
        return super().describe() | {"parts": len(self.records.used), "lists": self.records.told}
