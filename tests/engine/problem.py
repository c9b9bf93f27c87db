"""The training problem that the engine and the reference both solve: models, batches, learning rates, names.

Knows torch and transformers, and neither DeepSpeed nor progtuning_ds, so that an error there cannot hide here.
"""

from __future__ import annotations

import functools
import gc
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

NUM_BLOCKS = 6
VOCAB = 64
SEQUENCE = 8
MICRO_BATCH = 2
ACCUMULATION = 2
CLIP = {"bert": 0.2, "llama": 1.3, "wide": 1.0, "narrow": 0.2, "gpt2": 1.3}  # some steps are clipped and some are not


def clip(kind: str) -> float:
    """The norm to clip at."""
    base, _, method = kind.partition("+")
    return CLIP[base] / (10 if method else 1)


WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.999)
# As RoBERTa has it. With 1e-8, Adam blows the rounding noise of zero gradients up to full steps (a key's bias has
# none, because softmax ignores a shift), and parity would compare noise.
EPS = 1e-6
BASE_LR = 1e-3
WARMUP = 5

_BLOCK = re.compile(r"\.(?:layers?|h)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|\.w[tp]e\.")
# What the methods of a name train and where; the others are methods of the package, of rank 4 and reduction 4.
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"kind": "lora", "rank": 4},
    "rank1": {"kind": "lora", "rank": 1},
    "low": {"kind": "lora", "rank": 4, "targets": [f"layer.{block}.attention.self.query" for block in (0, 1)]},
    "tied": {"kind": "lora", "rank": 4, "targets": ["wte", "lm_head", "c_attn"]},
}


def build_model(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A BERT classifier or a Llama language model of six blocks, always with the same weights, no dropout.

    ``"wide"`` is the BERT at 19 million parameters, whose buffers are large enough to be seen from outside;
    ``"narrow"`` has layers 3 wide, smaller than most groups of ranks; ``"gpt2"`` has tied output embeddings.
    """
    kind, _, method = kind.partition("+")
    transformers = import_transformers()
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": {"wide": 512, "narrow": 3}.get(kind, 32),
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 1 if kind == "narrow" else 2,
        "intermediate_size": {"wide": 2048, "narrow": 5}.get(kind, 64),
        "max_position_embeddings": SEQUENCE,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        if kind in ("bert", "wide", "narrow"):
            config = transformers.BertConfig(
                **sizes, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
            model: torch.nn.Module = transformers.BertForSequenceClassification(config)
        elif kind == "llama":
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=False)
            )
        elif kind == "gpt2":
            dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts))
        else:
            raise ValueError(f"kind must be one of {', '.join(CLIP)}, got {kind!r}")
        if method == "qlora":
            quantize_linears(model)
        # Drawn in fp32 for all dtypes and rounded then, as DeepSpeed does it: bit16 draws other numbers.
        return with_method(model, method).to(dtype)


def quantize_linears(model: torch.nn.Module) -> None:
    """Store the linear layers of all blocks in NF4 with double quantization, in place, as bitsandbytes does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and _BLOCK.search(name + "."):
            layer = Linear4bit(module.in_features, module.out_features, module.bias is not None, quant_type="nf4")
            layer.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            layer.bias = module.bias
            model.set_submodule(name, layer)


def with_method(model: torch.nn.Module, method: str) -> torch.nn.Module:
    """The model as a fine-tuning method changes it: part of the problem, so that both sides train the same."""
    if not method:
        return model
    from progtuning_ds.methods import Method, apply_method

    model = apply_method(model, Method(**METHODS.get(method, {"kind": method, "rank": 4, "reduction": 4})))
    with torch.no_grad():
        for parameter in model.parameters():
            # Low-rank and bottleneck updates begin at zero, and half of their gradients with them.
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return model


@functools.cache
def import_transformers() -> ModuleType:
    """The library with both models loaded, and out of the garbage collector's sight: it is half the heap."""
    import transformers

    for name in ("BertForSequenceClassification", "LlamaForCausalLM", "GPT2LMHeadModel"):
        getattr(transformers, name)
    gc.collect()
    gc.freeze()
    return transformers


def batch(kind: str, step: int, micro: int, rank: int) -> dict[str, torch.Tensor]:
    """The micro-batch that ``rank`` sees: ids [2, 8] int64 with a padded tail, and labels."""
    generator = torch.Generator().manual_seed(1 + rank + 10 * micro + 100 * step)
    ids = torch.randint(1, VOCAB, (MICRO_BATCH, SEQUENCE), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, SEQUENCE - 1 - step % 3 :] = 0
    if not kind.startswith(("llama", "gpt2")):
        labels = torch.randint(0, 3, (MICRO_BATCH,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lr_factor(step: int) -> float:
    """Linear warm-up, then a slow linear decay, as a factor of the base learning rate."""
    return min(1.0, (step + 1) / WARMUP) * (1 - step / 100)


def decays(parameter: torch.Tensor) -> bool:
    """Matrices decay; biases and norms do not. ZeRO-3 has moved the shape elsewhere."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one trainable set, said in blocks so that it needs no plan to be understood."""

    steps: int
    blocks: tuple[int, ...]
    embeddings: bool = True

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name trains; what is neither block nor embedding is the head."""
        block = _BLOCK.search(name)
        if block:
            return int(block.group(1)) in self.blocks
        return self.embeddings or not _EMBEDDING.search(name)


def shrinking(steps: int = 2, stages: int = 3, embeddings: str = "always") -> tuple[Phase, ...]:
    """The paper's schedule: each stage leaves the lowest remaining part behind."""
    part = NUM_BLOCKS // stages
    return tuple(
        Phase(
            steps,
            tuple(range(stage * part, NUM_BLOCKS)),
            embeddings == "always" or (embeddings == "first_stage" and stage == 0),
        )
        for stage in range(stages)
    )


def phase_at(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase that ``step`` belongs to."""
    for phase in phases:
        if step < phase.steps:
            return phase
        step -= phase.steps
    raise IndexError(step)
