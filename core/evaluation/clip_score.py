"""CLIP score: how near pictures are to their captions, 100 times the cosine of CLIP's two embeddings (arXiv 2104.08718
without its factor of 2.5 and without the cut at zero, as the laion400m sheet §9 has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging

from core.errors import UserError
from core.files import read_json

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, where the folder says nothing else."""
TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})


class CLIPScore(nn.Module):
    """A local folder as transformers writes it: config.json, model.safetensors, a tokenizer."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if "config.json" not in there or not any(files <= there for files in TOKENIZERS):
            raise UserError(f"--clip {folder}: expected a folder with config.json, model.safetensors and a tokenizer")
        logging.disable_progress_bar()  # of reading tensors, which takes a second
        try:
            model, report = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            said = read_json(folder / "preprocessor_config.json", 2**20) if "preprocessor_config.json" in there else {}
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--clip {folder}: {str(error).strip().splitlines()[0]}") from None
        if absent := sorted(report["missing_keys"]):
            raise UserError(f"--clip {folder}: its weights lack {len(absent)} tensors of CLIP, e.g. {absent[0]}")
        self.model = model.float().eval().requires_grad_(False)
        self.side = int(model.config.vision_config.image_size)
        self.normal = [said.get("image_mean", MEAN), said.get("image_std", DEVIATION)]

    def forward(self, clips: Tensor, captions: Sequence[str]) -> Tensor:
        """Clips (N, 3, T, H, W) in [-1, 1] and N captions -> (N,): the mean over the frames."""
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(clips.device)
        scores = [self._scores(self.model(pixel_values=self._pixels(frame), **words)) for frame in clips.unbind(2)]
        return torch.stack(scores).mean(0)

    def _scores(self, out: object) -> Tensor:
        return 100 * (out.image_embeds * out.text_embeds).sum(-1)  # type: ignore[attr-defined, no-any-return]

    def _pixels(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, side, side), as CLIP was trained: shorter side, bicubic, centre."""
        height, width = frames.shape[2:]
        scale = self.side / min(height, width)
        size = [max(self.side, round(height * scale)), max(self.side, round(width * scale))]
        sized = functional.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)
        top, left = ((n - self.side) // 2 for n in size)
        cut = sized[:, :, top : top + self.side, left : left + self.side].clamp(-1, 1)
        mean, deviation = (cut.new_tensor(values)[:, None, None] for values in self.normal)
        return ((cut + 1) / 2 - mean) / deviation
