"""The data types of the cost model: ``Call``, the description of a call, and ``Candidate``, one algorithm that can compute it."""

from __future__ import annotations

from dataclasses import dataclass

from zsl_kernels.planning.devices import Gpu
from zsl_kernels.planning.tiles import Config


@dataclass(frozen=True)
class Call:
    """Everything that the choice of an algorithm depends on."""

    op: str
    N: int
    T: int
    K: int
    O: int
    M: int | None = None  # examples of the second set of `gram`; None if there is one set only
    gram: bool = False  # whether "interference" also computes the Gram matrix
    itemsize: int = 4  # of the sums
    threads: int = 1
    # Ragged rows (then T is their mean), or rows added to the gradients. Only algorithms that compute each gradient support these.
    irregular: bool = False
    dtype: str = "float32"  # of a and b
    gpu: Gpu | None = None  # the device, for calls that may use the GPU's kernels

    @property
    def formed(self) -> int:
        """Return the number of gradients to compute."""
        return self.N + (self.M or 0)

    @property
    def product(self) -> float:
        """Return the operations to compute all gradients."""
        return 2.0 * self.formed * self.T * self.O * self.K

    @property
    def elements(self) -> float:
        """Return the number of entries of all gradients."""
        return float(self.formed) * self.O * self.K

    @property
    def pairs(self) -> float:
        """Return the operations per coordinate of the pairwise products. Symmetry saves half of them for one set."""
        if self.op == "gram":
            return float(2 * self.N * self.M if self.M else self.N * self.N)
        return float(self.N * self.N) if self.gram else 0.0

    @property
    def operand_itemsize(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def operand_bytes(self) -> float:
        return float(self.operand_itemsize) * self.formed * self.T * (self.O + self.K)

    @property
    def result_bytes(self) -> float:
        """Return the bytes of results as large as the parameter or the operands. Scalars and the Gram matrix are left out."""
        if self.op == "interference_backward":
            return self.operand_bytes
        return float(self.itemsize) * {"interference": 3, "weighted_grad": 1}.get(self.op, 0) * self.O * self.K

    def __str__(self) -> str:
        rest = (f", M={self.M}" if self.M is not None else "") + (", gram" if self.gram else "")
        rest += ", irregular" if self.irregular else ""
        rest += f", {self.dtype} on {self.gpu.name}" if self.gpu else ""
        return f"{self.op}(N={self.N}, T={self.T}, K={self.K}, O={self.O}{rest})"


@dataclass(frozen=True)
class Candidate:
    """One algorithm that can compute a call, with its predicted cost."""

    impl: str
    way: str  # "direct", "stored", "ghost", "rank-one", "chunked" or "matmul"
    kernel: str  # the name in ``tiles.CONFIGS``, or "library" for PyTorch's matrix products
    tile: tuple[int, int]  # output rows × columns per step (ghost: positions × positions)
    work: float  # floating-point operations
    bytes: float  # read from and written to memory
    time: float  # predicted seconds
    workspace: int  # bytes per thread (in total on a GPU and for "chunked")
    limit: str = "work"  # the bottleneck
    l2_bytes: float = 0.0  # read from the GPU's L2 cache
    config: Config | None = None  # the configuration of a Triton kernel
    splits: int = 1  # parts of the examples that separate programs compute
