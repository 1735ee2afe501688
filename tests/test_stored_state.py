"""Stored weights in files, and models that are never dense: state dicts, safetensors, the meta device."""

import io
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit.nn import Recipe, StoredWeight, materialize_, quantize_

STORES = ["int8", "int4", "nf4", "mxfp4", "nvfp4", "split", "split8", "int8:64", "nf4-dq"]


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(30, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))


def net(store: str = "int4", seed: int = 0, embedding: str | None = "int8") -> Net:
    torch.manual_seed(seed)
    model = Net().requires_grad_(store != "nf4-dq")
    quantize_(model, Recipe(activation="int8", store=store, embedding=embedding), skip=())
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- State dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_a_state_dict_is_plain_tensors_under_the_weights_name(store: str):
    model = net(store)
    saved = model.state_dict()
    assert all(type(tensor) is Tensor for tensor in saved.values())
    extra = {"nvfp4": {"tensor_scale"}, "nf4-dq": {"scale_scale", "scale_offset"}}.get(store, set())
    extra |= {"rest"} if store.startswith("split") else set()
    own = {name.removeprefix("layers.0.weight") for name in saved if name.startswith("layers.0.weight")}
    assert own == {"", "_scale", "_writes", "_format", *(f"_{part}" for part in extra)}
    weight = model.layers[0].weight
    assert saved["layers.0.weight"].dtype == torch.uint8 and saved["layers.0.weight_format"] == weight.format.tag
    assert saved["layers.0.weight"].data_ptr() == weight.codes.data_ptr()  # like torch's: no copy


@pytest.mark.parametrize("way", ["torch", "safetensors", "assign"])
@pytest.mark.parametrize("store", STORES)
def test_saving_and_strict_loading_is_a_round_trip(store: str, way: str, tmp_path: Path):
    model, other = net(store), net(store, seed=1)
    if store != "nf4-dq":
        with torch.no_grad():
            model.layers[1].weight.mul_(0.99)
    if way == "safetensors":
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        saved = load_file(tmp_path / "x.safetensors")
    else:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    done = other.load_state_dict(saved, strict=True, assign=way == "assign")
    assert not done.missing_keys and not done.unexpected_keys
    assert equal(state(other), state(model))
    assert all(type(layer.weight) is StoredWeight for layer in other.layers)
    assert isinstance(other.layers[0].weight, nn.Parameter)
    assert other.layers[0].weight.requires_grad == (store != "nf4-dq")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("store", STORES)
def test_a_dense_checkpoint_is_rounded_on_the_way_in(store: str, assign: bool):
    torch.manual_seed(5)
    dense = Net().state_dict()
    model = net(store)
    model.load_state_dict(dense, assign=assign)
    for name in ("layers.0", "layers.2"):
        expected = StoredWeight.of(dense[f"{name}.weight"], store)
        got = model.get_submodule(name).weight
        assert all(torch.equal(got.parts[part], expected.parts[part]) for part in expected.parts)
    assert torch.equal(model.norm.weight, dense["norm.weight"])


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_stored_otherwise_is_decoded_and_stored_anew(assign: bool):
    source, model = net("split8"), net("int4")
    model.load_state_dict(source.state_dict(), assign=assign)
    expected = StoredWeight.of(source.layers[0].weight.load(), "int4")
    assert torch.equal(model.layers[0].weight.codes, expected.codes) and model.layers[0].weight.store == "int4"
    master = Net()
    quantize_(master, "int4", skip=())
    embedding = {name: tensor for name, tensor in Net().state_dict().items() if name.startswith("embed")}
    layers = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("embed")}
    master.load_state_dict(layers | embedding, assign=assign)
    assert torch.equal(master.layers[0].weight, source.layers[0].weight.load())
    assert type(master.layers[0].weight) is nn.Parameter


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("layers.1.weight_scale"), "layers.1.weight_scale is missing"),
        (lambda s: s.pop("layers.1.weight_rest"), "no format|weight_rest|loads|stored as"),
        (lambda s: s.pop("layers.1.weight"), "Missing key.*layers.1.weight"),
        (lambda s: s.pop("layers.1.weight_format"), "without layers.1.weight_format, codes"),
        (lambda s: s.update({"layers.1.weight_format": torch.tensor(5)}), "no format that this version"),
        (lambda s: s.update({"layers.1.weight": torch.zeros(64, 9, dtype=torch.uint8)}), "size mismatch for layers.1"),
        (lambda s: s.update({"layers.1.weight_scale": torch.zeros(64, 2)}), "size mismatch for layers.1.weight_scale"),
        (lambda s: s.update({"layers.1.weight_colour": torch.zeros(1)}), "Unexpected key.*layers.1.weight_colour"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_a_clear_error_and_changes_no_such_layer(change, message: str):
    model = net("split")
    saved = state(net("split", seed=1))
    before = {name: t for name, t in state(model).items() if name.startswith("layers.1.weight")}
    change(saved)
    if "rest" in message:  # codes without their rest are another store, and are taken for that
        model.load_state_dict(saved)
        assert (model.layers[1].weight.parts["rest"] == 0).all()
        return
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(saved)
    if "colour" not in message:
        after = {name: t for name, t in state(model).items() if name.startswith("layers.1.weight")}
        assert equal(after, before)


def test_loading_into_a_model_on_the_meta_device_says_that_it_does_nothing():
    with torch.device("meta"):
        model = Net()
    quantize_(model, Recipe(store="int4"), skip=())
    with pytest.warns(UserWarning, match="meta"):
        model.load_state_dict(Net().state_dict())
    assert model.layers[0].weight.is_meta
    model.load_state_dict(net("int4", embedding=None).state_dict(), assign=True)
    assert not model.layers[0].weight.is_meta and model.layers[0].weight.store == "int4"


# --- The meta device -------------------------------------------------------------------------------------------------


def on_meta(store: str = "int4", width: int = 64) -> Net:
    with torch.device("meta"):
        model = Net(width).requires_grad_(store != "nf4-dq")
    quantize_(model, Recipe(store=store, embedding="int8"), skip=())
    return model


@pytest.mark.parametrize("store", STORES)
def test_a_model_on_the_meta_device_gets_parts_of_the_right_size(store: str):
    with torch.device("meta"):
        model = Net().requires_grad_(store != "nf4-dq")
    report = quantize_(model, Recipe(store=store, embedding="int8"), skip=())
    real = net(store)
    for name, tensor in model.state_dict().items():
        twin = real.state_dict()[name]
        assert name.endswith("_format") or (
            tensor.is_meta and tensor.shape == twin.shape and tensor.dtype == twin.dtype
        )
    assert report.stored_bytes == sum(p.nbytes for p in model.parameters() if isinstance(p, StoredWeight))


@pytest.mark.parametrize("store", STORES)
def test_without_a_source_modules_fill_themselves(store: str):
    model = on_meta(store)
    parameters = dict(model.named_parameters())
    torch.manual_seed(3)
    assert materialize_(model) is model
    torch.manual_seed(3)
    dense = Net()
    quantize_(dense.requires_grad_(store != "nf4-dq"), Recipe(store=store, embedding="int8"), skip=())
    assert equal(state(model), state(dense))
    assert all(p is parameters[name] and not p.is_meta for name, p in model.named_parameters())
    assert model.layers[0].weight.requires_grad == (store != "nf4-dq")


@pytest.mark.parametrize("kind", ["dense mapping", "stored mapping", "dense file", "stored file", "files", "folder"])
def test_values_come_from_a_mapping_or_from_files(kind: str, tmp_path: Path):
    dense = Net()
    other = Net()
    other.load_state_dict(dense.state_dict())
    quantize_(other, Recipe(store="int4", embedding="int8"), skip=())
    saved = {k: v.clone() for k, v in (dense if "dense" in kind else other).state_dict().items()}
    source: object = saved
    if kind.endswith("file"):
        source = tmp_path / "x.safetensors"
        save_file(saved, source)
    elif "f" in kind:
        names = sorted(saved)
        for i, some in enumerate((names[:3], names[3:])):
            save_file({name: saved[name] for name in some}, tmp_path / f"{i}.safetensors")
        source = tmp_path if kind == "folder" else [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    model = materialize_(on_meta(), source)
    for name, tensor in state(other).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_tied_weights_and_what_has_memory_already_stay_as_they_are():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 64), nn.Linear(64, 30, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    with torch.device("meta"):
        model = Tied()
    model.real = nn.Linear(4, 4, device="cpu")
    value = model.real.weight.detach().clone()
    quantize_(model, Recipe(store="int4", embedding="int8"), skip=["real"])
    table = torch.randn(30, 64)
    materialize_(model, {"head.weight": table, "count": torch.tensor(7)})
    assert model.head.weight is model.embed.weight and torch.equal(model.real.weight, value) and model.count == 7
    assert torch.equal(model.embed.weight.codes, StoredWeight.of(table, "int8").codes)


class Alone(nn.Module):
    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.ones(3), persistent=persistent)


@pytest.mark.parametrize(
    "build, source, message",
    [
        (
            lambda: nn.Sequential(nn.Linear(3, 3), Alone()),
            None,
            r"1 \(Alone\) has no reset_parameters",
        ),
        (lambda: nn.Sequential(Alone(persistent=False)), {"0.scale": torch.ones(3)}, "'0.table' is in no checkpoint"),
        (Net, {"embed.weight": torch.zeros(30, 64)}, "source has no 'norm.weight'"),
        (lambda: nn.Linear(2, 2), {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "size mismatch for weight"),
        (lambda: nn.Linear(2, 2), "nowhere.safetensors", "no safetensors file nowhere.safetensors"),
    ],
)
def test_what_cannot_be_filled_is_an_error_before_anything_has_changed(build, source, message: str):
    with torch.device("meta"):
        model = build()
    with pytest.raises(ValueError, match=message):
        materialize_(model, source)
    assert all(p.is_meta for p in model.parameters())


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that operations make, for as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if type(x) is Tensor and not x.is_meta:
                self._take(x.untyped_storage())
        return out

    def _take(self, storage) -> None:
        if storage.data_ptr() in self.seen or not storage.nbytes():
            return
        key, size = storage.data_ptr(), storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("source, store", [("reset", "split"), ("file", "int4")])
def test_materializing_holds_one_dense_layer_at_a_time(source: str, store: str, tmp_path: Path):
    """12 layers of 1 MB: at the peak their codes, one dense layer, and what encoding a piece of it takes."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(12))

    with torch.device("meta"):
        model = Wide()
    quantize_(model, Recipe(store=store))
    file = None
    if source == "file":
        file = tmp_path / "x.safetensors"
        save_file({f"layers.{i}.weight": torch.randn(512, 512) for i in range(12)}, file)
    lowbit.stored.PIECE, piece = 1 << 14, lowbit.stored.PIECE
    try:
        with Meter() as meter:
            materialize_(model, file)
    finally:
        lowbit.stored.PIECE = piece
    layer, codes = 4 * 512 * 512, sum(p.nbytes for p in model.parameters())
    assert codes == 12 * 512 * 512 * {"int4": 4.5, "split": 12.5}[store] / 8
    assert meter.largest == layer
    assert codes + layer <= meter.peak < codes + 1.9 * layer, (meter.peak - codes) / layer
