"""The networks that are recognised in checkpoints. A new system adds its table here."""

from __future__ import annotations

import re

from core.weights.autoencoder_kl import NETWORKS as AUTOENCODERS
from core.weights.lazy import State
from core.weights.ldm import NETWORKS as LDM
from core.weights.lora import NETWORKS as LORA
from core.weights.lvdm import NETWORKS as LVDM
from core.weights.motion import NETWORKS as MOTION
from core.weights.network import Network
from core.weights.opensora import NETWORKS as OPENSORA

CLIP = Network(
    name="CLIP's text encoder",
    component="text_encoder",
    marks=(r"(text_model\.)?(embeddings\.)?token_embedding",),
    instead="it is the stock one: hf download openai/clip-vit-large-patch14 --local-dir weights/clip",
)

NETWORKS: tuple[Network, ...] = (*LORA, *MOTION, *LVDM, *LDM, *OPENSORA, *AUTOENCODERS, CLIP)


def recognised(state: State) -> Network | None:
    """The network that these names belong to, as far as it is known here."""
    for network in NETWORKS:
        if all(any(re.match(mark, name) for name in state) for mark in network.marks):
            return network
    return None
