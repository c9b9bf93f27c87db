"""With frozen embeddings, backward stops at the lowest trainable block and nothing below it keeps activations."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves

from progtuning_ds.blocks import BlockMap, discover_blocks, set_trainable
from progtuning_ds.errors import ConfigError
from progtuning_ds.grouping import param_groups
from progtuning_ds.schedule import StagePlan, plan_stages

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}


def bert() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False))


MODELS = {"bert": bert, "llama": llama}
both_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
checkpointing = pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
MIDDLE = 1  # the stage in which blocks 2 and 3 train


def enable_checkpointing(model: nn.Module, *, use_reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


class Run:
    """One training forward of a model in a stage, with what each block did on the way."""

    def __init__(self, make: Callable[[], nn.Module], embeddings: str, stage: int, *, checkpointed: bool) -> None:
        torch.manual_seed(0)
        self.model = make().train()
        self.blocks: BlockMap = discover_blocks(self.model)
        self.plan: StagePlan = plan_stages(4, 2, 2, embeddings)
        self.stage = self.plan.stages[stage]
        if checkpointed:
            enable_checkpointing(self.model, use_reentrant=False)
        param_groups(self.model, self.plan, self.blocks)
        set_trainable(self.model, self.blocks.trainable_names(self.stage))
        self.stack = self.model.get_submodule(self.blocks.path)
        self.calls = [0] * 4
        self.saved_bytes: dict[int | str, int] = dict.fromkeys(("outside", *range(4)), 0)
        self.outputs: list[weakref.ref[torch.Tensor]] = []
        self._now: int | str = "outside"
        self.loss = self._forward()

    def _forward(self) -> torch.Tensor:
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                self.saved_bytes[self._now] += tensor.nbytes
            return tensor

        ids = torch.arange(3, 43).reshape(4, 10)
        with self._watched(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return self.model(input_ids=ids).logits.square().mean()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        handles = []
        for index, block in enumerate(self.stack):

            def enter(_: nn.Module, __: Any, index: int = index) -> None:
                self._now = index
                self.calls[index] += 1

            def leave(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
                self._now = "outside"
                tensor = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor))
                self.outputs.append(weakref.ref(tensor))
                if index not in self.stage.trainable_blocks and not self.stage.embeddings:
                    assert tensor.grad_fn is None

            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
        yield
        for handle in handles:
            handle.remove()

    def names_in_graph(self) -> set[str]:
        """Names of the parameters that the autograd graph of the loss leads to."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        seen, found, stack = set(), set(), [self.loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found.add(names[id(node.variable)])
            stack.extend(following for following, _ in node.next_functions)
        return found


@both_models
@checkpointing
@pytest.mark.parametrize("embeddings", ["never", "first_stage"])
def test_backward_reaches_the_trainable_parameters_and_no_frozen_block(
    make: Callable[[], nn.Module], embeddings: str, checkpointed: bool
) -> None:
    run = Run(make, embeddings, MIDDLE, checkpointed=checkpointed)
    expected = {*run.blocks.blocks[2], *run.blocks.blocks[3], *run.blocks.head}
    if not checkpointed:  # a checkpointed block shows its parameters only when it is run again
        assert run.names_in_graph() == expected
    assert not run.names_in_graph() & {*run.blocks.embeddings, *run.blocks.blocks[0], *run.blocks.blocks[1]}
    run.loss.backward()
    assert {name for name, p in run.model.named_parameters() if p.grad is not None} == expected


@both_models
def test_the_frozen_prefix_saves_no_byte_and_the_rest_saves_as_before(make: Callable[[], nn.Module]) -> None:
    full = Run(make, "never", 0, checkpointed=False).saved_bytes
    half = Run(make, "never", MIDDLE, checkpointed=False).saved_bytes
    assert min(full[block] for block in range(4)) > 0
    assert (half[0], half[1]) == (0, 0)
    assert half[3] == full[3]
    assert 0 < half[2] <= full[2]
    assert half["outside"] <= full["outside"]


@both_models
def test_trainable_embeddings_keep_the_activations_of_frozen_blocks(make: Callable[[], nn.Module]) -> None:
    run = Run(make, "always", MIDDLE, checkpointed=False)
    assert min(run.saved_bytes[0], run.saved_bytes[1]) > 0
    assert run.names_in_graph() >= set(run.blocks.embeddings)
    assert not run.names_in_graph() & {*run.blocks.blocks[0], *run.blocks.blocks[1]}


@both_models
@checkpointing
def test_outputs_inside_the_frozen_prefix_die_at_once(make: Callable[[], nn.Module], checkpointed: bool) -> None:
    frozen = Run(make, "never", MIDDLE, checkpointed=checkpointed)
    assert frozen.outputs[0]() is None
    if checkpointed:  # a checkpoint keeps its input, which is the output of the block below
        training = Run(make, "always", MIDDLE, checkpointed=True)
        assert training.outputs[0]() is not None


@both_models
def test_checkpointing_never_runs_a_frozen_block_again(make: Callable[[], nn.Module]) -> None:
    run = Run(make, "never", MIDDLE, checkpointed=True)
    assert run.calls == [1, 1, 1, 1]
    calls = [0] * 4
    for index, block in enumerate(run.stack):
        # A checkpoint runs the block's forward again, not its hooks: look at a layer inside.
        inner = next(module for module in block.modules() if isinstance(module, nn.Linear))
        inner.register_forward_pre_hook(lambda _, __, index=index: calls.__setitem__(index, calls[index] + 1))
    run.loss.backward()
    assert calls == [0, 0, 1, 1]


@both_models
def test_checkpointing_changes_no_gradient(make: Callable[[], nn.Module]) -> None:
    plain, checkpointed = (Run(make, "never", MIDDLE, checkpointed=on) for on in (False, True))
    for run in (plain, checkpointed):
        run.loss.backward()
    for (name, one), (_, other) in zip(
        plain.model.named_parameters(), checkpointed.model.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert torch.equal(one.grad, other.grad), name


@both_models
def test_the_hook_that_transformers_adds_for_checkpointing_is_taken_away(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    enable_checkpointing(model, use_reentrant=False)
    blocks = discover_blocks(model)
    plan = plan_stages(4, 2, 2, "never")
    inputs: list[bool] = []
    model.get_submodule(blocks.path)[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    set_trainable(model, blocks.trainable_names(plan.stages[1]))
    model(input_ids=torch.arange(3, 13)[None])
    param_groups(model, plan, blocks)
    model(input_ids=torch.arange(3, 13)[None])
    assert inputs == [True, False]


def test_embeddings_that_always_train_keep_the_hook_they_do_not_mind() -> None:
    model = bert().train()
    enable_checkpointing(model, use_reentrant=True)
    param_groups(model, plan_stages(4, 2, 2, "always"), discover_blocks(model))
    assert model._require_grads_hooks


def test_reentrant_checkpointing_is_refused_where_embeddings_freeze() -> None:
    model = bert().train()
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(ConfigError, match="gradient checkpointing must be non-reentrant when embeddings freeze"):
        param_groups(model, plan_stages(4, 2, 2, "first_stage"), discover_blocks(model))


def test_a_lora_base_keeps_no_activations_below_the_lowest_adapter() -> None:
    model = get_peft_model(llama().train(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    enable_checkpointing(model, use_reentrant=False)
    blocks = discover_blocks(model)
    plan = plan_stages(4, 2, 2, "always")  # the embeddings are frozen with the base, whatever the plan says
    param_groups(model, plan, blocks)
    set_trainable(model, blocks.trainable_names(plan.stages[1]))
    needs: list[bool] = []
    for block in model.get_submodule(blocks.path):
        block.register_forward_pre_hook(lambda _, args: needs.append(args[0].requires_grad))
    model(input_ids=torch.arange(3, 13)[None]).logits.square().mean().backward()
    assert needs == [False, False, False, True]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name in blocks.order if "lora" in name and blocks.component_of(name) in (2, 3)
    }
