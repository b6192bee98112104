"""A trainer that fails as a file plans it, in a module that a fresh process imports without loading torch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from experiments.settings import Run

PLAN = "plan.json"


class PlannedTrainer:
    """`plan.json` in its directory holds, by the key of a run, what its attempts do; those not planned succeed.

    Such a plan is the seconds an attempt takes and how it ends: "raise", "die", "succeed". Each attempt leaves a file.
    """

    def __init__(self, gpu: int, data: Path) -> None:
        self.gpu, self.data = gpu, data
        self.plan = json.loads((data / PLAN).read_text())

    def __call__(self, run: Run) -> dict[str, Any]:
        attempt = {"gpu": self.gpu, "pid": os.getpid(), "begin": time.time()}
        past = attempts(self.data, run)
        seconds, ending = (self.plan.get(run.key, [])[len(past) :] or [(0, "succeed")])[0]
        time.sleep(seconds)
        attempt["end"] = time.time()
        (self.data / f"{run.key}-{len(past)}").write_text(json.dumps(attempt))
        if ending == "raise":
            raise RuntimeError("CUDA error: an illegal instruction was encountered")
        if ending == "die":
            os._exit(3)
        return {"key": run.key, "diverged_at": 0, "tokens_per_second": 1.0, "seconds": 1.0}


def attempts(data: Path, run: Run) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(data.glob(f"{run.key}-*"))]
