"""What an export promises, for tied embeddings, encoder-decoders and adapters, from an engine that trained two stages.

The base is a file on disk, as a user has it; the export is read back with safetensors alone, and then by the library.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.blocks import families
from tests.ranks import RankPools

HEADS = {"gpt2": "causal-lm", "t5": "seq2seq-lm", "bert": "sequence-classification"}
STEPS = 2  # of each of two stages


def stages_of(blocks: int) -> list[dict[str, Any]]:
    """Block 0 and the embeddings never train, block 1 freezes in the middle."""
    return [{"blocks": f"{first}-{blocks - 1}", "steps": STEPS, "embeddings": False} for first in (1, 2)]


def prepared(family: str, method: str, dtype: torch.dtype) -> torch.nn.Module:
    from progtuning_ds.methods import Method, apply_method

    model = families.build(family, HEADS[family]).to(dtype)
    return model if method == "full" else apply_method(model, Method(kind=method, rank=2))


def train_and_export(family: str, method: str, zero: int, bf16: bool, folder: str) -> dict[str, Any]:
    """Train four steps and export; returns which names ever train, and what froze in the middle, as it was then."""
    import deepspeed

    import progtuning_ds
    from progtuning_ds.train.export import full_state_dict, save_final
    from tests.train import tiny

    first = torch.distributed.get_rank() == 0
    out = Path(folder)
    if first:
        tiny.save_model(out / "other")  # for its tokenizer
        families.build(family, HEADS[family]).to(torch.bfloat16 if bf16 else torch.float32).save_pretrained(
            out / "base"
        )
    model = prepared(family, method, torch.bfloat16 if bf16 else torch.float32)
    blocks = progtuning_ds.discover_blocks(model)
    plan = progtuning_ds.custom_plan(len(blocks), stages_of(len(blocks)))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=progtuning_ds.param_groups(model, plan, blocks, 0.1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": zero},
            "bf16": {"enabled": bf16},
        },
    )
    stages = progtuning_ds.StageEngine(engine, plan, blocks)
    trained: set[str] = set()
    frozen: dict[str, torch.Tensor] = {}
    for step in range(plan.total_steps):
        transition = stages.advance(step)
        if step == STEPS:
            now = full_state_dict(engine.module, keep=True)
            frozen = {name: now[name] for name in transition.frozen}
        trained |= set(stages.trainable_names)
        batch = families.inputs_of(engine.module)
        labels = torch.ones(2, dtype=torch.long) if family == "bert" else batch["input_ids"]
        engine.backward(engine(**batch, labels=labels).loss)
        engine.step()
    from transformers import AutoTokenizer

    save_final(engine.module, AutoTokenizer.from_pretrained(out / "other"), out / "final", is_first=first)
    torch.distributed.barrier()
    return {"trained": trained, "frozen": frozen, "every": [name for name, _ in engine.module.named_parameters()]}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def no_pickles(folder: Path) -> set[str]:
    """Names of all files, none of which could be unpickled."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in names:
        path = folder / name
        assert path.suffix in (".safetensors", ".json", ".txt", ".jinja", ".md"), name
        assert not zipfile.is_zipfile(path), name
        assert path.read_bytes()[:1] != b"\x80", name  # how every pickle of today begins
    return names


@pytest.mark.parametrize(
    ("family", "zero", "bf16"),
    [
        ("gpt2", 2, False),
        pytest.param("gpt2", 3, True, marks=pytest.mark.slow),
        pytest.param("t5", 2, True, marks=pytest.mark.slow),
        pytest.param("t5", 3, False, marks=pytest.mark.slow),
    ],
)
def test_tied_and_two_sided_models_keep_what_never_trained_and_what_froze(
    ranks: RankPools, tmp_path: Path, family: str, zero: int, bf16: bool
) -> None:
    told = ranks(2).run(train_and_export, family=family, method="full", zero=zero, bf16=bf16, folder=str(tmp_path))[0]
    base, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "final"))
    assert exported.keys() == base.keys() == set(told["every"]), "tied weights once, under the name they have"
    never = [name for name in base if name not in told["trained"]]
    assert any("wte" in name or "shared" in name for name in never)
    for name in never:
        assert torch.equal(bits(exported[name]), bits(base[name])), name
    assert told["frozen"]
    for name, tensor in told["frozen"].items():
        assert torch.equal(bits(exported[name]), bits(tensor)), name
    moved = [name for name in told["trained"] if not torch.equal(exported[name], base[name])]
    assert len(moved) > len(told["trained"]) / 2
    assert "generation_config.json" in no_pickles(tmp_path / "final")
    model = families.HEADS[HEADS[family]].from_pretrained(tmp_path / "final", dtype="auto")
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(parameter.detach()), bits(exported[name])), name
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("zero", "bf16"), [(3, True), pytest.param(2, False, marks=pytest.mark.slow)], ids=["zero3-bf16", "zero2-fp32"]
)
def test_adapters_that_froze_are_as_they_were_and_the_base_is_untouched(
    ranks: RankPools, tmp_path: Path, zero: int, bf16: bool
) -> None:
    from peft import PeftModel

    told = ranks(2).run(train_and_export, family="bert", method="lora", zero=zero, bf16=bf16, folder=str(tmp_path))[0]
    names = no_pickles(tmp_path / "final")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names
    saved = load_file(tmp_path / "final" / "adapter_model.safetensors")
    adapters = {name.replace(".default", "").replace("modules_to_save.", ""): name for name in told["every"]}
    assert saved.keys() == {short for short, name in adapters.items() if "lora_" in name or "modules_to_save" in name}
    assert told["frozen"]
    for name, tensor in told["frozen"].items():
        short = name.replace(".default", "").replace("modules_to_save.", "")
        assert torch.equal(bits(saved[short]), bits(tensor)), name
    base = families.HEADS[HEADS["bert"]].from_pretrained(tmp_path / "base", dtype="auto")
    again = PeftModel.from_pretrained(base, tmp_path / "final")
    original = load_file(tmp_path / "base" / "model.safetensors")
    for name, parameter in again.get_base_model().named_parameters():
        plain = name.replace("base_layer.", "").replace("original_module.", "")
        if plain in original:
            assert torch.equal(bits(parameter.detach()), bits(original[plain])), name
