"""The map of docs/architecture.md, held: what each room may import, which libraries have one door, how big files get.

Rooms are the folders of `pipeline/` and the files at its top. Rule numbers are those of the document.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from helpers import ROOT

from pipeline.run_folder import predictions

LINE = (
    {"errors"}, {"files", "randomness", "terminal"}, {"fetch", "hub"}, {"config"}, {"data", "model", "adapters"},
    {"loss"}, {"prediction"}, {"training"}, {"stages"}, {"cli"}, {"interface"},
)
"""Rule 1: imports point left only. The rooms beside the line have rules of their own."""
GROUND = {"errors", "files", "randomness", "terminal", "fetch", "hub"}
MAY_SEE = {
    "scores": {"errors"},
    "run_folder": GROUND | {"config", "scores"},
    "distributed": GROUND | {"config", "run_folder"},
    "report": GROUND | {"config", "data", "run_folder", "scores"},
    "ensemble": GROUND
    | {"config", "data", "model", "adapters", "loss", "prediction", "run_folder", "distributed", "scores"},
    "export": GROUND
    | {"config", "data", "model", "adapters", "loss", "prediction", "run_folder", "distributed", "scores", "ensemble"},
    "serving": GROUND
    | {"config", "data", "model", "adapters", "loss", "prediction", "run_folder", "distributed", "scores", "ensemble"}
    | {"plan"},
    "plan": GROUND | {"config", "data", "model", "adapters", "loss", "run_folder", "distributed"},
    "harness": GROUND
    | {"config", "data", "model", "adapters", "loss", "prediction", "run_folder", "distributed", "scores", "plan"},
    "setup": {"errors"},
    "doctor": GROUND | {"config", "data", "model", "run_folder", "distributed", "plan", "setup", "support"},
    "support": GROUND | {"config", "data", "model", "adapters", "loss", "run_folder", "distributed", "plan", "stages"},
}
"""Rules 3 and 4: rooms beside the line -> all that they may import."""
NEVER = {
    "data": {"model", "run_folder", "distributed", "scores"},
    "model": {"data", "run_folder", "distributed", "scores"},
    "adapters": {"data", "model", "run_folder", "distributed", "scores"},
    "loss": {"run_folder", "distributed", "scores"},
    "prediction": {"report", "export", "plan", "support", "setup"},
    "training": {"report", "export", "plan", "support", "setup"},
    "stages": {"support", "setup"},
}
"""Rules 2 and 3: rooms of the line -> what they never import, though it does not stand to their right."""
STARTERS = {"run", "compare", "distill", "table"}
"""Rule 5: stage files that may import other stage files; `processes` and `table` are no stages."""
ONE_DOOR = {
    "deepspeed": ("pipeline.distributed.zero",),
    "bitsandbytes": ("pipeline.model.", "pipeline.export."),
    "peft": ("pipeline.adapters.peft_", "pipeline.export."),
    "ray": ("tune.",),
    "fastapi": ("pipeline.serving.",),
    "uvicorn": ("pipeline.serving.command", "pipeline.serving.hurry"),
    "lm_eval": ("pipeline.harness.",),
}
"""Rule 6: library -> beginnings of the modules that may import it."""
NO_TORCH = (
    "pipeline.cli", "pipeline.config.", "pipeline.plan.resolve", "pipeline.plan.request", "pipeline.plan.steps",
    "pipeline.plan.preflight", "pipeline.plan.compute_dtype", "pipeline.plan.communication", "pipeline.run_folder.",
    "pipeline.setup.", "pipeline.report.", "pipeline.scores.",
    "pipeline.distributed.launcher", "pipeline.distributed.nodes", "pipeline.distributed.devices",
    "pipeline.distributed.ranks", "pipeline.distributed.lifeline", "pipeline.distributed.worker",
    "pipeline.distributed.hosts", "pipeline.distributed.remote",
    "pipeline.stages.table", "pipeline.stages.__main__", "pipeline.stages.processes", "pipeline.stages.run",
    "pipeline.stages.search", "pipeline.stages.compare", "pipeline.stages.pack", "pipeline.stages.report",
    "pipeline.stages.predict", "pipeline.ensemble.readout", "pipeline.ensemble.rows", "pipeline.serving.command",
    "pipeline.stages.reference.test", "pipeline.interface.loradrop", "pipeline.interface.loradrop.commands",
    "pipeline.stages.doctor", "pipeline.harness.command",
    "pipeline.doctor.finding", "pipeline.doctor.machine", "pipeline.doctor.steps",
    "tune.__main__", "tune.search", "tune.study",
)
"""Rules 4 and 6: modules that import no torch, nor a module of ours that does, where the interpreter runs them."""


def all_modules() -> dict[str, str]:
    """Dotted name -> source of every module of both packages."""
    found = {}
    for package in ("pipeline", "tune"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path.read_text(encoding="utf-8")
    return found


def room_of(module: str) -> str:
    """`pipeline.data.read` -> data; the package itself and tune have their own names."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else parts[0]


def imports_of(source: str, modules: set[str], types: bool = False, top: bool = False) -> set[str]:
    """Dotted names a module imports: at any depth, or only where it is loaded (`top`); with type-only ones or not."""
    found: set[str] = set()
    for module, aliases in statements_of(source, types, top):
        names = {f"{module}.{alias}" for alias in aliases}
        found |= {name for name in names if name in modules}
        if not aliases or not names <= modules:  # `from package import module` is an import of the module alone
            found.add(module)
    return found


@functools.cache
def statements_of(source: str, types: bool, top: bool) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(module, names taken from it) of every import; no names for `import module`."""
    tree = ast.parse(source)
    hidden: set[int] = set()
    for node in ast.walk(tree):
        type_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (type_only and not types) or (inner and top):
            hidden |= {id(one) for one in ast.walk(node)}
    found: list[tuple[str, tuple[str, ...]]] = []
    for node in (one for one in ast.walk(tree) if id(one) not in hidden):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module, tuple(alias.name for alias in node.names)))
    return tuple(found)


def faults_of(module: str, source: str, modules: set[str]) -> Iterator[str]:
    """What is wrong with the imports of one module, rule by rule; those for a type checker alone do not count."""
    own, place = room_of(module), {room: place for place, rooms in enumerate(LINE) for room in rooms}
    for name in sorted(imports_of(source, modules)):
        library = name.split(".")[0]
        doors = ONE_DOOR.get(library)
        if doors is not None and not any(module.startswith(door) or module == door for door in doors):
            yield f"rule 6: {module} imports {name}; only {', '.join(doors)} may"
        if name not in modules or name in ("pipeline", "tune"):
            continue
        theirs = room_of(name)
        if module.split(".")[0] == "tune":
            if library == "pipeline":
                yield f"rule 6: {module} imports {name}; tune uses the names that pipeline exports"
            continue
        if module == "pipeline" or theirs == own:
            if own == "stages" and theirs == "stages" and not allowed_among_stages(module, name):
                yield f"rule 5: {module} imports {name}: stages never import each other"
            continue
        if own in place and theirs in place and (place[theirs] > place[own]):
            yield f"rule 1: {module} imports {name}, which stands to its right"
        if theirs in NEVER.get(own, set()):
            yield f"rule {2 if {own, theirs} <= {'data', 'model', 'adapters'} else 3}: {module} imports {name}"
        if own in MAY_SEE and theirs not in MAY_SEE[own]:
            yield f"rule {3 if own == 'scores' else 4}: {module} imports {name}"


def allowed_among_stages(module: str, name: str) -> bool:
    """Rule 5: the table and the processes serve all; what starts other stages may name them."""
    own, theirs = module.rpartition(".")[2], name.rpartition(".")[2]
    return theirs in ("table", "processes") or own in STARTERS


def torch_faults(modules: dict[str, str]) -> Iterator[str]:
    """Rules 4 and 6: ways from a module without torch to torch, over what is imported when modules are loaded."""
    known = set(modules)
    loads = {m: imports_of(source, known, top=True) for m, source in modules.items()}
    for start in sorted(known):
        if not any(start == name or (name.endswith(".") and start.startswith(name)) for name in NO_TORCH):
            continue
        seen, ways = {start}, [(start,)]
        while ways:
            way = ways.pop()
            for name in loads[way[-1]]:
                if name.split(".")[0] == "torch":
                    yield f"rule 6: {' -> '.join((*way, name))}"
                elif name in known and name not in seen:
                    seen.add(name)
                    ways.append((*way, name))


def circles(modules: dict[str, str]) -> list[str]:
    """Circles of imports, type-only ones included."""
    known = set(modules)
    edges = {
        m: {n for n in imports_of(s, known, types=True) if n in known and n not in (m, "pipeline", "tune")}
        for m, s in modules.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        if module in above:
            found.append(" -> ".join((*above[above.index(module):], module)))
        elif module not in done:
            for below in sorted(edges[module]):
                visit(below, (*above, module))
            done.add(module)

    for module in sorted(modules):
        visit(module, ())
    return found


def test_rules_1_to_6() -> None:
    modules = all_modules()
    assert len(modules) > 100
    rooms = {room_of(module) for module in modules} - {"pipeline", "tune"}
    assert rooms == {room for part in LINE for room in part} | set(MAY_SEE), "a new room needs its rules here"
    wrong = [line for module, source in modules.items() for line in faults_of(module, source, set(modules))]
    assert not [*wrong, *torch_faults(modules)], "\n".join([*wrong, *torch_faults(modules)])


def test_no_circles() -> None:
    assert not circles(all_modules())


@pytest.mark.parametrize(
    ("rule", "module", "line"),
    [
        ("rule 1", "pipeline.files", "from pipeline.config import RunConfig"),
        ("rule 1", "pipeline.config.train", "from pipeline.data.rows import Row"),
        ("rule 1", "pipeline.adapters.linear", "def f():\n    from pipeline.training import checkpoint"),
        ("rule 1", "pipeline.prediction.task", "import pipeline.stages.train"),
        ("rule 2", "pipeline.data.rows", "from pipeline.model.load import load_base"),
        ("rule 2", "pipeline.adapters.attach", "from pipeline.data.encode import Encoded"),
        ("rule 3", "pipeline.loss.terms", "from pipeline.distributed.world import agree"),
        ("rule 3", "pipeline.adapters.peft_format", "from pipeline.run_folder.paths import RunPaths"),
        ("rule 3", "pipeline.scores.regression", "from pipeline.files import read_json"),
        ("rule 4", "pipeline.report.inputs", "from pipeline.model.kind import model_kind"),
        ("rule 4", "pipeline.plan.memory", "from pipeline.training.engine import trained_parameters"),
        ("rule 4", "pipeline.export.peft", "from pipeline.training import checkpoint"),
        ("rule 4", "pipeline.serving.worker", "from pipeline.training import checkpoint"),
        ("rule 5", "pipeline.stages.export", "from pipeline.stages.evaluate import evaluate_run"),
        ("rule 6", "pipeline.training.engine", "import deepspeed"),
        ("rule 6", "pipeline.adapters.linear", "from bitsandbytes.nn import Linear4bit"),
        ("rule 6", "pipeline.ensemble.ensemble", "from lm_eval.api.model import LM"),
        ("rule 4", "pipeline.harness.likelihoods", "from pipeline.training import checkpoint"),
        ("rule 6", "pipeline.adapters.build", "from peft import LoraConfig"),
        ("rule 6", "pipeline.stages.train", "import ray"),
        ("rule 6", "pipeline.stages.train", "import fastapi"),
        ("rule 6", "tune.search", "from pipeline.stages.train import train_run"),
    ],
)
def test_a_broken_rule_is_noticed(rule: str, module: str, line: str) -> None:
    modules = all_modules()
    broken = list(faults_of(module, f"{modules[module]}\n{line}\n", set(modules)))
    assert [fault.split(":")[0] for fault in broken] == [rule], broken


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("pipeline.cli", "import torch"), ("pipeline.report.tables", "import torch"),
        ("pipeline.stages.run", "from pipeline.adapters.spec import AdapterSpec\nfrom torch import nn"),
        ("pipeline.run_folder.paths", "from pipeline.distributed.world import World"),
    ],
)
def test_torch_where_none_may_be_is_noticed(module: str, line: str) -> None:
    modules = all_modules()
    assert not list(torch_faults(modules))
    assert any(module in fault for fault in torch_faults({**modules, module: f"{modules[module]}\n{line}\n"}))


def test_a_circle_is_noticed_also_of_types() -> None:
    modules = all_modules()
    line = "if TYPE_CHECKING:\n    from pipeline.adapters.attach import Adapters\n"
    assert circles({**modules, "pipeline.adapters.members": f"{modules['pipeline.adapters.members']}\n{line}"})


KINDS = {"ChoicePredictions", "CompletionPredictions", "RegressionPredictions"}
"""The kinds of prediction, which answer by their own methods."""
ASKING = {"isinstance", "issubclass", "hasattr", "getattr"}
KIND_ARRAYS = {name for kind in KINDS for name in getattr(predictions, kind).stored}


def questions_of_kind(source: str) -> list[str]:
    """Calls, and cases, that ask which kind of prediction something is: by its class, or by the arrays it has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        asks = isinstance(node, ast.Call) and ast.unparse(node.func) in ASKING
        inner = [part for argument in node.args for part in ast.walk(argument)] if asks else []
        classes = {part.id for part in inner if isinstance(part, ast.Name)}
        classes |= {part.attr for part in inner if isinstance(part, ast.Attribute)}
        arrays = {part.value for part in inner if isinstance(part, ast.Constant)}
        if isinstance(node, ast.MatchClass):
            classes = {ast.unparse(node.cls).rpartition(".")[2]}
        if classes & KINDS or arrays & KIND_ARRAYS:
            found.append(ast.unparse(node))
    return found


def test_nobody_asks_which_kind_of_prediction_it_is() -> None:
    assert {"log_probs", "token_log_probs", "offsets", "values"} == KIND_ARRAYS
    assert not [line for source in all_modules().values() for line in questions_of_kind(source)]


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(found, ChoicePredictions)", "isinstance(found, (int, predictions.RegressionPredictions))",
        "hasattr(cached[0], 'token_log_probs')", "getattr(found, 'values', None)",
        "match found:\n    case CompletionPredictions():\n        pass",
    ],
)
def test_a_question_of_kind_is_noticed(line: str) -> None:
    assert questions_of_kind(line)


def test_few_rooms_of_few_small_files() -> None:
    modules = all_modules()
    folders = Counter(
        str(path.parent.relative_to(ROOT)) for p in ("pipeline", "tune") for path in (ROOT / p).rglob("*.py")
    )
    assert folders["pipeline"] <= 9
    assert max(folders.values()) <= 17, folders.most_common(3)
    for module, source in modules.items():
        assert source.count("\n") <= 400, f"{module} has more than 400 lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{module}.{node.name} has {length} lines"


def test_the_tree_in_the_document_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("```")[1]
    rooms = re.split(r"\n(?=\s{0,4}[\w]+/ )", tree)  # each with its continuation lines
    words = {room.split("/")[0].strip(): set(re.findall(r"[\w.]+", room)) for room in rooms}
    for path in (path for package in ("pipeline", "tune") for path in (ROOT / package).rglob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            assert path.stem in words[path.parent.name], f"{path.relative_to(ROOT)} is missing in the tree"
