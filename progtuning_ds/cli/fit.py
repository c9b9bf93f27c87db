"""Owns `progtuning plan --gpus N --memory SIZE`: from a planned model to the cheapest run that fits. No deepspeed."""

from __future__ import annotations

from dataclasses import dataclass

from progtuning_ds.cli.plan import PlanReport
from progtuning_ds.errors import ConfigError, require_choice
from progtuning_ds.memory import (
    ATTENTIONS,
    KERNELS,
    Budget,
    EngineSetup,
    Outcome,
    Remedy,
    Request,
    parse_bytes,
    remedies,
    search,
)
from progtuning_ds.model_shape import TESTED
from progtuning_ds.on_freeze import KINDS

RUN = "run.yaml"
TASKS = {
    "sequence-classification": "classification",
    "causal-lm": "causal_lm",
    "token-classification": "token_classification",
    "question-answering": "squad",
}
"""What the training program learns with a head; for another there is no run to write."""
KERNEL_CHOICES = ("any", *KERNELS)
_DEFAULT_LENGTH, _DEFAULT_ROWS = 512, 32
_CONTEXT = 2**30
_FRAGMENTATION = 0.05


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What the user asked for beside the plan itself, as written on the command line."""

    gpus: int
    memory: str
    seq_len: int | None = None
    global_batch: int | None = None
    precision: str = "bf16"
    attention: str = "sdpa"
    host_memory: str | None = None
    reserve: str | None = None
    kernel: str = "any"
    on_freeze: str = "keep"


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found for a planned model."""

    report: PlanReport
    request: Request
    outcome: Outcome
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]


def default_reserve(device_bytes: int) -> int:
    """Bytes of a GPU that are for no tensor: CUDA context, NCCL and cuBLAS (1 GiB), fragmentation (5%)."""
    return _CONTEXT + int(_FRAGMENTATION * device_bytes)


def make_fit(report: PlanReport, wanted: FitRequest) -> Fit:
    """Search for the cheapest configuration; `ConfigError` for bad input, and for a budget below the reserve."""
    require_choice("kernel", wanted.kernel, KERNEL_CHOICES)
    _check_on_freeze(report, wanted.on_freeze)
    request = Request(
        gpus=wanted.gpus,
        budget=_budget(wanted),
        seq_len=_seq_len(report, wanted.seq_len),
        global_batch=_global_batch(wanted),
        precision=wanted.precision,
        attention=wanted.attention,
        kernels=KERNELS if wanted.kernel == "any" else (wanted.kernel,),
        on_freeze=wanted.on_freeze,
    )
    outcome = search(report.workload, request)
    found = () if outcome.proposal else tuple(remedies(report.workload, request))
    return Fit(report, request, outcome, found, _notes(report))


def _check_on_freeze(report: PlanReport, kind: str) -> None:
    """Refuse what no engine can do with this model and plan."""
    require_choice("on_freeze", kind, KINDS)
    reason = report.workload.why_not_quantized(EngineSetup(zero_stage=1, world_size=1, on_freeze=kind))
    if reason:
        raise ConfigError(f"on_freeze must be keep here, got {kind!r}: {reason}")


def _budget(wanted: FitRequest) -> Budget:
    device = parse_bytes("memory", wanted.memory)
    reserve = default_reserve(device) if wanted.reserve is None else _reserve(wanted.reserve)
    host = None if wanted.host_memory is None else parse_bytes("host_memory", wanted.host_memory)
    if reserve >= device:
        raise ConfigError(f"memory must be above the reserve of {reserve / 2**30:.2f} GiB, got {wanted.memory!r}")
    return Budget(device, host, reserve)


def _reserve(text: str) -> int:
    return 0 if text.strip() in ("0", "none") else parse_bytes("reserve", text)


def _seq_len(report: PlanReport, asked: int | None) -> int:
    limit = report.max_positions
    if asked is None:
        return min(_DEFAULT_LENGTH, limit or _DEFAULT_LENGTH)
    if limit is not None and asked > limit:
        raise ConfigError(f"seq_len must be at most the {limit} positions of the model, got {asked}")
    return asked


def _global_batch(wanted: FitRequest) -> int:
    if wanted.global_batch is not None:
        return wanted.global_batch
    return -(-_DEFAULT_ROWS // max(wanted.gpus, 1)) * max(wanted.gpus, 1)


def _notes(report: PlanReport) -> tuple[str, ...]:
    notes = []
    if report.workload.shape is None:
        notes.append("The configuration does not tell the shape of a block: activations are not counted.")
    elif report.model_type not in TESTED:
        notes.append(
            f"Activations of {report.model_type} models are counted by the nearest pattern; check with profile."
        )
    if report.head not in TASKS:
        notes.append(
            f"The training program has no task for {report.head}: --output writes no {RUN}, but a DeepSpeed JSON."
        )
    return tuple(notes)


__all__ = ["ATTENTIONS", "KERNEL_CHOICES", "RUN", "TASKS", "Fit", "FitRequest", "default_reserve", "make_fit"]
