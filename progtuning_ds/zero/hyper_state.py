"""Hyper-parameters, schedulers, counters and loss scale of an engine as plain values, and back.

Owns what of them has to survive a restart. Tensors of parameters and optimizer are ``held_state``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from progtuning_ds.zero.adapter import Adapter
from progtuning_ds.zero.hyper import _SCHEDULER_LISTS, HyperParameters, _scheduler_layers

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_SHARED_BY_OPTIMIZERS = ("lr", "initial_lr", "betas", "eps", "weight_decay")
_RATES = ("base_lrs", "_last_lr", "max_lrs", "min_lr", "min_lrs", "delta_lrs", "org_lrs")


def plain_state(adapter: Adapter) -> dict[str, Any]:
    """Everything but tensors: numbers, texts, tuples, lists and mappings of these."""
    hyper, engine = adapter.hyper, adapter.engine
    return {
        "optimizer": type(adapter.torch_optimizer).__name__,
        "groups": [_without_params(group) for group in adapter.torch_optimizer.param_groups],
        "origins": list(hyper.origins),
        "configured": dict(hyper._configured),
        "lr_ratio": dict(hyper._lr_ratio),
        "origin_of": dict(hyper._origin_of),
        "schedules": [(key, value) for key, value in hyper._schedules.items() if _is_number(value)],
        "scheduler": hyper.scheduler.state_dict() if hyper.scheduler is not None else None,
        "scheduler_lists": list(_numeric_lists(hyper)),
        "counters": {name: int(getattr(engine, name)) for name in _COUNTERS},
        "loss_scale": {name: value for holder in _scale_holders(adapter) for name, value in _scale(holder).items()},
    }


def set_plain_state(adapter: Adapter, state: Mapping[str, Any]) -> None:
    """Give back what ``plain_state`` took, to an engine whose groups are the same.

    Between two kinds of optimizer, groups keep what both know: rates, betas, epsilon and weight decay.
    """
    hyper, engine, optimizer = adapter.hyper, adapter.engine, adapter.torch_optimizer
    same = type(optimizer).__name__ == state["optimizer"]
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: value for key, value in saved.items() if same or key in _SHARED_BY_OPTIMIZERS})
    hyper.origins = list(state["origins"])
    for origin, settings in state["configured"].items():
        hyper._configured.setdefault(origin, {}).update(settings)
    hyper._lr_ratio = dict(state["lr_ratio"])
    hyper._origin_of = dict(state["origin_of"])
    hyper._schedules.update(state["schedules"])
    if hyper.scheduler is not None and state["scheduler"] is not None:
        hyper.scheduler.load_state_dict(state["scheduler"])
        layers = list(_scheduler_layers(hyper.scheduler))
        for layer, name, values in state["scheduler_lists"]:
            setattr(layers[layer], name, list(values))
    for name, value in state["counters"].items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    for holder in _scale_holders(adapter):
        for name in _scale(holder).keys() & state["loss_scale"].keys():
            setattr(holder, name, state["loss_scale"][name])


def scale_learning_rate(adapter: Adapter, factor: float) -> None:
    """Multiply the rates of all groups, now and in the rest of their schedule."""
    hyper = adapter.hyper
    for settings in (*adapter.torch_optimizer.param_groups, *hyper._configured.values()):
        for name in ("lr", "initial_lr"):
            if name in settings:
                settings[name] = settings[name] * factor
    layers = list(_scheduler_layers(hyper.scheduler))
    for layer, name, values in list(_numeric_lists(hyper)):
        if name in _RATES:
            setattr(layers[layer], name, [value * factor for value in values])
    for key, value in hyper._schedules.items():
        if key[1] in _RATES and _is_number(value):
            hyper._schedules[key] = value * factor


def _numeric_lists(hyper: HyperParameters) -> Iterator[tuple[int, str, list[Any]]]:
    """``(layer, name, values)`` of the scheduler's lists of one number per group, or per group and momentum."""
    for layer, scheduler in enumerate(_scheduler_layers(hyper.scheduler)):
        for name in _SCHEDULER_LISTS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and values and all(_is_number(value) for value in values):
                yield layer, name, list(values)


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_number(item) for item in value)
    return isinstance(value, (int, float))


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _scale_holders(adapter: Adapter) -> list[Any]:
    """What keeps the loss scale: an object of its own, or in older versions the wrapper."""
    wrapper = adapter.wrapper
    holders = (getattr(wrapper, "loss_scaler", None), getattr(wrapper, "loss_scale_config", None), wrapper)
    return [holder for holder in holders if holder is not None]


def _scale(holder: Any) -> dict[str, Any]:
    own = getattr(holder, "__dict__", {})
    return {name: own[name] for name in _LOSS_SCALE if name in own}
