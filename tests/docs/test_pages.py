"""What the pages tell their readers to type: all of it runs, in the order of the page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fenced import ROOT, blocks, make_small
from sparse_bitnet import convert
from sparse_bitnet.kernels.packed_linear import NATIVE, OPERATOR
from sparse_bitnet.training.config import load_config
from tables import PROGRAM, commands

DOCS = ROOT / "docs"
PAGES = {str(file.relative_to(DOCS)): file.read_text(encoding="utf-8") for file in sorted(DOCS.rglob("*.md"))}
TUTORIAL = "tutorial.md"
PRINTS_WITHOUT_GPU = "prints, with the native extension and without a GPU"
ASSIGNMENT = re.compile(r"[A-Z_]+=")


@pytest.fixture
def after_the_tutorial(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, documents: list[str]
) -> Callable[[Path], None]:
    """Lays out what the tutorial leaves, of a smaller model."""

    def lay_out(directory: Path) -> None:
        for name, texts in (("corpus", documents), ("valid", documents[:20])):
            (directory / name).mkdir()
            (directory / name / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
        latent = directory / "runs" / "sparse-bitnet" / "model"
        model = latent_model()
        model.save_pretrained(latent)
        tokenizer.save_pretrained(latent)
        convert(model).save_pretrained(directory / "packed")
        tokenizer.save_pretrained(directory / "packed")

    return lay_out


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if blocks(text, "sh", "python")])
def test_a_page_runs(
    page: str,
    command: Callable[..., Any],
    after_the_tutorial: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Word for word, in one directory; only the settings and the text of the tutorial are made small.

    A block of Python sees the names of those before it, and where a block that `prints` follows it prints just that.
    """
    if "import xllamacpp" in PAGES[page] and find_spec("xllamacpp") is None:
        pytest.skip("needs the package xllamacpp")
    if page != TUTORIAL:
        after_the_tutorial(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    names: dict[str, Any] = {}
    printed = ""
    for block in blocks(PAGES[page]):
        if block.language == "sh":
            for line in block.commands:
                _run(line, command, monkeypatch)
            if page == TUTORIAL and "cp " in block.code:
                _make_text_small()
        elif block.language == "python":
            capsys.readouterr()
            exec(compile(block.code, page, "exec"), names)
            printed = capsys.readouterr().out
        elif block.title == "prints" or (block.title == PRINTS_WITHOUT_GPU and _is_without_gpu()):
            assert printed == block.code


def _run(line: str, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of ours in this process, for speed; any other line by the shell."""
    words = shlex.split(line)
    variables = dict(word.split("=", 1) for word in takewhile(ASSIGNMENT.match, words))
    program, *arguments = words[len(variables) :]
    if program != PROGRAM:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        answer = command(*arguments)
    assert answer.code == 0, f"{line}\n{answer.out}\n{answer.err}"
    if arguments[0] == "init":
        make_small(Path(arguments[1]))


def _is_without_gpu() -> bool:
    return OPERATOR.obstacle(NATIVE) is None and not torch.cuda.is_available()


def _make_text_small() -> None:
    """Of the standard library a few files to train on, and the beginnings of those that are held out."""
    for file in sorted(Path("corpus").iterdir())[20:]:
        file.unlink()
    for file in Path("valid").iterdir():
        file.write_text(file.read_text(encoding="utf-8")[:10_000], encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_commands_that_are_not_run_have_the_options_and_settings_that_they_name(page: str) -> None:
    text = PAGES.get(page) or (ROOT / page).read_text(encoding="utf-8")
    for block in blocks(text, "console"):
        for line in block.commands:
            words = shlex.split(line)
            for start in (index + 1 for index, word in enumerate(words) if word in (PROGRAM, "sparse_bitnet")):
                _check(words[start:], line)


def _check(words: list[str], line: str) -> None:
    name = next((name for name in (" ".join(words[:2]), words[0]) if name in commands()), None)
    assert name is not None, f"{line}: no such command"
    known = {option for parameter in commands()[name].params for option in parameter.opts}
    assert [word for word in words if word.startswith("--") and word.partition("=")[0] not in known] == [], line
    if name == "train":
        load_config(None, [word for word in words if "=" in word and not word.startswith("-")])


def test_the_check_finds_what_is_not_there() -> None:
    _check(["bench", "train", "--pattern", "2:4"], "")
    with pytest.raises(AssertionError, match="no such command"):
        _check(["tran", "x.yaml"], "")
    with pytest.raises(AssertionError, match="--colour"):
        _check(["doctor", "--colour"], "sparse-bitnet doctor --colour")
    with pytest.raises(ValueError, match="unknown setting"):
        _check(["train", "x.yaml", "training.color=1"], "")


def test_the_tutorial_leaves_what_other_pages_take_up() -> None:
    told = " ".join(line for block in blocks(PAGES[TUTORIAL], "sh") for line in block.commands)
    assert all(
        f" {made}" in told for made in ("mkdir corpus valid", "runs/sparse-bitnet/model packed", "init train.yaml")
    )
