"""What may import what: the package is layered, and most of it does no I/O."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import idalloc_tcp

ROOT: Final = Path(idalloc_tcp.__file__).parent

#: Every module and sub-package, in the only direction in which imports may point: to the left.
ORDER: Final = (
    *("errors", "names", "address", "kinds", "settings", "config", "metrics", "log"),
    *("protocol", "session"),
    *("limits", "express", "snapshot", "pool", "sizing", "recent", "underway", "backoff", "health"),
    *("garbage", "bridge", "ledger", "counter", "reservation", "sync", "fallback", "service"),
    *(
        "allocator",
        "stores",
        "observation",
        "lanes",
        "connection",
        "listeners",
        "server",
        "signals",
        "systemd",
    ),
    *("reload", "client", "link", "workers", "admin", "assembly", "composition", "worker"),
    *("doctor", "top", "cli", "__main__"),
)
#: What talks and what allocates know nothing of each other; `server` puts them together.
TALKING: Final = frozenset({"protocol", "session", "express"})
ALLOCATING: Final = frozenset(ORDER[ORDER.index("pool") : ORDER.index("stores")])

#: What must be usable, and testable, without an event loop or a store.
PURE: Final = (
    *("errors", "names", "address", "kinds", "settings", "config", "metrics", "log"),
    *("protocol", "session"),
    *("limits", "express", "snapshot", "pool", "sizing", "recent", "backoff", "fallback"),
)
IMPURE_PACKAGES: Final = frozenset({"trio", "trio_asyncio", "asyncio", "redis", "asyncmy"})


def module_of(path: Path) -> str:
    """The entry of `ORDER` that a file belongs to; "" for the package itself."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


MODULES: Final = frozenset(map(module_of, ROOT.rglob("*.py"))) - {""}


def imported_modules(path: Path) -> Iterator[str]:
    """The entry of `ORDER` for each import that stays in the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        # The dot is there for a plain `import idalloc_tcp`, whose inner part is empty.
        for package, inner, *_ in (f"{name}.".split(".") for name in names):
            if package == ROOT.name and inner in MODULES:
                yield inner


def imports() -> dict[str, set[str]]:
    """Module -> the other modules of the package that it imports, anywhere in its files."""
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        module = module_of(path)
        graph.setdefault(module, set()).update(set(imported_modules(path)) - {module})
    return graph


def test_imports_point_upwards() -> None:
    """Every module has its place in `ORDER` and imports only from modules before it."""
    graph = imports()
    assert graph.pop("") == set(), "the package itself imports nothing"
    assert set(ORDER) >= MODULES, "a new module needs a place in ORDER"
    for module, imported in graph.items():
        allowed = set(ORDER[: ORDER.index(module)])
        assert imported <= allowed, f"{module} imports from below: {imported - allowed}"


def test_talking_and_allocating_are_strangers() -> None:
    """The session needs the protocol and the metrics alone; the allocator's side needs neither."""
    graph = imports()
    assert graph["session"] == {"errors", "metrics", "protocol"}
    assert graph["protocol"] == {"errors", "names"}
    for module in ALLOCATING & MODULES:
        assert not graph[module] & TALKING, f"{module} knows the protocol"


def test_the_pure_modules_load_no_event_loop_and_no_driver() -> None:
    """Importing what decides, but does no I/O, brings neither Trio nor asyncio nor a driver."""
    modules = ", ".join(f"{ROOT.name}.{module}" for module in PURE)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print(*sys.modules)"],
        cwd=ROOT.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert ROOT.name in loaded
    assert not loaded & IMPURE_PACKAGES


def test_the_embedded_server_loads_no_driver() -> None:
    """A server on its SQLite file brings no driver, nor the bridge for them, nor what draws."""
    program = """
import sys, tempfile, trio
from pathlib import Path
from idalloc_tcp import cli, composition
from idalloc_tcp.settings import Settings
from idalloc_tcp.metrics import Metrics
from idalloc_tcp.stores import open_stores

async def main(folder):
    async with open_stores(Settings(data=Path(folder, "ids")), Metrics()) as stores:
        await stores.source.reserve("orders", 10)

with tempfile.TemporaryDirectory() as folder:
    trio.run(main, folder)
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    loaded = set(done.stdout.split())
    assert {"trio", "sqlite3"} <= loaded
    assert not loaded & (IMPURE_PACKAGES - {"trio"} | {f"{ROOT.name}.bridge", "rich"})


def test_the_safety_argument_names_every_rule() -> None:
    """Whoever asks why IDs are unique finds all eight rules in one place, by their names."""
    text = ast.get_docstring(ast.parse((ROOT / "reservation.py").read_text())) or ""
    assert re.findall(r"^(\d)\. \*(.+?)\.?\*", text, re.M) == [
        ("1", "Lead"),
        ("2", "Fence"),
        ("3", "Seat anew"),
        ("4", "At most once"),
        ("5", "Extend by compare-and-set"),
        ("6", "Floor"),
        ("7", "Never backwards"),
        ("8", "Give back, or leave a gap"),
    ]
