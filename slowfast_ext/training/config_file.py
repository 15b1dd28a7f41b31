"""Configuration files, read and never run: mmaction2's Python form, and JSON."""

from __future__ import annotations

import ast
import copy
import difflib
import json
import keyword
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The keys that a configuration file sets, those of its ``_base_`` files merged in.

    A Python file consists of assignments. Values are literals, ``dict(...)``, lists, tuples, arithmetic on numbers,
    joined lists, f-strings of plain names, and names assigned earlier (with ``[key]``); ``{{_base_.name}}`` is a name
    of a base file. Names that other assignments refer to are the file's variables; the other names are its keys. In a
    dictionary of a file that has bases, ``_delete_=True`` replaces the inherited dictionary instead of adding to it.

    Raises:
        FileNotFoundError: the file, or a base, does not exist.
        ValueError: anything else in it; the message names file and line.
    """
    keys, _ = _read(Path(path), ())
    return keys


def apply_overrides(config: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``config`` with ``a.b.c=value`` set for each override.

    A value is a Python literal, else text; ``true``, ``false`` and ``none`` count as literals in any case, ``a,b`` as a
    list. A number in the path is a position in a list. Missing dictionaries on the way are made.

    Raises:
        ValueError: no ``=``, or a path through something that is neither dictionary nor list.
    """
    config = _separate(config)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ValueError(f"--cfg-options: each option must be KEY=VALUE, got {text!r}")
        *parents, last = path.split(".")
        node: Any = config
        for name in parents:
            node = _child(node, name, path)
        if isinstance(node, list):
            node[_position(node, last, path)] = _override_value(value)
        elif isinstance(node, dict):
            node[last] = _override_value(value)
        else:
            raise ValueError(f"--cfg-options: {path} must lead through dictionaries and lists, got {node!r}")
    return config


def format_config(config: dict[str, Any]) -> str:
    """The configuration as a Python file that :func:`read_config` and mmaction2 read."""
    return "".join(f"{name} = {_format(value, '')}\n" for name, value in config.items())


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for an unknown name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a file and, for files built on it, all its names."""
    if not path.is_file():
        raise FileNotFoundError(f"config: path must be an existing file, got '{path}'")
    if path.resolve() in chain:
        raise ValueError(f"config: _base_ of '{path}' must not lead back to the file itself")
    if path.suffix not in (".py", ".json"):
        raise ValueError(f"config: path must end in .py or .json, got '{path}'")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values, variables, base_names = json.loads(text), set(), {}
            if not isinstance(values, dict):
                raise ValueError(f"config: '{path}' must hold one JSON object, got {type(values).__name__}")
            bases = values.pop("_base_", [])
        else:
            tree = ast.parse(text)
            bases = _bases_of(tree, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"config: '{path}' must be UTF-8 text, got other bytes at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"config: '{path}' must be JSON, got an error: {error}") from error
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"config: '{path}' must be Python, got an error: {error}") from error

    keys: dict[str, Any] = {}
    base_names = {}
    for base in [bases] if isinstance(bases, str) else bases:
        base_keys, names = _read(path.parent / base, (*chain, path.resolve()))
        if twice := keys.keys() & base_keys.keys():
            raise ValueError(f"config: the bases of '{path}' must set different keys, got {sorted(twice)} twice")
        keys.update(base_keys)
        base_names.update(names)
    if path.suffix == ".py":
        values, variables = _PythonFile(path, base_names).read(tree)
    names = {**base_names, **values}
    keys = _merge(keys, {name: value for name, value in values.items() if name not in variables}, str(path))
    return keys, names


def _bases_of(tree: ast.Module, path: Path) -> list[str] | str:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_base_":
            try:
                bases = ast.literal_eval(statement.value)
            except ValueError:
                bases = None
            if isinstance(bases, str) or (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
                return bases
            raise ValueError(f"config: _base_ of '{path}' must be a path or a list of paths")
    return []


class _PythonFile:
    """Evaluates the assignments of one file."""

    def __init__(self, path: Path, base_names: dict[str, Any]):
        self.path = path
        self.base_names = base_names
        self.values: dict[str, Any] = {}
        self.variables: set[str] = set()

    def read(self, tree: ast.Module) -> tuple[dict[str, Any], set[str]]:
        for statement in tree.body:
            match statement:
                case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                    pass
                case ast.Assign(targets=[ast.Name(id="_base_")]):
                    pass
                case ast.Assign(targets=[ast.Name(id=name)]):
                    self.values[name] = self.evaluate(statement.value)
                case _:
                    raise self.error(statement, "an assignment to a name")
        return self.values, self.variables

    def error(self, node: ast.AST, expected: str) -> ValueError:
        source = ast.unparse(node).splitlines()[0]
        return ValueError(f"config: '{self.path}' line {node.lineno} must be {expected}, got {source[:60]!r}")

    def evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=None | str() | int() | float()):
                return node.value
            case ast.Name(id=name):
                if name not in self.values:
                    raise self.error(node, f"a name assigned before{nearest(name, self.values)}")
                self.variables.add(name)
                return copy.deepcopy(self.values[name])
            case ast.Set(elts=[ast.Set(elts=[ast.Attribute() as reference])]):
                return self.base_value(reference)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                value = self.evaluate(operand)
                if isinstance(value, int | float):
                    return -value if isinstance(node.op, ast.USub) else value
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
                return self.arithmetic(node, self.evaluate(left), self.evaluate(right))
            case ast.List(elts=items):
                return [self.evaluate(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.evaluate(item) for item in items)
            case ast.Dict(keys=keys, values=values):
                return self.dictionary(node, [key and self.evaluate(key) for key in keys], values)
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                return self.dictionary(
                    node, [keyword.arg for keyword in keywords], [keyword.value for keyword in keywords]
                )
            case ast.Subscript(value=ast.Name() as container, slice=key):
                try:
                    return self.evaluate(container)[self.evaluate(key)]
                except (KeyError, IndexError, TypeError):
                    raise self.error(node, "an entry that is there") from None
            case ast.JoinedStr(values=parts):
                return "".join(str(self.text_part(part)) for part in parts)
        raise self.error(node, "a literal, dict(...), a list, a tuple or a name assigned before")

    def dictionary(self, node: ast.expr, keys: list[Any], values: list[ast.expr]) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key, item in zip(keys, values, strict=True):
            value = self.evaluate(item)
            if key is not None and isinstance(key, str | int):
                result[key] = value
            elif key is None and isinstance(value, dict):  # **other
                result.update(value)
            else:
                raise self.error(node, "a dictionary with names or whole numbers as keys")
        return result

    def arithmetic(self, node: ast.BinOp, left: Any, right: Any) -> Any:
        numbers = all(isinstance(value, int | float) for value in (left, right))
        joined = isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | list | tuple)
        if not numbers and not joined:
            raise self.error(node, "arithmetic on numbers, or joined text or lists")
        try:
            return _ARITHMETIC[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError):
            raise self.error(node, "a finite number") from None

    def text_part(self, part: ast.expr) -> Any:
        match part:
            case ast.Constant():
                return part.value
            case ast.FormattedValue(value=ast.Name() as name, conversion=-1, format_spec=None):
                return self.evaluate(name)
        raise self.error(part, "a plain {name} in an f-string")

    def base_value(self, reference: ast.Attribute) -> Any:
        steps: list[str] = []
        node: ast.expr = reference
        while isinstance(node, ast.Attribute):
            steps.insert(0, node.attr)
            node = node.value
        if not (isinstance(node, ast.Name) and node.id == "_base_"):
            raise self.error(reference, "{{_base_.name}}")
        value: Any = self.base_names
        for step in steps:
            if not isinstance(value, dict) or step not in value:
                raise self.error(reference, "a name that a base file sets")
            value = value[step]
        return copy.deepcopy(value)


def _merge(base: dict[str, Any], child: dict[str, Any], where: str) -> dict[str, Any]:
    """``child`` over ``base``: dictionaries entry by entry, everything else as a whole."""
    merged = dict(base)
    for name, value in child.items():
        inherited = base.get(name)
        if not isinstance(value, dict):
            merged[name] = value
        elif value.get("_delete_") or inherited is None:
            merged[name] = _merge({}, {key: item for key, item in value.items() if key != "_delete_"}, where)
        elif isinstance(inherited, dict):
            merged[name] = _merge(inherited, value, f"{where}: {name}")
        else:
            raise ValueError(
                f"config: {name} of '{where}' must have _delete_=True to replace {inherited!r} with a dictionary"
            )
    return merged


def _separate(value: Any) -> Any:
    """A copy in which no part is shared: an override must reach one place only."""
    if isinstance(value, dict):
        return {key: _separate(item) for key, item in value.items()}
    return type(value)(map(_separate, value)) if isinstance(value, list | tuple) else value


def _child(node: Any, name: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, name, path)]
    if isinstance(node, dict):
        if node.get(name) is None:
            node[name] = {}
        return node[name]
    raise ValueError(f"--cfg-options: {path} must lead through dictionaries and lists, got {node!r} before {name}")


def _position(node: list, name: str, path: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ValueError(f"--cfg-options: {path} must have a position from 0 to {len(node) - 1}, got {name!r}")
    return int(name)


def _override_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        bracketed = text[:1] == "[" and text[-1:] == "]"
        items = text[1:-1] if bracketed else text
        return [_override_value(item.strip()) for item in items.split(",")] if bracketed or "," in text else text
    # mmaction2 reads `a,b` as a list, `(a,b)` as a tuple.
    return list(value) if isinstance(value, tuple) and not text.startswith("(") else value


def _format(value: Any, indent: str) -> str:
    inner = f"{indent}    "
    if isinstance(value, dict):
        if not value:
            return "dict()"
        if all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in value):
            items = [f"{key}={_format(item, inner)}" for key, item in value.items()]
            opening, closing = "dict(", ")"
        else:
            items = [f"{key!r}: {_format(item, inner)}" for key, item in value.items()]
            opening, closing = "{", "}"
        line = f"{opening}{', '.join(items)}{closing}"
        if len(line) + len(indent) <= 100 and "\n" not in line:
            return line
        return f"{opening}\n{inner}" + f",\n{inner}".join(items) + f"{closing}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        items = f",\n{inner}".join(_format(item, inner) for item in value)
        opening, closing = "[]" if isinstance(value, list) else ("(", ",)")
        return f"{opening}\n{inner}{items}{closing}"
    return repr(value)
