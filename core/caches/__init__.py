"""Latents and states of captions, computed once: what `data cache` writes and `--cache` reads."""
