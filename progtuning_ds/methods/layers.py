"""Linear layers of blocks, and the roles their names tell. May import torch and transformers; no deepspeed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from progtuning_ds.blocks import discover_blocks
from progtuning_ds.errors import ConfigError, did_you_mean
from progtuning_ds.methods.settings import ALL_LINEAR

# Ends of the paths, within a block, of the layers whose output is added to the residual stream.
ATTENTION_OUTPUTS = (
    "attention.output.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa
    "attention.o_proj",  # ViT
    "attention.out_lin",  # DistilBERT
    "attention.dense",  # GPT-NeoX
    "self_attention.dense",  # BLOOM, Falcon
    "attn.c_proj",  # GPT-2
    "attn.Wo",  # ModernBERT
    "self_attn.o_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3
    "self_attn.out_proj",  # OPT, BART
    "self_attn.dense",  # Phi
    "SelfAttention.o",  # T5
)
FEED_FORWARD_OUTPUTS = (
    "output.dense",
    "ffn.lin2",
    "mlp.dense_4h_to_h",
    "mlp.c_proj",
    "mlp.Wo",
    "mlp.down_proj",
    "mlp.fc2",
    "fc2",
    "DenseReluDense.wo",
)
# Names of the layers that make queries and values (LoRA, arXiv 2106.09685, section 4.2), also where they are fused.
QUERIES_AND_VALUES = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("qkv_proj",),
    ("Wqkv",),
    ("query_key_value",),
    ("qkv",),
    ("c_attn",),
)


def linear_layers(model: nn.Module, blocks_path: str | None = None) -> list[list[str]]:
    """Paths of the linear layers of each block, in the model's order.

    Args:
        model: a bare model, on any device.
        blocks_path: as in `discover_blocks`.
    """
    blocks = discover_blocks(model, path=blocks_path)
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    layers = []
    for block in blocks.blocks:
        inside = {name.rpartition(".")[0] for name in block}
        layers.append([name for name in linear if name in inside])
    return layers


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: Conv1D is GPT-2's, and bitsandbytes' are nn.Linear."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raise a ConfigError unless each of ``targets`` is the end of a module's path, as PEFT reads them."""
    paths = [name for name, _ in model.named_modules() if name]
    for target in targets:
        if target == ALL_LINEAR or any(path == target or path.endswith(f".{target}") for path in paths):
            continue
        parts = target.count(".") + 1
        known = [ALL_LINEAR, *sorted({".".join(path.split(".")[-parts:]) for path in paths})]
        raise ConfigError(f"method.targets: {target!r} fits no module{did_you_mean(target, known)}")


def users_of(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each parameter, by its id; several where it is shared."""
    users: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(path)
    return users


def ends_of(layers: Iterable[str]) -> list[str]:
    """The last two names of each path, once each: enough to tell the layers of a block apart."""
    return sorted({".".join(name.split(".")[-2:]) for name in layers})


def queries_and_values(blocks: Sequence[Sequence[str]]) -> list[str]:
    """Last names of the layers in which every one of ``blocks`` makes queries and values; empty if none is known."""
    last = [{name.rpartition(".")[2] for name in layers} for layers in blocks]
    for names in QUERIES_AND_VALUES:
        if last and all(found.issuperset(names) for found in last):
            return list(names)
    return []
