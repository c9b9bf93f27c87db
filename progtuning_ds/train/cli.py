"""The command line of the training program: arguments, overrides, help, and how errors end. No torch, no deepspeed."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from progtuning_ds.config import RunConfig, load_run_config, reference
from progtuning_ds.config.files import shipped_names
from progtuning_ds.errors import CheckpointError, ConfigError, did_you_mean
from progtuning_ds.train.outcome import CHECKPOINT, DONE, EXPECTED, USER_ERROR, OutOfMemoryEndError, RunEndError
from progtuning_ds.train.quiet import quiet_libraries
from progtuning_ds.train.run_dir import NEVER, check_run_dir
from progtuning_ds.train.seeds import parse_seeds

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that takes no more, or not from this user; one line tells it as well as a traceback."""

_INTRO = """\
Fine-tunes a pretrained Transformer in stages (Progtuning) on DeepSpeed.

  deepspeed launch/train.py --config demo
  deepspeed launch/train.py --config my.yaml train.epochs=2 schedule.num_stages=3 deepspeed=zero3
  deepspeed --module progtuning_ds.train --config my.yaml --compare
  deepspeed launch/train.py --config my.yaml --resume auto       # go on where the run was, or start it
"""

_EXAMPLE = """\
A configuration that says the least:

  model: {path: bert-base-uncased}
  data: {train_file: train.csv, validation_file: test.csv}   # columns: text, label
  train: {epochs: 3}                                         # three epochs, three stages
"""


class _Parser(argparse.ArgumentParser):
    """Reports its errors as a `ConfigError`, so that one rank can speak for all."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            name = message.removeprefix(prefix).split()[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"{name} is not a known argument{did_you_mean(name, known)}"
        raise ConfigError(message)


def parse(argv: Sequence[str] | None = None) -> tuple[RunConfig, argparse.Namespace]:
    """Read the command line and the configuration it names.

    Raises:
        ConfigError: one line per mistake.
    """
    args = _parser().parse_intermixed_args(argv)
    if args.config is None:
        raise ConfigError(f"--config must be given: a file, or one of {', '.join(shipped_names())}")
    # `overwrite` is no field of the configuration: a saved one must not overwrite when it is run again.
    overrides = [text for text in args.overrides if text.partition("=")[0] != "overwrite"]
    for text in args.overrides:
        if text not in overrides:
            args.overwrite = _flag(text)
    return load_run_config(args.config, overrides), args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code, one of those in `progtuning_ds.train.outcome`."""
    try:
        config, args = parse(argv)
        _check_modes(args)
        if not args.dry_run and args.seeds is None:
            check_run_dir(Path(config.output_dir).expanduser(), overwrite=args.overwrite, resume=args.resume)
        quiet_libraries(config.logging)
        _run(config, args)
    except EXPECTED as error:
        _report(error)
        return _code(error)
    except OutOfMemoryEndError as error:
        _report(error, alone=True)
        return error.code
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _report(error)
        return CHECKPOINT
    return DONE


def _run(config: RunConfig, args: argparse.Namespace) -> None:
    # Not at the top: this imports torch and DeepSpeed.
    from progtuning_ds.train.program import run_dry, run_program, run_with_seeds
    from progtuning_ds.train.ranks import leave_ranks

    try:
        if args.dry_run:
            run_dry(config, resume=args.resume)
        elif args.seeds is not None:
            run_with_seeds(config, args.seeds, overwrite=args.overwrite, resume=args.resume)
        else:
            run_program(config, compare=args.compare, overwrite=args.overwrite, resume=args.resume)
    except EXPECTED:  # which all ranks raise together; a crash must not wait for them
        leave_ranks()
        raise
    leave_ranks()


def _code(error: Exception) -> int:
    if isinstance(error, RunEndError):
        return error.code
    return CHECKPOINT if isinstance(error, CheckpointError) else USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train.py",
        description=_INTRO,
        epilog=f"settings, as section.field=value or in the configuration file:\n\n{reference()}\n\n{_EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(shipped_names())
    parser.add_argument("--config", metavar="FILE", help=f"YAML or JSON file, or one of: {names}")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides of the file")
    parser.add_argument(
        "--compare", action="store_true", help="also train without freezing, and print both side by side"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, fetch a batch, print the plan; no training")
    parser.add_argument(
        "--seeds", metavar="0,1,2", help="train once per seed and print mean and spread; replaces train.seed"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    parser.add_argument(
        "--resume",
        metavar="auto|never|DIR",
        default=NEVER,
        help="go on from the newest checkpoint in output_dir (auto), or from this one; never is the default",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher; the environment has it
    return parser


def _check_modes(args: argparse.Namespace) -> None:
    given = [name for name in ("compare", "dry_run", "seeds") if getattr(args, name)]
    if len(given) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{options} do not go together; give one of them")
    if args.seeds is not None:
        args.seeds = parse_seeds(args.seeds)


def _flag(text: str) -> bool:
    value = text.partition("=")[2].lower()
    if value not in ("true", "false"):
        raise ConfigError(f"overwrite must be true or false, got {value!r}")
    return value == "true"


def _report(error: Exception, *, alone: bool = False) -> None:
    """Let rank 0 speak for all; another rank waits for it, and speaks only if the launcher lets it live.

    With `alone` the error is this rank's own, and nobody else tells it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank and isinstance(error, RunEndError):
        return
    if rank and not alone:
        time.sleep(5)
    for line in str(error).splitlines():
        prefix = f"rank {rank}: " if rank else ""
        print(f"error: {prefix}{line}", file=sys.stderr, flush=True)  # noqa: T201
