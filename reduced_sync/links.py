"""All-reduces over links, as public figures have them."""

from dataclasses import dataclass


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
    "10gbe": Link(0.0, 40e-6, 1.25e9, "TCP: half of an 80 us round trip (grpc#7988) a ring step, line rate; inferred"),
}
