"""Which backend runs an op, and why the others do not.

An op is a folder of `kernels`; each backend is one module in it with three functions:

    obstacle() -> str | None            why it cannot run on this machine at all, None where it can
    supports(*arguments) -> str | None  why it cannot run the op on these arguments
    run(*arguments)                     the op

A module is imported when it is first asked, and only where the packages that it imports are installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

FORCE_VARIABLE = "SPARSE_BITNET_BACKEND"


def forcing() -> str | None:
    """What keeps those from choosing who would choose between kernels by themselves; None where nothing does."""
    return f"{FORCE_VARIABLE} asks for a certain kernel" if os.environ.get(FORCE_VARIABLE) else None


class NoBackendError(RuntimeError, ValueError):
    """Nothing here can run an op on these arguments; a ValueError too, which commands tell in a line."""


@dataclass(frozen=True)
class Backend:
    """A backend's name, which is its module's name too, and the packages that this module imports at its head.

    remedy  how to get those packages, where `pip install` of their name is not the way
    """

    name: str
    needs: tuple[str, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class Operator:
    """An op by its package name, with its backends from the most to the least preferred."""

    package: str
    backends: tuple[Backend, ...]

    @property
    def name(self) -> str:
        return self.package.rpartition(".")[2]

    def run(self, *args: Any) -> Any:
        """The result of the first backend that supports these arguments."""
        return self.select(*args)(*args)

    def select(self, *args: Any) -> Callable[..., Any]:
        """The `run` of the first backend that supports these arguments.

        NoBackendError where none does, or where the one that SPARSE_BITNET_BACKEND names does not: a forced backend
        never falls back. ValueError where that name is unknown to the op.
        """
        forced = self.forced()
        refusals = []
        for backend in self.backends:
            if forced and backend.name != forced:
                continue
            reason = self.refusal(backend, *args)
            if reason is None:
                return _module(self.package, backend).run
            refusals.append(f"{backend.name}: {reason}")
        asked = f"{FORCE_VARIABLE}={forced}: " if forced else ""
        raise NoBackendError(f"{asked}no backend can run {self.name}: {'; '.join(refusals)}")

    def forced(self) -> str | None:
        """The backend that SPARSE_BITNET_BACKEND names, if it does; ValueError where the op has no such backend."""
        forced = os.environ.get(FORCE_VARIABLE) or None
        if forced and forced not in (backend.name for backend in self.backends):
            known = ", ".join(backend.name for backend in self.backends)
            raise ValueError(f"{FORCE_VARIABLE}={forced}: {self.name} has no such backend, it has {known}")
        return forced

    def explain(self, *args: Any) -> str:
        """A line a backend: whether it can run these arguments, and if not, why."""
        answers = ((backend, self.refusal(backend, *args)) for backend in self.backends)
        return "\n".join(f"{self.name}/{backend.name}: {reason or 'yes'}" for backend, reason in answers)

    def obstacle(self, backend: Backend) -> str | None:
        """Why `backend` cannot run on this machine, whatever the arguments; None where it can."""
        return _obstacle(self.package, backend)

    def refusal(self, backend: Backend, *args: Any) -> str | None:
        """Why `backend` cannot run these arguments; None where it can."""
        return self.obstacle(backend) or _module(self.package, backend).supports(*args)


@cache  # the machine does not change, and to ask it takes as long as a kernel
def _obstacle(package: str, backend: Backend) -> str | None:
    missing = [needed for needed in backend.needs if not _is_installed(needed)]
    if missing:
        return f"needs the package {missing[0]}, which is not installed{backend.remedy and ': ' + backend.remedy}"
    return _module(package, backend).obstacle()


def _is_installed(package: str) -> bool:
    above = package.rpartition(".")[0]
    return (not above or _is_installed(above)) and find_spec(package) is not None


@cache
def _module(package: str, backend: Backend) -> Any:
    return import_module(f"{package}.{backend.name}")
