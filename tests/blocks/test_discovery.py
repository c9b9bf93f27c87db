"""What discovery refuses, what a path overrides, and what it does without a readable forward."""

import pytest
import torch
import transformers as tf
from torch import nn

from progtuning_ds.blocks import BlockMap, component_counts, discover_blocks, set_trainable
from progtuning_ds.errors import BlockDiscoveryError, ConfigError
from progtuning_ds.schedule import Stage, plan_stages
from tests.blocks.families import build, inputs_of

TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def albert(layers: int, groups: int) -> nn.Module:
    config = tf.AlbertConfig(**TINY, embedding_size=8, num_hidden_layers=layers, num_hidden_groups=groups)
    return tf.AlbertForSequenceClassification(config)


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("layers", "groups"), [(12, 1), (4, 2)])
@pytest.mark.parametrize("path", [None, "albert.encoder.albert_layer_groups"])
def test_albert_is_refused_because_its_layers_share_weights(layers: int, groups: int, path: str | None) -> None:
    with pytest.raises(BlockDiscoveryError, match="layers that share weights cannot freeze one by one") as caught:
        discover_blocks(albert(layers, groups), path=path)
    message = one_line(caught)
    assert f"runs {layers} layers through the {groups} block" in message
    assert "albert.encoder.albert_layer_groups" in message


def test_albert_with_a_group_for_every_layer_shares_nothing() -> None:
    assert len(discover_blocks(albert(3, 3))) == 3


def test_a_model_cut_after_loading_needs_no_new_config() -> None:
    model = build("bert", "sequence-classification")
    model.bert.encoder.layer = model.bert.encoder.layer[:2]
    assert model.config.num_hidden_layers == 3
    assert len(discover_blocks(model)) == 2


def test_blocks_that_share_a_weight_are_refused() -> None:
    model = build("bert", "sequence-classification")
    layers = model.bert.encoder.layer
    layers[2].output.dense.weight = layers[0].output.dense.weight
    with pytest.raises(BlockDiscoveryError) as caught:
        discover_blocks(model)
    assert "blocks 0 and 2" in one_line(caught)
    assert "bert.encoder.layer.0.output.dense.weight" in one_line(caught)


def test_a_module_used_as_two_blocks_is_refused() -> None:
    model = build("gpt2", "causal-lm")
    model.transformer.h[1] = model.transformer.h[0]
    with pytest.raises(BlockDiscoveryError, match="blocks 0 and 1 of GPT2LMHeadModel share the weight"):
        discover_blocks(model)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.ModuleDict({"different": nn.ModuleList([nn.Linear(2, 3), nn.Embedding(4, 5)])}),
        nn.ModuleDict({"empty": nn.ModuleList([nn.ReLU(), nn.ReLU()])}),
    ],
)
def test_a_model_without_a_stack_is_refused(model: nn.Module) -> None:
    with pytest.raises(BlockDiscoveryError, match="has no stack of similar blocks") as caught:
        discover_blocks(model)
    assert type(model).__name__ in one_line(caught)


def two_towers() -> nn.Module:
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.CLIPModel(
        tf.CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=text | {"image_size": 8, "patch_size": 4})
    )


def test_two_towers_are_refused_until_one_is_named() -> None:
    model = two_towers()
    with pytest.raises(BlockDiscoveryError, match="has several block stacks") as caught:
        discover_blocks(model)
    paths = one_line(caught).partition("stacks: ")[2].partition(";")[0].split(", ")
    assert len(paths) == 2
    for path in paths:
        blocks = discover_blocks(model, path=path)
        assert (blocks.path, len(blocks)) == (path, 2)


def test_a_path_overrides_the_search() -> None:
    model = build("bart", "sequence-classification")
    blocks = discover_blocks(model, path="model.decoder.layers")
    assert blocks.path == "model.decoder.layers"
    assert len(blocks) == 2
    assert all(name.startswith("model.decoder.layers.0.") for name in blocks.blocks[0])
    assert "model.encoder.layers.0.fc1.weight" in blocks.embeddings
    both = discover_blocks(model, path="model.encoder.layers+model.decoder.layers")
    assert both == discover_blocks(model)


def test_a_sequence_of_blocks_may_be_named() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(2, 1)
            self.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.input = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.output(self.blocks(self.input(x)))

    blocks = discover_blocks(Stacked(), path="blocks")
    assert blocks.embeddings == ("input.weight", "input.bias")
    assert blocks.blocks == (("blocks.0.weight", "blocks.0.bias"), ("blocks.1.weight", "blocks.1.bias"))
    assert blocks.head == ("output.weight", "output.bias")


@pytest.mark.parametrize("path", ["bert.encoder.layers", "encoder.layer", "bert.encoder.layer.0", "bert", ""])
def test_a_wrong_path_gets_the_nearest_valid_one(path: str) -> None:
    with pytest.raises(BlockDiscoveryError, match="blocks path must be a module list") as caught:
        discover_blocks(build("bert", "sequence-classification"), path=path)
    message = one_line(caught)
    assert f"got {path!r}" in message
    assert "allowed: bert.encoder.layer" in message


def test_a_close_path_is_suggested() -> None:
    with pytest.raises(BlockDiscoveryError, match=r"did you mean 'bert\.encoder\.layer'\?"):
        discover_blocks(build("bert", "sequence-classification"), path="bert.encoder.layers")


@pytest.mark.parametrize("path", ["encoder.block+encoder.block", "encoder.block+encoder.block.0.layer"])
def test_two_paths_must_not_overlap(path: str) -> None:
    with pytest.raises(BlockDiscoveryError, match="separate module lists"):
        discover_blocks(build("t5", "seq2seq-lm"), path=path)


def test_without_readable_source_kind_and_registration_decide() -> None:
    scope: dict[str, object] = {"nn": nn}
    exec(
        "class Hidden(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.project = nn.Linear(4, 4)\n"
        "        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))\n"
        "        self.norm = nn.LayerNorm(4)\n"
        "        self.tokens = nn.Embedding(7, 4)\n"
        "        self.register = nn.Parameter(nn.init.zeros_(nn.Linear(1, 1).weight))\n",
        scope,
    )
    blocks = discover_blocks(scope["Hidden"]())  # type: ignore[operator]
    assert set(blocks.embeddings) == {"project.weight", "project.bias", "tokens.weight", "register"}
    assert blocks.head == ("norm.weight", "norm.bias")


def test_half_an_encoder_decoder_is_one_stack() -> None:
    for family, head, count in (("bart", "causal-lm", 2), ("t5", "token-classification", 3)):
        blocks = discover_blocks(build(family, head))
        assert len(blocks) == count
        assert "+" not in blocks.path


def test_components_are_named_and_strangers_get_the_nearest_name() -> None:
    blocks = discover_blocks(build("bert", "sequence-classification"))
    assert blocks.component_of("bert.embeddings.LayerNorm.weight") == "embeddings"
    assert blocks.component_of("bert.encoder.layer.2.output.dense.weight") == 2
    assert blocks.component_of("classifier.bias") == "head"
    with pytest.raises(ConfigError, match=r"did you mean 'classifier\.weight'\?"):
        blocks.component_of("clasifier.weight")


def test_a_map_that_forgets_or_repeats_a_parameter_is_refused() -> None:
    with pytest.raises(BlockDiscoveryError, match="exactly once"):
        BlockMap("layers", ("a",), (("a", "b"),), ())
    with pytest.raises(BlockDiscoveryError, match="exactly once"):
        BlockMap("layers", ("a",), (("b",),), (), order=("a", "b", "c"))
    with pytest.raises(BlockDiscoveryError, match="frozen must name parameters"):
        BlockMap("layers", ("a",), (("b",),), (), frozen=frozenset({"x"}))


def test_trainable_names_keep_model_order_and_honour_always_train() -> None:
    model = build("opt", "sequence-classification")
    blocks = discover_blocks(model)
    order = [name for name, _ in model.named_parameters()]
    stage = plan_stages(3, 3, 3, "never").stages[2]
    plain = blocks.trainable_names(stage)
    assert plain == tuple(name for name in order if name in {*blocks.blocks[2], *blocks.head})
    assert order.index("model.decoder.final_layer_norm.weight") < order.index(blocks.blocks[2][0])
    norms = blocks.trainable_names(stage, ("*layer_norm*", "model.decoder.embed_positions.*"))
    assert set(norms) - set(plain) == {
        name for name in order if ("layer_norm" in name or "embed_positions" in name) and name not in set(plain)
    }
    assert list(norms) == sorted(norms, key=order.index)
    with pytest.raises(ConfigError, match=r"always_train\[0\] must match a parameter name, got '\*layrnorm\*'"):
        blocks.trainable_names(stage, ("*layrnorm*",))
    with pytest.raises(ConfigError, match=r"stage\.trainable_blocks must be within 0\.\.2"):
        blocks.trainable_names(Stage(0, (3,), range(1), True))


def test_set_trainable_sets_exactly_the_names_or_nothing() -> None:
    model = build("llama_tied", "causal-lm")
    names = [name for name, _ in model.named_parameters()]
    set_trainable(model, names[1:4])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names[1:4]
    with pytest.raises(ConfigError, match=r"got 'model\.nrm\.weight'; did you mean"):
        set_trainable(model, ["model.nrm.weight"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names[1:4]


def test_what_was_frozen_at_discovery_is_no_candidate_and_not_counted() -> None:
    model = build("bert", "sequence-classification")
    model.bert.embeddings.requires_grad_(False)
    blocks = discover_blocks(model)
    assert blocks.frozen == set(blocks.embeddings)
    counts = component_counts(model, blocks, always_train=("*LayerNorm*",))
    assert (counts.embeddings, counts.always_embeddings) == (0, 0)
    assert counts.always_blocks == (64,) * 3  # two norms of weight and bias with 16 elements
    assert not set(blocks.trainable_names(plan_stages(3, 1, 1).stages[0])) & blocks.frozen


def test_discovery_leaves_the_model_as_it_was() -> None:
    model = build("bert", "sequence-classification")
    before = {name: (p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()}
    expected = model(**inputs_of(model)).logits
    discover_blocks(model)
    assert {name: (p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs_of(model)).logits, expected)
