"""Captions to what a denoiser is told: CLIP's tokenizer and text encoder (arXiv 2103.00020) as one frozen module.

The network is transformers' own. What is added is that names of tensors fit whatever wrote them (transformers 4 and 5
differ, a full CLIP has a picture side too), and that nothing is guessed: a tokenizer that does not go with the weights,
or a config that says something else than the recipe, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core.errors import UserError
from core.slots import CLIPText
from core.weights.load import locate, read_component
from core.weights.lvdm import load_strict

PREFIX = "text_model."
"""Before every published name. transformers 5 holds the tensors without it, and reads both."""
OTHER_SIDE = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
"""What a full CLIP has besides: none of it moves the last hidden state."""
SAID = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "hidden_act",
)
"""Fields of the slot that are transformers' own configuration."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class CLIPTextEncoder(nn.Module):
    """Captions to (B, max_length, hidden_size) float32: the last hidden state after the final norm, without a mask, so
    that padding is attended to as in the published denoisers.
    """

    def __init__(self, slot: CLIPText) -> None:
        super().__init__()
        self.slot = slot
        # the special tokens are CLIP's last two, until the tokenizer says better; they do not move the hidden states
        start, end = max(slot.vocab_size - 2, 0), slot.vocab_size - 1
        special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
        self.model = CLIPTextModel(CLIPTextConfig(**{name: getattr(slot, name) for name in SAID}, **special))
        self.tokenizer: CLIPTokenizer | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Token ids (B, max_length) int64, padded and cut; without values on the meta device."""
        if self.device.type == "meta":
            return torch.empty(len(captions), self.slot.max_length, dtype=torch.int64, device="meta")
        if self.tokenizer is None:
            raise UserError("the text encoder has no tokenizer yet: its weights were not loaded")
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=self.slot.max_length, truncation=True, return_tensors="pt"
        )["input_ids"]
        return ids.to(self.device, non_blocking=True)  # type: ignore[no-any-return]

    def lost_tokens(self, caption: str) -> int:
        """Tokens of a caption that `tokens` cuts off."""
        assert self.tokenizer is not None
        ids = self.tokenizer(caption, verbose=False)["input_ids"]
        return max(len(ids) - self.slot.max_length, 0)

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        return self.model(input_ids=self.tokens(captions)).last_hidden_state.float()  # type: ignore[no-any-return]

    def load(self, spec: str) -> None:
        """Weights and tokenizer that `spec` names (see `core.weights.load`), every tensor accounted for.

        Raises UserError where something is missing, left over, or says something else than the slot.
        """
        state, self.tokenizer = self._read(spec)
        load_strict(self.model, state)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self.model.config, name, getattr(self.tokenizer, name))

    def stored(self, spec: str) -> tuple[dict[str, Any], CLIPTokenizer]:
        """What `load` takes: tensors by their names here, each read when it is asked for, and the tokenizer."""
        state, tokenizer = self._read(spec)
        return {f"model.{name}": entry for name, entry in state.items()}, tokenizer

    def _read(self, spec: str) -> tuple[dict[str, Any], CLIPTokenizer]:
        path = locate(spec, self.slot.component)
        state, config = read_component(path, self.slot.component)
        self._agree(config.get("text_config", config), path)
        tokenizer = read_tokenizer(path)
        if len(tokenizer) > self.slot.vocab_size:
            raise UserError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens, the text encoder knows {self.slot.vocab_size}"
            )
        return text_names(state, self.model), tokenizer

    def _agree(self, config: Mapping[str, Any], path: Path) -> None:
        """Not every difference shows in the shape of a tensor."""
        for name in SAID:
            if config.get(name, getattr(self.slot, name)) != getattr(self.slot, name):
                raise UserError(
                    f"{path}/config.json has {name} {config[name]!r}, the recipe's {type(self.slot).__name__} "
                    f"{getattr(self.slot, name)!r}: set {name} to that of the weights"
                )

    def write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """`text_encoder/` and `tokenizer/` as transformers lays them out, under the published names, with the whole
        tensors `state` of this module.
        """
        if self.tokenizer is None:
            raise UserError("the text encoder cannot be written: it has no tokenizer yet")
        own = folder / self.slot.component
        own.mkdir(parents=True, exist_ok=True)
        named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        published = {PREFIX + bare(name): t.detach().cpu().contiguous() for name, t in named.items()}
        save_file(published, own / "model.safetensors", metadata={"format": "pt"})
        (own / "model.safetensors").chmod(0o644)
        self.model.config.save_pretrained(own)
        self.tokenizer.save_pretrained(folder / "tokenizer")


def bare(name: str) -> str:
    return name.removeprefix(PREFIX)


def text_names(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The tensors of the text side under the names of `model`, whichever of the known layouts they come in."""
    own = {bare(name): name for name in model.state_dict()}
    kept = {bare(n): t for n, t in state.items() if not n.startswith(OTHER_SIDE) and not n.endswith("position_ids")}
    return {own.get(name, name): tensor for name, tensor in kept.items()}


def read_tokenizer(path: Path) -> CLIPTokenizer:
    """The tokenizer in the encoder's folder, or in `tokenizer` beside it. Nothing is fetched."""
    for folder in (path, path.parent / "tokenizer"):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]
    raise UserError(
        f"{path}: no tokenizer in it ({' or '.join(TOKENIZER_FILES)}), and none in {path.parent / 'tokenizer'}; name "
        "the folder that has text_encoder/ and tokenizer/"
    )
