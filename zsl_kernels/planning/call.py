"""What the cost model is asked, and what it answers with: one call's sizes, and one way of computing it."""

from __future__ import annotations

from dataclasses import dataclass

from zsl_kernels.planning.devices import Gpu
from zsl_kernels.planning.tiles import Config


@dataclass(frozen=True)
class Call:
    """All that the choice depends on."""

    op: str
    N: int
    T: int
    K: int
    O: int
    M: int | None = None  # examples of the second set of `gram`; None for the Gram of one set with itself
    gram: bool = False  # with "interference"
    itemsize: int = 4  # of the sums
    threads: int = 1
    # Ragged rows (T is their mean), or rows added to the gradients: of the ways to know each gradient only those that form it.
    irregular: bool = False
    dtype: str = "float32"  # of a and b
    gpu: Gpu | None = None  # of the GPU's kernels

    @property
    def formed(self) -> int:
        """Gradients that a form which computes gradients computes."""
        return self.N + (self.M or 0)

    @property
    def product(self) -> float:
        """Operations of forming them."""
        return 2.0 * self.formed * self.T * self.O * self.K

    @property
    def elements(self) -> float:
        """Entries of all of them."""
        return float(self.formed) * self.O * self.K

    @property
    def pairs(self) -> float:
        """Operations for each coordinate of the pairwise products: half of the N² by symmetry."""
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
        """Of what is as large as the parameter, or as the operands: the scalars are left out, and the Gram."""
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
    """One way of computing a call."""

    impl: str
    way: str  # "direct", "stored", "ghost", "rank-one", "chunked" or "matmul"
    kernel: str  # as the configurations name it; "library" where PyTorch's own products do the work
    tile: tuple[int, int]  # output rows × columns (ghost: rows × rows of positions) handled at a time
    work: float  # floating-point operations
    bytes: float  # to and from memory
    time: float  # predicted seconds
    workspace: int  # bytes, for each thread (on a GPU, and chunked: in all)
    limit: str = "work"  # what the time is spent on
    l2_bytes: float = 0.0  # from the GPU's second-level cache
    config: Config | None = None  # of a Triton kernel
    splits: int = 1  # parts of the examples that go to programs of their own
