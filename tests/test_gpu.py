"""On a real GPU: the reference's bits, the CUDA backend's bits, layers, graphs; skipped where there is none.

Everything is compared with the reference on the CPU. The reference on CUDA is not what users run, but what it shows is
worth knowing: torch's own operations have the same bits there.
"""

import functools
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, gradient, injected, parameters
from cases import one_thread as one_thread
from native_cases import COVERING, Setting, differences, every_value, run, same
from torch import Tensor, nn
from torch.nn import Parameter

import lowbit
from lowbit import backends
from lowbit.nn import Operand, QuantLinear, Recipe
from lowbit.optim import AdamW, StableSPAM
from lowbit.rotation import Rotation
from lowbit.rounding import key

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's autograd threads, on their first product
]

CUDA = torch.device("cuda")
BACKENDS = ["reference", "native"]


FEW = every_value(COVERING)
REST = [s for s in COVERING if s not in FEW]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend that runs on CUDA tensors, and is asked to."""
    monkeypatch.setenv("LOWBIT_BACKEND", request.param)
    try:
        backends.choose(CUDA)
    except ValueError as error:  # one that is there but cannot be had is a failure
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """While it lasts, whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    yield
    torch.cuda.set_sync_debug_mode("default")


# ---- codecs


@pytest.mark.parametrize("name", lowbit.formats())
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_a_codec_has_the_same_bits(name: str, stochastic: bool, backend: str, monkeypatch: pytest.MonkeyPatch):
    fmt, noise = lowbit.format(name), key(3, 1, 4, 1) if stochastic else None
    for k, (shape, dtype) in enumerate(
        [((64, 64), torch.float32), ((7, 5461), torch.bfloat16), ((33, 301), torch.float16)]
    ):
        x = gradient(shape, 5, k, dtype)
        x = x if fmt.signed else x.abs()
        x[1] = 0
        x[-1, :2] = torch.tensor([torch.inf, torch.nan])
        with monkeypatch.context() as patch:
            patch.setenv("LOWBIT_BACKEND", "reference")
            expected = backends.encode(fmt, x, noise)
            values, fake = backends.decode(fmt, expected, shape[1]), backends.fake(fmt, x, noise)
        parts = backends.encode(fmt, x.to(CUDA), noise)
        found = {
            "values": backends.decode(fmt, parts, shape[1]),
            "fake": backends.fake(fmt, x.to(CUDA), noise),
            **parts,
        }
        assert all(its.is_cuda for its in found.values())
        wrong = differences({"values": values, "fake": fake, **expected}, {k: its.cpu() for k, its in found.items()})
        assert not wrong, wrong


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("mxfp4-quest", {"edge": 3.0}),
        ("int4-quest", {"edge": 7.5, "dtype": torch.bfloat16}),
        ("nvfp4-eden", {"run": 128, "noise": key(1, 2, 3, 4)}),
        ("nvfp4-46", {"dtype": torch.float16, "noise": key(1, 2, 3, 4)}),
        ("mxfp6-e2m3", {"edge": 7.5}),
        ("nvfp4-2d", {}),
    ],
)
def test_scales_masks_and_corrections_have_the_same_bits(
    name: str, asked: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
):
    fmt, rotation = lowbit.format(name), Rotation(128, 2**40 + 1)
    x = gradient((65, 1000), 3, 1, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setenv("LOWBIT_BACKEND", "reference")
        values, expected = backends.quantized(fmt, x, rotation=rotation, **asked)
    got, parts = backends.quantized(fmt, x.to(CUDA), rotation=rotation, **asked)
    found = {"values": got, **parts}
    assert not (wrong := differences({"values": values, **expected}, {k: v.cpu() for k, v in found.items()})), wrong


# ---- steps


@functools.lru_cache(maxsize=1)
def expected(s: Setting) -> tuple[dict[str, Any], list[Any]]:
    """By the reference on the CPU, and its matrix stages."""
    tape: list[Any] = []
    with injected(tape, replay=False):
        return run(s, "reference"), tape


def agree(s: Setting, backend: str) -> None:
    values, tape = expected(s)
    with injected(tape, replay=True):
        found = differences(values, run(s, backend, device="cuda"))
    assert not found, f"{len(found)} differ: {'; '.join(found[:4])}"


@pytest.mark.parametrize("s", FEW, ids=str)
def test_steps_have_the_same_bits(s: Setting, backend: str):
    agree(s, backend)


@pytest.mark.slow
@pytest.mark.parametrize("s", REST, ids=str)
def test_steps_have_the_same_bits_in_every_pair_of_settings(s: Setting, backend: str):
    agree(s, backend)


@pytest.mark.parametrize("case", [case for case in CASES if not case.mixes and not case.low_rank], ids=str)
@pytest.mark.parametrize("states", ["8bit", "4bit"])
def test_presets_have_the_same_bits(case: Any, states: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    """As users have them: bf16 parameters, rounded stochastically, of a model's shapes."""
    shapes = [(512, 64), (33, 300), (3, 5461), (300,), ()]

    def trained(device: str) -> dict[str, Tensor]:
        named = [(n, Parameter(p.detach().to(device))) for n, p in parameters(shapes, torch.bfloat16)]
        opt = case.build(named, states=states)
        for t in range(1, 4):
            for k, (_, p) in enumerate(named):
                p.grad = gradient(tuple(p.shape), t, k, p.dtype).to(device)
            opt.step()
        values = {f"{n} {k}": v.cpu() for n, p in named for k, v in opt.state[p].items() if isinstance(v, Tensor)}
        return {**values, **{n: p.detach().cpu() for n, p in named}}

    on_gpu = trained("cuda")
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    assert not (wrong := differences(trained("cpu"), on_gpu)), wrong


def two_matrices(device: torch.device = CUDA) -> list[tuple[str, Parameter]]:
    return [(n, Parameter(p.detach().to(device))) for n, p in parameters([(512, 256), (300,)], torch.bfloat16)]


def give(named: list[tuple[str, Parameter]], t: int) -> None:
    """Gradients of step t, in the memory where the last were: what a captured graph reads."""
    for k, (_, p) in enumerate(named):
        g = gradient(tuple(p.shape), t, k, p.dtype).to(p.device)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


RULES = {"adamw": lambda its: AdamW(its, states="8bit"), "stablespam": lambda its: StableSPAM(its, states="4bit")}
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch calls it a prototype
@every_rule
def test_a_step_does_not_wait_for_the_device(rule: str, backend: str, no_waiting: None):
    if backend == "reference":
        pytest.skip("the reference copies numbers from the host and waits for it")
    named = two_matrices()
    opt = RULES[rule](named)
    give(named, 1)
    opt.step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    opt.step()
    torch.cuda.set_sync_debug_mode("default")
    assert opt.counters() == {"skipped_blocks": 0, "skipped_tensors": 0}


@every_rule
def test_a_step_runs_on_the_current_stream(rule: str, backend: str):
    """What is on the stream before it is done before it."""
    named, late = two_matrices(), two_matrices()
    give(named, 1)
    opt = RULES[rule](named)
    opt.step()
    other, stream = RULES[rule](late), torch.cuda.Stream()
    for _, p in late:
        p.grad = torch.zeros_like(p)
    grads = [p.grad.clone() for _, p in named]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for (_, p), g in zip(late, grads, strict=True):
            p.grad.copy_(g)
        other.step()
    stream.synchronize()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, late, strict=True))


@every_rule
def test_a_captured_step_can_be_replayed(rule: str, backend: str):
    """20 replays are 20 steps. What is captured is not run, and so not counted."""
    if backend == "reference":
        pytest.skip("a step of this backend cannot be captured")
    eager, replayed = two_matrices(), two_matrices()
    opt, other = RULES[rule](eager), RULES[rule](replayed)
    for t in (1, 2):
        for named, its in ((eager, opt), (replayed, other)):
            give(named, t)
            its.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.step()
    assert other.param_groups[0]["steps"] == 2
    for t in range(3, 23):
        give(eager, t)
        opt.step()
        give(replayed, t)
        other.prepare_replay()
        graph.replay()
    torch.cuda.synchronize()
    for (name, p), (_, q) in zip(eager, replayed, strict=True):
        assert torch.equal(p, q), name
        wrong = differences(
            {k: v.cpu() for k, v in opt.state[p].items() if isinstance(v, Tensor)},
            {k: v.cpu() for k, v in other.state[q].items() if isinstance(v, Tensor)},
        )
        assert not wrong, wrong


@every_rule
def test_a_captured_training_step_can_be_replayed(rule: str, backend: str):
    """Forward, backward and step in one graph, whose gradients live in the graph's own memory; a schedule beside it."""
    if backend == "reference":
        pytest.skip("a step of this backend cannot be captured")
    found = []
    for replays in (False, True):
        named = two_matrices()
        opt = RULES[rule](named)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 20)
        x = torch.empty(512, 256, dtype=torch.bfloat16, device=CUDA)

        def train_step(x=x, named=named, opt=opt):
            sum((y * y.float()).sum() for y in (x * named[0][1], named[1][1])).backward()
            opt.step()

        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        for t in range(1, 23):
            x.copy_(gradient((512, 256), t, 9, x.dtype))
            if t <= 3 or not replays:
                opt.zero_grad()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    train_step()
                torch.cuda.current_stream().wait_stream(side)
            else:
                if t == 4:
                    opt.zero_grad()
                    with torch.cuda.graph(graph):
                        train_step()
                opt.prepare_replay()
                graph.replay()
            schedule.step()
        found.append([p.detach().cpu() for _, p in named])
    assert all(map(torch.equal, *found))


@every_rule
def test_a_learning_rate_on_the_device_is_read_there(rule: str, backend: str, no_waiting):
    """By steps and by the replays of a graph, whose schedule writes into it."""
    if backend == "reference":
        pytest.skip("this backend takes the value, and waits for it")
    found = []
    for on_device in (False, True):
        named = two_matrices()
        opt = RULES[rule](named)
        rates = [torch.tensor(0.5**t).item() for t in range(1, 9)]
        lr = torch.tensor(rates[0], device=CUDA)
        graph = torch.cuda.CUDAGraph()
        for t, rate in enumerate(rates, 1):
            lr.fill_(rate)
            for group in opt.param_groups:
                group["lr"] = lr if on_device else rate
            give(named, t)
            if on_device and t == 4:
                with torch.cuda.graph(graph):
                    opt.step()
            torch.cuda.set_sync_debug_mode("error" if t > 1 else "default")
            if on_device and t >= 4:
                opt.prepare_replay()
                graph.replay()
            else:
                opt.step()
            torch.cuda.set_sync_debug_mode("default")
        found.append([p.detach().cpu() for _, p in named])
    assert all(map(torch.equal, *found))


# ---- checkpoints


@every_rule
@pytest.mark.parametrize("way", [("cuda", "cpu"), ("cpu", "cuda")], ids="-to-".join)
def test_a_checkpoint_goes_on_on_another_device(rule: str, way: tuple[str, str], backend: str, monkeypatch):
    """As if it had never moved, to the bit."""

    def use(device: torch.device) -> None:
        monkeypatch.setenv("LOWBIT_BACKEND", backend if device.type == "cuda" else "reference")

    first, second = map(torch.device, way)
    use(first)
    named = two_matrices(first)
    opt = RULES[rule](named)
    for t in (1, 2):
        give(named, t)
        opt.step()
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "model": [p.detach() for _, p in named]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location=second)
    moved = [(n, Parameter(p.to(second))) for (n, _), p in zip(named, saved["model"], strict=True)]
    other = RULES[rule](moved)
    other.load_state_dict(saved["opt"])
    for its, ours in ((opt, named), (other, moved)):
        use(ours[0][1].device)
        for t in (3, 4):
            give(ours, t)
            its.step()
    assert all(same(p.detach().cpu(), q.detach().cpu()) for (_, p), (_, q) in zip(named, moved, strict=True))


# ---- layers

NOISY = Recipe(weight="int4:32", activation="int4:32", gradient=Operand("int4:32", rounding="stochastic"), seed=3)


@pytest.mark.parametrize("recipe", [*lowbit.recipes(), NOISY], ids=str)
@pytest.mark.parametrize("cols", [256, 200])
def test_a_layer_computes_the_same(recipe: str | Recipe, cols: int, backend: str, monkeypatch):
    """What is multiplied has the same bits; the matmuls round in another order."""

    def made(device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        layer = QuantLinear(cols, 96, recipe=recipe)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / cols**0.5)
        x, gy = (torch.randn(64, n, generator=generator).to(device) for n in (cols, 96))
        layer.to(device)
        x.requires_grad_()
        y = layer(x)
        y.backward(gy)
        found = {"y": y, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
        return {name: its.detach().cpu() for name, its in found.items()}

    on_gpu = made(CUDA)
    monkeypatch.setenv("LOWBIT_BACKEND", "reference")
    for name, its in made(torch.device("cpu")).items():
        torch.testing.assert_close(
            on_gpu[name], its, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# torch's own tracing of autograd functions does what it warns of; and fp32 matmuls are meant to be fp32.
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:TensorFloat32",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # torch's own compiler uses it
)
@pytest.mark.parametrize("recipe", ["stablespam-int4", "fp4"])
def test_a_quantized_model_compiles(recipe: str, backend: str):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 64)).to(CUDA)
    lowbit.quantize_(model, recipe)
    x = torch.randn(64, 256, device=CUDA)
    compiled, found = torch.compile(model, fullgraph=True), []
    for its in (model, compiled):
        model.zero_grad()
        y = its(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, other in zip(*found, strict=True):  # fused kernels may round a value to the next code
        assert (eager - other).norm() < 0.02 * eager.norm()
