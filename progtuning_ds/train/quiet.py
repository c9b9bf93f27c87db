"""Keeps the libraries from drowning the program's own output. May be imported before any of them."""

from __future__ import annotations

import logging
import warnings

from progtuning_ds.config import LoggingConfig


def quiet_libraries(settings: LoggingConfig) -> None:
    """Let the libraries say no more than the user asked for; call it before anything else imports DeepSpeed.

    DeepSpeed alone logs hundreds of lines otherwise, some of them while it is imported.
    """
    quiet_bitsandbytes()
    level = getattr(logging, settings.deepspeed.upper())
    logging.disable(level - 1)
    import datasets
    import deepspeed  # noqa: F401 - it sets its own level when it is imported
    import transformers

    logging.disable(logging.NOTSET)
    logger = logging.getLogger("DeepSpeed")
    for handler in (logger, *logger.handlers):
        handler.setLevel(level)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is raised as well
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # DeepSpeed supports older versions of PyTorch than the one that wants another name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def quiet_bitsandbytes() -> None:
    """Drop its warning, on CPUs with AVX512-BF16, that a kernel of the hub is missing; call it before PEFT loads it.

    That kernel has no backward and `keep_trainable` leaves it out.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
