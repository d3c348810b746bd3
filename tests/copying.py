"""Cuts pieces out of the scripts, as a reader does who copies them into another project."""

import ast
import builtins
import dis
import re
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = {path.stem for path in ROOT.glob("*.py")}


def pieces():
    """The table of tests/README.md of pieces: {title: {script: [names]}}. A cell reads `script.py`: `name`, `name`; `other.py`: ..."""
    section = (
        (ROOT / "tests" / "README.md").read_text().split("## Copying pieces")[1].split("\n## ")[0]
    )
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \|$", section, re.MULTILINE)
    return {
        title: {
            names[0]: names[1:]
            for part in cell.split(";")
            if (names := re.findall(r"`([^`]+)`", part))
        }
        for title, cell in rows
    }


def bound_names(node):
    """The names that a statement at the top level of a script defines; of a call, the name that it calls."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign):
        return {
            name.id
            for target in node.targets
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return {name.id for name in ast.walk(node.value.func) if isinstance(name, ast.Name)}
    return set()


def used_names(node):
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def cut(script, names):
    """The source of the named definitions and calls of a script, in its order, after the imports of other packages that they
    use. Calls with arguments that were not copied are left out."""
    text, names = (ROOT / script).read_text(), set(names)
    nodes = ast.parse(text).body
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = [node for node in imports if getattr(node, "module", None) not in OWN]
    known = names.union(*map(bound_names, imports))
    chosen = [node for node in nodes if node not in imports and bound_names(node) & names]
    chosen = [
        node for node in chosen if not isinstance(node, ast.Expr) or used_names(node) <= known
    ]
    missing = names.difference(*map(bound_names, chosen))
    assert not missing, f"{script} has no {sorted(missing)}"
    used = set().union(*map(used_names, chosen))
    lines = text.splitlines(keepends=True)
    first = lambda node: min(
        [node.lineno, *(line.lineno for line in getattr(node, "decorator_list", []))]
    )
    kept = [node for node in imports if bound_names(node) & used] + chosen
    return "\n".join("".join(lines[first(node) - 1 : node.end_lineno]) for node in kept)


def globals_of(code):
    """Every global name that a code object reads, functions inside it included."""
    found = {
        step.argval
        for step in dis.get_instructions(code)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return found.union(
        *(globals_of(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))
    )


def paste(title):
    """A module made of nothing but the named piece. AssertionError if it reads a name that was not copied along."""
    source = "\n".join(cut(script, names) for script, names in pieces()[title].items())
    module = types.ModuleType("pasted")
    code = compile(source, f"<{title}>", "exec")
    exec(code, module.__dict__)
    strange = (
        globals_of(code) - set(vars(module)) - set(dir(builtins)) - {"__name__", "__annotations__"}
    )
    assert not strange, f"{title}: {sorted(strange)} must be copied too"
    return module
