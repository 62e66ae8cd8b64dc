"""What GPUs do, from NVIDIA's data sheets (dense bfloat16), and all-reduces over links, from public figures."""

from dataclasses import dataclass


@dataclass
class Accelerator:
    """What one rank computes with: bytes/s of its memory, flops/s, seconds of a layer that moves next to no data."""

    bandwidth: float
    peak_flops: float
    overhead: float
    source: str = ""


OVERHEAD = 10.4e-6  # of a layer: measured on an H100, and taken for all
DATA_SHEET = "NVIDIA's data sheet; 8 kernels per layer, 1.3 us each in a graph (Hazy Research 2025)"

# by a part of the name that torch.cuda.get_device_name gives; the first that fits
ACCELERATORS = {
    "H100 PCIe": Accelerator(2.0e12, 756e12, OVERHEAD, DATA_SHEET),
    "H100": Accelerator(3.35e12, 989e12, OVERHEAD, DATA_SHEET),
    "H200": Accelerator(4.8e12, 989e12, OVERHEAD, DATA_SHEET),
    "B200": Accelerator(8.0e12, 2250e12, OVERHEAD, DATA_SHEET),
    "A100": Accelerator(2.0e12, 312e12, OVERHEAD, DATA_SHEET),
}
GPUS = {name.lower(): accelerator for name, accelerator in ACCELERATORS.items()}  # as options name them


@dataclass
class Link:
    """All-reduce over a link: seconds `base` and `step`, and the bus bandwidth in bytes/s."""

    base: float
    step: float
    bandwidth: float
    source: str = ""

    def all_reduce(self, payload: float, n: int) -> float:
        """Seconds of one all-reduce of `payload` bytes over n ranks; 0 for one rank."""
        return self.base + 2 * (n - 1) * (self.step + payload / n / self.bandwidth) if n > 1 else 0.0


# From public threads, as read there; their ranges are wide, and other drivers, sizes and software give other figures.
LINKS = {
    "nvlink": Link(
        6.6e-6, 0.6e-6, 180e9, "H100 NVLink, NCCL: tuner constants (LL ring); 8 ranks, 2 KiB-1 MiB: sglang#22734"
    ),
    "nvlink-oneshot": Link(3.3e-6, 0.19e-6, 65e9, "H100 NVLink, custom one-shot kernel, 2, 4, 8 ranks: sglang#2904"),
    "no-p2p": Link(38.5e-6, 0.3e-6, 1.9e9, "through host memory, NCCL: sglang#39605 (2 ranks), nccl#1530 (8)"),
    "pcie": Link(0.2e-6, 3.2e-6, 12.8e9, "PCIe Gen4 peer to peer, NCCL: sglang-V100#2 (4 ranks), vllm#50576 (8)"),
    "infiniband": Link(18e-6, 1.0e-6, 343e9, "2 nodes, HDR or NDR, NCCL: nccl-tests#150 (2 ranks), nccl#1244 (16)"),
    "pcie-8": Link(
        0.0, 1.8e-6, 0.36e9, "8 cards, no NVLink, NCCL, up to 64 KB: sglang#32479 (45 us for 4 KB, 344 for 64)"
    ),
    "10gbe": Link(0.0, 40e-6, 1.25e9, "TCP: half of an 80 us round trip (grpc#7988) a ring step, line rate; inferred"),
    "usb4": Link(0.0, 59e-6, 3e9, "2 ranks, TCP: 120 us for one token's (fak#11910), 3 GB/s (mlx-lm#1905)"),
    "thunderbolt": Link(0.0, 150e-6, 4e9, "2 Macs, TCP: 250-350 us (fak#12596), 25-40 Gbit/s (OdinLink-Five#15)"),
    "gigabit": Link(
        0.0,
        180e-6,
        125e6,
        "TCP, 64 of 4.3 KB a token: distributed-llama#136 (24 ms, 2 ranks), #64 (75 ms, 4); line rate",
    ),
}
