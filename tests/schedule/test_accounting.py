"""The paper's numbers, from the sizes of BERT alone."""

from fractions import Fraction

import pytest

from progtuning_ds.accounting import ComponentCounts, account
from progtuning_ds.errors import ConfigError
from progtuning_ds.schedule import plan_stages


def bert(hidden: int, layers: int, *, pooler: bool = True) -> ComponentCounts:
    """Sizes of BERT with a head of two outputs, from its architecture: 30522 words, 512 positions, feed-forward 4H."""
    norm = 2 * hidden
    attention = 4 * (hidden * hidden + hidden) + norm
    feed_forward = 2 * hidden * 4 * hidden + 4 * hidden + hidden + norm
    return ComponentCounts(
        embeddings=(30522 + 512 + 2) * hidden + norm,
        blocks=(attention + feed_forward,) * layers,
        head=(hidden * hidden + hidden if pooler else 0) + 2 * hidden + 2,
    )


@pytest.mark.parametrize(
    ("hidden", "layers", "full", "progtuning"),
    [(768, 12, 328_451_334, 243_396_870), (1024, 24, 1_005_431_814, 703_122_438)],
)
@pytest.mark.parametrize("steps_per_epoch", [1, 30, 1250])
def test_three_epochs_of_classification_update_as_many_parameters_as_the_paper_says(
    hidden: int, layers: int, full: int, progtuning: int, steps_per_epoch: int
) -> None:
    run = account(bert(hidden, layers), plan_stages(layers, 3, 3 * steps_per_epoch), steps_per_epoch)
    assert run.updated_params_full == full == run.exact_updated_params_full
    assert run.updated_params == progtuning == run.exact_updated_params


@pytest.mark.parametrize(("epochs", "percent"), [(3, 26), (2, 20)])
def test_squad_saves_what_the_paper_says(epochs: int, percent: int) -> None:
    run = account(bert(768, 12, pooler=False), plan_stages(12, epochs, epochs), 1)
    assert round(100 * run.saving) == percent


def test_stages_need_not_be_epochs() -> None:
    counts = ComponentCounts(embeddings=10, blocks=(100, 100), head=1)
    run = account(counts, plan_stages(2, 2, 9, lengths=[3, 6]), steps_per_epoch=6)
    assert [stage.epochs for stage in run.stages] == [Fraction(1, 2), 1]
    assert [stage.trainable_params for stage in run.stages] == [211, 111]
    assert run.exact_updated_params == Fraction(211, 2) + 111
    assert run.updated_params_full == round(211 * 1.5)


def test_an_empty_model_saves_nothing() -> None:
    assert account(ComponentCounts(0, (0,), 0), plan_stages(1, 1, 1), 1).saving == 0


def test_counts_and_plan_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"plan\.num_blocks must be 2 as the model's, got 3"):
        account(ComponentCounts(1, (1, 1), 1), plan_stages(3, 1, 1), 1)
    with pytest.raises(ConfigError, match="steps_per_epoch must be positive, got 0"):
        account(ComponentCounts(1, (1, 1), 1), plan_stages(2, 1, 1), 0)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"always_blocks": (1,)}, "one count for each of the 2 blocks"),
        ({"always_blocks": (6, 0)}, "always_blocks must lie within"),
        ({"always_embeddings": 11}, "counts must not be negative"),
    ],
)
def test_impossible_counts_are_refused(counts: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ComponentCounts(10, (5, 5), 1, **counts)  # type: ignore[arg-type]
