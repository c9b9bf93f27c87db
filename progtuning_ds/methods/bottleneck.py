"""Bottleneck adapters after the output projections of a block. May import torch and transformers; no deepspeed.

The one maintained library for them (adapters 1.3) wants transformers 4.57, so they are built here, after Houlsby et
al. (arXiv 1902.00751) and Pfeiffer et al. (arXiv 2005.00247): down, activation, up, and a residual around all three.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.methods.heads import head_modules
from progtuning_ds.methods.layers import ATTENTION_OUTPUTS, FEED_FORWARD_OUTPUTS, check_targets, ends_of, linear_layers
from progtuning_ds.methods.settings import ALL_LINEAR, PLACEMENTS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KIND = "BOTTLENECK"


@dataclass(frozen=True)
class BottleneckConfig:
    """What is saved beside the weights.

    Attributes:
        placement: "houlsby" or "pfeiffer".
        reduction: width of the layer's output over width of the bottleneck.
        activation: name of a function in ``torch.nn.functional``.
        targets: paths of the adapted layers; empty before they are known.
        modules_to_save: names of modules of the model that are trained and saved whole.
        base_model_name_or_path: what they were trained on.
    """

    placement: str = "houlsby"
    reduction: int = 16
    activation: str = "gelu"
    targets: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        if self.reduction < 1:
            raise ConfigError(f"reduction must be at least 1, got {self.reduction}")
        if not callable(getattr(nn.functional, self.activation, None)):
            raise ConfigError(f"activation must be a function of torch.nn.functional, got {self.activation!r}")


class BottleneckLayer(nn.Module):
    """A layer and its adapter: ``y = base(x)``, then ``y + up(activation(down(y)))``.

    ``up`` starts at zero, so that an untrained adapter changes nothing.
    """

    def __init__(self, base_layer: nn.Module, width: int, config: BottleneckConfig) -> None:
        super().__init__()
        weight = next(base_layer.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        bottleneck = max(1, width // config.reduction)
        self.base_layer = base_layer
        self.adapter_down = nn.Linear(width, bottleneck, device=weight.device, dtype=dtype)
        self.adapter_up = nn.Linear(bottleneck, width, device=weight.device, dtype=dtype)
        self._activation = getattr(nn.functional, config.activation)
        if not weight.is_meta:
            nn.init.normal_(self.adapter_down.weight, std=0.02)
            nn.init.zeros_(self.adapter_down.bias)
            nn.init.zeros_(self.adapter_up.weight)
            nn.init.zeros_(self.adapter_up.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own weight: models look at its dtype (T5)."""
        return self.base_layer.weight  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the adapted output [..., width]."""
        output = self.base_layer(*args, **kwargs)
        inner = self._activation(self.adapter_down(output.to(self.adapter_down.weight.dtype)))
        return output + self.adapter_up(inner).to(output.dtype)


def add_bottlenecks(
    model: PreTrainedModel, config: BottleneckConfig, *, blocks_path: str | None = None, train_head: bool = True
) -> BottleneckConfig:
    """Put adapters into every block of ``model``, in place; only they and the task's head then require grad.

    Args:
        model: a bare model, also on the meta device.
        config: ``targets`` are ends of layer paths within a block; by default those of the architecture.
        blocks_path: as in `discover_blocks`.
        train_head: whether the head of the task trains too.

    Returns:
        The configuration with ``targets`` as full paths and ``modules_to_save`` filled.

    Raises:
        ConfigError: if a block has no layer to adapt.
    """
    paths = config.targets if _all_present(model, config.targets) else _find_layers(model, config, blocks_path)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    heads = tuple(head_modules(model)) if train_head else ()
    for path in paths:
        layer = model.get_submodule(path)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, BottleneckLayer(layer, _width(layer), config))
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    return BottleneckConfig(
        config.placement,
        config.reduction,
        config.activation,
        tuple(paths),
        heads,
        config.base_model_name_or_path or model.config.name_or_path or None,
    )


def bottleneck_state(model: nn.Module, config: BottleneckConfig) -> list[str]:
    """Names of the parameters that belong to the adapters and the modules saved with them."""
    return [
        name
        for name, _ in model.named_parameters()
        if ".adapter_down." in name or ".adapter_up." in name or name.split(".", 1)[0] in config.modules_to_save
    ]


def save_bottlenecks(state: dict[str, torch.Tensor], config: BottleneckConfig, folder: Path) -> None:
    """Write ``state`` (see `bottleneck_state`) and ``config``: safetensors and JSON, as PEFT names them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS_FILE)
    content = {"peft_type": KIND, **asdict(config)}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_bottlenecks(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put saved adapters into a base model and return it.

    Raises:
        ConfigError: if the folder holds none, or they fit another model.
    """
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no bottleneck adapters in {str(folder)!r}: it has no {CONFIG_FILE}") from error
    if content.pop("peft_type", None) != KIND:
        raise ConfigError(f"{CONFIG_FILE} in {str(folder)!r} is no bottleneck adapter's; load it with PEFT")
    lists = ("targets", "modules_to_save")
    fields: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in content.items()}
    config = BottleneckConfig(**fields)
    if not _all_present(model, config.targets):
        raise ConfigError(f"the adapters in {str(folder)!r} are for another model: no {config.targets[0]!r} here")
    add_bottlenecks(model, config, train_head=bool(config.modules_to_save))
    state = load_file(folder / WEIGHTS_FILE)
    missing = [name for name in bottleneck_state(model, config) if name not in state]
    if missing:
        raise ConfigError(f"the adapters in {str(folder)!r} are not whole: {WEIGHTS_FILE} has no {missing[0]!r}")
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise ConfigError(f"the adapters in {str(folder)!r} are for another model: no {unknown[0]!r} here")
    return model


def _all_present(model: nn.Module, paths: tuple[str, ...]) -> bool:
    modules = {name for name, _ in model.named_modules()}
    return bool(paths) and all(path in modules for path in paths)


def _find_layers(model: PreTrainedModel, config: BottleneckConfig, blocks_path: str | None) -> list[str]:
    check_targets(model, config.targets)
    found: list[str] = []
    for index, layers in enumerate(linear_layers(model, blocks_path)):
        chosen = _in_block(layers, config)
        if not chosen:
            ends = ends_of(layers)
            wanted = ", ".join(config.targets) or f"known output projection for placement {config.placement}"
            near = did_you_mean(config.targets[0], ends) if config.targets else "; name the layers in method.targets"
            raise ConfigError(f"method.targets: block {index} has no {wanted} among {', '.join(ends)}{near}")
        found += chosen
    return found


def _in_block(layers: list[str], config: BottleneckConfig) -> list[str]:
    if config.targets == (ALL_LINEAR,):
        return layers
    if config.targets:
        return [name for name in layers if _ends(name, config.targets)]
    attention = [name for name in layers if _ends(name, ATTENTION_OUTPUTS)]
    feed_forward = [name for name in layers if _ends(name, FEED_FORWARD_OUTPUTS) and name not in attention]
    if not feed_forward or (config.placement == "houlsby" and not attention):
        return []
    return feed_forward if config.placement == "pfeiffer" else [*attention, *feed_forward]


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return any(name.endswith(f".{end}") or name == end for end in ends)


def _width(layer: nn.Module) -> int:
    return int(getattr(layer, "out_features", 0) or getattr(layer, "nf", 0))
