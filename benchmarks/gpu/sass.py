"""What a compiled GPU kernel is made of: registers, stack, spills, shared memory, and the instructions of its hot loops.

Reads machine code (SASS), and needs no GPU: ``inspect`` a cubin, ``cubins`` those that nvcc built, ``compile_triton`` a
Triton kernel. The disassembler and its sister come with Triton, or with nvcc.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

MATRIX = re.compile(r"UTC\w*MMA|\w*GMMA|[HDIQO]MMA")
LOCAL = ("LDL", "STL")  # of spilled registers, or of an array on the stack


@dataclass(frozen=True)
class Instruction:
    name: str  # without modifiers: "HMMA"
    text: str
    conditional: bool

    @property
    def target(self) -> str | None:
        found = re.search(r"`\((\.L_\w+)\)", self.text)
        return found[1] if found else None


class Loop(NamedTuple):
    """A natural loop: its instructions by name, those of the loops inside it included, and not."""

    instructions: Counter[str]
    own: Counter[str]

    @property
    def matrix(self) -> Counter[str]:
        return _matrix(self.instructions)

    @property
    def own_matrix(self) -> Counter[str]:
        return _matrix(self.own)


@dataclass(frozen=True)
class Usage:
    kernel: str
    registers: int
    stack: int
    shared: int  # static: a launch may add to it
    instructions: Counter[str] = field(repr=False)
    loops: tuple[Loop, ...] = field(repr=False)  # with matrix instructions, innermost first
    hot: tuple[Loop, ...] = field(repr=False)  # those without another such loop inside
    ffma_in_loops: int = 0
    wide_loads: int = 0  # from global memory, of 16 bytes

    @property
    def spills(self) -> int:
        return sum(self.instructions[name] for name in LOCAL)

    @property
    def matrix(self) -> Counter[str]:
        return _matrix(self.instructions)


def _matrix(instructions: Counter[str]) -> Counter[str]:
    return Counter({name: count for name, count in instructions.items() if MATRIX.fullmatch(name)})


@lru_cache
def tool(name: str) -> str:
    """Triton's own, or that on the path."""
    try:
        from triton.backends import nvidia

        found = Path(nvidia.__file__).parent / "bin" / name
    except ImportError:
        found = Path()
    path = str(found) if found.is_file() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name}: expected it in Triton's wheel or on the path")
    return path


def _run(name: str, *arguments: str | Path, cwd: str | None = None) -> str:
    command = [tool(name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def cubins(library: Path) -> dict[str, bytes]:
    """The cubins in what nvcc built, by file name, which ends in the architecture: ``….sm_80.cubin``."""
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "-xelf", "all", library.resolve(), cwd=folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def inspect(cubin: bytes) -> list[Usage]:
    """Every kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", resources)
    codes = dict(_codes(listing))
    return [_usage(kernel, int(reg), int(stack), int(shared), codes[kernel]) for kernel, reg, stack, shared in found]


def _codes(listing: str) -> list[tuple[str, Code]]:
    sections = re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]
    return [(section[: section.index(",")].strip('"'), Code(section)) for section in sections]


def _usage(kernel: str, registers: int, stack: int, shared: int, code: Code) -> Usage:
    bodies = sorted(code.loops, key=len)
    loops, hot, in_loops = [], [], set[int]()
    for at, body in enumerate(bodies):
        in_loops |= body
        inside = set[int]().union(*(other for other in bodies[:at] if other < body))
        loop = Loop(code.count(body), code.count(body - inside))
        if loop.matrix:
            loops.append(loop)
            if not _matrix(code.count(inside)):
                hot.append(loop)
    ffma = code.count(in_loops)["FFMA"]
    everything = code.count(set(range(len(code.instructions))))
    wide = sum(x.name == "LDG" and ".128" in x.text for x in code.instructions)
    return Usage(kernel, registers, stack, shared, everything, tuple(loops), tuple(hot), ffma, wide)


class Code:
    """A kernel's instructions and the graph of its control flow."""

    def __init__(self, section: str) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in section.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                self.labels[label[1]] = len(self.instructions)
            elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?(([A-Z][A-Z0-9_]*)[^;]*);", line):
                # A branch may have its condition among the operands: BRA.U UP0, `(.L_x_1).
                conditional = bool(code[1]) or re.match(r"BRA\S*\s+!?U?P", code[2]) is not None or code[2].startswith("BRA.DIV")
                self.instructions.append(Instruction(code[3], code[2], conditional))

    def count(self, places: set[int] | frozenset[int]) -> Counter[str]:
        return Counter(self.instructions[place].name for place in places)

    @cached_property
    def successors(self) -> list[list[int]]:
        # A BSYNC continues where the BSSY of its barrier said.
        meetings: dict[str, list[int]] = {}
        for x in self.instructions:
            if x.name == "BSSY" and x.target in self.labels:
                meetings.setdefault(x.text.replace(",", " ").split()[1], []).append(self.labels[x.target])
        found = []
        for place, x in enumerate(self.instructions):
            after = [place + 1] if place + 1 < len(self.instructions) else []
            if x.name == "BRA" and x.target in self.labels:
                after = [self.labels[x.target], *(after if x.conditional else [])]
            elif x.name in ("EXIT", "RET", "KILL") and not x.conditional:
                after = []
            elif x.name == "BSYNC":
                after = [*meetings.get(x.text.split()[1], []), *after]
            found.append([place for place in dict.fromkeys(after) if place < len(self.instructions)])
        return found

    @cached_property
    def _order(self) -> list[int]:
        """What is reached, each after all that lead to it but for loops."""
        seen, order, stack = {0}, [], [(0, iter(self.successors[0]))] if self.instructions else []
        while stack:
            place, rest = stack[-1]
            step = next((x for x in rest if x not in seen), None)
            if step is None:
                order.append(place)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(self.successors[step])))
        return order[::-1]

    @cached_property
    def _dominators(self) -> dict[int, int]:
        """The last place that every way to a place passes."""
        rank = {place: at for at, place in enumerate(self._order)}
        before: dict[int, list[int]] = {}
        for place in self._order:
            for step in self.successors[place]:
                before.setdefault(step, []).append(place)
        last = {0: 0}
        changed = True
        while changed:
            changed = False
            for place in self._order[1:]:
                ways = [x for x in before[place] if x in last]
                common = ways[0]
                for x in ways[1:]:
                    while common != x:
                        if rank[common] > rank[x]:
                            common = last[common]
                        else:
                            x = last[x]
                if last.get(place) != common:
                    last[place], changed = common, True
        return last

    @cached_property
    def loops(self) -> list[frozenset[int]]:
        """The natural loops, one for each head: what reaches a branch back to the head without passing it."""
        before: dict[int, list[int]] = {}
        for place in self._order:
            for step in self.successors[place]:
                before.setdefault(step, []).append(place)
        found: dict[int, set[int]] = {}
        for place in self._order:
            for head in self.successors[place]:
                if self._passes(head, place):
                    body, todo = found.setdefault(head, {head}), [place]
                    while todo:
                        x = todo.pop()
                        if x not in body:
                            body.add(x)
                            todo += before[x]
        return [frozenset(body) for body in found.values()]

    def _passes(self, head: int, place: int) -> bool:
        """Whether every way to ``place`` passes ``head``."""
        while place > 0 and place != head:
            place = self._dominators[place]
        return place == head


class Variant(NamedTuple):
    """How one Triton kernel is compiled: ``constants`` are the arguments that it is compiled for, ``signature`` has the others'
    types, of which those in ``odd`` are not known to be multiples of 16."""

    name: str
    kernel: Any  # of triton.jit
    dtype: str  # "half" or "float32"
    config: Any  # zsl_kernels.planning.tiles.Config
    signature: dict[str, str]
    constants: dict[str, object]
    odd: tuple[str, ...] = ()


class Compiled(NamedTuple):
    usage: Usage
    shared: int  # all of it, in bytes
    cubin: bytes


def compile_triton(variant: Variant, arch: int) -> Compiled:
    """Compiles for an architecture (80, 90, 100), on any machine."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names}
    aligned = [at for at, name in enumerate(names) if signature[name] != "constexpr" and name not in variant.odd]
    aligned = [at for at in aligned if signature[names[at]][0] in "*iu"]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(at,): [["tt.divisibility", 16]] for at in aligned},
    )
    options = {"num_warps": variant.config.warps, "num_stages": variant.config.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    (usage,) = inspect(kernel.asm["cubin"])
    return Compiled(usage, kernel.metadata.shared, kernel.asm["cubin"])
