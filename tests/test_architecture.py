"""Imports point down the layers of docs/architecture.md, and modules stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    0: [
        "errors", "config", "files", "run_folder.paths", "run_folder.comparison", "distributed.ranks",
        "distributed.lifeline", "distributed.nodes", "distributed.launcher", "distributed.devices", "bootstrap",
        "installation",
    ],
    1: ["distributed", "randomness", "terminal", "fetch", "scores", "run_folder"],
    2: ["adapters", "model", "data"],
    3: [
        "adapters.attach", "adapters.build", "loss", "training", "prediction", "preflight",
        "memory", "memory_table", "memory_trace", "epochs",
    ],
    4: [
        "train", "evaluate", "report", "export", "view", "line", "runner", "compare", "method_check", "cli", "selftest",
        "stock_parity", "adapters.support", "deepspeed_matrix",
    ],
    5: ["tune"],
}
STAGES = {"train", "evaluate", "report", "export"}
GROUPS = {"adapters", "model", "data"}
NO_TORCH = LAYERS[0]
ONLY_IMPORTER = {
    "deepspeed": {"pipeline.distributed"},
    "torch.distributed": {"pipeline.distributed"},
    "bitsandbytes": {"pipeline.model", "pipeline.adapters.peft_format"},
    "ray": {"tune"},
}


def layer_of(module: str) -> int:
    """Layer of a dotted module name; the longest match wins."""
    if module.split(".")[0] == "tune":
        return 5
    name = module.removeprefix("pipeline").removeprefix(".")
    if not name:
        return 0
    matches = [
        (len(entry), layer)
        for layer, entries in LAYERS.items()
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    ]
    assert matches, f"{module} belongs to no layer: add it to LAYERS"
    return max(matches)[1]


def imports_of(source: str, modules: set[str]) -> set[str]:
    """Dotted names a module imports at any depth of its code; what only a type checker sees does not count."""
    tree = ast.parse(source)
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names
            if not names <= modules:  # `from package import module` is an import of the module alone
                found.add(node.module)
    return found


def violations(module: str, source: str, modules: set[str]) -> list[str]:
    """What is wrong with the imports of one module."""
    wrong = []
    own = layer_of(module)
    top = module.removeprefix("pipeline.").split(".")[0]
    for name in imports_of(source, modules):
        for library, allowed in ONLY_IMPORTER.items():
            if (name == library or name.startswith(f"{library}.")) and not any(module.startswith(a) for a in allowed):
                wrong.append(f"{module} imports {name}; only {', '.join(sorted(allowed))} may")
        if own == 0 and name.split(".")[0] == "torch":
            wrong.append(f"{module} imports torch in layer 0")
        if name not in modules or name in ("pipeline", "tune"):
            continue
        theirs, their_top = layer_of(name), name.removeprefix("pipeline.").split(".")[0]
        if module.split(".")[0] == "tune":
            if name.startswith("pipeline."):
                wrong.append(f"{module} imports {name}; tune uses the names exported by pipeline")
            continue
        if theirs > own:
            wrong.append(f"{module} (layer {own}) imports {name} (layer {theirs})")
        if own == 2 and {top, their_top} <= GROUPS and top != their_top:
            wrong.append(f"{module} imports {name}: the groups of layer 2 stand apart")
        if {top, their_top} <= STAGES and top != their_top:
            wrong.append(f"{module} imports {name}: stages never import each other")
    return wrong


def all_modules() -> dict[str, str]:
    """Dotted name -> source of every module of both packages."""
    found = {}
    for package in ("pipeline", "tune"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path.read_text(encoding="utf-8")
    return found


def test_imports_point_down() -> None:
    modules = all_modules()
    assert len(modules) > 40
    wrong = [line for module, source in modules.items() for line in violations(module, source, set(modules))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pipeline.files", "import torch"),
        ("pipeline.data.rows", "from pipeline.model.load import load_base"),
        ("pipeline.loss.terms", "import deepspeed"),
        ("pipeline.scores.regression", "from pipeline.prediction.passes import predict_choices"),
        ("pipeline.export", "from pipeline.evaluate import evaluate_run"),
        ("pipeline.train", "import ray"),
        ("tune.search", "from pipeline.train import train_run"),
        ("pipeline.adapters.linear", "def f():\n    from pipeline import checkpoint"),
    ],
)
def test_the_test_notices_an_import_against_the_layers(module: str, line: str) -> None:
    modules = all_modules()
    assert not violations(module, modules[module], set(modules))
    assert violations(module, f"{modules[module]}\n{line}\n", set(modules))


def test_no_module_cycles() -> None:
    modules = all_modules()
    edges = {
        m: {n for n in imports_of(s, set(modules)) if n in modules and n not in (m, "pipeline", "tune")}
        for m, s in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"cycle: {' -> '.join((*above, module))}"
        if module not in done:
            for below in edges[module]:
                visit(below, (*above, module))
            done.add(module)

    for module in modules:
        visit(module, ())


def test_modules_and_functions_stay_small() -> None:
    for module, source in all_modules().items():
        assert source.count("\n") <= 400, f"{module} has more than 400 lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{module}.{node.name} has {length} lines"
