"""The house keeps its shape: imports point up the list only, and importing costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import silotune

SOURCE = Path(silotune.__file__).parent

# Top to bottom; a file may import from above itself, never from below. A folder is one place.
ORDER = [
    "errors",
    "types",
    "tree",
    "algorithm",
    "seeds",
    "stats",
    "wording",
    "divergence",
    "tracks",
    "rows",
    "tables",
    "labelled",
    "partition",
    "foreign_partition",
    "algorithms",
    "privacy",
    "gguf_llama",
    "gguf_write",
    "sources",
    "devices",
    "allocator",
    "heads",
    "quantization",
    "adapters",
    "models",
    "files",
    "reading",
    "data",
    "canary_rows",
    "duplicates",
    "templates",
    "tasks",
    "train",
    "row_check",
    "server",
    "evaluate",
    "generate",
    "quality",
    "suites",
    "overview",
    "algorithm_config",
    "recipe_sections",
    "sampling",
    "grid",
    "config",
    "recipe_contradictions",
    "recipe_mistakes",
    "recipe_parse",
    "arm_recipes",
    "disk",
    "memory",
    "consortium",
    "client_config",
    "ledger",
    "outbound",
    "own_privacy",
    "metrics",
    "store",
    "promise",
    "privacy_statement",
    "budget",
    "progress",
    "tracking",
    "report",
    "verdicts",
    "card",
    "ranking",
    "svg",
    "charts",
    "page",
    "comparison",
    "comparison_verdicts",
    "comparison_card",
    "comparison_page",
    "export_card",
    "export",
    "pushing",
    "chatting",
    "recipe_model",
    "finished",
    "teaching",
    "client",
    "alone",
    "parts",
    "acceptance",
    "round_rows",
    "rounds",
    "runtime",
    "checking",
    "membership",
    "previewing",
    "shapes",
    "sizing",
    "measuring",
    "fitting",
    "planning",
    "predicted",
    "provenance",
    "launch",
    "deployment",
    "audit_result",
    "auditing",
    "bench",
    "arms",
    "trials",
    "searching",
    "sweep_worker",
    "sweep_page",
    "sweeping",
    "exam",
    "chat_page",
    "cli",
    "__main__",
]
TORCH_ONLY = ("algorithms", "privacy", "types", "tree", "seeds", "sampling", "errors")
HEAVY = {"transformers", "peft", "trl", "flwr", "datasets"}


def place(path: Path) -> str:
    inside = path.relative_to(SOURCE)
    return inside.parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_file_of_the_package_has_a_place_in_the_order():
    assert {place(p) for p in modules()} == set(ORDER)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_up_the_list_only(path):
    own = ORDER.index(place(path))
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "silotune" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= own, f"{path.name} imports {name} from below itself"


@pytest.mark.parametrize("folder", TORCH_ONLY)
def test_torch_only_parts_import_no_model_library(folder):
    for path in modules():
        if place(path) == folder:
            assert not {name.split(".")[0] for name in imported(path)} & HEAVY, path


def test_only_the_runtime_folder_may_import_flower():
    door = SOURCE / "deployment" / "flower_app.py"  # Flower starts it, and it starts a whole run
    for path in modules():
        if place(path) != "runtime" and path != door:
            assert "flwr" not in {name.split(".")[0] for name in imported(path)}, path


def test_importing_the_front_door_loads_no_torch():
    code = "import sys, silotune; print('torch' in sys.modules, len(dir(silotune)) > 0)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "True"]


def test_public_names_are_sorted_and_all_resolve():
    assert list(silotune.__all__) == sorted(silotune.__all__)
    for name in silotune.__all__:
        assert getattr(silotune, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = silotune.nonsense


def test_nothing_in_the_package_pickles():
    for path in modules():
        assert not imported(path) & {"pickle", "dill", "joblib", "torch.load", "torch.save"}, path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path


def test_functions_of_the_main_loop_fit_one_screen():
    tree = ast.parse((SOURCE / "rounds.py").read_text(encoding="utf-8"))
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run_rounds")
    assert loop.end_lineno is not None
    body_starts = loop.body[1].lineno  # after the docstring
    assert loop.end_lineno - body_starts <= 45
