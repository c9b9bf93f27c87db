"""Predicted activations against what autograd keeps, on models of real size without memory."""

from __future__ import annotations

import pytest
import torch

from progtuning_ds import discover_blocks, plan_stages
from progtuning_ds.blocks import set_trainable
from progtuning_ds.memory import Batch, EngineSetup, Workload
from progtuning_ds.model_shape import architecture, param_table
from tests.memory.models import NO_DROPOUT, fake_model, peak_of_a_pass

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [
    # model, precision, attention, rows, seq_len, checkpointing, embeddings, stage, changes of the configuration
    ("bert-base", "fp32", "eager", 8, 128, False, "always", 0, {}),
    ("bert-base", "fp32", "sdpa", 8, 128, False, "always", 2, {}),
    ("bert-base", "fp32", "eager", 8, 128, False, "first_stage", 1, {}),
    ("bert-base", "bf16", "sdpa", 4, 512, False, "always", 1, {}),
    ("bert-base", "bf16", "sdpa", 8, 512, False, "never", 2, NO_DROPOUT),
    ("bert-base", "fp32", "eager", 8, 256, True, "always", 0, {}),
    ("gpt2", "fp32", "eager", 4, 256, False, "always", 0, {}),
    ("gpt2", "bf16", "eager", 4, 512, False, "always", 2, {}),
    ("gpt2", "fp32", "sdpa", 4, 256, False, "never", 1, {"attn_pdrop": 0.0}),
    ("gpt2", "bf16", "eager", 4, 512, True, "always", 1, {}),
    ("llama", "fp32", "eager", 2, 256, False, "always", 0, {}),
    ("llama", "bf16", "eager", 2, 512, False, "always", 1, {}),
    ("llama", "bf16", "sdpa", 2, 1024, False, "always", 2, {}),
    ("llama", "bf16", "sdpa", 2, 1024, False, "never", 2, {}),
    ("llama", "bf16", "sdpa", 4, 512, True, "never", 1, {"vocab_size": 500}),
    ("llama", "bf16", "eager", 4, 512, False, "always", 0, {"vocab_size": 500}),
]


# Every other one is enough for every change of the code.
MARKED = [pytest.param(case, marks=pytest.mark.slow) if i % 2 else case for i, case in enumerate(CASES)]


@pytest.mark.parametrize("case", MARKED, ids=lambda case: "-".join(str(part) for part in case[:8]))
def test_the_peak_of_a_pass_is_predicted_within_a_tenth(case: tuple) -> None:
    name, precision, attention, rows, seq_len, checkpointing, embeddings, stage, changes = case
    mode, model = fake_model(name, PRECISIONS[precision], attention, checkpointing, **changes)
    blocks = discover_blocks(model)
    plan = plan_stages(len(blocks), 3, 3, embeddings)
    load = Workload(param_table(model, blocks), architecture(model, blocks), plan)
    set_trainable(model, blocks.trainable_names(plan.stages[stage]))
    _, peak = peak_of_a_pass(mode, model, rows, seq_len)
    batch = Batch(rows, seq_len, checkpointing=checkpointing, attention=attention, device="cpu")
    forward = load.footprint(EngineSetup(0, 1, precision=precision), batch, stage).moments["forward"]
    assert forward["activations"] + forward["logits"] == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", ["bert-base", "gpt2", "llama"])
def test_where_backward_stops_nothing_is_kept_below(name: str) -> None:
    mode, model = fake_model(name, torch.float32, "eager", False)
    blocks = discover_blocks(model)
    kept = {}
    for embeddings in ("always", "never"):
        plan = plan_stages(len(blocks), 3, 3, embeddings)
        set_trainable(model, blocks.trainable_names(plan.stages[2]))
        measured, _ = peak_of_a_pass(mode, model, 4, 128)
        load = Workload(param_table(model, blocks), architecture(model, blocks), plan)
        batch = Batch(4, 128, attention="eager", device="cpu")
        forward = load.footprint(EngineSetup(0, 1, precision="fp32"), batch, 2).moments["forward"]
        kept[embeddings] = measured, forward["activations"] + forward["logits"]
    (measured, predicted), (measured_low, predicted_low) = kept["always"], kept["never"]
    assert measured_low < 0.8 * measured
    assert predicted - predicted_low == pytest.approx(measured - measured_low, rel=0.05)
