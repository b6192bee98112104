"""Which backend `Operator` selects, and its words where it selects none: real backend modules, written for the test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from sparse_bitnet.kernels import OPERATORS
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE, Backend, Operator

WORKS = """
def obstacle(): return None
def supports(x): return None
def run(x): return (__name__.rpartition(".")[2], x)
"""
BLOCKED = WORKS.replace("obstacle(): return None", 'obstacle(): return "no such device"').replace(
    "supports(x): return None", 'supports(x): raise AssertionError("asked although it cannot run here")'
)
ODD_ONLY = WORKS.replace("supports(x): return None", 'supports(x): return None if x % 2 else f"{x} is even"')
NEEDY = "import package_that_nobody_has\n" + WORKS

NUMBERS = count()

WriteOperator = Callable[..., Operator]


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteOperator:
    """Writes a package of backend modules, most preferred first, and gives the operator over it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(needs: dict[str, tuple[str, ...]] | None = None, **sources: str) -> Operator:
        package = tmp_path / f"some_op_{next(NUMBERS)}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        for name, source in sources.items():
            (package / f"{name}.py").write_text(source)
        return Operator(package.name, tuple(Backend(name, (needs or {}).get(name, ())) for name in sources))

    return write


def imported(operator: Operator, backend: str) -> bool:
    return f"{operator.package}.{backend}" in sys.modules


def test_takes_the_first_backend_that_can(operator: WriteOperator) -> None:
    op = operator(fast=WORKS, reference=WORKS)
    assert op.run(3) == ("fast", 3)
    assert op.select(3)(4) == ("fast", 4)
    assert not imported(op, "reference")


def test_passes_over_a_backend_that_cannot_run_on_the_machine(operator: WriteOperator) -> None:
    assert operator(fast=BLOCKED, reference=WORKS).run(3) == ("reference", 3)


def test_passes_over_a_backend_that_refuses_the_arguments(operator: WriteOperator) -> None:
    op = operator(fast=ODD_ONLY, reference=WORKS)
    assert op.run(3) == ("fast", 3)
    assert op.run(4) == ("reference", 4)


def test_never_imports_a_backend_whose_package_is_missing(operator: WriteOperator) -> None:
    op = operator(fast=NEEDY, reference=WORKS, needs={"fast": ("json", "package_that_nobody_has")})
    assert op.run(1) == ("reference", 1)
    assert "needs the package package_that_nobody_has, which is not installed" in op.explain(1)
    assert not imported(op, "fast")


def test_imports_a_backend_whose_packages_are_there(operator: WriteOperator) -> None:
    assert operator(fast="import json\n" + WORKS, needs={"fast": ("json",)}).run(1) == ("fast", 1)


def test_lets_a_broken_backend_speak_for_itself(operator: WriteOperator) -> None:
    op = operator(fast=NEEDY, reference=WORKS)
    with pytest.raises(ModuleNotFoundError, match="package_that_nobody_has"):
        op.run(1)


def test_says_every_reason_where_none_can(operator: WriteOperator) -> None:
    op = operator(first=BLOCKED, second=ODD_ONLY)
    with pytest.raises(RuntimeError) as refusal:
        op.run(4)
    assert str(refusal.value) == f"no backend can run {op.name}: first: no such device; second: 4 is even"


def test_explains_each_backend_in_a_line(operator: WriteOperator) -> None:
    op = operator(first=BLOCKED, second=ODD_ONLY, third=WORKS)
    assert op.explain(4).splitlines() == [
        f"{op.name}/first: no such device",
        f"{op.name}/second: 4 is even",
        f"{op.name}/third: yes",
    ]


def test_obstacle_is_that_of_the_machine_alone(operator: WriteOperator) -> None:
    op = operator(first=BLOCKED, second=ODD_ONLY)
    assert [op.obstacle(backend) for backend in op.backends] == ["no such device", None]


def test_forced_backend_runs_although_another_comes_first(
    operator: WriteOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = operator(fast=WORKS, reference=WORKS)
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert op.run(3) == ("reference", 3)


@pytest.mark.parametrize(("name", "reason"), [("odd", "4 is even"), ("gpu", "no such device")])
def test_forced_backend_that_refuses_raises_and_never_falls_back(
    operator: WriteOperator, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    op = operator(gpu=BLOCKED, odd=ODD_ONLY, reference=WORKS)
    monkeypatch.setenv(FORCE_VARIABLE, name)
    with pytest.raises(RuntimeError) as refusal:
        op.run(4)
    assert str(refusal.value) == f"{FORCE_VARIABLE}={name}: no backend can run {op.name}: {name}: {reason}"


def test_forced_backend_whose_package_is_missing_raises(
    operator: WriteOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = operator(fast=NEEDY, reference=WORKS, needs={"fast": ("package_that_nobody_has",)})
    monkeypatch.setenv(FORCE_VARIABLE, "fast")
    with pytest.raises(RuntimeError, match="fast: needs the package package_that_nobody_has"):
        op.run(1)


def test_forced_name_that_is_unknown_is_refused_with_those_that_exist(
    operator: WriteOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = operator(fast=WORKS, reference=WORKS)
    monkeypatch.setenv(FORCE_VARIABLE, "fats")
    with pytest.raises(ValueError, match=f"{FORCE_VARIABLE}=fats: {op.name} has no such backend, it has fast, referen"):
        op.run(1)


def test_empty_variable_forces_nothing(operator: WriteOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "")
    assert operator(fast=WORKS, reference=WORKS).run(3) == ("fast", 3)


def test_forcing_a_backend_imports_no_other(operator: WriteOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    op = operator(fast="raise ImportError('a driver is too old')", reference=WORKS)
    monkeypatch.setenv(FORCE_VARIABLE, "reference")
    assert op.run(3) == ("reference", 3)
    assert not imported(op, "fast")


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
def test_every_op_of_the_package_ends_with_a_reference_that_always_runs(op: Operator) -> None:
    assert op.backends[-1].name == "reference"
    assert op.obstacle(op.backends[-1]) is None
