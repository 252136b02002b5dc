"""GPUs: the peaks of their data sheets, and the hours that training takes on them."""

import re

# Dense bf16 and fp16 tensor-core FLOP/s with fp32 accumulation, by words of torch.cuda.get_device_name. H100, H200 and
# V100 without another word are the SXM cards. From Hopper on, NVIDIA's data sheets give twice as much, with sparsity.
PEAK_FLOPS = {
    "B200": 2250e12,  # HGX B200 data sheet
    "H200": 989.5e12,  # H200 data sheet
    "H200 NVL": 835.5e12,
    "H100": 989.5e12,  # H100 data sheet
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H20": 148e12,  # H20 data sheet, as resellers print it
    "A100": 312e12,  # A100 data sheet
    "L40S": 362e12,  # L40S data sheet
    "V100": 125e12,  # V100 data sheet, fp16 only
    "V100 PCIE": 112e12,  # spelled as torch reports it
    "RTX 4090": 165.2e12,  # Ada architecture white paper, appendix
    "RTX 3090": 71e12,  # GA102 architecture white paper, appendix
}
OTHER_CARDS = {"Ti", "SUPER", "D", "Laptop", "MIG"}  # words that mark another card than the table's
MFU = 0.35  # share of the peak that estimates of hours assume


def gpu_hours(flops_per_image, images, gpu, mfu):
    """Hours of one GPU, a key of PEAK_FLOPS, that reaches the share `mfu` of its peak on that many images."""
    return flops_per_image * images / (PEAK_FLOPS[gpu] * mfu) / 3600


def peak_of(gpu_name):
    """The PEAK_FLOPS entry whose words occur consecutively in a GPU's name, the longest if several; None if none do."""
    words = re.split("[ -]", gpu_name)
    if OTHER_CARDS & set(words):
        return None
    found = [name for name in PEAK_FLOPS if f" {name} " in f" {' '.join(words)} "]
    return PEAK_FLOPS[max(found, key=len)] if found else None
