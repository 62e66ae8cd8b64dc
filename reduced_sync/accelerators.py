"""What GPUs can do, from NVIDIA's data sheets (dense bfloat16), and which share of it a training run attains."""

from dataclasses import dataclass

from reduced_sync_model import GPT


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


def model_flops_utilisation(model: GPT, sequences: float, seconds: float, device_name: str) -> float | None:
    """MFU: the share of its device's bfloat16 peak that one rank attains, or None where the peak is not known.

    sequences: those of block_size that this rank's TP group trains on in so many seconds. Flops as in PaLM (arXiv
    2204.02311, appendix B).
    """
    peak = next((a.peak for name, a in ACCELERATORS.items() if name in device_name), None)
    if peak is None:
        return None
    c = model.config
    flops_per_token = 6 * model.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
    return flops_per_token * c.block_size * sequences / model.tp_size / seconds / peak
