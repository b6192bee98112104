"""What mkdocs calls while it builds the site: generated parts of pages, formulas, the notebook as a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

from figures import FIGURES
from tables import TABLES

NOTEBOOK = Path("notebooks/one-weight.ipynb")
GENERATED = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """A ```math block becomes MathML, which browsers draw themselves."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": formula})
    return config


def on_files(files: Files, config: Any) -> Files:
    """The notebook, with the outputs that are in it, as a page and its pictures."""
    body, resources = MarkdownExporter().from_filename(str(Path(config.docs_dir) / NOTEBOOK))
    files.append(File.generated(config, NOTEBOOK.with_suffix(".md").as_posix(), content=body))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, (NOTEBOOK.parent / name).as_posix(), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lines `<!-- generated: NAME -->` become figures or tables; links to the notebook lead to its page."""
    markdown = markdown.replace(f"{NOTEBOOK.name})", f"{NOTEBOOK.with_suffix('.md').name})")
    return GENERATED.sub(lambda match: (FIGURES | TABLES)[match[1]](), markdown)


def formula(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """LaTeX, one formula a line -> MathML."""
    lines = [line for line in source.splitlines() if line.strip()]
    return f'<div class="{css_class}">{"".join(convert(line, display="block") for line in lines)}</div>'
