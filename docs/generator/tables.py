"""Reference pages written from the code: commands, settings, kernels, formats."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from sparse_bitnet.cli.main import app
from sparse_bitnet.formats import FORMATS
from sparse_bitnet.kernels import OPERATORS
from sparse_bitnet.training.config import Settings, TrainConfig

PROGRAM = "sparse-bitnet"


@cache
def commands() -> dict[str, Any]:
    """Every command by its words, `eval ppl` for one, as typer has it."""
    return dict(_walk(typer.main.get_command(app), ()))


def command_reference() -> str:
    """A section for each command, with a table of its arguments and options."""
    return "\n\n".join(_command_section(words, command) for words, command in commands().items())


def settings_reference() -> str:
    """A table for each section of train.yaml; the words are those of the comments in that file."""
    comments = _comments()
    tables = [_settings_table("", TrainConfig, comments)]
    for section, field in TrainConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            told = (field.annotation.__doc__ or "").strip()
            heading = f"## {section}\n\n" + (f"{told}\n\n" if told and "!!!" not in told else "")
            tables.append(heading + _settings_table(section, field.annotation, comments))
    return "\n\n".join(tables)


def kernel_table() -> str:
    """Ops and their backends in the order in which these are asked."""
    rows = ["| op | backend | what it is |", "| --- | --- | --- |"]
    for operator in OPERATORS:
        for backend in operator.backends:
            told = _first_line(f"{operator.package}.{backend.name}")
            needs = f" Needs {', '.join(f'`{package}`' for package in backend.needs)}." if backend.needs else ""
            rows.append(f"| `{operator.name}` | `{backend.name}` | {_cell(told)}{needs} |")
    return "\n".join(rows)


def operator_table() -> str:
    """What each op does."""
    rows = ["| op | its contract |", "| --- | --- |"]
    rows += [f"| `{operator.name}` | {_cell(_first_line(operator.package))} |" for operator in OPERATORS]
    return "\n".join(rows)


def format_table() -> str:
    """Formats in the order in which `auto` tries them."""
    rows = ["| format | bits a weight | holds | bytes of a row of 1,536 |", "| --- | --- | --- | --- |"]
    for layout in FORMATS.values():
        rows.append(f"| `{layout.name}` | {layout.bits:g} | {layout.holds} | {layout.bytes_per_row(1536)} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (command_reference, settings_reference, kernel_table, operator_table, format_table)
}


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):  # typer's own kind of group
        for name, below in command.commands.items():
            yield from _walk(below, (*words, name))
    else:
        yield " ".join(words), command


def _command_section(words: str, command: Any) -> str:
    arguments = [one for one in command.params if not one.opts[0].startswith("-")]
    options = [one for one in command.params if one.opts[0].startswith("-") and one.opts != ["--help"]]
    usage = " ".join([PROGRAM, words, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])])
    section = [f"## {words}", _paragraphs(command.help), f"```text\n{usage}\n```"]
    if arguments or options:
        named = [(_argument(one), one) for one in arguments] + [(", ".join(one.opts), one) for one in options]
        rows = [f"| `{name}` | {_cell(one.help or '')} | {_default(one)} |" for name, one in named]
        section.append("\n".join(["| | | default |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(section)


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if getattr(parameter, "is_flag", False) or parameter.default in (None, "", False):
        return ""
    return f"`{parameter.default}`"


def _settings_table(section: str, settings: type[Settings], comments: dict[str, tuple[str, str]]) -> str:
    rows = ["| setting | `init` | default | |", "| --- | --- | --- | --- |"]
    for name, field in settings.model_fields.items():
        path = f"{section}.{name}" if section else name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            continue
        value, told = comments[path]
        default = "null" if field.default is None else _scalar(field.default)
        rows.append(f"| `{path}` | `{value}` | {'the same' if default == value else f'`{default}`'} | {_cell(told)} |")
    return "\n".join(rows)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value != round(value, 4):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _comments() -> dict[str, tuple[str, str]]:
    """`section.field` -> its value and comment in train.yaml."""
    found: dict[str, tuple[str, str]] = {}
    section = ""
    for line in files("sparse_bitnet.training").joinpath("train.yaml").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"( *)(\w+):\s*(.*?)\s*(?:# (.*))?", line)
        if match is None:
            continue
        indent, name, value, comment = match.groups()
        if not value:
            section = name
        else:
            found[f"{section}.{name}" if indent else name] = (value, comment or "")
    return found


def _first_line(module: str) -> str:
    """Of the module's docstring, read without importing it: it may need packages that are not here."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[")
