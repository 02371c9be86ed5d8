"""Condition slots: what a denoiser is told besides the noisy sample (text, embeddings, a low-resolution clip, a first
frame).
"""

from __future__ import annotations

from core.slots.slot import Slot


class Condition(Slot):
    """Something of the batch that becomes an input of the denoiser."""
