"""Owns the commands, their options and how errors reach the user; torch and transformers load inside the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from progtuning_ds import __version__
from progtuning_ds.errors import ConfigError
from progtuning_ds.train.outcome import OutOfMemoryEndError
from progtuning_ds.train.quiet import quiet_bitsandbytes

app = typer.Typer(
    name="progtuning",
    help="Fine-tune Transformers in stages: low blocks freeze as training goes on, and their memory is released.",
    epilog="Start with:  progtuning plan --model PATH_OR_ID --epochs 3",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Newer typers bring their own copy of click; the base of BadParameter is UsageError in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_FIT = "Fit a budget"
_PLAN_EXAMPLES = """\
[bold]Examples[/bold]

  progtuning plan --model bert-base-uncased --epochs 3

  progtuning plan --model ./llama/config.json --epochs 2 --stages 4 --embeddings never

  progtuning plan --model ./my-model --epochs 3 --stage-lengths 1,0.5,1.5 --json

  progtuning plan --model ./llama --gpus 4 --memory 24GB --seq-len 1024 --global-batch 64 --output planned
"""

_PROFILE_EXAMPLES = """\
[bold]Examples[/bold]

  progtuning profile --config my.yaml

  deepspeed --num_gpus 4 --module progtuning_ds.cli profile --config my.yaml --json
"""

_PROBE_EXAMPLES = """\
[bold]Examples[/bold]

  progtuning probe --config my.yaml --steps 200 --output probe/

  progtuning probe --config my.yaml --fast

  deepspeed --num_gpus 4 --module progtuning_ds.cli probe --config my.yaml --output probe/
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bad input gives one line on stderr and 2, lack of memory 6.

    Args:
        arguments: words after the program name; those of the process when `None`.
    """
    code = 2
    quiet_bitsandbytes()
    try:
        result = app(args=arguments if arguments is None else list(arguments), standalone_mode=False)
    except ConfigError as error:
        message = str(error)
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
    except typer.Abort:
        message = "stopped"
    except OutOfMemoryEndError as error:
        message, code = str(error), error.code
    else:
        return result if isinstance(result, int) else 0
    print("progtuning: error:", " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return code


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"progtuning {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("plan", epilog=_PLAN_EXAMPLES)
def _plan(
    model: Annotated[
        str, typer.Option(help="Folder with a config.json, the file itself, or a hub id. No weights are read.")
    ],
    epochs: Annotated[
        str | None,
        typer.Option(
            help="Length of the run in epochs; fractions such as 2.5 are fine.",
            show_default="3 with --gpus, else required",
        ),
    ] = None,
    stages: Annotated[
        int | None, typer.Option(help="Number of stages T.", show_default="one per epoch, or per stage length")
    ] = None,
    embeddings: Annotated[
        str, typer.Option(help="When embeddings train: always (as in the paper), first_stage or never.")
    ] = "always",
    stage_lengths: Annotated[
        str | None,
        typer.Option(help="Length of every stage, such as 1,0.5,1.5.", show_default="equal stages"),
    ] = None,
    length_unit: Annotated[str, typer.Option(help="Unit of the stage lengths: epochs or fractions.")] = "epochs",
    head: Annotated[
        str | None,
        typer.Option(
            help="Task head to count: sequence-classification, question-answering, token-classification, causal-lm, "
            "masked-lm, seq2seq-lm or image-classification.",
            show_default="that of the config's architecture, else sequence-classification",
        ),
    ] = None,
    num_labels: Annotated[
        int | None, typer.Option(help="Classes of a classification head.", show_default="the config's, usually 2")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="Path of the module list that holds the blocks.", show_default="found")
    ] = None,
    always_train: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of parameter names that train in every stage, such as '*LayerNorm*'; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    gpus: Annotated[int | None, typer.Option(help="GPUs to fit the run on, 1 to 1024.", rich_help_panel=_FIT)] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of each GPU, such as 24GB (10^9) or 80GiB (2^30).", rich_help_panel=_FIT)
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens per row.", show_default="512, or what the model can read", rich_help_panel=_FIT),
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(help="Rows per optimizer step.", show_default="32, or one per GPU", rich_help_panel=_FIT),
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16, fp16 or fp32.", rich_help_panel=_FIT)] = "bf16",
    attention: Annotated[str, typer.Option(help="eager, sdpa or flash.", rich_help_panel=_FIT)] = "sdpa",
    kernel: Annotated[
        str, typer.Option(help="Optimizer step: deepspeed, fused, or any of them.", rich_help_panel=_FIT)
    ] = "any",
    on_freeze: Annotated[
        str,
        typer.Option(help="Linear layers of frozen blocks: keep, or quantize to int8 or nf4.", rich_help_panel=_FIT),
    ] = "keep",
    host_memory: Annotated[
        str | None,
        typer.Option(help="Host memory per GPU, for offload.", show_default="no limit", rich_help_panel=_FIT),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(help="Of each GPU, for what is no tensor.", show_default="1GiB + 5%", rich_help_panel=_FIT),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for run.yaml, deepspeed.json, plan.json and memory.png.", rich_help_panel=_FIT),
    ] = None,
) -> int:
    """Show which blocks train in which stage, how many parameters each stage updates, and what the run saves.

    With --gpus and --memory, also find the cheapest configuration that fits every stage; exit code 1 if none does.

    Works from a config.json alone: the model is built without weights, in seconds even at 70B parameters.
    """
    from progtuning_ds.cli.plan import PlanRequest, make_report, print_json, print_table

    if (gpus is None) != (memory is None):
        given, missing = ("--gpus", "--memory") if memory is None else ("--memory", "--gpus")
        raise ConfigError(f"{missing} must be given together with {given}, such as --gpus 4 --memory 24GB")
    if gpus is None and output is not None:
        raise ConfigError("--output needs --gpus and --memory, such as --gpus 4 --memory 24GB")
    if epochs is None and gpus is None:
        raise ConfigError("Missing option '--epochs'.")
    asked = PlanRequest(
        model=model,
        epochs=epochs or "3",
        stages=stages,
        embeddings=embeddings,
        stage_lengths=stage_lengths,
        length_unit=length_unit,
        head=head,
        num_labels=num_labels,
        blocks=blocks,
        always_train=tuple(always_train or ()),
    )
    report = make_report(asked)
    if gpus is None or memory is None:
        (print_json if as_json else print_table)(report)
        return 0
    from progtuning_ds.cli.fit import FitRequest, make_fit
    from progtuning_ds.cli.fit_show import fit_content, print_fit

    fit = make_fit(
        report,
        FitRequest(gpus, memory, seq_len, global_batch, precision, attention, host_memory, reserve, kernel, on_freeze),
    )
    if as_json:
        typer.echo(json.dumps(fit_content(fit), indent=2))
    else:
        print_table(report)
        print_fit(fit)
    if output is not None:
        from progtuning_ds.cli.fit_files import write_fit

        written = write_fit(fit, asked, output)
        if not as_json:
            typer.echo(f"Written: {', '.join(str(path) for path in written)}")
    return 0 if fit.outcome.proposal else 1


@app.command("paper")
def _paper(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the paper's counts of updated parameters beside those computed here, and say where they differ."""
    from progtuning_ds.cli.paper import paper_rows, show_paper

    show_paper(paper_rows(), as_json=as_json)


@app.command("profile", epilog=_PROFILE_EXAMPLES)
def _profile(
    config: Annotated[str, typer.Option(help="Run configuration, as for training.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.field=value", help="Overrides of the file.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps per stage.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for profile.json and snapshots.")] = None,
    snapshot: Annotated[bool, typer.Option(help="Write a PyTorch memory snapshot per stage (CUDA).")] = False,
) -> None:
    """Run a few steps of every stage on the longest rows and print predicted beside measured memory.

    Nothing is trained through or saved. Under a launcher it profiles all ranks and shows the first.
    """
    from progtuning_ds.cli.profile import profile

    profile(config, tuple(overrides or ()), steps=steps, as_json=as_json, output=output, snapshot=snapshot)


@app.command("probe", epilog=_PROBE_EXAMPLES)
def _probe(
    config: Annotated[str, typer.Option(help="Run configuration, as for training.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="section.field=value", help="Overrides of the file.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps for each block.", show_default="those of the run")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Estimate by gradients in one pass, without training.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for probe.json and probe.png.")] = None,
) -> None:
    """Show what each block contributes: train embeddings, head and one block at a time, as in the paper's first figure.

    Nothing is saved of the models. Under a launcher all ranks take part and the first one speaks.
    """
    from progtuning_ds.cli.probe import probe

    probe(config, tuple(overrides or ()), steps=steps, fast=fast, as_json=as_json, output=output)
