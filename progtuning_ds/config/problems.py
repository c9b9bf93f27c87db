"""Turns what pydantic says about a configuration into one line per mistake. No torch, no deepspeed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from progtuning_ds.errors import did_you_mean


def lines(error: ValidationError, root: type) -> list[str]:
    """One line per mistake: field, what is allowed, the value, and the nearest valid choice.

    Args:
        error: what validating a mapping against `root` raised.
        root: the dataclass of the whole configuration.
    """
    found: dict[str, str] = {}
    for details in error.errors():
        field = dotted(details["loc"], root)
        # A field of several types reports one mistake per type: the first one says enough.
        found.setdefault(field, _line(details, field, root))
    return list(found.values())


def dotted(loc: tuple[int | str, ...], root: type) -> str:
    """Name a location as a user writes it: `train.epochs`, `schedule.stage_lengths[1]`."""
    name, section = "", root
    kinds: dict[Any, type] = {}
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part in kinds:
            section, kinds = kinds[part], {}  # pydantic says which kind it took the section for
        elif section is None:
            break  # pydantic appends the type it tried, which is no part of the name
        else:
            name += f".{part}" if name else part
            kinds = section_kinds(section, part)
            section = _section(section, part)
    return name


def field_names(root: type) -> list[str]:
    """Every dotted name of the configuration."""
    return [name for name, _ in walk(root)]


def walk(root: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield every field that is no section, with the dataclass that owns it, in order of declaration."""
    for field in dataclasses.fields(root):
        name = f"{prefix}{field.name}"
        section = _section(root, field.name)
        if section is None:
            yield name, root
            continue
        seen: set[str] = set()
        for kind in (section_kinds(root, field.name) or {"": section}).values():
            for inner, owner in walk(kind, f"{name}."):
                if inner not in seen:
                    seen.add(inner)
                    yield inner, owner


def is_section(owner: type, name: str) -> bool:
    """Whether a field of `owner` is a section with fields of its own."""
    return _section(owner, name) is not None


def field_info(owner: type, name: str) -> Any:
    """Return what pydantic knows of a field (annotation, default, description), or None if there is no such field."""
    return getattr(owner, "__pydantic_fields__", {}).get(name)


def section_kinds(owner: type, name: str) -> dict[Any, type]:
    """The dataclasses a section may be, by the `kind` that tells them apart; none for a section of one kind."""
    info = field_info(owner, name)
    choices = get_args(info.annotation) if info and info.discriminator == "kind" else ()
    return {get_args(field_info(choice, "kind").annotation)[0]: choice for choice in choices}


def _section(owner: type, name: str) -> type | None:
    kinds = section_kinds(owner, name)
    if kinds:
        return next(iter(kinds.values()))
    info = field_info(owner, name)
    annotation = info.annotation if info else None
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def _line(details: ErrorDetails, field: str, root: type) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"{field} is not a known field{near_field(field, root)}"
    if kind == "invalid_key":
        return f"{value!r} is not a name of a section or field"
    if kind == "dataclass_type":
        return f"{field} must be a section with fields of its own, got {value!r}"
    if kind == "union_tag_invalid":
        choices = [choice.strip("'") for choice in context["expected_tags"].split(", ")]
        value = context["tag"]
        return f"{field}.kind must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}"
    if kind == "missing":
        return f"{field} must be given"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{field} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}"
    if field == "deepspeed":
        return f"deepspeed must be a preset's name, the path of a JSON file or a mapping, got {value!r}"
    demand = details["msg"].replace("Input should be ", "must be ").replace("String should ", "must ")
    return f"{field} {demand}, got {value!r}"


def near_field(field: str, root: type) -> str:
    """Return the hint for an unknown name: a name other programs use, the nearest one, or its like elsewhere."""
    leaf = field.rpartition(".")[2]
    if leaf in _ELSEWHERE:
        return f"; did you mean {_ELSEWHERE[leaf]!r}?"
    names = field_names(root)
    if "." not in field:
        names += [part.name for part in dataclasses.fields(root)]
    # Compared without the section first: a shared prefix makes any two short names look alike.
    for choices in (_leaves(names, field.rpartition(".")[0]), _leaves(names, None)):
        near = difflib.get_close_matches(leaf, choices, n=1)
        if near:
            return f"; did you mean {choices[near[0]]!r}?"
    return ""


def _leaves(names: list[str], section: str | None) -> dict[str, str]:
    """Names by their last part, of one section or of all."""
    parts = ((name, *name.rpartition(".")[::2]) for name in names)
    return {leaf: name for name, owner, leaf in parts if section is None or owner == section}


# What transformers, accelerate and DeepSpeed call it.
_ELSEWHERE = {
    "lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "per_device_eval_batch_size": "train.eval_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "lr_scheduler": "train.lr_scheduler_type",
    "num_warmup_steps": "train.warmup_steps",
    "model_name_or_path": "model.path",
    "dataset_name": "data.source",
    "dataset_config_name": "data.config_name",
    "dataloader_num_workers": "data.num_workers",
    "max_seq_length": "task.max_length",
    "logging_steps": "logging.steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
}


def is_mapping(value: Any) -> bool:
    """Whether a value can take dotted overrides."""
    return isinstance(value, Mapping)
