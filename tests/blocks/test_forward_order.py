"""Reading the order of use from the source of forward, one way of writing a forward at a time."""

import pytest
import torch
from torch import nn

from progtuning_ds.blocks.forward_order import loops_over, uses_after


class Model(nn.Module):
    """Registered in an order that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.before = nn.Linear(2, 2)
        self.between = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.unused = nn.Linear(2, 2)
        self.inner_name = "layers"


EXPECTED = {"before": False, "after": True}


class Plain(Model):
    def forward(self, x):
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.after(x)


class Nested(Model):
    def forward(self, x):
        return self.after(nn.Sequential(*self.layers)(self.before(x)))


class Enumerated(Model):
    def forward(self, x):
        x = self.before(x)
        for index, layer in enumerate(self.layers[: len(self.layers)]):
            if index == 0:
                x = self.between(x)
            x = layer(x)
        return self.after(x)


class Subscripted(Model):
    def forward(self, x):
        x = self.before(x)
        for index in range(3):
            x = self.layers[index](x)
            x = self.between(x)
        return self.after(x)


class Aliased(Model):
    def forward(self, x):
        layers = self.layers
        last = self.after
        x = self.before(x)
        for layer in layers:
            x = layer(x)
        return last(x)


class MentionedEarly(Model):
    def forward(self, x):
        x = x.to(self.after.weight.dtype)
        if self.after is not None:
            x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.after(x)


class InMethods(Model):
    def first(self, x):
        return self.before(x)

    def run(this, x):  # the first argument may have any name
        for layer in this.layers:
            x = layer(x)
        return x

    @property
    def last(self):
        return self.after

    def forward(self, x):
        x = self.first(x)
        x = self.run(x)
        return self.last(x)


class InParent(Plain):
    def forward(self, x):
        return super().forward(x) * self.scale


class ByName(Model):
    def forward(self, x):
        x = self.before(x)
        for layer in getattr(self, self.inner_name):
            x = layer(x)
        return getattr(self, "after")(x)  # noqa: B009


class Recursive(Model):
    def forward(self, x, again=True):
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.after(self.forward(x, False) if again else x)


@pytest.mark.parametrize(
    "kind",
    [Plain, Nested, Enumerated, Subscripted, Aliased, MentionedEarly, InMethods, InParent, ByName, Recursive],
)
def test_the_order_is_read_from_source_and_is_that_of_a_real_run(kind: type[Model]) -> None:
    model = kind()
    order = uses_after(model, "layers")
    assert {name: order[name] for name in EXPECTED} == EXPECTED
    assert "unused" not in order

    entered: list[nn.Module] = []
    for module in (model.before, model.after, model.layers[-1]):
        module.register_forward_pre_hook(lambda m, _: entered.append(m))
    model(torch.ones(1, 2))
    assert entered[:2] == [model.before, model.layers[-1]]
    assert model.after in entered[2:]


@pytest.mark.parametrize("kind", [Enumerated, Subscripted])
def test_what_runs_between_the_blocks_does_not_come_after_them(kind: type[Model]) -> None:
    assert uses_after(kind(), "layers")["between"] is False


def test_a_parameter_counts_like_a_module() -> None:
    assert uses_after(InParent(), "layers")["scale"] is True


def test_a_loop_over_the_blocks_is_told_from_one_that_picks_them() -> None:
    assert all(loops_over(kind(), "layers") for kind in (Plain, Enumerated, Aliased, InMethods, InParent, ByName))
    assert not loops_over(Subscripted(), "layers")


def test_unreadable_source_says_nothing() -> None:
    scope: dict[str, type[Model]] = {"Model": Model}
    exec("class Hidden(Model):\n    def forward(self, x):\n        return self.after(x)", scope)
    assert uses_after(scope["Hidden"](), "layers") == {}
    assert uses_after(nn.ModuleList([nn.Linear(1, 1)]), "0") == {}
    assert uses_after(Plain(), "unused") == {}
