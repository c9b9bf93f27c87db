"""Links from model parameters to their high-precision masters and optimizer state.

DeepSpeed links optimizer state once, after the first group's first step, so ``safe_get_full_optimizer_state`` fails
for every later group, and again for all groups after ``load_checkpoint`` (``stage_1_and_2.py``,
``_lazy_init_hp_params_optimizer_state``). Here each group is linked as soon as it has state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def keep_linked(wrapper: Any, groups: Callable[[], Iterable[tuple[list[torch.nn.Parameter], torch.Tensor]]]) -> None:
    """Make one wrapper instance link every group's optimizer state as soon as it exists.

    Args:
        wrapper: a DeepSpeed optimizer with ``_link_all_hp_params`` and ``_lazy_init_hp_params_optimizer_state``.
        groups: the current ``(parameters, master)`` of each group.
    """
    link_masters = wrapper._link_all_hp_params

    def link_states() -> None:
        for params, master in groups():
            state = wrapper.optimizer.state.get(master)
            if state:
                _link_group(params, master, state)
        wrapper._hp_optimizer_states_linked = True

    def link_all() -> None:
        link_masters()
        link_states()

    if hasattr(wrapper, "reload_states"):
        reload = wrapper.reload_states

        def reload_states(*args: Any, **kwargs: Any) -> None:
            reload(*args, **kwargs)
            link_all()  # states come back as new tensors

        wrapper.reload_states = reload_states
    wrapper._link_all_hp_params = link_all
    wrapper._lazy_init_hp_params_optimizer_state = link_states
    link_all()


def follow_states(wrapper: Any) -> None:
    """Let links follow optimizer state that now lies elsewhere; only where `keep_linked` made some."""
    link_states = vars(wrapper).get("_lazy_init_hp_params_optimizer_state")
    if link_states is not None:
        link_states()


def _link_group(params: list[torch.nn.Parameter], master: torch.Tensor, state: dict[str, Any]) -> None:
    for param in params:
        mapping = param._hp_mapping
        if mapping is None:
            continue  # no element of this parameter is on this rank
        linked = mapping.optim_fragment
        if linked and all(
            linked[key].untyped_storage().data_ptr() == state[key].untyped_storage().data_ptr() for key in linked
        ):
            return  # the first parameter of a group speaks for all: they are linked together
        mapping.set_optim_state_fragment(master, state)
