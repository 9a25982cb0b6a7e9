"""Data of the cost model about GPUs: the rates and sizes of the devices that the kernels are compiled for.

Rates are the vendor's figures for dense operations at boost clock, in operations or bytes per second. The L2 bandwidth is not a
vendor's figure: it is an assumption, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: int  # the compute capability without the dot: 90 for 9.0
    sms: int  # streaming multiprocessors
    shared_bytes: int  # the most shared memory that one block can request
    half_flops: float  # bfloat16 and float16 matrix products on the matrix units (tensor cores), accumulated in float32
    tf32_flops: float
    float32_flops: float  # without the matrix units
    instructions: float  # thread instructions per second of all multiprocessors: four warps issue one per cycle
    l2_bandwidth: float
    bandwidth: float  # of device memory
    # The fraction of the rates above that single-warp matrix instructions (HMMA) reach. On newer devices these rates need
    # instructions that span several warps. This is an assumption too.
    warp_share: float
    cluster: int  # blocks of a library matrix product that share loaded operands
    max_warps: int = 64  # that are resident on a multiprocessor
    boxes: bool = False  # whether there are kernels that use bulk tensor copies and warpgroup matrix products


A100 = Gpu("A100", 80, 108, 166912, 312e12, 156e12, 19.5e12, 19.5e12, 5.0e12, 2.0e12, 1.0, 1)
H100 = Gpu("H100", 90, 132, 232448, 989e12, 494e12, 67e12, 33.5e12, 5.5e12, 3.35e12, 0.62, 2, boxes=True)
B200 = Gpu("B200", 100, 148, 232448, 2250e12, 1125e12, 75e12, 37.5e12, 10e12, 8.0e12, 0.31, 4)
GPUS = {gpu.arch: gpu for gpu in (A100, H100, B200)}


OLDEST = min(GPUS)


def nearest(arch: int) -> Gpu:
    """Return the newest of :data:`GPUS` that is not newer than ``arch``, or the oldest if all are newer.

    12.x is treated like 8.x because it has the same matrix instructions.
    """
    return GPUS[max((known for known in GPUS if known <= arch < 120), default=OLDEST)]


def of_device(arch: int, sms: int, shared_bytes: int) -> Gpu:
    """Describe a device with these properties. Each of its multiprocessors is assumed to be as fast as the nearest GPU's."""
    known = nearest(arch)
    share = sms / known.sms
    rates = {name: getattr(known, name) * share for name in ("half_flops", "tf32_flops", "float32_flops", "instructions")}
    return replace(known, sms=sms, shared_bytes=shared_bytes, **rates)
