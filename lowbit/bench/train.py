"""One run: one method, one learning rate, one seed. Returns everything the report needs as plain numbers.

The loop is the same for every method, down to the batches; only the optimizer, the linear layers and the storage of the
weights differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import quantize_
from .compute import Compute
from .data import Corpus
from .machine import PeakMemory
from .methods import Method, build
from .model import Llama, Preset
from .spike import Spike
from .storage import Weights, round_to_bf16

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Settings:
    """What all runs of one folder share: runs are comparable if and only if these (and the corpus) are equal."""

    preset: Preset
    steps: int
    batch: int
    micro_batch: int
    seq: int
    vocab: int
    warmup: float = 0.1
    embed_lr_mult: float = 1.0
    val_windows: int = 256
    val_points: int = 20
    spike: str = ""
    compute: Compute = field(default_factory=Compute)

    def describe(self) -> dict:
        """As plain data, for the run folder."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    method: Method
    lr: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        """What identifies its result."""
        return (self.method.name, self.lr, self.seed)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate at `step` (from 0): linear warm-up, then a cosine down to 0.1."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(job: Job, settings: Settings, corpus: Corpus, progress: Progress = lambda step, loss: None) -> dict:
    """Do one run and return its result."""
    memory, on_gpu = PeakMemory(), settings.compute.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run = _Run(job, settings, corpus)
    started, started_cpu = time.perf_counter(), time.process_time()
    run.loop(progress)
    return {
        "method": job.method.name, "lr": job.lr, "seed": job.seed, "status": "ok", **run.result(),
        "wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu,
        "peak_rss": memory.peak(), "rss_before": memory.before,
        "peak_device": torch.cuda.max_memory_allocated() if on_gpu else None,
        "compute": settings.compute.label, "torch": torch.__version__,
    }  # fmt: skip


class _Run:
    """The state of one run, so that the loop reads as a list of what happens."""

    def __init__(self, job: Job, settings: Settings, corpus: Corpus):
        self.job, self.settings, self.corpus = job, settings, corpus
        torch.manual_seed(job.seed)  # nothing below draws from the global stream; this is for layers of others
        self.device = settings.compute.device
        self.plain = Llama(settings.preset, settings.vocab, settings.seq).to(self.device)
        model = Llama(settings.preset, settings.vocab, settings.seq).initialise(job.seed)
        model = round_to_bf16(model).to(self.device)
        if job.method.recipe != "none":
            quantize_(model, job.method.recipe)
        self.weights = Weights(model, master=job.method.master, autocast=settings.compute.autocast)
        groups = self.weights.groups(settings.embed_lr_mult)
        self.optimizer, self.clip = build(job.method, groups, job.lr, settings.steps, job.seed)
        self.spike = Spike.parse(settings.spike, job.seed)
        self.held_out = [t.to(self.device) for t in corpus.validation(settings.val_windows, settings.seq)]
        self.curve: list[tuple[int, float]] = []
        self.train_curve: list[tuple[int, float]] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.bytes: dict[str, int] = {}
        self.times = {"model": [], "optimizer": []}
        self.broken = ""

    def loop(self, progress: Progress) -> None:
        steps = self.settings.steps
        points = {round(i * steps / self.settings.val_points) for i in range(1, self.settings.val_points + 1)} | {steps}
        self.curve.append((0, self.evaluate()))
        for step in range(steps):
            loss = self.step(step)
            if self.broken:
                break
            if step + 1 in points:
                self.curve.append((step + 1, self.evaluate()))
                recent = self.losses[-max(1, steps // self.settings.val_points) :]
                self.train_curve.append((step + 1, mean(recent)))
                if not math.isfinite(self.curve[-1][1]):
                    self.broken = f"validation loss not finite at step {step + 1}"
                    break
            progress(step + 1, loss)

    def step(self, step: int) -> float:
        start = self.now()
        loss = self.backward(step)
        middle = self.now()
        self.spike.apply(step, self.weights.stored)
        self.norms.append(norm(self.weights.gradients()))
        if not self.bytes:
            self.bytes = {"gradients": self.weights.bytes(self.optimizer)["gradients"]}
        before = self.now()
        factor = learning_rate(step, self.settings.steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.job.lr * factor * group.get("lr_mult", 1.0)
        self.weights.before_step()
        if self.clip is not None:
            nn.utils.clip_grad_norm_((p for g in self.optimizer.param_groups for p in g["params"]), self.clip)
        self.optimizer.step()
        self.weights.after_step()
        end = self.now()
        self.times["model"].append(middle - start)
        self.times["optimizer"].append(end - before)
        self.losses.append(loss)
        if not math.isfinite(loss):
            self.broken = f"training loss not finite at step {step + 1}"
        return loss

    def backward(self, step: int) -> float:
        inputs, targets = self.corpus.batch(self.job.seed, step, self.settings.batch, self.settings.seq)
        total = 0.0
        self.weights.model.train()
        size = self.settings.micro_batch
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            loss = self.loss(x.to(self.device), y.to(self.device)) * (len(x) / len(inputs))
            loss.backward()
            total += loss.item()
        return total

    def loss(self, x: Tensor, y: Tensor, model: nn.Module | None = None) -> Tensor:
        return F.cross_entropy(self.weights.forward(x, model).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module | None = None) -> float:
        """Mean loss over the fixed windows; with `model`, through that module and the same weights."""
        (model or self.weights.model).eval()
        x, y = self.held_out
        parts = zip(x.split(64), y.split(64), strict=True)
        return sum(self.loss(a, b, model).item() * len(a) for a, b in parts) / len(x)

    def result(self) -> dict:
        quantized = self.job.method.recipe != "none"
        initial, final = self.curve[0][1], self.curve[-1][1]
        finished = not self.broken
        self.bytes = {**self.weights.bytes(self.optimizer), "gradients": self.bytes.get("gradients", 0)}
        tokens = len(self.losses) * self.settings.batch * self.settings.seq
        seconds = sum(self.times["model"]) + sum(self.times["optimizer"])
        why = self.broken or diverged(initial, final, self.losses)
        return {
            "initial_val": finite(initial), "final_val": finite(final) if finished else None,
            "final_val_dense": finite(self.evaluate(self.plain)) if quantized and finished else None,
            "best_val": finite(min(v for _, v in self.curve)),
            "curve": [[s, finite(v)] for s, v in self.curve],
            "train_curve": [[s, finite(v)] for s, v in self.train_curve],
            "diverged": bool(why), "diverged_why": why, "steps": len(self.losses), "tokens": tokens,
            "tokens_per_second": tokens / seconds, "ms_model": 1000 * median(self.times["model"]),
            "ms_optimizer": 1000 * median(self.times["optimizer"]), "grad_norm": norm_summary(self.norms),
            "bytes": self.bytes, "parameters": sum(p.numel() for p in self.weights.stored.values()),
        }  # fmt: skip

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def finite(value: float) -> float | None:
    """JSON has no NaN: what is not finite is recorded as null."""
    return value if math.isfinite(value) else None


def norm(gradients: list[Tensor]) -> float:
    """L2 norm over all gradients, accumulated in fp32."""
    parts = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.linalg.vector_norm(torch.stack(parts)).item()


def norm_summary(norms: list[float]) -> dict:
    """Median, 99th percentile and maximum of the finite norms, and how many exceed ten times the running median."""
    clean = sorted(n for n in norms if math.isfinite(n))
    if not clean:
        return {"median": None, "p99": None, "max": None, "spikes": 0, "non_finite": len(norms)}
    spikes = sum(n > 10 * median(norms[max(0, i - 50) : i]) for i, n in enumerate(norms) if i >= 10)
    last = len(clean) - 1
    return {
        "median": clean[last // 2], "p99": clean[math.ceil(0.99 * last)], "max": clean[-1], "spikes": spikes,
        "non_finite": len(norms) - len(clean),
    }  # fmt: skip


def diverged(initial: float, final: float, losses: list[float]) -> str:
    """Why a finished run counts as diverged, or nothing."""
    if not final < initial - 0.5:
        return f"validation loss ended at {final:.3f}, not 0.5 below its start {initial:.3f}"
    best, above = math.inf, 0
    for loss in losses:
        best, above = min(best, loss), above + 1 if loss > best + 1 else 0
        if above >= 50:
            return "training loss stayed more than 1 above its best for 50 steps"
    return ""
