"""Result files: one JSON object a run, found again by the settings of the run."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from experiments.settings import Run
from sparse_bitnet.checkpoint.directory import write_text

Result = dict[str, Any]


class Results:
    """The results below a directory, by the key of their settings."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.found: dict[str, Result] = {}
        for file in sorted(self.directory.glob("*.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            self.found[result["key"]] = result

    def of(self, run: Run) -> Result | None:
        return self.found.get(run.key)

    def add(self, run: Run, result: Result) -> Path:
        """Write the file of a finished run, whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / f"{run.name}.json"
        write_text(file, json.dumps(result) + "\n")
        self.found[run.key] = result
        return file

    def perplexity(self, run: Run, split: str = "test") -> float | None:
        """Of a finished run; infinite where it diverged, None where it is not run yet."""
        result = self.of(run)
        if result is None:
            return None
        return float("inf") if result["diverged_at"] is not None else float(result["perplexity"][split])

    def passes(self, tokens: int) -> str:
        """How often a run of so many tokens reads the text that these were trained on; "?" where there are none."""
        read = [result["corpus"]["tokens"]["train"] for result in self.found.values()]
        return f"{tokens / read[0]:.0f}" if read else "?"

    def pack(self, archive: Path, keys: list[str]) -> None:
        """Write the files of some results into one .tar.xz, to be unpacked in `directory` elsewhere."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
            for file in sorted(self.directory.glob("*.json")):
                if file.stem.rpartition("-")[2] in keys:
                    tar.add(file, file.name)
        staging = archive.with_name(f".{archive.name}")
        staging.write_bytes(buffer.getvalue())
        staging.replace(archive)
