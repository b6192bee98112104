"""`sparse-bitnet train CONFIG.yaml [section.field=value ...]`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_bitnet.cli.options import STOPPED


def train(
    config: Annotated[Path, typer.Argument(help="Settings, as `sparse-bitnet init` writes them.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.field=value]...")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: from the newest whole checkpoint, if any; a checkpoint directory; never.")
    ] = "never",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings, the parameters and the memory; do not train.")
    ] = False,
) -> None:
    """Train a model, from scratch or from a checkpoint, and leave it in OUTPUT_DIR/model.

    SIGTERM, Ctrl-C: finishes the step, saves a checkpoint and ends with status 143, 130; go on with --resume auto.
    """
    from sparse_bitnet.training.config import load_config
    from sparse_bitnet.training.processes import failing_together, is_first_process, join_processes, leave_processes

    join_processes()
    with failing_together():
        settings = load_config(config, overrides or [])
    if dry_run:
        from sparse_bitnet.training.plan import describe_plan

        if is_first_process():
            print(describe_plan(settings))
        return
    from sparse_bitnet.training.run import train as run

    result = run(settings, resume)
    if is_first_process() and result.stopped_by is None:
        print(f"trained {result.steps} steps; the latent checkpoint is in {result.model_directory}")
    elif is_first_process() and result.stopped_by is not None:
        print(
            f"stopped by {result.stopped_by.name} after step {result.steps} of {settings.training.steps}: its "
            f"checkpoint is saved, {result.model_directory} is not written; go on with --resume auto"
        )
    leave_processes()
    if result.stopped_by is not None:
        raise typer.Exit(STOPPED + result.stopped_by)
