"""What compiled kernels cost, read off their machine code: registers, spills, instructions for each value.

A step streams memory, and while it does the chip can issue only so many instructions for each parameter; the count is
known without a GPU. Counted is the loop that does the work: the innermost one with most of the 128-bit accesses. Left
out of it are blocks that do not run on aligned, finite input: those that call a subroutine (IEEE division and square
root of subnormals and the like), those that gather lanes which have drifted apart, those that access memory by 8 or 16
bits; and, where there is another way past it, a stretch of blocks from which such blocks are reached.

What ptxas says is in the log of the compiler (`VERBOSE`); the instructions come from NVIDIA's nvdisasm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Options that make NVRTC's log say what `resources` reads, and warn of all that goes to memory for want of registers.
VERBOSE = [f"--ptxas-options=-{said}" for said in ("v", "warn-spills", "warn-lmem-usage")]
NO_NVDISASM = "nvdisasm is missing, which reads machine code: pip install nvidia-cuda-nvdisasm"
WORD = 16  # bytes of an instruction, on every architecture since Volta


class InspectError(RuntimeError):
    """The machine code could not be read; the message says what to do."""


@dataclass(frozen=True)
class Specialisation:
    """Kernels as they are compiled for one purpose: a file of cuda/, and the `spec.h` that it includes.

    `values`: of the kernels whose main loop is counted, how many values a thread handles in one turn; `apart`: for some
    of them, accesses of results that not every launch asks for (`STG 128`), which the count leaves out.
    """

    name: str
    file: str
    spec: str
    values: Mapping[str, int]
    apart: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread, bytes of a thread's stack, and of a block's shared memory."""

    registers: int
    stack: int
    spills: int  # bytes stored and loaded because registers ran out
    shared: int


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with all modifiers (`LDG.E.128`), its operands, its predicate or an empty string."""

    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def name(self) -> str:
        """The opcode without modifiers.

        >>> Instruction("LDG.E.128").name
        'LDG'
        """
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch or a barrier names, if it names one."""
        found = re.search(r"0x[0-9a-f]+$", self.operands)
        return int(found.group(), 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether a branch may go on to the next instruction."""
        return bool(self.predicate) or "," in self.operands

    @property
    def width(self) -> int:
        """The bits that one lane accesses.

        >>> [Instruction(name).width for name in ("LDG.E.128", "STG.E.U16", "LDG.E")]
        [128, 16, 32]
        """
        sizes = [found.group(1) for part in self.opcode.split(".") if (found := _SIZE.fullmatch(part))]
        return int(sizes[-1]) if sizes else 32

    @property
    def access(self) -> str:
        """What and how much one lane accesses.

        >>> Instruction("LDG.E.128").access
        'LDG 128'
        """
        return f"{self.name} {self.width}"


_SIZE = re.compile(r"[US]?(8|16|64|128|256)")
CLASSES = {
    "fp32": "FADD FMUL FFMA FSETP FSEL FMNMX FMNMX3 FCHK FSET FADD2 FMUL2 FFMA2",
    "convert": "I2F I2FP F2I F2F F2FP FRND I2I",
    "mufu": "MUFU",
    "shared": "LDS STS LDSM STSM SHFL REDUX CREDUX ATOMS",
    "global": "LDG STG LD ST RED REDG ATOM ATOMG",
    "local": "LDL STL",
    "matrix": "HMMA IMMA QMMA",
    "control": "BRA EXIT BSSY BSYNC BREAK WARPSYNC BAR NOP YIELD CALL RET",
}
_CLASS = {name: kind for kind, names in CLASSES.items() for name in names.split()}
GLOBAL = frozenset(CLASSES["global"].split())


@dataclass(frozen=True)
class Mix:
    """The instructions of a loop: how many, of each class, and of each kind of global access with its width."""

    instructions: int
    classes: Mapping[str, int]
    accesses: Mapping[str, int]  # "LDG 128": count

    @staticmethod
    def of(instructions: Sequence[Instruction]) -> Mix:
        """Count them; what is in none of `CLASSES` is integer."""
        classes = Counter(_CLASS.get(one.name, "integer") for one in instructions)
        accesses = Counter(one.access for one in instructions if one.name in GLOBAL)
        return Mix(len(instructions), dict(classes), dict(accesses))

    @property
    def bytes(self) -> int:
        """Bytes that one thread moves from and to global memory in one turn of the loop."""
        return sum(int(access.split()[1]) // 8 * count for access, count in self.accesses.items())


def resources(log: str) -> dict[str, Resources]:
    """What ptxas reported of each kernel, by name."""
    found = {}
    for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", log, re.S):

        def number(pattern: str, report: str = report) -> int:
            return sum(int(n) for n in re.findall(pattern, report))

        if not (used := re.search(r"Used (\d+) registers", report)):
            raise InspectError(f"ptxas said nothing of the registers of {name}; was it told {VERBOSE[0]}?")
        found[name] = Resources(
            registers=int(used.group(1)),
            stack=number(r"(\d+) bytes stack frame"),
            spills=number(r"(\d+) bytes spill"),
            shared=number(r"(\d+) bytes smem"),
        )
    return found


def nvdisasm() -> str | None:
    """The path of nvdisasm: of NVIDIA's package, else on PATH, else in $CUDA_HOME."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or []:
        if packaged := sorted(Path(folder).glob("*/bin/nvdisasm")):
            return str(packaged[-1])
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.environ.get("CUDA_HOME", "") + "/bin")


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel of a cubin, subroutines behind them."""
    if not (tool := nvdisasm()):
        raise InspectError(NO_NVDISASM)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-json", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise InspectError(
            f"{tool} cannot read this machine code: {done.stderr.strip()}; a newer one may: {NO_NVDISASM}"
        )
    functions: list[dict[str, Any]] = json.loads(done.stdout)[1]
    return {
        function["function-name"]: [
            Instruction(i["opcode"], i.get("operands", ""), i.get("predicate", ""))
            for i in function["sass-instructions"]
        ]
        for function in functions
    }


def hot_loop(kernel: Sequence[Instruction], apart: frozenset[str] = frozenset()) -> list[Instruction]:
    """The instructions of one turn of a kernel's main loop, on its aligned path; of all of it if it has no loop.

    Narrow accesses are a general path, unless the aligned path cannot do without: those of 16 bits where numbers of
    columns are gathered, of 8 bits where a scale is a byte.
    """
    turns = (_hot_loop(kernel, narrow, apart) for narrow in (16, 8, 0))
    return max(turns, key=lambda found: (_wide(found[0]), found[1]))[0]


def _wide(instructions: Iterable[Instruction]) -> int:
    return sum(i.name in GLOBAL and i.width >= 128 for i in instructions)


def _accesses(instructions: Iterable[Instruction], most: int = 256) -> int:
    return sum(i.name in GLOBAL and i.width <= most for i in instructions)


def _hot_loop(kernel: Sequence[Instruction], narrow: int, apart: frozenset[str]) -> tuple[list[Instruction], bool]:
    """And whether it is a loop, not all of a kernel."""
    blocks = _blocks(kernel)
    edges = _edges(kernel, blocks)
    hot = {start for start, block in blocks.items() if not any(_cold(i, narrow, apart) for i in block)}
    ways = {start: [to for to in edges[start] if to in hot] for start in hot}
    back: dict[int, list[int]] = {start: [] for start in hot}
    for start, targets in ways.items():
        for to in targets:
            back[to].append(start)
    reached = _reach({0} & hot, ways)
    heads = {head: {start for start in reached if head in ways[start] and head <= start} for head in reached}
    loops = [
        (head, _reach({latch}, back, stop=head) & _reach({head}, ways) & reached)
        for head in reached
        for latch in heads[head]
    ]
    # Where IEEE arithmetic may take a slower course, or an access a narrower one.
    risks = {start for start in hot if any(_slow(i, narrow) for to in edges[start] for i in blocks[to])}
    paths = [_likely(head, body, ways, blocks, risks) for head, body in loops if body]
    turns = [[i for start in path for i in blocks[start]] for path in paths]
    if not any(map(_wide, turns)):
        ends = {start for start in reached if not edges[start] and blocks[start][-1].name != "RET"}
        straight = [i for start in _likely(0, reached & _reach(ends, back), ways, blocks, risks) for i in blocks[start]]
        if _wide(straight) or not any(map(_accesses, turns)):
            return straight, False
        return max(turns, key=_accesses), True
    return min(turns, key=lambda turn: (-_wide(turn), len(turn))), True


def _likely(
    head: int,
    body: set[int],
    ways: Mapping[int, Sequence[int]],
    blocks: Mapping[int, Sequence[Instruction]],
    risks: set[int],
) -> list[int]:
    """The blocks of a way through a loop: of most wide accesses, fewest narrow ones, fewest risks, most instructions.

    Of two branches only one is taken, where they depend on what is the same for a whole warp. One that has risks where
    the other has none is what kernels fall back to.
    """
    best: dict[int, tuple[tuple[int, int, int, int], list[int]]] = {}
    entered: set[int] = set()
    stack = [head] if head in body else []
    while stack:  # depth first: a way that leads back to a block that is entered and not left begins another turn
        at = stack[-1]
        ahead = [to for to in ways[at] if to in body and to != head]
        if at not in entered:
            entered.add(at)
            stack += [to for to in ahead if to not in entered]
            continue
        stack.pop()
        if at in best:
            continue
        (wide, narrow, safe, count), rest = max((best[to] for to in ahead if to in best), default=((0, 0, 0, 0), []))
        own = (_wide(blocks[at]), -_accesses(blocks[at], 16), -(at in risks), len(blocks[at]))
        best[at] = (wide + own[0], narrow + own[1], safe + own[2], count + own[3]), [at, *rest]
    return best[head][1] if head in best else []


def _cold(i: Instruction, narrow: int, apart: frozenset[str]) -> bool:
    asked = i.name in GLOBAL and i.access in apart
    return asked or _slow(i, narrow) or i.opcode.startswith("WARPSYNC.COLLECTIVE")


def _slow(i: Instruction, narrow: int) -> bool:
    call = i.name == "CALL" and not i.predicate  # with one, it leaves a loop on sm_80
    return call or (i.name in GLOBAL and i.width <= narrow)


def _blocks(kernel: Sequence[Instruction]) -> dict[int, Sequence[Instruction]]:
    """Basic blocks by the address of their first instruction."""
    cuts = {0}
    for k, i in enumerate(kernel):
        if i.name in ("BRA", "EXIT", "CALL", "RET", "BSYNC", "BRX", "BREAK"):
            cuts.add(k + 1)
        if i.name in ("BRA", "BSSY") and i.target is not None:
            cuts.add(i.target // WORD)
    starts = sorted(cut for cut in cuts if cut < len(kernel))
    return {a * WORD: kernel[a:b] for a, b in zip(starts, [*starts[1:], len(kernel)], strict=True)}


def _edges(kernel: Sequence[Instruction], blocks: Mapping[int, Sequence[Instruction]]) -> dict[int, list[int]]:
    """Where each block goes on to. A computed jump (BRX) names no targets: taken are those that nothing else names."""
    edges = {start: [to for to in _successors(kernel, blocks, start) if to in blocks] for start in blocks}
    named = {0}.union(*edges.values())
    for start, block in blocks.items():
        if block[-1].name == "BRX":
            if not (targets := [at for at in blocks if at not in named]):
                raise InspectError("a computed jump (BRX) to where other instructions lead, too")
            edges[start] += targets
    return edges


def _successors(
    kernel: Sequence[Instruction], blocks: Mapping[int, Sequence[Instruction]], start: int
) -> Iterator[int]:
    """Where a block goes on to. A BSYNC goes to where its BSSY says, and nearly always that is the next block."""
    last, after = blocks[start][-1], start + len(blocks[start]) * WORD
    if last.name == "BRA":
        if last.target is not None:
            yield last.target
        if last.conditional:
            yield after
    elif last.name == "BSYNC":
        barrier = last.operands.partition(",")[0]
        meeting = {i.target for i in kernel if i.name == "BSSY" and i.operands.partition(",")[0] == barrier}
        yield from [after] if after in meeting else [at for at in meeting if at is not None]
    elif last.name not in ("EXIT", "RET", "BRX") or last.predicate:
        yield after


def _reach(start: set[int], ways: Mapping[int, Sequence[int]], stop: int | None = None) -> set[int]:
    """What can be reached from some blocks; not through `stop`, which may be reached itself."""
    seen, todo = set(start), list(start)
    while todo:
        if (at := todo.pop()) != stop:
            new = [to for to in ways.get(at, ()) if to not in seen]
            seen.update(new)
            todo += new
    return seen
