"""`StoredWeight` as torch meets it: which operations give what, and that none is silently wrong."""

import copy
import gc
import io
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.nn import StoredFlat, StoredWeight
from lowbit.nn.stored import StoredView

STORES = ["int8", "int4", "nf4", "mxfp4", "nvfp4", "split", "split8"]


def dense(rows: int = 12, cols: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1


def made(store: str = "int8", dtype: torch.dtype = torch.float32, **kwargs) -> nn.Parameter:
    return nn.Parameter(StoredWeight.of(dense(**kwargs).to(dtype), store, stream=7))


def parts(weight) -> dict[str, Tensor]:
    return {part: tensor.clone() for part, tensor in weight.parts.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[part], b[part]) for part in a)


# --- What it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [*STORES, "nf4-dq", "int8:64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_parameter_of_the_outer_dtype_and_shape(store: str, dtype: torch.dtype):
    p = made(store, dtype)
    assert isinstance(p, nn.Parameter) and type(p) is StoredWeight and p.is_leaf and p.requires_grad
    assert p.shape == (12, 96) and p.dtype == dtype and p.device.type == "cpu" and p.numel() == 12 * 96
    assert p.store == store and p.nbytes == sum(part.nbytes for part in p.parts.values())
    assert all(type(part) is Tensor for part in p.parts.values())
    assert torch.equal(p.codes, p.parts["codes"])
    assert f"store={store!r}" in repr(p) and "bits" in repr(p)
    with pytest.raises(AttributeError, match="no attribute 'code'"):
        _ = p.code


def test_what_no_weight_can_be_made_of_is_refused():
    with pytest.raises(TypeError, match="floating-point"):
        StoredWeight.of(torch.zeros(3, 4, dtype=torch.int64), "int8")
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        StoredWeight.of(dense(), "int9")


def test_there_is_no_dense_copy_between_uses():
    p, x = made("int4", rows=257, cols=320), torch.randn(4, 320)
    opt = torch.optim.SGD([p], lr=0.1)
    for _ in range(2):
        F.linear(x, p).square().sum().backward()
        opt.step()
        opt.zero_grad()
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and type(t) is not StoredWeight]
    large = [t for t in tensors if t.is_floating_point() and t.numel() == p.numel()]
    assert [t for t in large if t.untyped_storage().nbytes() > 0] == []
    assert p.data_ptr() == 0


# --- Autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [*STORES, "nf4-dq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_dense_and_those_of_the_decoded_weight(store: str, dtype: torch.dtype):
    p, x = made(store, dtype), torch.randn(5, 96).to(dtype)
    q = p.dequantize().requires_grad_()
    for w in (p, q):
        y = F.linear(x, w)
        (y.float().square().sum() + (w * w).sum()).backward()
    assert type(p.grad) is Tensor and p.grad.dtype == dtype and torch.equal(p.grad, q.grad)


def test_hooks_run_with_dense_gradients_and_can_be_removed():
    p, seen = made(), []
    first = p.register_hook(lambda g: seen.append(type(g)))
    second = p.register_post_accumulate_grad_hook(lambda w: seen.append(w is p))
    p.sum().backward()
    assert seen == [Tensor, True]
    first.remove(), second.remove()
    p.sum().backward()
    assert len(seen) == 2


def test_a_change_between_forward_and_backward_is_noticed():
    p, x = made(), torch.randn(3, 96, requires_grad=True)
    y = F.linear(x, p).sum()
    with torch.no_grad():
        p.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_writing_to_a_leaf_that_requires_a_gradient_is_torchs_error():
    p = made()
    before = parts(p)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        p.add_(1)
    assert same(parts(p), before)


# --- What comes back -------------------------------------------------------------------------------------------------

READS = {
    "add": lambda w: w + 1,
    "mul by another": lambda w: w * torch.full((96,), 2.0),
    "matmul": lambda w: torch.ones(3, 12) @ w,
    "norm": lambda w: w.norm(),
    "float64 sum": lambda w: w.sum(dtype=torch.float64),
    "abs max": lambda w: w.abs().amax(1),
    "cat": lambda w: torch.cat([w, torch.ones(1, 96)]),
    "stack": lambda w: torch.stack([w, w]),
    "zeros_like": torch.zeros_like,
    "full_like": lambda w: torch.full_like(w, 3.0),
    "ones_like": torch.ones_like,
    "new_zeros": lambda w: w.new_zeros(4),
    "where": lambda w: torch.where(w > 0, w, 0.0),
    "embedding": lambda w: F.embedding(torch.tensor([[3, 1], [1, 11]]), w),
    "index_select": lambda w: w.index_select(0, torch.tensor([5, 0])),
    "index_select of columns": lambda w: w.index_select(1, torch.tensor([5, 0])),
    "advanced indexing": lambda w: w[torch.tensor([2, 2, 9])],
    "mask": lambda w: w[torch.arange(12) > 5],
    "reshape": lambda w: w.reshape(-1) + 0,
    "linear": lambda w: F.linear(torch.ones(2, 96), w, torch.ones(12)),
    "einsum": lambda w: torch.einsum("ij,kj->ik", torch.ones(2, 96), w),
    "dequantize": lambda w: w.dequantize(),
    "isfinite": lambda w: torch.isfinite(w).all(),
    "allclose": lambda w: torch.tensor(torch.allclose(w, w + 0)),
    "to int": lambda w: (w * 100).to(torch.int32),
    "long": lambda w: w.long(),
    "float on a view": lambda w: w.t().contiguous(),
}


@pytest.mark.parametrize("store", ["int8", "split", "nf4-dq"])
@pytest.mark.parametrize("name", READS)
def test_reading_gives_plain_tensors_of_what_the_forward_pass_sees(name: str, store: str):
    w = StoredWeight.of(dense(), store)
    got, expected = READS[name](w), READS[name](w.dequantize())
    assert type(got) is Tensor and torch.equal(got, expected) and got.dtype == expected.dtype


VIEWS = {
    "t": lambda w: w.t(),
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "view": lambda w: w.view(-1),
    "view of a view": lambda w: w.view(3, 4, 96).transpose(0, 1)[1],
    "row": lambda w: w[3],
    "element": lambda w: w[3, 5],
    "rows": lambda w: w[2:5],
    "rows of rows": lambda w: w[2:9][1:3],
    "columns": lambda w: w[:, 3:40],
    "every other row": lambda w: w[::2],
    "split": lambda w: w.split(5)[1],
    "split of columns": lambda w: w.split([32, 64], 1)[1],
    "chunk": lambda w: w.chunk(3)[2],
    "unbind": lambda w: w.unbind(0)[4],
    "unsqueeze": lambda w: w.unsqueeze(1),
    "expand": lambda w: w.unsqueeze(0).expand(2, 12, 96)[0],
    "as_strided": lambda w: w.as_strided((3, 4), (96, 2), 5),
    "diagonal": lambda w: w.diagonal(),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
}


@pytest.mark.parametrize("store", ["int8", "nvfp4", "split", "nf4-dq"])
@pytest.mark.parametrize("name", VIEWS)
def test_views_read_as_views_of_the_decoded_weight(name: str, store: str):
    w = StoredWeight.of(dense(), store)
    got, expected = VIEWS[name](w), VIEWS[name](w.dequantize())
    assert isinstance(got, StoredView | StoredWeight)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert got.stride() == expected.stride() or isinstance(got, StoredWeight)
    assert torch.equal(got + 0, expected) and got.tolist() == expected.tolist()
    assert np.array_equal(got.numpy(), expected.numpy())


@pytest.mark.parametrize("store", ["int8", "nvfp4", "split"])
@pytest.mark.parametrize("name", VIEWS)
def test_what_is_written_to_a_view_is_written_to_the_weight(name: str, store: str):
    w = StoredWeight.of(dense(), store)
    values = w.load()
    with torch.no_grad():
        VIEWS[name](w).zero_()
    VIEWS[name](values).zero_()
    if VIEWS[name](torch.empty(12, 96)).shape == (12, 96):
        assert (w.load() == 0).all()  # an initialization of all of it: new scales
    else:
        assert torch.equal(w.load(), values)  # what was not written to has its codes


def test_rows_are_aliases_of_the_codes():
    w = StoredWeight.of(dense(), "int4")
    some = w[2:5]
    assert type(some) is StoredWeight and some.shape == (3, 96)
    assert some.codes.untyped_storage().data_ptr() == w.codes.untyped_storage().data_ptr()
    assert [type(x) for x in w.split(5)] == [StoredWeight] * 3
    with torch.no_grad():
        some.mul_(2)
    assert torch.equal(w.dequantize()[2:5], some.dequantize()) and w.writes == 1


@pytest.mark.parametrize(
    "index", [3, (3, 5), slice(2, 5), (slice(None), 7), torch.tensor([1, 8]), (torch.arange(12) > 9)], ids=str
)
def test_items_are_assigned(index):
    w = StoredWeight.of(dense(), "int8")
    values = w.load()
    w[index] = 0.0
    values[index] = 0.0
    assert torch.equal(w.load(), values)


@pytest.mark.parametrize("store", STORES)
def test_copies_have_codes_of_their_own(store: str):
    p = made(store)
    p.sum().backward()
    p.note = "kept"
    before = parts(p)
    copies = {
        "clone": p.detach().clone(),
        "deepcopy": copy.deepcopy(p),
        "pickle": pickle.loads(pickle.dumps(p)),
        "torch.save": _saved(p),
        "to": p.detach().to(torch.bfloat16),
        "cpu copy": torch.empty_like(p).copy_(p.detach()),
    }
    with torch.no_grad():
        p.zero_()
    for name, other in copies.items():
        assert type(other) is StoredWeight and same(parts(other), before), name
        assert other.format == p.format and other.stream == 7
    assert isinstance(copies["deepcopy"], nn.Parameter) and torch.equal(copies["deepcopy"].grad, p.grad)
    assert isinstance(copies["pickle"], nn.Parameter) and copies["pickle"].requires_grad
    assert copies["to"].dtype == torch.bfloat16


def _saved(p: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(p, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_deep_copy_keeps_ties():
    p = made()
    first, second = copy.deepcopy([p, p])
    assert first is second and first is not p


def test_empty_like_is_a_stored_weight_of_zeros():
    w = torch.empty_like(made("nf4"))
    assert type(w) is StoredWeight and (w.dequantize() == 0).all() and w.store == "nf4"
    assert type(torch.empty_like(w, dtype=torch.int64)) is Tensor


def test_shared_memory_is_that_of_the_parts():
    p = made("int4")
    assert not p.is_shared()
    assert p.share_memory_() is p and p.is_shared() and all(part.is_shared() for part in p.parts.values())
    other = pickle.loads(ForkingPickler.dumps(p))
    with torch.no_grad():
        other.zero_()
    assert (p.dequantize() == 0).all()  # the same memory


def test_converting_a_module_changes_the_outer_dtype_only():
    m = nn.Linear(96, 12)
    m.weight = made("int4")
    p, before = m.weight, parts(m.weight)
    m(torch.randn(2, 96)).sum().backward()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        m.to(dtype)
        assert m.weight is p and p.dtype == dtype == p.grad.dtype and same(parts(p), before)
        assert p.dequantize().dtype == dtype
    m.to("meta")
    assert p.is_meta and p.parts["codes"].is_meta
    m.to_empty(device="cpu")
    assert type(m.weight) is StoredWeight and (m.weight.dequantize() == 0).all()


def test_parameters_go_to_a_vector_and_back():
    m = nn.Linear(96, 12)
    m.weight = made("int4")
    vector = nn.utils.parameters_to_vector(m.parameters())
    assert torch.equal(vector + 0, torch.cat([m.weight.dequantize().view(-1), m.bias.detach()]))
    new = torch.randn(len(vector)) * 0.1
    nn.utils.vector_to_parameters(new, m.parameters())
    assert torch.equal(m.weight.dequantize(), StoredWeight.of(new[: 12 * 96].view(12, 96), "int4").dequantize())


def test_data_can_be_set_to_what_fits():
    p = made("int4")
    p.data = dense(seed=1)
    assert same(parts(p), parts(StoredWeight.of(dense(seed=1), "int4")))
    other = StoredWeight.of(dense(seed=2), "int4")
    p.data = other
    assert p.codes is other.codes
    before = parts(p)
    for wrong in (torch.zeros(12, 95), torch.zeros(12, 96, dtype=torch.int64)):
        with pytest.raises(TypeError, match="must be floating point"):
            p.data = wrong
    assert same(parts(p), before)


@pytest.mark.parametrize("change", [lambda w: w.t_(), lambda w: w.resize_(3, 4), lambda w: w.unsqueeze_(0)])
def test_what_would_change_its_shape_in_place_is_refused(change):
    w = StoredWeight.of(dense(), "int8")
    before = parts(w)
    with pytest.raises((TypeError, RuntimeError), match=r"stored weight|resize"):
        change(w)
    assert w.shape == (12, 96) and same(parts(w), before)


# --- Writing ---------------------------------------------------------------------------------------------------------

UPDATES = {
    "mul_": lambda w, g: w.mul_(1 - 1e-3),
    "add_": lambda w, g: w.add_(g, alpha=-0.1),
    "sub_": lambda w, g: w.sub_(g * 0.1),
    "addcdiv_": lambda w, g: w.addcdiv_(g, g.abs() + 1, value=-0.1),
    "addcmul_": lambda w, g: w.addcmul_(g, g, value=-0.1),
    "lerp_": lambda w, g: w.lerp_(g, 0.1),
    "clamp_": lambda w, g: w.clamp_(-0.05, 0.05),
    "index_add_": lambda w, g: w.index_add_(0, torch.tensor([1, 4]), g[:2]),
    "masked_fill_": lambda w, g: w.masked_fill_(g > 0, 0.0),
    "foreach": lambda w, g: torch._foreach_add_([w], [g], alpha=0.1),
    "out=": lambda w, g: torch.mul(g, 0.5, out=w),
}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", UPDATES)
def test_in_place_operations_are_computed_in_fp32_and_rounded_to_a_neighbour(name: str, store: str):
    w, g = StoredWeight.of(dense(), store), dense(seed=3)
    exact = w.load()
    UPDATES[name](exact, g)
    UPDATES[name](w, g)
    step = 2 * dense().abs().amax() * {"int8": 1 / 127, "split": 1 / 1792, "split8": 1e-4}.get(store, 0.35)
    assert (w.load() - exact).abs().max() <= step * max(1.0, float(exact.abs().max() / dense().abs().max()))
    assert w.writes == 1


def test_in_place_operations_of_a_bf16_weight_are_not_computed_in_bf16():
    """An update of 2**-12 is nothing to a bf16 number near 1, and one code in 32 to an int8 one with absmax 1."""
    w = StoredWeight.of(torch.ones(64, 256).bfloat16(), "int8")
    for _ in range(8):
        w.sub_(torch.full((64, 256), 2.0**-12).bfloat16())
    assert abs(float(w.load().mean()) - (1 - 8 * 2.0**-12)) < 1e-4


def test_each_write_has_random_bits_of_its_own_that_depend_on_nothing_else():
    def after(count: int, stream: int = 7) -> Tensor:
        w = StoredWeight.of(dense(), "int4", stream=stream)
        w.writes.fill_(count)
        return w.add_(dense(seed=1), alpha=1e-2).codes

    assert torch.equal(after(3), after(3))
    assert not torch.equal(after(3), after(4)) and not torch.equal(after(3), after(3, stream=8))


def test_the_counter_is_shared_by_aliases_and_never_goes_back():
    p = made("int4")
    p.data.mul_(0.5)
    p.detach().mul_(0.5)
    assert p.writes == 2
    saved = p.detach().clone()
    p.data.mul_(0.5)
    p.data.copy_(saved)
    assert p.writes == 3 and same(parts(p), parts(saved))


@pytest.mark.parametrize("store", [*STORES, "nf4-dq"])
def test_initializers_give_new_scales(store: str):
    w = StoredWeight.of(dense(200, 96) * 100, store)
    torch.manual_seed(0)
    nn.init.normal_(w, std=0.02)
    torch.manual_seed(0)
    expected = StoredWeight.of(torch.empty(200, 96).normal_(std=0.02), store)
    assert same(parts(w), parts(expected))
    for init in (nn.init.kaiming_uniform_, nn.init.xavier_normal_, nn.init.zeros_):
        init(w)
    assert (w.dequantize() == 0).all()


@pytest.mark.parametrize("store", [*STORES, "nf4-dq"])
def test_a_copy_of_a_whole_weight_has_scales_of_its_own(store: str):
    """Under the old scales, values a thousandth as large would vanish, or be thrown from 0 to a code."""
    small, expected = dense() * 1e-3, parts(StoredWeight.of(dense() * 1e-3, store))
    split = StoredWeight.of(small, "split8")
    for way, source in (
        (lambda w: w.copy_(small), small),
        (lambda w: w.data.copy_(small), small),
        (lambda w: w.copy_(small.double()), small),
        (lambda w: w.t().copy_(small.t()), small),
        (lambda w: w.view(-1).copy_(small.view(-1)), small),
        (lambda w: w.copy_(small[:1]), small[:1].expand(12, 96)),
        (lambda w: w.copy_(split), split.load()),
    ):
        w = StoredWeight.of(dense(), store)
        with torch.no_grad():
            way(w)
        assert same(parts(w), parts(StoredWeight.of(source.contiguous(), store))) and w.writes == 0
    assert same(parts(StoredWeight.of(small, store)), expected)


@pytest.mark.parametrize("store", STORES)
def test_a_copy_of_some_rows_leaves_the_others_alone(store: str):
    w = StoredWeight.of(dense(), store)
    before = parts(w)
    w[2:5].copy_(dense(seed=1)[2:5] * 0.1)
    assert torch.equal(w.codes[:2], before["codes"][:2]) and torch.equal(w.codes[5:], before["codes"][5:])
    assert (w[2:5].dequantize() - dense(seed=1)[2:5] * 0.1).abs().max() < 0.01


def test_orthogonal_initialization_writes_through_a_view():
    w = StoredWeight.of(torch.ones(64, 64) * 100, "split8")
    nn.init.orthogonal_(w)
    assert torch.allclose(w.load() @ w.load().t(), torch.eye(64), atol=1e-3)


def test_frozen_formats_can_be_read_and_initialized_but_not_updated():
    w = StoredWeight.of(dense(), "nf4-dq")
    before = parts(w)
    with pytest.raises(ValueError, match="frozen"):
        w.mul_(0.5)
    assert same(parts(w), before) and w.writes == 0


# --- Optimizers of torch ---------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}


@pytest.mark.parametrize("store", ["int8", "split8", "nvfp4"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_step_it(name: str, store: str):
    """Near the same optimizer on the dense weight: by the noise of rounding, which is the store's."""
    p = made(store)
    q = nn.Parameter(p.load())
    opts = [OPTIMIZERS[name]([w]) for w in (p, q)]
    for step in range(3):
        for w, opt in zip((p, q), opts, strict=True):
            w.grad = dense(seed=10 + step)
            nn.utils.clip_grad_norm_([w], 1.0)
            opt.step()
    assert all(type(s) is Tensor for s in opts[0].state[p].values() if torch.is_tensor(s))
    step = 0.4 * {"int8": 1 / 127, "split8": 1e-4}.get(store, 0.34)
    assert (p.load() - q).abs().max() < 6 * step and p.writes >= 3


@pytest.mark.parametrize("store", ["int4", "split"])
def test_going_on_from_a_copy_is_never_having_stopped(store: str):
    def run(p: nn.Parameter, opt: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            p.grad = dense(seed=step)
            opt.step()

    p = made(store)
    opt = torch.optim.AdamW([p], lr=1e-3)
    run(p, opt, range(4))
    q = pickle.loads(pickle.dumps(p))
    other = torch.optim.AdamW([q], lr=1e-3)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(p, opt, range(4, 8)), run(q, other, range(4, 8))
    assert same(parts(p), parts(q))


# --- Compilers and processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["int8", "split"])
def test_a_function_of_it_compiles_in_one_graph(store: str):
    p, x = made(store), torch.randn(4, 96)

    def loss(x: Tensor, p: Tensor) -> Tensor:
        return F.linear(x, p).relu().square().sum()

    loss(x, p).backward()
    expected, p.grad = p.grad, None
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x, p).backward()
    assert torch.allclose(p.grad, expected)


def test_compiled_code_is_kept_under_what_it_depends_on():
    """By default torch hashes the inner tensors and warns; a warning is an error here."""
    weights = [StoredWeight.of(dense(), store, stream=3) for store in (*lowbit.stored.stores(), "int4:16", "e2m1")]
    frozen = StoredWeight.of(dense(), "int8").requires_grad_()
    others = [frozen, StoredWeight.of(dense().bfloat16(), "int8"), StoredWeight.of(dense()[:4], "int8")]
    hashes = [w._stable_hash_for_caching() for w in (*weights, *others)]
    assert len(set(hashes)) == len(hashes)
    for w in weights:  # other codes and random bits, and another process, are the same to it
        assert (
            StoredWeight.of(dense(seed=1), w.store, stream=4)._stable_hash_for_caching() == w._stable_hash_for_caching()
        )
    assert " object at 0x" not in "".join(hashes)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's compiler uses it
def test_torchs_own_compiler_does_not_warn_about_it():
    torch._dynamo.reset()
    w, x = StoredWeight.of(dense(), "nf4").requires_grad_(), torch.randn(4, 96)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = torch.compile(lambda x, w: F.linear(x, w), fullgraph=True)(x, w)
    assert not [str(c.message) for c in caught if "StoredWeight" in str(c.message)]
    assert torch.allclose(y, F.linear(x, w.dequantize()), atol=1e-5)
    torch._dynamo.reset()


def test_a_compiled_update_has_the_bits_of_an_eager_one():
    """… for weights with random bits of their own, which share the graph."""
    p, q, g = made("int4"), made("int4"), dense(seed=1)
    others = [StoredWeight.of(dense(), "int4", stream=8).requires_grad_() for _ in range(2)]

    def update(w: Tensor, g: Tensor) -> None:
        with torch.no_grad():
            w.mul_(0.999)
            w.add_(g, alpha=-0.01)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for a, b in ((p, q), others):
            compiled(a, g), update(b, g)
            assert same(parts(a), parts(b)) and a.writes == b.writes
    assert not same(parts(p), parts(others[0]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_moves_it_between_processes_unasked_is_refused():
    w = StoredWeight.of(dense(), "int8")
    with pytest.raises(TypeError, match="move its parts"):
        torch.ops._c10d_functional.all_reduce(w, "sum", "0")


def test_sharding_that_would_make_it_dense_is_refused():
    """What fully_shard does first with a parameter's rows (torch.distributed.fsdp)."""
    w = StoredWeight.of(dense(), "int8")
    shard = w.chunk(2)[0]
    with pytest.raises(TypeError, match="fully_shard"):
        w.new_zeros(shard.shape)


def test_weights_end_to_end_remember_their_parts():
    w, b = StoredWeight.of(dense(), "int4"), torch.randn(12)
    flat = torch.cat([b, w.view(-1)])
    assert type(flat) is StoredFlat and torch.equal(flat + 0, torch.cat([b, w.dequantize().view(-1)]))
    other = StoredWeight.of(dense(seed=9), "int4")
    other.copy_(flat[12:].view(12, 96))
    assert same(parts(other), parts(w))
    assert torch.equal(flat[:12], b) and torch.equal(flat[5:20] + 0, (flat + 0)[5:20])
