"""The house keeps its shape: imports point up the list only, and importing costs nothing."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import silotune

SOURCE = Path(silotune.__file__).parent

# A file imports from its own room and from rooms of a lower rank, and from nothing else.
RANK = {
    "core": 0,
    "data": 1,
    "models": 1,
    "algorithms": 1,
    "privacy": 1,
    "compression": 1,
    "training": 2,
    "recipes": 3,
    "federation": 4,
    "runtime": 5,
    "results": 5,
    "workflows": 6,
    "deployment": 7,
    "cli": 8,
}
FRONT_DOOR = {"__init__", "__main__"}
TORCH_ONLY = ("core", "algorithms", "privacy", "compression")
HEAVY = {"transformers", "peft", "trl", "flwr", "datasets"}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [p for p in sorted(SOURCE.rglob("*.py")) if room_of(p) not in FRONT_DOOR]


@functools.cache  # six tests ask about each file
def imported(path: Path) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def test_every_file_is_in_a_room():
    assert {room_of(p) for p in modules()} == set(RANK)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_imports_from_its_own_room_and_from_rooms_of_a_lower_rank(path):
    own = room_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "silotune" and len(parts) > 1 and parts[1] in RANK and parts[1] != own:
            assert RANK[parts[1]] < RANK[own], f"{path.relative_to(SOURCE)} imports {name}"


def test_no_file_grows_past_400_lines():
    """Past that, a second idea has its own place."""
    long = {p.name for p in modules() if len(p.read_text(encoding="utf-8").splitlines()) > 400}
    assert not long


def test_every_folder_says_what_it_is_for():
    for folder in {path.parent for path in modules()}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert text, folder
        # a room also says what it does not know about; the command line is above all others
        if folder.parent == SOURCE and folder.name not in ("algorithms", "cli"):
            assert "not know" in text or "nothing about" in text, folder


def test_the_unit_tests_have_the_same_folders_as_the_package():
    unit = Path(__file__).parent
    for path in unit.rglob("test_*.py"):
        assert (SOURCE / path.relative_to(unit)).parent.is_dir(), path


@pytest.mark.parametrize("room", TORCH_ONLY)
def test_torch_only_rooms_import_no_model_library(room):
    for path in modules():
        if room_of(path) == room:
            assert not {name.split(".")[0] for name in imported(path)} & HEAVY, path


def test_algorithms_know_fedavg_and_no_other_algorithm():
    own = {path.stem for path in modules() if room_of(path) == "algorithms"}
    for path in modules():
        if room_of(path) != "algorithms" or path.stem == "__init__":
            continue
        used = {name.split(".")[2] for name in imported(path) if name.count(".") >= 2}
        assert used & own <= {"base", "factors", "fedavg", "products"}, path


def test_only_runtime_flower_imports_flower():
    door = SOURCE / "deployment" / "flower_app.py"  # Flower starts it, and it starts a whole run
    for path in modules():
        if path.parent != SOURCE / "runtime" / "flower" and path != door:
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


def test_rows_meet_a_loaded_model_through_one_function():
    """It refuses tokens that the model has no embedding for; a forward pass ends in an IndexError.

    The three others compare tokenizers, count tokens and try a few rows, without a forward pass.
    """
    callers = {p.name for p in modules() if ".prepare(" in p.read_text(encoding="utf-8")}
    assert callers == {"known_tokens.py", "server_work.py", "preview.py", "early_checks.py"}


def test_functions_of_the_main_loop_fit_one_screen():
    tree = ast.parse((SOURCE / "federation" / "rounds.py").read_text(encoding="utf-8"))
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run_rounds")
    assert loop.end_lineno is not None
    body_starts = loop.body[1].lineno  # after the docstring
    assert loop.end_lineno - body_starts <= 45
