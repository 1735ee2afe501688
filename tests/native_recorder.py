"""Records native calls into a file that tests/native/harness.cpp plays back: structs, operands before and after."""

from collections.abc import Callable
from ctypes import c_int64, sizeof, string_at
from typing import Any, BinaryIO

from lowbit.native import abi, build
from lowbit.native.library import Library

SIZE = {0: 4, 1: 2, 2: 2}  # of an abi.DTYPE
COMPANION = {0: 0, 1: 1, 2: 2, 3: 2, 4: 4}  # of an abi.MASTER
STEP, ENCODE, DECODE, MEASURE = range(4)


class Recorder:
    """Stands for a library. What it is asked, it asks the library with `threads`, and writes down."""

    def __init__(self, library: Library, threads: int):
        self.library, self.threads = library, threads
        self.formats: list[bytes] = []  # each once
        self.programs: list[bytes] = []
        self.calls: list[bytes] = []

    def ships(self, *arguments: Any) -> bool:
        return self.library.ships(*arguments)

    def kernel(self, *arguments: Any) -> Any:
        return self.library.kernel(*arguments)

    # ---- calls

    def step(self, jobs: Any, count: int, threads: int) -> int:
        parts, written = [number(STEP), number(self.threads), number(count)], []
        for job in jobs:
            rows, cols, size = job.rows, job.cols, SIZE[job.param_dtype]
            program = abi.Program.from_address(job.program)
            param, companion = (job.param, rows * cols * size), (job.companion, rows * cols * COMPANION[job.master])
            grad, skipped = (job.grad, rows * cols * SIZE[job.grad_dtype]), (job.skipped, 16)
            parts += [struct(job), self._program(program)]
            parts += [chunk(*operand) for operand in (param, grad, companion, skipped)]
            written += [param, companion, skipped]
            for k in range(program.moments):
                operands = self._operand(job.moments[k], rows, cols)
                parts += [self._format(job.moments[k].format), *(chunk(*operand) for operand in operands)]
                written += operands
            lengths = {abi.OVER["row"]: rows, abi.OVER["column"]: cols, abi.OVER["group"]: -(-rows // job.group_rows)}
            if job.weight.format:
                bytes_each = {0: 4, 1: 2}.get(job.scaled, 1)  # of an abi.SCALED
                weight = [
                    (job.weight.codes, rows * job.weight.row_bytes),
                    (job.weight.scale, bytes_each * rows * job.weight.scales),
                    (job.rest, rows * cols),
                    (job.tensor_scale, 4),
                ]
                parts += [number(1), self._format(job.weight.format), *(chunk(*operand) for operand in weight)]
                written += weight
            else:
                parts.append(number(0))
            own = [(job.vectors[k], 4 * lengths[program.over[k]]) for k in range(program.vectors)]
            own += [(job.scalars[k], 4) for k in range(program.kept)]
            parts += [chunk(*operand) for operand in own]
            written += own
        result = self.library.step(jobs, count, threads)
        self.calls.append(b"".join([*parts, *(chunk(*operand) for operand in written)]))
        return result

    def encode(self, matrix: Any, threads: int) -> int:
        return self._matrix(ENCODE, matrix, lambda: self.library.encode(matrix, self.threads))

    def decode(self, matrix: Any, threads: int) -> int:
        return self._matrix(DECODE, matrix, lambda: self.library.decode(matrix, self.threads))

    def measure(self, matrix: Any, what: int, to: int, threads: int) -> int:
        return self._matrix(MEASURE, matrix, lambda: self.library.measure(matrix, what, to, self.threads), what, to)

    def _matrix(self, kind: int, matrix: Any, call: Callable[[], int], what: int = 0, to: int = 0) -> int:
        m = matrix._obj
        lines, across = (m.filled, m.rows) if m.columns else (m.rows, m.filled)
        values = m.values, SIZE[m.dtype] * ((lines - 1) * m.step + across)
        out = m.out, SIZE[m.out_dtype] * m.rows * m.cols
        blocks = 4 * -(-m.rows // m.tile) * m.packed.scales
        found = to, (4 if what == abi.STATISTIC["absmax"] else 8) * m.rows * m.packed.scales
        codes, _, extra = self._operand(m.packed, m.rows, m.cols)
        fmt = abi.Format.from_address(m.packed.format)
        in_bytes = m.multipliers or m.outers or (fmt.stored and not m.inverse)
        stored = (m.bytes, blocks // 4) if in_bytes else (None, 0)
        tables = [(x, 4 * 256) for x in (m.multipliers, m.inverses)]
        outers = m.outers, 4 * m.rows * -(-m.cols // fmt.outer) if m.outers else 0
        mask = m.mask, m.rows * -(-m.cols // 8) if m.mask else 0
        operands = codes, (None, 0) if in_bytes else (m.packed.scale, blocks), extra
        parts = [number(kind), number(self.threads), number(what), struct(m)]
        parts += [
            chunk(*operand) for operand in (values, (m.inverse, blocks), out, found, stored, *tables, outers, mask)
        ]
        parts += [self._format(m.packed.format), *(chunk(*operand) for operand in operands)]
        result = call()
        self.calls.append(
            b"".join([*parts, *(chunk(*operand) for operand in (out, found, stored, outers, mask, *operands))])
        )
        return result

    # ---- what calls share

    def _operand(self, o: Any, rows: int, cols: int) -> list[tuple[int, int]]:
        f = abi.Format.from_address(o.format)
        if f.kind == abi.KIND["float"]:
            return [(o.codes, rows * cols * SIZE[f.dtype]), (None, 0), (None, 0)]
        extra = {abi.KIND["affine"]: 1, abi.KIND["log"]: 4}.get(f.kind, 0)
        return [(o.codes, rows * o.row_bytes), (o.scale, 4 * rows * o.scales), (o.extra, extra * rows * o.scales)]

    def _format(self, address: int) -> bytes:
        f = abi.Format.from_address(address)
        return among(self.formats, struct(f) + (chunk(f.cells, 4 * 2 * f.cell_half) if f.cells else chunk(None, 0)))

    def _program(self, program: Any) -> bytes:
        names = {kernel: printed.symbol.encode() for kernel, _, printed in self.library._kernels.values()}
        parts = [struct(program)]
        for stage in (abi.Stage * program.count).from_address(program.stages):
            name = names[stage.kernel]
            parts += [struct(stage), number(0), number(len(name)), name]
        return among(self.programs, b"".join(parts))

    def write(self, file: BinaryIO) -> None:
        for found in (self.formats, self.programs, self.calls):
            file.write(b"".join([number(len(found)), *found]))

    def own_kernels(self) -> str:
        """The header own.h: kernels that no header of the library has, and a table of all."""
        rules = (build.HERE / "rules.h").read_text()
        printed = {p.symbol: p for _, _, p in self.library._kernels.values()}
        foreign = [p for p in printed.values() if p.functor not in rules]
        helpers = {name: text for p in foreign for name, text in p.helpers.items() if text not in rules}
        lines = [*helpers.values(), *(text for p in foreign for text in (p.functor, p.kernel))]
        lines += [
            "#ifdef LB_FUSED",
            "#define LB_CHOOSE(name) LB_NAME(name##_fused)",
            "#else",
            "#define LB_CHOOSE(name) nullptr",
            "#endif",
            "struct Kernel {",
            "  const char *name;",
            "  lb_kernel kernel;",
            "  lb_choose_fused fused;",
            "};",
            "static const Kernel KERNELS[] = {",
        ]
        for name, p in printed.items():
            fused = f"LB_CHOOSE({name})" if "LB_FUSED" in p.kernel else "nullptr"
            lines.append(f'  {{"{name}", LB_NAME({name}), {fused}}},')
        return "\n".join([*lines, "};", ""])


def among(known: list[bytes], one: bytes) -> bytes:
    if one not in known:
        known.append(one)
    return number(known.index(one))


def number(n: int) -> bytes:
    return bytes(c_int64(n))


def struct(value: Any) -> bytes:
    return number(0) + number(sizeof(value)) + bytes(value)


def chunk(address: int | None, size: int) -> bytes:
    """Bytes, and how far they were off the alignment of the heap."""
    if not address or not size:
        return number(0) + number(0)
    return number(address % 16) + number(size) + string_at(address, size)
