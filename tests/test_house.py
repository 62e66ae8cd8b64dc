"""The order of the house: who imports whom, and who prints. Commands and tests are imported by nobody."""

import ast
import graphlib

import pytest
from launch import ROOT

COMMANDS = {path.stem for path in ROOT.glob("*.py")} - {"reduced_sync_model"}
LIBRARIES = sorted((ROOT / "reduced_sync").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CODE = [*ROOT.glob("*.py"), *LIBRARIES, *(ROOT / "results").glob("*.py"), *ROOT.glob("*/*/prepare.py")]


# what a subpackage may import besides itself and train/; top-level modules import none
SUBPACKAGES = {"": set(), "train": set(), "compare": {"bench"}, "bench": set(), "dropping": {"hf"}, "hf": {"dropping"}}
# libraries that print: what a command says at its end, its help, its log on the terminal, and what happens meanwhile
PRINT = {"cli", "configurator", "distributed", "preparing", "train.recorder"}


def imported(path):
    """The modules that the file at `path` imports, with what is taken from a package as modules of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""  # none in `from . import x`
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_a_command(path):
    assert not imported(path) & COMMANDS


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_nobody_imports_a_test(path):
    """What two of them need stands in a file that is none."""
    tests = {path.stem for path in TESTS if path.stem.startswith("test_")}
    assert len(tests) > 10
    assert not {part for name in imported(path) for part in name.split(".")} & tests


def test_libraries_go_in_no_circle():
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in LIBRARIES if path.stem != "__init__"
    }
    assert len(names) > 10
    order = graphlib.TopologicalSorter({name: imported(path) & set(names) for name, path in names.items()})
    assert set(order.static_order()) == set(names)  # raises CycleError


@pytest.mark.parametrize("source", ["reduced_sync_model.py", "reduced_sync/old_keys.py"])
def test_the_plugin_reads_the_same_file(source):
    link = ROOT / "serving/vllm_reduced_sync" / source.split("/")[-1]
    assert link.is_symlink() and link.resolve() == ROOT / source


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_subpackages(path):
    subpackage = path.parent.name if path.parent.name in SUBPACKAGES else ""
    seen = {name.split(".")[1] for name in imported(path) if name.startswith("reduced_sync.")}
    assert seen & SUBPACKAGES.keys() <= SUBPACKAGES[subpackage] | ({subpackage, "train"} if subpackage else set())


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_a_library_prints_nothing(path):
    name = ".".join(path.relative_to(ROOT / "reduced_sync").with_suffix("").parts)
    calls = [node.func for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert name in PRINT or not any(isinstance(call, ast.Name) and call.id == "print" for call in calls)


def test_the_model_imports_nothing_of_ours():
    assert not {name for name in imported(ROOT / "reduced_sync_model.py") if name.startswith("reduced_sync")}


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_a_library_does_nothing_by_itself(path):
    """Its lines are definitions, assignments and imports."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert not isinstance(node, ast.If | ast.For | ast.With), f"line {node.lineno}"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno}"  # the docstring
