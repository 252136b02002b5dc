"""Attention kernels: one fused kernel per process, and plain matrix products where a forward-mode derivative is taken.

q, k, v and the result are (N, heads, T, D/heads).
"""

import contextlib
import functools
import importlib

import torch
import torch.nn.functional as F

from common.errors import InputError


def fused(q, k, v):
    """Torch's own choice of kernel."""
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q, k, v):
    """softmax(q·kᵀ/√d)·v in the network's dtype; it has derivatives of every kind."""
    device = q.device.type
    if torch.is_autocast_enabled(device):  # else the softmax would run in float32
        q, k, v = (part.to(torch.get_autocast_dtype(device)) for part in (q, k, v))
    with torch.autocast(device, enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1) @ v


def flash(kernel, q, k, v):
    """A flash-attn kernel, for (N, T, heads, D/heads) in half precision on a GPU; all else goes to torch's kernel."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return fused(q, k, v)
    out = kernel(*(part.transpose(1, 2).to(dtype) for part in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


FLASH_PACKAGES = {  # --attn-func → (module, how to install it)
    "fa2": ("flash_attn", "pip install flash-attn"),
    "fa3": ("flash_attn_interface", "install the hopper/ folder of the flash-attention repository"),
}
_state = {"kernel": fused, "differentiating": False}


def set_attention(name):
    """Choose the process's kernel as --attn-func names it; auto: torch's. Raises InputError for a missing package."""
    kernel = written_out if name == "base" else fused
    if name in FLASH_PACKAGES:
        module, remedy = FLASH_PACKAGES[name]
        try:
            kernel = functools.partial(flash, importlib.import_module(module).flash_attn_func)
        except ImportError:
            raise InputError(f"--attn-func {name} needs the package {module}: {remedy}; or use auto") from None
    _state["kernel"] = kernel


def attention(q, k, v):
    """Attention of all tokens to all tokens with the kernel for the pass at hand."""
    if q.is_meta:  # counting FLOPs: the same for every kernel; autocast does not support this device
        return fused(q, k, v)
    return (written_out if _state["differentiating"] else _state["kernel"])(q, k, v)


def differentiating():
    """Whether the pass at hand takes a forward-mode derivative."""
    return _state["differentiating"]


@contextlib.contextmanager
def forward_mode():
    """Within the context, attention and affine norms avoid fused kernels.

    These have no rule for forward-mode derivatives, and the compiler silently drops custom rules.
    """
    before, _state["differentiating"] = _state["differentiating"], True
    try:
        yield
    finally:
        _state["differentiating"] = before
