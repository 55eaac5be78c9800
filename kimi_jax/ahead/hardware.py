"""What the chips can do, and with which assumptions a compiled program becomes a time.

``docs/scaling.md`` says where each figure comes from and what would falsify it on hardware.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from kimi_jax.flops import PEAK_BF16

T = TypeVar("T")
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One JAX device by its data sheet. Devices of one chip share its links and its network."""

    hbm_gib: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # of a chip: one link of the torus, one direction
    dcn_bytes_per_s: float  # of a chip, to other slices
    host_bytes_per_s: float  # of a chip, by PCIe
    wrap: int  # a dimension of the torus closes to a ring if its size is a multiple of this
    cubes: bool  # and, here, only if every dimension has that size at least
    flops_per_cycle: int  # of all matrix units
    product_cycles: int  # the compiler's estimate for PRODUCT
    devices: int = 1  # per chip

    @property
    def matmul_efficiency(self) -> float:
        """Of the peak, by the compiler's own model of a large bf16 product."""
        rows, inner, columns = PRODUCT
        return 2 * rows * inner * columns / (self.product_cycles * self.flops_per_cycle)


PRODUCT = (8192, 7168, 2048)  # rows, contracted, columns: one expert's up-projection of 8,192 tokens
CHIPS = {  # by the start of the device_kind; Google Cloud's pages on v5e, v5p, v6e and TPU7x
    "TPU v5 lite": Chip(16, 819e9, 50e9, 3.125e9, 16e9, 16, False, 4 * 128**2 * 2, 1_901_949),
    "TPU v5e": Chip(16, 819e9, 50e9, 3.125e9, 16e9, 16, False, 4 * 128**2 * 2, 1_901_949),
    "TPU v5": Chip(95, 2765e9, 100e9, 6.25e9, 16e9, 4, True, 8 * 128**2 * 2, 955_083),
    "TPU v6": Chip(32, 1638e9, 100e9, 12.5e9, 32e9, 16, False, 4 * 256**2 * 2, 530_304),
    "TPU7x": Chip(96, 3690e9, 100e9, 12.5e9, 32e9, 4, True, 4 * 256**2 * 2, 486_722, devices=2),
}
KERNEL_EFFICIENCY = 0.85  # grouped products: the last tile of every expert is part empty
BOOK = "How to Scale Your Model"
LINK_EFFICIENCY = 0.9  # measured on v5e: 45 of 50 GB/s (How to Scale Your Model, "How to Think About TPUs")


def of_kind(figures: Mapping[str, T], kind: str) -> T:
    """The entry of the longest name that ``kind`` starts with."""
    return next(figures[name] for name in sorted(figures, key=len, reverse=True) if kind.startswith(name))


@dataclass(frozen=True)
class Assumption:
    name: str
    value: float
    unit: str
    source: str


def assumptions(kind: str) -> tuple[Assumption, ...]:
    """Everything that a modelled time on such a device rests on."""
    chip, sheet = of_kind(CHIPS, kind), "data sheet"
    return (
        Assumption("bf16 peak", of_kind(PEAK_BF16, kind) / 1e12, "TFLOP/s per device", sheet),
        Assumption(
            "products reach", chip.matmul_efficiency, "of the peak", "the compiler's cycles for a large product"
        ),
        Assumption("kernels reach", KERNEL_EFFICIENCY, "of the peak", "assumed: part-filled tiles"),
        Assumption("HBM", chip.hbm_bytes_per_s / 1e9, "GB/s per device", sheet),
        Assumption("link, one way", chip.link_bytes_per_s / 1e9, "GB/s", f"{sheet}: a chip's total over its links"),
        Assumption("links reach", LINK_EFFICIENCY, "of that", f"measured on v5e ({BOOK})"),
        Assumption("devices share a chip's links", chip.devices, "per chip", sheet),
        Assumption("between slices", chip.dcn_bytes_per_s / chip.devices / 1e9, "GB/s per device", sheet),
        Assumption("to the host", chip.host_bytes_per_s / chip.devices / 1e9, "GB/s per device", f"PCIe ({BOOK})"),
    )
