"""What the cost model knows about a GPU: plain numbers, of the parts that the kernels are compiled for.

Rates are the vendor's figures for dense operations at boost clock, in operations and bytes for each second. The bandwidth of the
second-level cache is no vendor's figure: it is an assumption, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: int  # of compute capability 9.0: 90
    sms: int  # streaming multiprocessors
    shared_bytes: int  # shared memory that one block may ask for
    half_flops: float  # bfloat16 and float16 products on the matrix units, accumulated in float32
    tf32_flops: float
    float32_flops: float  # outside of the matrix units
    instructions: float  # of all threads, that the multiprocessors issue in a second: a warp's in a cycle, four at a time
    l2_bandwidth: float
    bandwidth: float  # of the device's memory
    # What products by the instructions of a single warp (HMMA) reach of the rates above, which on newer parts are those of
    # instructions of several warps: an assumption too.
    warp_share: float
    cluster: int  # blocks of a library's product that share what they load
    max_warps: int = 64  # that a multiprocessor holds
    boxes: bool = False  # whether there are kernels that copy boxes and multiply by warpgroups


A100 = Gpu("A100", 80, 108, 166912, 312e12, 156e12, 19.5e12, 19.5e12, 5.0e12, 2.0e12, 1.0, 1)
H100 = Gpu("H100", 90, 132, 232448, 989e12, 494e12, 67e12, 33.5e12, 5.5e12, 3.35e12, 0.62, 2, boxes=True)
B200 = Gpu("B200", 100, 148, 232448, 2250e12, 1125e12, 75e12, 37.5e12, 10e12, 8.0e12, 0.31, 4)
GPUS = {gpu.arch: gpu for gpu in (A100, H100, B200)}


OLDEST = min(GPUS)


def nearest(arch: int) -> Gpu:
    """The newest of :data:`GPUS` that is no newer than ``arch``; the oldest, for what is older than all.

    12.x counts as 8.x, whose matrix instructions it has.
    """
    return GPUS[max((known for known in GPUS if known <= arch < 120), default=OLDEST)]


def of_device(arch: int, sms: int, shared_bytes: int) -> Gpu:
    """A device as it says it is: each of its multiprocessors as fast as the nearest part's."""
    known = nearest(arch)
    share = sms / known.sms
    rates = {name: getattr(known, name) * share for name in ("half_flops", "tf32_flops", "float32_flops", "instructions")}
    return replace(known, sms=sms, shared_bytes=shared_bytes, **rates)
