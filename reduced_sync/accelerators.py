"""What GPUs can do, from NVIDIA's data sheets (dense bfloat16)."""

from dataclasses import dataclass


@dataclass
class Accelerator:
    """What one rank computes with: bytes/s of its memory, flops/s, seconds of a layer that moves next to no data."""

    bandwidth: float
    peak: float
    overhead: float
    source: str = ""


LAYER = 10.4e-6  # measured on an H100, and taken for all
SHEET = "NVIDIA's data sheet; 8 kernels a layer, 1.3 us each in a graph (Hazy Research 2025)"

# by a part of the name that torch.cuda.get_device_name gives; the first that fits
ACCELERATORS = {
    "H100 PCIe": Accelerator(2.0e12, 756e12, LAYER, SHEET),
    "H100": Accelerator(3.35e12, 989e12, LAYER, SHEET),
    "H200": Accelerator(4.8e12, 989e12, LAYER, SHEET),
    "B200": Accelerator(8.0e12, 2250e12, LAYER, SHEET),
    "A100": Accelerator(2.0e12, 312e12, LAYER, SHEET),
}
NAMED = {name.lower(): accelerator for name, accelerator in ACCELERATORS.items()}  # as options name them
