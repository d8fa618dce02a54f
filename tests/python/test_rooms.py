"""The order of the package's rooms: what each may import. docs and CONTRIBUTING.md describe the same."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python" / "flexq"
# From the lowest room to the highest: each may import those it names, and itself.
MAY_IMPORT = {
    "_core": (),
    "_imports": (),
    "checksum": (),
    "plots": (),
    "progress": (),
    "plan": (),
    "execution": ("_core",),
    "ops": ("_core", "execution"),
    "packed": ("ops", "plan"),
    "linear": ("packed", "ops", "plan"),
    "embedding": ("packed", "ops", "plan"),
    "experts": ("packed", "ops", "plan"),
    "quantize": ("embedding", "experts", "linear", "packed", "ops", "plan", "checksum", "progress"),
    "run": ("quantize", "linear", "packed", "ops", "plan"),
    "bench": ("experts", "run", "quantize", "linear", "execution", "ops", "plan", "plots", "progress", "_core"),
    "evaluate": ("quantize", "plan", "plots", "progress"),
    "planning": ("bench", "quantize", "embedding", "experts", "linear", "ops", "plan", "plots", "progress"),
    "checkpoint": ("quantize", "embedding", "experts", "linear", "execution", "ops", "plan", "checksum", "progress"),
    "integrations": ("checkpoint", "run", "quantize", "embedding", "experts", "linear", "packed", "ops", "plan"),
    "cli": ("checkpoint", "planning", "evaluate", "bench", "run", "quantize", "execution", "plan", "plots", "_core"),
}
# Imported for what they register, by names of the importing and the imported module.
REGISTRATIONS = {("flexq.checkpoint.read", "flexq.integrations.transformers")}


def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(("flexq", *(p for p in parts if p != "__init__")))] = file
    return found


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("flexq.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flexq":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known or whole == "flexq._core" else node.module)
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_room_imports_a_higher_one():
    known = modules()
    wrong = []
    for module, file in known.items():
        room = room_of(module)
        if room in ("", "__main__"):
            continue
        assert room in MAY_IMPORT, f"{module} is in no room that this test knows"
        for imported in imports_of(file, known):
            other = room_of(imported)
            if other in ("", room) or (module, imported) in REGISTRATIONS:
                continue
            if other not in MAY_IMPORT[room]:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_rooms_themselves_have_an_order():
    order = list(MAY_IMPORT)
    for room, lower in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in lower), room


def test_no_two_modules_import_each_other():
    known = modules()
    graph = {module: imports_of(file, known) & known.keys() for module, file in known.items()}
    graph = {m: {o for o in others if (m, o) not in REGISTRATIONS} for m, others in graph.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        if module != "flexq":  # its names are imported when they are asked for
            visit(module, ())


def test_every_public_name_is_where_users_import_it_from():
    import flexq

    assert sorted(flexq.__all__) == flexq.__all__
    assert set(flexq.__all__) == set(flexq._HOME_OF)
    for name in flexq.__all__:
        assert getattr(flexq, name) is not None
    assert callable(flexq.linear)  # and not the module of that name


def test_every_module_is_on_the_map():
    words = set(re.findall(r"\w+", (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text()))
    in_rooms = [file for file in modules().values() if file.parent != PACKAGE and file.stem != "__init__"]
    # cli/ and vLLM's parts are named as a whole.
    missing = [f for f in in_rooms if f.parent.name != "cli" and not f.stem.startswith("vllm") and f.stem not in words]
    assert not missing
