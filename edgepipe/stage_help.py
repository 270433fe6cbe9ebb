"""Describe stages for `edgepipe stages`: the first line of the file, and the comment beside each option."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys

from edgepipe.recipe import find_stage, list_stages


def describe_stages() -> list[dict[str, str]]:
    """Return name and one-line summary of every stage."""
    found = []
    for name in list_stages():
        documentation = sys.modules[find_stage(name).__module__].__doc__ or ""
        found.append({"name": name, "summary": documentation.partition(": ")[2].partition("\n")[0]})
    return found


def stage_options_help(name: str) -> list[dict[str, str]]:
    """Return name, default and meaning of every option of a stage; the meaning is the comment beside the field."""
    kind = find_stage(name)
    lines = inspect.getsource(sys.modules[kind.__module__]).splitlines()
    tree = ast.parse("\n".join(lines))
    owner = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
    comments = {
        node.target.id: _comment(lines, node)
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return [
        {"name": f.name.rstrip("_"), "default": _toml(f.default), "meaning": comments[f.name]}
        for f in dataclasses.fields(kind)
    ]


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    after = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
    found = re.search(r"#\s*(.*)", after)
    return found.group(1).strip() if found else ""


def _toml(value: object) -> str:
    """Write a default as it would stand in a recipe."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
