"""The architecture, asserted: who may import whom, and that importing the library does nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

# The house, ground floor first. A room is a module or package directly under lowbit. It imports only from rooms on
# lower floors, and freely from inside itself. A new module gets its place here.
FLOORS = [
    {"words", "formats", "rounding", "compiler", "tables", "tape", "layout", "shards"},
    {"codec", "stages", "masters", "roles", "rotation"},
    {"blocks"},
    {"scales"},
    {"rows", "native"},
    {"eden", "gpu", "stored"},
    {"backends"},
    {"packed", "policy"},
    {"optim", "nn"},
    {"bench", "integrations"},
    {"__init__", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ADVICE = "has no floor: give it a floor in tests/test_floors.py"

ROOT = Path(__file__).parents[1] / "lowbit"
OPTIONAL = [
    "matplotlib", "datasets", "transformers", "torchao", "bitsandbytes", "triton", "peft", "compressed_tensors",
]  # fmt: skip


def module_name(path: Path) -> str:
    """`optim/__init__.py` is lowbit.optim, but `__init__.py` at the top keeps its name: it is a room of its own."""
    parts = ["lowbit", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
ROOMS = FLOOR.keys() | {name.split(".")[1] for name in MODULES}


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) for every import in the source: at the top, in functions, for types only, by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                # From `lowbit` itself comes either a room or a name that only __init__ has.
                yield node.lineno, f"lowbit.{alias.name}" if module == "lowbit" and alias.name in ROOMS else module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, resolve_name(node.args[0].value, package)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    own = module.split(".")[1]
    if own not in FLOOR:
        return [f"{module} {ADVICE}"]
    package = module if is_package and own != "__init__" else module.rpartition(".")[0]
    found = []
    for line, target in imports(source, package):
        top, room = (target + ".__init__").split(".")[:2]
        if top != "lowbit" or room == own:
            continue
        if room not in FLOOR:
            found.append(f"{module}:{line} imports lowbit.{room}, which {ADVICE}")
        elif FLOOR[room] >= FLOOR[own]:
            found.append(f"{module}:{line} (floor {FLOOR[own]}) imports lowbit.{room} (floor {FLOOR[room]})")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_floors(module):
    path = MODULES[module]
    assert violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


def test_every_folder_with_modules_is_a_package():
    # setuptools leaves out what is not, silently.
    assert [str(path.parent) for path in MODULES.values() if not (path.parent / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowbit.words", "import lowbit.packed"),
        ("lowbit.words", "import torch, lowbit.packed as p"),
        ("lowbit.words", "import lowbit"),
        ("lowbit.words", "from lowbit import quantize_"),
        ("lowbit.words", "from lowbit import packed"),
        ("lowbit.words", "from lowbit.packed import Packed"),
        ("lowbit.words", "from . import packed"),
        ("lowbit.words", "from .optim.adamw import AdamW"),
        ("lowbit.words", "def late():\n    from lowbit.backends import native"),
        ("lowbit.words", "if TYPE_CHECKING:\n    from .packed import Packed"),
        ("lowbit.words", "importlib.import_module('lowbit.optim')"),
        ("lowbit.words", "import_module('.optim', __package__)"),
        ("lowbit.words", "__import__('lowbit.optim.adamw')"),
        ("lowbit.words", "from .formats import Format"),  # the same floor, another room
        ("lowbit.optim.adamw", "from ..nn.linear import Linear"),
        ("lowbit.optim.adamw", "from .. import bench"),
        ("lowbit.optim.adamw", "from lowbit.surprise import x"),
        ("lowbit.surprise", "import torch"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert len(violations(source, module)) == 1


def test_relative_imports_of_a_package_count_from_the_package():
    assert violations("from . import reference", "lowbit.backends", is_package=True) == []
    assert violations("from .. import bench", "lowbit.backends", is_package=True) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lowbit.packed", "import lowbit.words\nfrom .formats import Format\nfrom . import words"),
        (
            "lowbit.optim.adamw",
            "from .base import Rule\nfrom . import base\nfrom lowbit.optim import base\nfrom ..packed import Packed",
        ),
        ("lowbit.__init__", "from .optim import AdamW\nfrom . import bench, optim"),
        ("lowbit.__main__", "from lowbit.bench import cli\nimport lowbitter, torch"),
    ],
)
def test_an_honest_import_is_not(module, source):
    assert violations(source, module, is_package=module.endswith("__init__")) == []


# Runs in a fresh interpreter. What comes before the dash is loaded first: what torch does at import is not our doing.
PROBE = """
import importlib, json, os, socket, subprocess, sys
dash = sys.argv.index("-")
for name in sys.argv[1:dash]:
    importlib.import_module(name)
before, events = set(sys.modules), []
busy = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo"}
sys.addaudithook(lambda event, args: events.append(event) if event in busy else None)
for name in sys.argv[dash + 1 :]:
    importlib.import_module(name)
print(json.dumps({"events": events, "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - before})}))
"""


def probe(first: list[str], then: list[str], cwd: Path) -> tuple[list[str], list[str]]:
    """The audit events of importing `then`, and which optional libraries it loaded."""
    command = [sys.executable, "-c", PROBE, *first, "-", *then]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    return seen["events"], [name for name in OPTIONAL if name in seen["loaded"]]


def test_import_does_nothing():
    ours = ["lowbit", *(m for m in MODULES if m == "lowbit.__main__" or m.startswith("lowbit.integrations"))]
    assert probe(["torch", "numpy"], ours, cwd=ROOT.parent) == ([], [])


def test_the_probe_sees_a_planted_process_connection_and_library(tmp_path):
    (tmp_path / "triton.py").touch()
    (tmp_path / "planted.py").write_text(
        "import socket, subprocess, sys, triton\n"
        "subprocess.run([sys.executable, '-c', ''])\n"
        "socket.socket(socket.AF_UNIX).connect_ex('nobody-listens')\n"
    )
    events, loaded = probe([], ["planted"], cwd=tmp_path)
    assert {"subprocess.Popen", "socket.connect"} <= set(events)
    assert loaded == ["triton"]


def test_importing_the_library_imports_no_compiler():
    code = "import sys, lowbit; print(sorted(m for m in sys.modules if m.startswith(('torch._dynamo', 'sympy'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain = subprocess.run([sys.executable, "-c", code.replace(", lowbit", ", torch")], capture_output=True, text=True)
    assert done.stdout == plain.stdout
