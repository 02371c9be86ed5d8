"""Attention behind one function, so that a network names no kernel and a run can choose one.

Four back ends give the same numbers: `sdpa` (torch chooses), `flash` (torch's FlashAttention or nothing), `xformers`
(imported only when asked for) and `eager` (matrix products in sight). Attention over few frames at every pixel has a
function of its own: its matrices are as small as 4 x 4, and with relative positions no library kernel fits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.errors import UserError, did_you_mean

# CUDA puts batch * heads into a grid dimension, and those end at 65,535: 8 clips of 32 x 32 pixels with 8 heads.
MAX_BATCH_HEADS = 65_535
# Up to this many frames the products over pixels are written out: 0.9 ms instead of 2.7 (bmm) or 2.9 (sdpa) for 4
# frames, 8 channels a head, 512 pixels, 4 heads, forward and backward on one core. It holds frames^2 * channels numbers
# a pixel for a moment.
FEW_FRAMES = 5


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa", bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over (B, heads, N, head_dim); k and v may have another N, N'.

    `bias` (B, N') is added to the logits of every key. flash and xformers take none here: torch chooses instead.
    """
    kernel = _kernel(backend if bias is None or backend in BIASED else "sdpa")
    given = (q, k, v) if bias is None else (q, k, v, bias[:, None, None].to(q.dtype))
    rows = max(1, MAX_BATCH_HEADS // q.shape[1])
    if q.shape[0] <= rows:
        return kernel(*given)
    return torch.cat([kernel(*part) for part in zip(*(x.split(rows) for x in given), strict=True)])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, heads, head_dim)
    return memory_efficient_attention(q, k, v).transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, N, N')
    logits = logits if bias is None else logits + bias
    return logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa,
    "xformers": _xformers,
    "flash": _flash,
    "eager": _eager,
}
BIASED = ("sdpa", "eager")
"""Those that take a bias."""


def _kernel(name: str) -> Callable[..., Tensor]:
    if name not in BACKENDS:
        raise UserError(f"attention {name!r}: expected one of {', '.join(BACKENDS)}{did_you_mean(name, BACKENDS)}")
    return BACKENDS[name]


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """`name` if it computes forward and backward on this device and dtype, else "sdpa" with one warning that says
    why.
    """
    _kernel(name)
    if name == "sdpa":
        return name
    reason = _failure(name, device, dtype, head_dim)
    if reason is None:
        return name
    warnings.warn(f"attention {name!r} does not work on {device} in {dtype}, sdpa is used: {reason}", stacklevel=2)
    return "sdpa"


def _failure(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What a trial on a tiny tensor says, in one line. Any exception counts: kernels built for another torch raise all
    sorts.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once a back end it passed over; the reason below says it once
            q, k, v = (torch.randn(1, 2, 8, head_dim, device=device).to(dtype).requires_grad_() for _ in range(3))
            with torch.enable_grad():
                attend(q, k, v, name).float().sum().backward()
    except Exception as error:  # noqa: BLE001 - whatever it is, the reason goes into the warning
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return None


def set_attention(module: nn.Module, backend: str) -> None:
    """Choose the back end of every submodule that has one. A plain attribute: neither config nor weights know of it."""
    _kernel(backend)
    for part in module.modules():
        if hasattr(part, "attention_backend"):
            part.attention_backend = backend  # type: ignore[assignment]


def choose_attention(module: nn.Module, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Set the back end `wanted` on the whole module, or "sdpa" (with one warning) where a head width of it fails."""
    widths = {vars(part)["head_dim"] for part in module.modules() if hasattr(part, "attention_backend")}
    found = (resolve_backend(wanted, device, dtype, width) for width in sorted(widths))
    chosen = next((name for name in found if name != wanted), wanted)
    set_attention(module, chosen)
    return chosen


def relative_rows(frames: int, reach: int, device: torch.device | None = None) -> Tensor:
    """Table row of query i and key j, clip(j - i, -reach, reach) + reach (arXiv 1803.02155, section 3.2), as (T, T)
    int64.
    """
    at = torch.arange(frames, device=device)
    return (at[None, :] - at[:, None]).clamp(-reach, reach) + reach


def relative_logits(q: Tensor, rows: Tensor) -> Tensor:
    """q_i . rows[i, j] as (B, heads, T, T, P), from q (B, heads, head_dim, T, P) and rows (T, T, head_dim)."""
    return torch.einsum("bhdip,ijd->bhijp", q, rows)


def attend_frames(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, values: Tensor | None = None) -> Tensor:
    """Attention over frames at every pixel, over (B, heads, head_dim, T, P) with any strides; the softmax is float32.

    `bias` (B, heads, T, T, P) is added to the logits q_i . k_j / sqrt(head_dim); `values` (T, T, head_dim) to v_j as
    query i sees it (arXiv 1803.02155, equations 3 and 4).
    """
    return (_few_frames if q.shape[3] <= FEW_FRAMES else _many_frames)(q, k, v, bias, values)


def _few_frames(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, values: Tensor | None) -> Tensor:
    products = q[:, :, :, :, None] * k[:, :, :, None]  # (B, heads, head_dim, T, T, P)
    logits = products.sum(2, dtype=torch.float32) * q.shape[2] ** -0.5  # (B, heads, T, T, P)
    weights = (logits if bias is None else logits + bias).softmax(3).to(v.dtype)
    seen = v[:, :, :, None]  # (B, heads, head_dim, 1, T, P)
    if values is not None:
        seen = seen + values.permute(2, 0, 1)[..., None]  # (B, heads, head_dim, T, T, P)
    return (weights[:, :, None] * seen).sum(4)


def _many_frames(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, values: Tensor | None) -> Tensor:
    q, k, v = (x.permute(0, 4, 1, 3, 2) for x in (q, k, v))  # (B, P, heads, T, head_dim)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, P, heads, T, T)
    if bias is not None:
        logits = logits + bias.permute(0, 4, 1, 2, 3)
    weights = logits.softmax(-1, dtype=torch.float32).to(v.dtype)
    out = weights @ v
    if values is not None:
        out = out + torch.einsum("bphij,ijd->bphid", weights, values)
    return out.permute(0, 2, 4, 3, 1)
