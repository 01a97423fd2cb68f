"""The package's shape, read from its source: layers, imports, sizes, annotations."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import dblightning

PACKAGE = Path(dblightning.__file__).parent

#: layers from the top down; a package's name stands for all its modules that are not listed apart.
#: A module imports from its own layer and from those below it. A new module has to be listed here or in a package.
LAYERS: dict[str, str] = {
    "command line": "__main__ cli help_pages preflight command_tree quickstart",
    "faces": "studio serving preference_search",
    "callbacks": "callbacks",
    "lightning": "module run_state run_folder progress checkpointing checkpoint_files distributed loggers "
    "lightning_internals scoring storing learners manual_updates reward_gradients data evaluation.module "
    "trackio_logger",
    "evaluation": "evaluation sharing",
    "pipeline": "pipeline pipeline_call pipeline_files pipeline_inputs pipeline_lora preset shared_pipeline",
    "algorithm": "rollout sampling execution blend_step blending few_rows kept_outputs per_image methods draws search "
    "steering policy_gradient replay value batch_size average objectives training_settings "
    "rollout_sampler same_run window learner basis",
    "model": "backbone adapters solvers schedule ddim flow flow_solver gaussian_step ode noise prompt_cache "
    "gaussian_mixture",
    "rewards and miniature": "rewards miniature",
    "ground": "settings training_rules class_paths flat_settings weights arguments signatures annotations precision "
    "figures figure_text geneval_prompts random_state extras whole_files",
}
#: the layers that may import lightning
ABOVE_THE_LINE = ("command line", "callbacks", "lightning")
#: imports that point up, each inside a function: "importer -> imported", with the reason
UPWARD: dict[str, str] = {}

MAX_LINES = 400
MAX_ARGUMENTS = 20
#: argument lists that are another project's
FOREIGN_ARGUMENTS = {"pipeline.DiffusionBlendPipeline.__call__": "diffusers' pipelines, argument for argument"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    """Module name without the package's → its syntax tree; the package itself is "dblightning"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "dblightning"
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def source(name: str) -> list[str]:
    folder = PACKAGE if name == "dblightning" else PACKAGE.joinpath(*name.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return path.read_text(encoding="utf-8").splitlines()


def imported(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Dotted names that a tree imports, and whether inside a function; not those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((each.name, inside) for each in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((f"{child.module}.{each.name}", inside) for each in child.names)
        yield from imported(child, inside or isinstance(child, Function | ast.Lambda))


def own(dotted: str, modules: Mapping[str, object]) -> str | None:
    """The package's module that a dotted name stands in; None for other packages and the package itself."""
    top, _, name = dotted.partition(".")
    while top == "dblightning" and name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def arrows(trees: Mapping[str, ast.Module]) -> Iterator[tuple[str, str, bool]]:
    """Importer, imported, and whether the import is inside a function."""
    for name, tree in trees.items():
        for dotted, inside in imported(tree):
            target = own(dotted, trees)
            if target is not None:
                yield name, target, inside


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, in order; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (walk(each, [*path, name]) for each in sorted(graph.get(name, ())))), [])
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(graph))), [])


def layer(name: str) -> str | None:
    """The layer of a module: its own entry, else its package's."""
    while name:
        for title, names in LAYERS.items():
            if name in names.split():
                return title
        name = name.rpartition(".")[0]
    return None


def functions() -> Iterator[tuple[str, Function]]:
    """Every function of the package under its dotted name, nested ones too."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if isinstance(child, Function | ast.ClassDef) else name
            if isinstance(child, Function):
                yield inner, child
            yield from walk(child, inner)

    for name, tree in trees().items():
        yield from walk(tree, name)


def arguments(function: Function) -> list[ast.arg]:
    """Named arguments, without ``self`` and ``cls``."""
    given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [each for each in given if each.arg not in ("self", "cls")]


def body_lines(function: Function) -> int:
    """Lines of a function's body, its docstring left out."""
    first = 1 if ast.get_docstring(function, clean=False) is not None else 0
    body = function.body[first:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for importer, target, inside in arrows(trees()):
        if not inside:
            graph.setdefault(importer, set()).add(target)
    assert circle(graph) == []


def test_a_circle_is_found_and_a_diamond_is_not() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}) == []


def test_every_module_has_a_layer_and_every_layers_name_a_module() -> None:
    assert [name for name in trees() if name != "dblightning" and layer(name) is None] == []
    listed = [name for names in LAYERS.values() for name in names.split()]
    assert [name for name in listed if name not in trees()] == []
    assert len(listed) == len(set(listed))


def test_imports_point_down() -> None:
    order = list(LAYERS)
    upward = {
        f"{importer} -> {target}{' inside a function' if inside else ''}"
        for importer, target, inside in arrows(trees())
        if importer != "dblightning" and order.index(str(layer(target))) < order.index(str(layer(importer)))
    }
    assert upward == {f"{each} inside a function" for each in UPWARD}


def test_nothing_below_the_lightning_line_imports_lightning() -> None:
    found = {
        name
        for name, tree in trees().items()
        if layer(name) not in ABOVE_THE_LINE
        and any(dotted.split(".")[0] in ("lightning", "pytorch_lightning") for dotted, _ in imported(tree))
    }
    assert found == set()


def test_the_algorithm_and_the_model_run_without_lightning() -> None:
    """No package that they import brings it in."""
    names = [name for name in trees() if layer(name) in ("pipeline", "algorithm", "model", "ground")]
    code = f"import sys\nfor name in {names}: __import__('dblightning.' + name)\nprint('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_long_module_says_why() -> None:
    """A comment line above the imports: "# Longer than 400 lines: the reason"."""
    silent = {}
    for name, tree in trees().items():
        lines = source(name)
        start = next((node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)), len(lines))
        says = any(line.startswith(f"# Longer than {MAX_LINES} lines: ") for line in lines[:start])
        if len(lines) > MAX_LINES and not says:
            silent[name] = len(lines)
    assert silent == {}


def test_argument_lists_are_short() -> None:
    long = {name: len(arguments(function)) for name, function in functions()}
    for name, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                long[f"{name}.{node.name}"] = sum(
                    isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each.annotation)
                    for each in node.body
                )
    assert set(FOREIGN_ARGUMENTS) <= {name for name, number in long.items() if number > MAX_ARGUMENTS}
    assert {name: n for name, n in long.items() if n > MAX_ARGUMENTS and name not in FOREIGN_ARGUMENTS} == {}


def test_functions_are_short() -> None:
    lengths = sorted(body_lines(function) for _, function in functions())
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * len(lengths))] <= 25


@pytest.mark.parametrize("what", ["arguments", "returns"])
def test_public_functions_are_annotated(what: str) -> None:
    def complete(function: Function) -> bool:
        if what == "returns":
            return function.returns is not None
        star = [each for each in (function.args.vararg, function.args.kwarg) if each is not None]
        return all(each.annotation is not None for each in [*arguments(function), *star])

    public = {name: function for name, function in functions() if not function.name.startswith("_")}
    assert [name for name, function in public.items() if not complete(function)] == []
