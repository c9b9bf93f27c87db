"""Blocks that are quantized when they freeze: what later stages train, what is released, what is refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

from tests.engine import problem
from tests.engine.agreement import assert_near, tolerance_for
from tests.engine.bytes_held import Held
from tests.engine.flavours import ALL
from tests.engine.problem import Phase, phase_at, shrinking
from tests.engine.ranks_train import MODES, build_staged, optimizer_step, weights
from tests.engine.reference import Moments, Numerics, adamw, averaged_gradients, retarget
from tests.ranks import RankPools

WORLD = 2


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of a weight: by bitsandbytes for nf4, by the definition of symmetric int8 rows else."""
    if kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # Flat: on the CPU, bitsandbytes 0.50 reads blocks that go over the end of a row with wrong scales.
        flat = quantize_4bit(weight.view(-1), blocksize=64, compress_statistics=True, quant_type="nf4")
        left = dequantize_4bit(*flat).view(weight.shape)
        assert (left - weight).abs().max() <= 0.16 * weight.abs().max()
        return left
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    return (torch.round(weight.float() / scale) * scale).to(weight.dtype)


def is_linear(name: str, parameter: torch.Tensor) -> bool:
    """Weights of linear layers inside blocks, by name: these models have no other matrices there."""
    return problem._BLOCK.search(name) is not None and name.endswith(".weight") and parameter.dim() == 2


def reference(kind: str, phases: tuple[Phase, ...], numerics: Numerics, on_freeze: str) -> tuple[list[Any], Any]:
    """Losses and final weights of a single process that rounds what froze, once."""
    model = problem.build_model(kind, numerics.weights)
    parameters = dict(model.named_parameters())
    states: dict[str, Moments] = {}
    done: set[str] = set()
    losses = []
    for step in range(sum(phase.steps for phase in phases)):
        trains = {n: p for n, p in parameters.items() if phase_at(phases, step).trains(n)}
        retarget(states, trains, numerics, first=step == 0)
        for name in parameters.keys() - trains.keys() - done:
            if is_linear(name, parameters[name]):
                parameters[name].data = rounded(parameters[name].data, on_freeze)
                done.add(name)
        own, gradients = averaged_gradients(model, trains, kind, step, WORLD, numerics)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        clip = min(1.0, problem.clip(kind) / (norm + 1e-6))
        for name, parameter in trains.items():
            decay = problem.WEIGHT_DECAY if problem.decays(parameter) else 0.0
            adamw(states[name], gradients[name] * clip, problem.BASE_LR * problem.lr_factor(step), decay)
            parameter.data.copy_(states[name].master)
        losses.append(own)
    assert done
    return losses, {n: p.detach().clone() for n, p in parameters.items()}


def train(flavour: str, kind: str, mode: str, on_freeze: str, kernel: str = "deepspeed") -> dict[str, Any]:
    from progtuning_ds.methods.frozen_linear import frozen_layers

    phases, groups = MODES[mode]
    engine, stages = build_staged(ALL[flavour], phases, groups, kind, {"on_freeze": on_freeze, "kernel": kernel})
    exact: dict[str, torch.Tensor] = {}
    stages.compression.keep = lambda block, given: exact.update({n: t.clone() for n, t in given.items()})
    seen: dict[str, Any] = {"losses": [], "transitions": [], "freed": [], "quantized": []}
    for step in range(sum(phase.steps for phase in phases)):
        held = Held.by(engine)
        kept = sum(t.numel() * t.element_size() for t in exact.values())
        transition = stages.advance(step)
        if transition is not None:
            more = sum(t.numel() * t.element_size() for t in exact.values()) - kept  # the test's own copies
            seen["transitions"].append((transition.released_bytes, transition.memory_bytes))
            seen["freed"].append(held.live - Held.by(engine).live + more)
            seen["quantized"].append(sorted(name for name, _ in frozen_layers(engine.module)))
        seen["losses"].append(optimizer_step(engine, kind, step))
    engine.eval()
    inputs = problem.batch(kind, 99, 0, 0)
    quantized = engine(**inputs).loss.item()
    stages.compression.expand()
    seen["weights"] = weights(engine)
    seen["eval"] = [quantized, engine(**inputs).loss.item()]
    stages.compression.put_back(lambda block: {n: t for n, t in exact.items() if n in stages.blocks.blocks[block]})
    final = weights(engine)
    seen["exact"] = bool(exact) and all(torch.equal(final[name], value) for name, value in exact.items())
    return seen


Runs = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(ranks: RankPools) -> Runs:
    """What all ranks saw; runs that several tests look at are made once."""

    @functools.cache
    def made(**settings: str) -> list[dict[str, Any]]:
        return ranks(WORLD).run(train, **settings)

    return made


@pytest.mark.parametrize(
    ("name", "kind", "mode", "on_freeze"),
    [
        ("zero2-fp32", "bert", "planned", "nf4"),
        ("zero3-fp32", "bert", "planned", "int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("zero1-fp32", "llama", "planned", "nf4"),
                ("zero2-bf16", "llama", "planned", "nf4"),
                ("zero2-bf16", "bert", "embeddings-first", "int8"),
                ("zero2-fp32", "bert", "ordinary", "int8"),
                ("zero2-offload-fp32", "bert", "planned", "nf4"),
                ("bf16-optimizer", "bert", "planned", "nf4"),
                ("zero0-fp32", "bert", "planned", "nf4"),
                ("zero3-fp32", "llama", "planned", "nf4"),
                ("zero3-bf16", "bert", "planned", "nf4"),
                ("zero3-bf16", "bert", "embeddings-first", "nf4"),
                ("zero3-offload-fp32", "bert", "planned", "int8"),
                ("zero3-subgroups-fp32", "bert", "planned", "nf4"),
                ("zero3-all-persistent", "bert", "planned", "nf4"),
                ("zero3-all-sharded", "bert", "planned", "int8"),
                ("zero3-small-buckets", "bert", "planned", "nf4"),
            ]
        ),
    ],
)
def test_later_stages_train_on_what_quantization_left(
    runs: Runs, name: str, kind: str, mode: str, on_freeze: str
) -> None:
    flavour = ALL[name]
    seen = runs(flavour=name, kind=kind, mode=mode, on_freeze=on_freeze)
    losses, expected = reference(kind, MODES[mode][0], flavour.numerics, on_freeze)
    tolerance = tolerance_for(flavour.numerics)
    for step, theirs in enumerate(losses):
        ours = [loss for run in seen for loss in run["losses"][step]]
        assert ours == pytest.approx(theirs, abs=max(1e-6, tolerance.loss)), f"step {step}"
    for run in seen:
        rounded_ones = run["quantized"][-1]
        ours, theirs = dict(run["weights"]), dict(expected)
        # A last bit decides to which side of a step a weight is rounded: there, single elements may be a step off.
        off = torch.cat([(ours.pop(n) - theirs.pop(n)).abs().float().flatten() for n in rounded_ones])
        assert off.mean() <= (2e-4 if flavour.mixed else 1e-6)
        assert_near(ours, theirs, tolerance, "weights at the end")
        assert run["exact"], "what was kept came back to the bit"
        assert run["eval"][0] == pytest.approx(run["eval"][1], abs=2e-3 if flavour.mixed else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-bf16", "zero3-fp32"])
def test_the_fused_step_goes_on_with_what_is_left(runs: Runs, name: str) -> None:
    settings = {"flavour": name, "kind": "bert", "mode": "planned", "on_freeze": "nf4"}
    ours, theirs = runs(**settings, kernel="reference"), runs(**settings)
    for run, other in zip(ours, theirs, strict=True):
        assert [*chain(*run["losses"])] == pytest.approx([*chain(*other["losses"])], abs=2**-6)
        # Its work lists shrink too.
        assert all(freed >= least - 4096 for freed, least in zip(run["freed"], other["freed"], strict=True))


@pytest.mark.parametrize("name", ["zero2-fp32", pytest.param("zero3-bf16", marks=pytest.mark.slow)])
def test_the_memory_of_the_weights_is_released_by_the_formula(runs: Runs, name: str) -> None:
    from progtuning_ds.on_freeze import weight_bytes

    element = 2 if ALL[name].mixed else 4
    sharing = WORLD if ALL[name].stage == 3 else 1
    for run in runs(flavour=name, kind="bert", mode="planned", on_freeze="nf4"):
        before, left = 0, set[str]()
        shapes = {n: p.shape for n, p in problem.build_model("bert").named_parameters()}
        for (released, held), freed, names in zip(run["transitions"], run["freed"], run["quantized"], strict=True):
            dense, stored = (
                sum(weight_bytes(kind, *shapes[n], element=element, ranks=sharing) for n in names)
                for kind in ("keep", "nf4")
            )
            tables = 4 * 256 + 4 * 16  # one of each for all layers
            assert held["quantized_weights"] == stored + tables
            assert released["quantized_weights"] == before - held["quantized_weights"]
            assert sum(released.values()) == pytest.approx(freed, abs=4096), "as seen from outside"
            newly = sum(shapes[n].numel() * element // sharing for n in set(names) - left)
            assert newly <= released["weights"] < newly + 64, "and at most what a flat buffer was padded with"
            before, left = held["quantized_weights"], set(names)
            assert dense > 2 * stored
        assert len(run["transitions"]) == 2
        assert {n.split(".")[3] for n in run["quantized"][0]} == {"0", "1"}
        assert {n.split(".")[3] for n in run["quantized"][1]} == {"0", "1", "2", "3"}


def refusals(flavour: str) -> list[str]:
    from progtuning_ds.errors import StageTransitionError, UnsupportedStateError

    said = []
    phases, groups = MODES["rotating"]
    for options, plan, own in (
        ({"on_freeze": "nf4"}, phases, groups),
        ({"on_freeze": "nf5"}, shrinking(), "plan"),
        ({"on_freeze": "nf4"}, shrinking(stages=1), "plan"),
        ({"on_freeze": "int8"}, shrinking(), "ordinary"),
    ):
        try:
            build_staged(ALL[flavour], plan, own, "bert", options)
        except ValueError as error:
            said.append(str(error))
    engine, stages = build_staged(ALL[flavour], shrinking(), "plan", "bert", {"on_freeze": "nf4"})
    for step in range(3):
        stages.advance(step)
        optimizer_step(engine, "bert", step)
    names, before = stages.trainable_names, weights(engine)
    for use in (lambda: engine.save_checkpoint("nowhere"), engine.module.state_dict):
        try:
            use()
        except UnsupportedStateError as error:
            said.append(str(error))
    try:
        stages.retarget([*names, "bert.encoder.layer.0.output.dense.weight"])
    except StageTransitionError as error:
        said.append(str(error))
    assert stages.trainable_names == names
    # Its bias was not quantized, and may.
    stages.retarget([*names, "bert.encoder.layer.0.output.dense.bias"])
    optimizer_step(engine, "bert", 3)
    after = weights(engine)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert "bert.encoder.layer.0.output.dense.bias" not in still
    assert "bert.encoder.layer.0.output.dense.weight" in still
    return said


@pytest.mark.parametrize("name", ["zero2-fp32", pytest.param("zero3-fp32", marks=pytest.mark.slow)])
def test_what_cannot_be_quantized_is_refused_by_name(ranks: RankPools, name: str) -> None:
    for said in ranks(WORLD).run(refusals, flavour=name):
        assert said[0] == (
            "on_freeze must be keep here, got 'nf4': block 0 trains again in stage 2, and what was quantized cannot"
        )
        assert said[1] == "on_freeze must be one of keep, int8, nf4, got 'nf5'; did you mean 'nf4'?"
        assert said[2] == "on_freeze must be keep here, got 'nf4': no block of the plan freezes"
        assert said[-3].startswith("engine.save_checkpoint knows nothing of blocks quantized to nf4 (on_freeze): use ")
        assert said[-2].startswith("a weight quantized to nf4 when its block froze has no place in a state dict")
        assert said[-1] == (
            "names must hold no weight that was quantized when its block froze (on_freeze), got "
            "'bert.encoder.layer.0.output.dense.weight'; it cannot train again, nothing was changed"
        )
        if name == "zero3-fp32":
            assert said[3].endswith(
                "under ZeRO-3 it needs groups made for the plan; build them with progtuning_ds.param_groups"
            )
        assert all("\n" not in line for line in said)
