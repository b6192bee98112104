"""`sparse-bitnet`: one line and exit status 2 for a user's mistake, a traceback only for ours."""

from __future__ import annotations

import os
import sys

import typer

from sparse_bitnet.cli import (
    bench,
    convert,
    demo,
    doctor,
    eval,
    export,
    generate,
    import_model,
    init,
    inspect,
    report,
    serve,
    train,
)

DEBUG_VARIABLE = "SPARSE_BITNET_DEBUG"

app = typer.Typer(
    help="Language models with ternary, N:M sparse weights: train, pack, evaluate, run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("init")(init.init)
app.command("train")(train.train)
app.command("import")(import_model.import_model)
app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.add_typer(export.app, name="export")
app.add_typer(eval.app, name="eval")
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.add_typer(bench.app, name="bench")
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point. SPARSE_BITNET_DEBUG=1 shows the traceback of a user's mistake too."""
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
