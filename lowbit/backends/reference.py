"""The reference backend: plain torch, on any device, and the meaning of every bit.

It works on step blocks (256 values of a row, or a whole shorter row), many at a time: tensors with the same formats are
cut into pieces of whole rows, and pieces are gathered into chunks of about a quarter of a million values. So a model of
many small tensors costs a few large torch operations, and no temporary is larger than a chunk (or one row).

A sum has one meaning (DESIGN §5), whose one tool is the halving tree: pad with zeros to a power of two n, then add
x[i] + x[i + n/2] until one is left. What a `measure` function returns is fp32, and 0 beyond the end of a row.

    row     the tree in fp32 inside each step block; the blocks of the row by the tree in float64
    group   the row sums of the group, by the tree in float64, padded to the power of two for its own number of rows
    tensor  all row sums, by the tree in float64
    all     the tensors, program by program in the order of the jobs, by the tree in float64; a tensor that will be left
            alone counts as 0
    column  values converted to float64; inside each tile of TILE = 512 rows (the last may be short) one row after the
            other, starting from the tile's first; then the tiles by the tree in float64

Of a tensor whose rows lie on several ranks, the sums of all rows are brought together first and folded as those of one
that has them all, so they are the same bits. Sums over columns are made so of each rank's rows, and then added.

The float64 sum is rounded to fp32 once: a sum as it is, a mean after one float64 division by the number of values. A
maximum is that of magnitudes, and NaN if any is. Scaling before a square, by a power of two, is the business of the
`measure` function (`s.unit` of AdaClip and AdaGN).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import codec, masters
from ..blocks import halve
from ..formats import Format
from ..layout import row_stride, step_width
from ..rounding import bits16, key, uniform
from ..rows import pack, unpack
from ..shards import Together, bring_together
from ..stages import VECTORS, Job, Namespace, Program, Stage
from ..stored import WHOLE
from ..stored import decode as decode_weight
from ..stored import encode as encode_weight
from .reference_matrix import decode as decode
from .reference_matrix import encode as encode
from .reference_matrix import fake as fake
from .reference_matrix import measured as measured
from .reference_matrix import quantized as quantized
from .reference_matrix import rotate as rotate
from .reference_matrix import takes as takes

CHUNK = 1 << 18  # values worked on at a time: temporaries of 1 MB, which stay in cache
TILE = 512  # rows that a sum over a column adds one after the other


@torch.no_grad()
def step(jobs: list[Job], update: Update | None = None) -> None:
    """Step every job: parameters, moments, scalars and skip counts are written in place.

    Programs run side by side, so that a measurement over all tensors sees the tensors of every program, and ranks that
    share tensors meet as seldom as can be. `update` may do the last sweep, and says of which jobs it has.
    """
    runs = [Sweeps(same).run(update) for same in _grouped(jobs, lambda job: job.kind)]
    asked = {run: question for run in runs if (question := next(run, None)) is not None}
    while asked:
        spread = {run: question for run, question in asked.items() if isinstance(question, list)}
        bring_together(one for question in spread.values() for one in question)
        ready = list(spread)
        answer = None
        if not ready:  # what is left waits for a number over all tensors
            ready, questions = list(asked), [question for question in asked.values() if not isinstance(question, list)]
            device = questions[0].each.device  # with one device, as usual, nothing is moved and nobody waits
            each = torch.cat([question.each.to(device, torch.float64) for question in questions])
            answer = each.amax() if questions[0].reduce == "max" else halve(each)
        for run in ready:
            del asked[run]
        for run in ready:
            with contextlib.suppress(StopIteration):
                asked[run] = run.send(answer)
        asked = {run: asked[run] for run in runs if run in asked}


@dataclass(frozen=True, eq=False)
class _Total:
    """A question for one number over all tensors: one of each job, and how to reduce them."""

    each: Tensor
    reduce: str


Update = Callable[["Sweeps", list[Stage]], set[int]]
Run = Generator[_Total | list[Together], Tensor | None, None]


def _grouped(jobs: list[Job], key: Any) -> list[list[Job]]:
    groups: dict[Any, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[key(job)].append(job)
    return list(groups.values())


@dataclass(frozen=True)
class _Piece:
    """Rows first..last of the job at `index`."""

    index: int
    first: int
    last: int


class Sweeps:
    """All jobs of one program on one device. Scalars have a number for each job; vectors are a list for each letter."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.program: Program = jobs[0].program
        self.device = jobs[0].param.device
        self.old = self._stack([job.scalars for job in jobs])
        fresh = self.program.temporaries
        begin = {k: torch.full((len(jobs),), v, dtype=torch.float32, device=self.device) for k, v in fresh.items()}
        self.scalars = Namespace({**self.old, **begin})
        names = jobs[0].constants
        self.constants = Namespace(
            {
                name: torch.tensor([job.constants[name] for job in jobs], dtype=torch.float32, device=self.device)
                for name in names
            }
        )
        kept = jobs[0].vectors
        self.vectors: dict[str, list[Tensor]] = {letter: [job.vectors[letter] for job in jobs] for letter in kept}
        self.skip = torch.zeros(len(jobs), dtype=torch.bool, device=self.device)
        self.lost = torch.zeros(len(jobs), dtype=torch.int64, device=self.device)
        # A parameter or gradient that is not contiguous is worked on in a contiguous copy and written back.
        self.params = [
            job.param.detach().reshape(job.rows, job.cols) if job.stored is None else job.stored[1]["codes"]
            for job in jobs
        ]
        self.grads = [job.grad.detach().reshape(job.rows, job.cols) for job in jobs]

    def _stack(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([row[name] for row in rows]) for name in self.program.scalars}

    def run(self, update: Update | None = None) -> Run:
        """One step. Yields where it needs a number over all tensors, or what other ranks have of its own."""
        done: list[Stage] = []  # the update stages that a later sweep must repeat
        measured: Any = None
        for stage in self.program.stages:
            if stage.kind == "update":
                done.append(stage)
            elif stage.kind == "fold" and stage.writes:
                self._fold(stage, measured)
            elif stage.kind == "fold":
                stage({"s": self.scalars, "c": self.constants, "x": measured})
            else:
                partial = self._measure(stage, done)
                asked = self._spread_out(stage, partial)
                if asked:
                    yield asked
                    partial = self._brought_together(stage, partial, asked)
                each = [_measured(stage, numbers, job) for numbers, job in zip(partial, self.jobs, strict=True)]
                measured = each if stage.over in VECTORS else torch.cat(each)
                if stage.over == "all":  # a tensor that will be left alone does not count
                    if self.program.guarded:
                        self.skip |= ~torch.isfinite(measured.float())
                        yield from self._agree()
                    total = yield _Total(torch.where(self.skip, 0.0, measured), stage.reduce)
                    assert total is not None
                    measured = total.to(self.device).float().expand(len(self.jobs)).clone()
        if self.program.guarded and self.program.measures:
            for value in self.scalars.values():
                self.skip |= ~torch.isfinite(value)
            for vectors in self.vectors.values():
                self.skip |= torch.stack([~torch.isfinite(vector).all() for vector in vectors])
            yield from self._agree()
        updated = update(self, done) if update is not None else set[int]()
        for chunk in self._chunks(updated):
            self._update(chunk, done)
        self._finish()

    # ---- sweeps

    def _measure(self, stage: Stage, before: list[Stage]) -> list[Tensor]:
        """Of each job the numbers of its rows, or of its columns' tiles."""
        partial: dict[int, list[Tensor]] = defaultdict(list)
        needed = {name for s in (*before, stage) for name in s.reads}
        for chunk in self._chunks():
            blocks = _Blocks(self, chunk, needed)
            if self.program.guarded:
                bad = ~torch.isfinite(blocks.operands["g"]).all(-1)
                self.skip |= self._per_job(blocks, bad) > 0
            for earlier in before:
                blocks.apply(earlier)
            values = blocks.masked(stage(blocks.operands))
            if stage.over != "column":
                values = _reduced(stage, values)
            for piece, part in zip(chunk, blocks.split(values), strict=True):
                rows = part.reshape(piece.last - piece.first, -1)
                if stage.over == "column":
                    self._add_columns(stage, partial[piece.index], rows, piece)
                else:
                    partial[piece.index].append(_reduced(stage, rows if stage.reduce == "max" else rows.double()))
        nothing = torch.float32 if stage.reduce == "max" else torch.float64  # what a rank has that has no row
        for index, job in enumerate(self.jobs):
            if not partial[index]:
                shape = (1, job.cols) if stage.over == "column" else (0,)
                partial[index] = [torch.zeros(shape, dtype=nothing, device=self.device)]
        return [torch.cat(partial[index]) for index in range(len(self.jobs))]

    # ---- what lies on several ranks

    def _spread_out(self, stage: Stage, partial: list[Tensor]) -> list[Together]:
        """What other ranks must be asked for, of each job that is sharded: the numbers of rows or columns."""
        asked: list[Together] = []
        for job, numbers in zip(self.jobs, partial, strict=True):
            if job.shard is None or stage.over == "row":
                continue
            if stage.over == "column":
                line = _reduced(stage, numbers.t())
                asked.append((job.shard, line.view(torch.int32) if stage.reduce == "max" else line, stage.reduce_over))
            else:
                asked.append((job.shard, job.shard.placed(numbers), stage.reduce_over))
        return asked

    def _brought_together(self, stage: Stage, partial: list[Tensor], asked: list[Together]) -> list[Tensor]:
        """The numbers of all rows or columns."""
        answers = iter(asked)
        made = []
        for job, numbers in zip(self.jobs, partial, strict=True):
            if job.shard is not None:
                numbers = next(answers)[1].view(numbers.dtype)
                numbers = numbers.unsqueeze(0) if stage.over == "column" else numbers
            made.append(numbers)
        return made

    def _agree(self) -> Run:
        """A tensor that is to be left alone is so on every rank."""
        flags = {index: self.skip[index].int() for index, job in enumerate(self.jobs) if job.shard is not None}
        asked: list[Together] = [(shard, flag, "max") for i, flag in flags.items() if (shard := self.jobs[i].shard)]
        if asked:
            yield asked
            for index, flag in flags.items():
                self.skip[index] = flag > 0

    def _add_columns(self, stage: Stage, tiles: list[Tensor], rows: Tensor, piece: _Piece) -> None:
        """Take rows of a tensor into its `tiles`: one matrix, of the sums of each tile, or of the largest so far."""
        job = self.jobs[piece.index]
        rows = rows[:, : job.cols]
        if stage.reduce == "max":
            tiles[:] = [torch.cat([*tiles, rows.abs()]).amax(0, True)]
            return
        if not tiles:
            tiles.append(torch.zeros(-(-job.rows // TILE), job.cols, dtype=torch.float64, device=self.device))
        for place in sorted((piece.first + i) % TILE for i in range(min(TILE, len(rows)))):
            start = (place - piece.first) % TILE  # the first row that is at this place of its tile, and all such rows
            mine, first = rows[start::TILE].double(), (piece.first + start) // TILE
            sums = tiles[0][first : first + len(mine)]
            sums.copy_(mine if place == 0 else sums + mine)

    def _fold(self, stage: Stage, measured: list[Tensor]) -> None:
        """A fold over rows, columns or groups, of all jobs at once."""
        counts = [len(vector) for vector in measured]
        owner = torch.arange(len(counts), device=self.device).repeat_interleave(
            torch.tensor(counts, device=self.device), output_size=sum(counts)
        )
        own = {letter: torch.cat(self.vectors[letter]) for letter in stage.reads if letter in self.vectors}
        s, c = (Namespace({k: v[owner] for k, v in values.items()}) for values in (self.scalars, self.constants))
        for letter, vector in stage.written({"x": torch.cat(measured), "s": s, "c": c, **own}).items():
            self.vectors[letter] = list(vector.split(counts))

    def _per_job(self, blocks: _Blocks, flags: Tensor) -> Tensor:
        """How many of a chunk's blocks are flagged, per job."""
        return torch.zeros_like(self.lost).index_add_(0, blocks.owner, flags.long())

    def _update(self, chunk: list[_Piece], stages: list[Stage]) -> None:
        read = {name for stage in stages for name in stage.reads}
        blocks = _Blocks(self, chunk, {"p", *self.program.values, *read})
        finite = torch.isfinite(blocks.operands["g"]).all(-1) if self.program.guarded else None
        for stage in stages:
            blocks.apply(stage)
        stored = {letter: blocks.encode(letter) for letter in self.program.values}
        parameter = blocks.parameter()
        keep = None
        if finite is not None:
            # A value that is broken already must not freeze its neighbours.
            written = blocks.operands["p"] if blocks.weight else parameter["codes"].float()
            spoiled = ~torch.isfinite(written) & torch.isfinite(blocks.raw.float())
            finite &= ~spoiled.any(-1)
            for parts in stored.values():
                check = parts.get("scale", parts["codes"])
                finite &= torch.isfinite(check.flatten(1)).all(-1)
            keep = finite & ~self.skip[blocks.owner]
            self.lost += self._per_job(blocks, ~keep)
        blocks.store(parameter, stored, keep)

    def _finish(self) -> None:
        for name, new in self.scalars.items():
            if name in self.program.scalars:  # the others are temporaries of this step
                kept = torch.where(self.skip, self.old[name], new)
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [job.scalars[name] for job in self.jobs], list(kept.unbind())
                )
        for letter in self.jobs[0].vectors:
            for index, job in enumerate(self.jobs):
                old = job.vectors[letter]
                old.copy_(torch.where(self.skip[index], old, self.vectors[letter][index]))
        counted = torch.stack([self.lost, self.skip.long()], 1)
        torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
            [job.skipped for job in self.jobs], list(counted.unbind())
        )
        for job, written in zip(self.jobs, self.params, strict=True):
            if job.stored is not None:
                increment_version(job.param)  # its parts have changed, which autograd would not notice
            elif written.data_ptr() != job.param.data_ptr():
                job.param.copy_(written.view(job.param.shape))

    # ---- pieces and chunks

    def _chunks(self, without: Collection[int] = ()) -> Iterator[list[_Piece]]:
        """Pieces of jobs that can share torch operations, about CHUNK values at a time."""
        kinds: dict[Any, list[int]] = defaultdict(list)
        for index, job in enumerate(self.jobs):
            if index in without:
                continue
            stochastic = tuple(sorted(job.noise))
            formats = tuple(job.formats.items())
            weight = job.stored and (job.stored[0], *job.stored[1])
            kinds[weight, job.param.dtype, formats, step_width(job.cols), job.master, stochastic].append(index)
        for indices in kinds.values():
            chunk: list[_Piece] = []
            room = CHUNK
            for index in indices:
                first, stride = 0, row_stride(self.jobs[index].cols)
                while first < self.jobs[index].rows:
                    last = min(self.jobs[index].rows, first + max(1, room // stride))
                    chunk.append(_Piece(index, first, last))
                    room -= (last - first) * stride
                    first = last
                    if room <= 0 or last < self.jobs[index].rows:
                        yield chunk
                        chunk, room = [], CHUNK
            if chunk:
                yield chunk


class _Blocks:
    """The operands of a chunk as step blocks, fp32 [blocks, width], zero beyond the end of a row."""

    def __init__(self, step: Sweeps, chunk: list[_Piece], needed: set[str]):
        self.step, self.chunk = step, chunk
        jobs = step.jobs
        self.job = jobs[chunk[0].index]  # formats and dtypes are the same for all
        self.width = step_width(self.job.cols)
        self.counts = [(p.last - p.first) * row_stride(jobs[p.index].cols) // self.width for p in chunk]
        index = torch.tensor([p.index for p in chunk], device=step.device)
        self.inside = self._inside()
        counts = torch.tensor(self.counts, device=step.device)
        self.owner = index.repeat_interleave(counts, output_size=sum(self.counts))  # a known size: no synchronisation
        self.operands: dict[str, Any] = {"g": self._gather(step.grads).float()}
        self.old: dict[str, dict[str, Tensor]] = {}
        self.weight = self.job.stored and self.job.stored[0]
        self.companion: Tensor | None = None
        if "p" in needed and self.weight:
            self.old["p"] = self._parts(self.weight, _weight)
            self.raw = self.operands["p"] = self.masked(decode_weight(self.weight, self.old["p"]).view(-1, self.width))
        elif "p" in needed:
            self.raw = self._gather(step.params)
            self.companion = self._companion()
            self.operands["p"] = masters.load(self.job.master, self.raw, self.companion)
        for letter in step.program.values:
            if letter in needed:
                self.old[letter] = self._parts(self.job.formats[letter], _moment(letter))
                self.operands[letter] = codec.decode(self.job.formats[letter], self.old[letter]).reshape(-1, self.width)
        for letter, over in step.program.vectors.items():
            if letter in needed:
                self.operands[letter] = torch.cat([self._spread(step.vectors[letter], over, p) for p in chunk])
        self.operands["s"] = self._broadcast(step.scalars)
        self.operands["c"] = self._broadcast(step.constants)

    def apply(self, stage: Stage) -> None:
        self.operands.update({name: self.masked(values) for name, values in stage.written(self.operands).items()})

    def masked(self, values: Tensor) -> Tensor:
        """What a stage makes of the zeros beyond the end of a row is no value: it counts in no scale and no sum."""
        values = values.broadcast_to(self.operands["g"].shape)  # it may be one number per tensor or row
        return values if self.inside is None else torch.where(self.inside, values, 0.0)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(self.counts)

    # ---- loading

    def _inside(self) -> Tensor | None:
        """Which values lie in a row rather than beyond its end; None when all do."""
        shapes = [(p.last - p.first, self.step.jobs[p.index].cols) for p in self.chunk]
        if all(row_stride(cols) == cols for _, cols in shapes):
            return None
        rows = [(torch.arange(row_stride(cols), device=self.step.device) < cols).repeat(n) for n, cols in shapes]
        return torch.cat(rows).view(-1, self.width)

    def _broadcast(self, values: Namespace) -> Namespace:
        if not values:
            return Namespace()
        table = torch.stack(list(values.values()), 1)[self.owner]
        return Namespace(zip(values, table.split(1, 1), strict=True))

    def _gather(self, matrices: list[Tensor]) -> Tensor:
        return torch.cat([self._in_blocks(matrices[p.index][p.first : p.last], p) for p in self.chunk])

    def _in_blocks(self, rows: Tensor, piece: _Piece) -> Tensor:
        cols = self.step.jobs[piece.index].cols
        return F.pad(rows, (0, row_stride(cols) - cols)).reshape(-1, self.width)

    def _spread(self, vectors: list[Tensor], over: str, piece: _Piece) -> Tensor:
        """A vector as blocks: [blocks, width] over columns, else [blocks, 1]."""
        vector, job = vectors[piece.index], self.step.jobs[piece.index]
        if over == "column":
            return self._in_blocks(vector.expand(piece.last - piece.first, -1), piece)
        rows = torch.arange(piece.first, piece.last, device=self.step.device)
        each = vector[(job.first + rows) // job.group_rows if over == "group" else rows]
        return each.repeat_interleave(row_stride(job.cols) // self.width).unsqueeze(1)

    def _companion(self) -> Tensor | None:
        if self.job.companion is None:
            return None
        jobs = self.step.jobs
        return self._gather([c.view(j.rows, j.cols) if (c := j.companion) is not None else j.param for j in jobs])

    def _sub_block(self, fmt: Format) -> int:
        """Values that share a scale inside a step block."""
        return min(fmt.block[1], self.width)

    def _parts(self, fmt: Format, of: PartsOf) -> dict[str, Tensor]:
        """Parts as blocks: codes (one per byte) and rest [blocks, k, sub-block], others [blocks, k]."""
        jobs, parts = self.step.jobs, defaultdict(list)
        for piece in self.chunk:
            job = jobs[piece.index]
            for part, tensor in of(job).items():
                if part in WHOLE:  # one number, for each block
                    tensor = tensor.expand(job.rows, -(-job.cols // fmt.block[1]))
                rows = tensor.view(job.rows, -1)[piece.first : piece.last]
                if part not in PER_VALUE:
                    pad = row_stride(job.cols) // self._sub_block(fmt) - rows.shape[1]
                    parts[part].append(F.pad(rows, (0, pad)).reshape(-1, self.width // self._sub_block(fmt)))
                elif part == "codes" and fmt.compressed:
                    parts[part].append(self._in_blocks(unpack(rows, fmt.bits, job.cols), piece))
                else:
                    parts[part].append(self._in_blocks(rows, piece))
        whole = {part: torch.cat(pieces) for part, pieces in parts.items()}
        return {k: self._cut(fmt, x) if k in PER_VALUE and fmt.compressed else x for k, x in whole.items()}

    def _cut(self, fmt: Format, values: Tensor) -> Tensor:
        """Step blocks as the blocks that share a scale: [blocks, k, sub-block]."""
        return values.view(-1, self.width // self._sub_block(fmt), self._sub_block(fmt))

    # ---- storing

    def _bits(self, operand: str) -> Tensor | None:
        """16 random bits per value, by the global element index; None where rounding is to nearest."""
        if operand not in self.job.noise:
            return None
        drawn, number = [], ["p", *self.job.moments].index(operand)
        for piece in self.chunk:
            job = self.step.jobs[piece.index]
            stride = row_stride(job.cols)
            count = (piece.last - piece.first) * stride
            start = (job.first + piece.first) * stride
            drawn.append(bits16(key(*job.stream, number), start, count, self.step.device))
        return torch.cat(drawn).view(-1, self.width)

    def encode(self, letter: str) -> dict[str, Tensor]:
        fmt, moment = self.job.formats[letter], self.step.program.moments[letter]
        bits, values = self._bits(letter), self.operands[letter]
        if not fmt.compressed:
            return codec.encode(fmt, values, bits=bits, live=not moment.signed)
        noise = None if bits is None else self._cut(fmt, uniform(bits))
        return codec.encode(fmt, self._cut(fmt, values.contiguous()), noise, live=not moment.signed)

    def parameter(self) -> dict[str, Tensor]:
        """What is to be written for p: its parts if it is stored, else `codes` and the companion."""
        bits, p = self._bits("p"), self.operands["p"]
        if self.weight:
            noise = None if bits is None else self._cut(self.weight, uniform(bits))
            return encode_weight(self.weight, self.old["p"], self._cut(self.weight, p.contiguous()), noise)
        written, companion = masters.store(self.job.master, p, self.raw.dtype, bits)
        return {"codes": written} if companion is None else {"codes": written, "companion": companion}

    def store(self, parameter: dict[str, Tensor], stored: dict[str, dict[str, Tensor]], keep: Tensor | None) -> None:
        """Write everything back; blocks outside `keep` get what they had."""
        if self.weight:
            self._write_parts(self.weight, _weight, parameter, self.old["p"], keep)
        else:
            self._write(self.step.params, _kept(keep, parameter["codes"], self.raw))
        if self.companion is not None:
            companions = [c.view(j.rows, j.cols) if (c := j.companion) is not None else j.param for j in self.step.jobs]
            self._write(companions, _kept(keep, parameter["companion"], self.companion))
        for letter, parts in stored.items():
            self._write_parts(self.job.formats[letter], _moment(letter), parts, self.old[letter], keep)

    def _write(self, matrices: list[Tensor], blocks: Tensor) -> None:
        for piece, rows in zip(self.chunk, self.split(blocks), strict=True):
            matrix = matrices[piece.index]
            matrix[piece.first : piece.last] = rows.reshape(piece.last - piece.first, -1)[:, : matrix.shape[1]]

    def _write_parts(
        self, fmt: Format, of: PartsOf, new: dict[str, Tensor], old: dict[str, Tensor], keep: Tensor | None
    ) -> None:
        for part, blocks in new.items():
            self._write_part(fmt, of, part, _kept(keep, blocks, old[part]))

    def _write_part(self, fmt: Format, of: PartsOf, part: str, blocks: Tensor) -> None:
        for piece, rows in zip(self.chunk, self.split(blocks), strict=True):
            job = self.step.jobs[piece.index]
            target = of(job)[part].view(job.rows, -1)
            lines = rows.reshape(piece.last - piece.first, -1)
            if part == "codes" and fmt.compressed:
                lines = pack(lines[:, : job.cols], fmt.bits)
            target[piece.first : piece.last] = lines[:, : target.shape[1]]


PartsOf = Callable[[Job], dict[str, Tensor]]
PER_VALUE = ("codes", "rest")  # parts with one element per value


def _weight(job: Job) -> dict[str, Tensor]:
    assert job.stored is not None
    return job.stored[1]


def _moment(letter: str) -> PartsOf:
    return lambda job: job.moments[letter]


def _kept(keep: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if keep is None else torch.where(keep.view(-1, *[1] * (new.dim() - 1)), new, old)


def _reduced(stage: Stage, values: Tensor) -> Tensor:
    return values.abs().amax(-1) if stage.reduce == "max" else halve(values)


def _measured(stage: Stage, each: Tensor, job: Job) -> Tensor:
    """What was measured of one tensor, a vector, from the numbers of its rows, or of its columns' tiles."""
    rows = job.all_rows
    if stage.over == "row":
        lines = [each.unsqueeze(1)]
    elif stage.over == "column":
        lines = [each.t()]
    elif stage.over == "group":
        whole, short = each.split([rows - rows % job.group_rows, rows % job.group_rows])
        lines = [whole.view(-1, job.group_rows), *([short.unsqueeze(0)] if len(short) else [])]
    else:
        lines = [each.unsqueeze(0)]
    numbers = torch.cat([_reduced(stage, line) for line in lines])
    if stage.reduce == "mean":
        sizes = [rows if stage.over == "column" else line.shape[1] * job.cols for line in lines]
        numbers = numbers / torch.cat([numbers.new_full((len(line),), n) for line, n in zip(lines, sizes, strict=True)])
    return numbers if stage.over == "all" else numbers.float()
