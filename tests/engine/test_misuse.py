"""What must not be done fails early, on every rank, in one clear line, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine import problem
from tests.engine.flavours import ALL
from tests.engine.problem import Phase, shrinking
from tests.engine.ranks_train import (
    ALL_BLOCKS,
    build_engine,
    build_staged,
    group_names,
    micro_step,
    optimizer_step,
    ordinary_groups,
    weights,
)
from tests.ranks import RankPools

FLAVOURS = ("zero0-fp32", "zero0-bf16", "bf16-optimizer", "zero2-fp32", "zero2-offload-fp32", "zero3-bf16")
SHORT = shrinking(steps=1)


def error_of(function: Callable[[], Any]) -> str:
    """Class and message of what ``function`` raises, or an empty string."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the test compares what it was
        return f"{type(error).__name__}: {error}"
    return ""


# ---- the wrong moment --------------------------------------------------------------------------------------------


def transitions_at_wrong_moments(flavour: str, groups: str) -> tuple[list[str], bool, bool]:
    engine, stages = build_staged(ALL[flavour], SHORT, groups)
    stages.advance(0)
    optimizer_step(engine, "bert", 0)
    before, memory = group_names(engine), stages.memory()
    errors = []
    micro_step(engine, "bert", 1, 0)
    engine.step()
    errors.append(error_of(lambda: stages.advance(1)))  # after the first of two micro-batches
    micro_step(engine, "bert", 1, 1)
    errors.append(error_of(lambda: stages.advance(1)))  # after the last backward, before its step
    errors.append(error_of(lambda: stages.retarget(stages.trainable_names[:3])))
    unchanged = group_names(engine) == before and stages.stage.index == 0
    engine.step()
    kept = stages.memory()["exp_avg"] == memory["exp_avg"]
    transition = stages.advance(1)
    optimizer_step(engine, "bert", 2)
    return errors, unchanged and kept, transition is not None and len(transition.frozen) > 0


@pytest.mark.parametrize("groups", ["plan", "ordinary"])
@pytest.mark.parametrize("name", FLAVOURS)
def test_a_transition_between_optimizer_steps_only(ranks: RankPools, name: str, groups: str) -> None:
    for errors, unchanged, works_later in ranks(2).run(transitions_at_wrong_moments, flavour=name, groups=groups):
        assert "after micro-batch 1 of 2" in errors[0]
        for error in errors:
            assert error.startswith("StageTransitionError: a transition is legal only between optimizer steps")
        assert unchanged
        assert works_later


def transition_while_states_are_away(flavour: str) -> list[str]:
    engine, stages = build_staged(ALL[flavour], SHORT, "plan")
    optimizer_step(engine, "bert", 0)
    engine.offload_states()
    errors = [error_of(lambda: stages.advance(1))]
    engine.reload_states()
    return [*errors, error_of(lambda: stages.advance(1))]


@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-fp32-fused"])
def test_no_transition_while_states_are_offloaded(ranks: RankPools, name: str) -> None:
    for away, back in ranks(2).run(transition_while_states_are_away, flavour=name):
        assert "call engine.reload_states() first" in away
        assert back == ""


# ---- ranks that disagree -----------------------------------------------------------------------------------------


def build_with_another_plan_per_rank() -> str:
    import deepspeed.comm as dist

    phases = shrinking(steps=1 + dist.get_rank())
    return error_of(lambda: build_staged(ALL["zero2-fp32"], phases, "ordinary"))


def test_ranks_with_different_plans_are_told(ranks: RankPools) -> None:
    for error in ranks(2).run(build_with_another_plan_per_rank):
        assert error.startswith("StageTransitionError: ranks disagree on the plan")


def retarget_to_another_set_per_rank(flavour: str) -> tuple[str, bool]:
    import deepspeed.comm as dist

    engine, stages = build_staged(ALL[flavour], (Phase(3, ALL_BLOCKS),), "ordinary")
    optimizer_step(engine, "bert", 0)
    before = group_names(engine)
    names = stages.trainable_names[: 5 + dist.get_rank()]
    error = error_of(lambda: stages.retarget(names))
    unchanged = group_names(engine) == before and all(p.requires_grad for p in engine.module.parameters())
    optimizer_step(engine, "bert", 1)
    return error, unchanged


@pytest.mark.parametrize("name", ["zero2-fp32", "zero3-fp32"])
def test_ranks_that_ask_for_different_sets_are_told(ranks: RankPools, name: str) -> None:
    for error, unchanged in ranks(2).run(retarget_to_another_set_per_rank, flavour=name):
        assert error.startswith("StageTransitionError: ranks disagree on what shall train")
        assert unchanged


# ---- wrong arguments ---------------------------------------------------------------------------------------------


def wrong_arguments() -> dict[str, str]:
    import progtuning_ds

    engine, stages = build_staged(ALL["zero2-fp32"], SHORT, "plan")
    model = problem.build_model("bert")
    blocks = progtuning_ds.discover_blocks(model)
    other = progtuning_ds.discover_blocks(problem.build_model("llama"))
    plan = progtuning_ds.plan_stages(6, 3, 3)
    of = progtuning_ds.StageEngine
    return {
        "blocks": error_of(lambda: of(engine, progtuning_ds.plan_stages(5, 3, 3), blocks)),
        "model": error_of(lambda: of(engine, plan, other)),
        "chunk": error_of(lambda: of(engine, plan, blocks, chunk_bytes=0)),
        "step": error_of(lambda: stages.advance(3)),
        "name": error_of(lambda: stages.retarget(["bert.pooler.dense.wieght"])),
        "empty": error_of(lambda: stages.retarget([])),
        "nothing": error_of(lambda: stages.retarget(stages.trainable_names)),
    }


def test_wrong_arguments_are_named(ranks: RankPools) -> None:
    (errors,) = ranks(1).run(wrong_arguments)
    assert "plan.num_blocks must be 6 as the model's, got 5" in errors["blocks"]
    assert "which has no parameter 'lm_head.weight'" in errors["model"]
    assert "chunk_bytes must be at least 1, got 0" in errors["chunk"]
    assert "step must be within 0..2" in errors["step"]
    assert "got 'bert.pooler.dense.wieght'; did you mean 'bert.pooler.dense.weight'?" in errors["name"]
    assert "ValueError" in errors["empty"]
    assert errors.pop("nothing") == "", "the same set again is no mistake"
    assert all("\n" not in error for error in errors.values())


# ---- engines that cannot be staged -------------------------------------------------------------------------------


def stage_engine_over_frozen_parameters(flavour: str) -> str:
    """Parameters frozen behind the engine's back, after it was built."""
    import progtuning_ds

    model = problem.build_model("bert")
    blocks = progtuning_ds.discover_blocks(model)
    engine = build_engine(ALL[flavour], model=model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layer.0." not in name)
    return error_of(lambda: progtuning_ds.StageEngine(engine, progtuning_ds.plan_stages(6, 3, 3), blocks))


@pytest.mark.parametrize("name", FLAVOURS)
def test_an_optimizer_that_holds_frozen_parameters_is_refused(ranks: RankPools, name: str) -> None:
    for error in ranks(2).run(stage_engine_over_frozen_parameters, flavour=name):
        assert error.startswith("StageTransitionError: the optimizer holds 16 frozen parameters, e.g. ")
        assert ".layer.0." in error


DEEPSPEED_ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "hpz": ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "hpZ"),
    "quantized": ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "ZeRO++ quantization"),
    "zenflow": (
        DEEPSPEED_ADAM
        | {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "cpu"},
                "zenflow": {"topk_ratio": 0.1, "update_interval": 2, "full_warm_up_rounds": 0, "overlap_step": False},
            }
        },
        "ZenFlow",
    ),
    "muon": (
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 1}},
        "the Muon optimizer",
    ),
    "partial": (
        DEEPSPEED_ADAM | {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
        "partial optimizer offload",
    ),
    "alignment": ({"zero_optimization": {"stage": 2, "parameter_alignment": True}}, "parameter_alignment"),
}


def stage_engine_over_unsupported(case: str) -> str:
    import deepspeed

    import progtuning_ds

    model = problem.build_model("bert")
    blocks = progtuning_ds.discover_blocks(model)
    config = ALL["zero2-fp32"].deepspeed_config("bert") | UNSUPPORTED[case][0]
    if case == "muon":
        for parameter in model.parameters():
            parameter.use_muon = parameter.ndim == 2
    groups = model.parameters() if case == "muon" else ordinary_groups(model)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return error_of(lambda: progtuning_ds.StageEngine(engine, progtuning_ds.plan_stages(6, 3, 3), blocks))


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_features_are_refused_by_name(ranks: RankPools, case: str) -> None:
    for error in ranks(2).run(stage_engine_over_unsupported, case=case):
        assert error.startswith("UnsupportedDeepSpeedError: ")
        assert UNSUPPORTED[case][1] in error
        assert "\n" not in error


def stage_engine_over_a_pipeline() -> str:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import progtuning_ds

    layers = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]
    model = PipelineModule(layers=layers, num_stages=2, loss_fn=torch.nn.MSELoss())
    config = ALL["zero1-fp32"].deepspeed_config("bert")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    blocks = progtuning_ds.discover_blocks(problem.build_model("bert"))
    return error_of(lambda: progtuning_ds.StageEngine(engine, progtuning_ds.plan_stages(6, 3, 3), blocks))


def test_a_pipeline_engine_is_refused_by_name(ranks: RankPools) -> None:
    for error in ranks(2).run(stage_engine_over_a_pipeline):
        assert "does not support the pipeline engine" in error


def stage_engine_without_an_optimizer() -> str:
    import deepspeed

    import progtuning_ds

    model = problem.build_model("bert")
    blocks = progtuning_ds.discover_blocks(model)
    config = {"train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return error_of(lambda: progtuning_ds.StageEngine(engine, progtuning_ds.plan_stages(6, 3, 3), blocks))


def test_an_engine_without_an_optimizer_is_refused_by_name(ranks: RankPools) -> None:
    assert "an engine without an optimizer" in ranks(1).run(stage_engine_without_an_optimizer)[0]


def stage_engine_over_another_deepspeed(flavour: str, attribute: str, value: Any) -> str:
    """An engine as another version might build it: an attribute less, or a list per group more."""
    import progtuning_ds

    model = problem.build_model("bert")
    blocks = progtuning_ds.discover_blocks(model)
    engine = build_engine(ALL[flavour], model=model)
    if value is None:
        delattr(engine.optimizer, attribute)
    else:
        setattr(engine.optimizer, attribute, value * len(group_names(engine)))
    return error_of(lambda: progtuning_ds.StageEngine(engine, progtuning_ds.plan_stages(6, 3, 3), blocks))


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("zero2-fp32", "bit16_groups_flat"),
        ("zero3-fp32", "fp16_partitioned_groups_flat"),
        ("bf16-optimizer", "fp32_groups_gradients_flat"),
        ("zero0-bf16", "fp32_groups"),
    ],
)
def test_a_deepspeed_that_lacks_an_attribute_is_refused_and_the_attribute_named(
    ranks: RankPools, name: str, attribute: str
) -> None:
    arguments = {"flavour": name, "attribute": attribute, "value": None}
    for error in ranks(2).run(stage_engine_over_another_deepspeed, **arguments):
        assert error.startswith("UnsupportedDeepSpeedError: DeepSpeed ")
        assert attribute in error


@pytest.mark.parametrize("name", ["zero2-fp32", "bf16-optimizer", "zero3-subgroups-fp32"])
def test_an_unknown_list_with_an_entry_per_group_is_refused_and_named(ranks: RankPools, name: str) -> None:
    arguments = {"flavour": name, "attribute": "shards_of_tomorrow", "value": [None]}
    for error in ranks(2).run(stage_engine_over_another_deepspeed, **arguments):
        assert error.startswith("UnsupportedDeepSpeedError: DeepSpeed ")
        assert "shards_of_tomorrow" in error


# ---- what looks like misuse and is not ---------------------------------------------------------------------------


def advance_again_and_again() -> list[bool]:
    engine, stages = build_staged(ALL["zero2-fp32"], SHORT, "plan")
    begun = []
    for step in (0, 0, 1, 1, 1, 2, 2):
        begun.append(stages.advance(step) is not None)
    optimizer_step(engine, "bert", 0)
    return begun


def test_advancing_to_the_same_step_again_does_nothing(ranks: RankPools) -> None:
    assert ranks(2).run(advance_again_and_again) == [[False, False, True, False, False, True, False]] * 2


def leave_and_come_back(flavour: str) -> tuple[bool, bool]:
    """Everything to one bias and back to everything, before and after steps."""
    engine, stages = build_staged(ALL[flavour], (Phase(9, ALL_BLOCKS),), "ordinary")
    everything = stages.trainable_names
    before = weights(engine)
    stages.retarget(["classifier.bias"])
    stages.retarget(everything)
    same = all(torch.equal(before[n], w) for n, w in weights(engine).items())
    for step in range(2):
        optimizer_step(engine, "bert", step)
    stages.retarget(["classifier.bias"])
    optimizer_step(engine, "bert", 2)
    stages.retarget(everything)
    optimizer_step(engine, "bert", 3)
    after = weights(engine)
    return same, all(not torch.equal(before[n], after[n]) for n in before if before[n].ndim > 1)


@pytest.mark.parametrize("name", ["zero1-bf16", "bf16-optimizer", "zero2-offload-fp32", "zero3-fp32"])
def test_a_set_smaller_than_the_number_of_ranks_is_no_problem(ranks: RankPools, name: str) -> None:
    assert ranks(4).run(leave_and_come_back, flavour=name) == [(True, True)] * 4
