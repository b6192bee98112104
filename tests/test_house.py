"""The package as a whole: lean imports, import contracts, and a README whose tree and commands are true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fenced import ROOT, blocks, make_small

README = (ROOT / "README.md").read_text(encoding="utf-8")


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in answer.stdout.split()}


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    assert not {"torch", "transformers", "datasets", "typer", "pydantic"} & imported_by("import sparse_bitnet")


def test_the_core_needs_torch_alone() -> None:
    loaded = imported_by("from sparse_bitnet import prepare, convert, summary, Recipe")
    assert "torch" in loaded
    assert not {"transformers", "safetensors", "datasets", "typer", "rich", "pydantic", "yaml", "triton"} & loaded


def test_importing_the_core_touches_no_cuda() -> None:
    code = "import sparse_bitnet.nn.swap, torch; print(torch.cuda.is_initialized())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_the_public_names_are_there() -> None:
    import sparse_bitnet

    assert all(getattr(sparse_bitnet, name) is not None for name in sparse_bitnet.__all__)
    assert set(sparse_bitnet.__all__) <= set(dir(sparse_bitnet))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparse_bitnet.nothing


def test_the_version_is_one() -> None:
    import sparse_bitnet

    assert f'version = "{sparse_bitnet.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {sparse_bitnet.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_files_stay_short_and_rooms_have_names() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        limit = 500 if "kernels" in path.parts else 300
        assert len(path.read_text().splitlines()) <= limit, path
    for path in (ROOT / "csrc").iterdir():
        assert len(path.read_text().splitlines()) <= 500, path
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in (ROOT / "src").rglob("*")}


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    tree = next(block.code for block in blocks(README, "text") if "src/sparse_bitnet/" in block.code)
    named: set[Path] = set()
    parents: list[tuple[int, Path]] = []
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        parents = [(depth, path) for depth, path in parents if depth < indent]
        path = (parents[-1][1] if parents else ROOT) / name
        named.add(path)
        parents.append((indent, path))
    assert [path for path in named if not path.exists()] == []
    package = ROOT / "src" / "sparse_bitnet"
    rooms = {path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - named == {package / "__init__.py", package / "__main__.py"}


def test_the_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_commands_of_the_readme_run(tmp_path: Path, documents: list[str]) -> None:
    """Word for word, in order, in one directory; only the settings are made small once `init` has written them."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    lines = [line for block in blocks(README, "sh") for line in block.commands]
    commands = [line for line in lines if line.startswith("sparse-bitnet ")]
    assert {command.split()[1] for command in commands} >= {
        "init", "train", "convert", "inspect", "eval", "generate", "doctor",
    }  # fmt: skip
    for command in commands:
        if command.startswith("sparse-bitnet demo"):
            continue  # tests/cli runs it, whole
        answer = subprocess.run(
            command.replace("sparse-bitnet", f"{sys.executable} -m sparse_bitnet", 1),
            shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
        if command.startswith("sparse-bitnet init"):
            make_small(tmp_path / "train.yaml")


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    for block in blocks(README, "python"):
        answer = subprocess.run(
            [sys.executable, "-c", block.code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
