"""Precision of matrix products and choice of attention kernels, for the whole process."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def set_math(allow_tf32, fused_attn=True):
    """Switch TF32 and the fused attention kernels on or off for the whole process."""
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.backends.cuda.enable_flash_sdp(fused_attn)
    torch.backends.cuda.enable_mem_efficient_sdp(fused_attn)
    torch.backends.cuda.enable_cudnn_sdp(fused_attn)
