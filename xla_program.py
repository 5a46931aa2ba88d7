"""A training step on XLA that is traced once and then replayed.

torch_xla traces each step anew, operation by operation. For TRM these are some thousands of
operations, and tracing them takes more host time than a slice needs to compute the step. Here only
the first call traces and compiles. Each later call gives the compiled program its arguments, and
puts its results into the tensors that the step changes. torch_xla's backend for torch.compile does
the same with a captured graph; here nothing is captured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_xla
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

_XLAC = torch_xla._XLAC


def places(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """{torch_xla's number of a tensor: its place among `tensors`}."""
    return {_XLAC._xla_get_tensor_id(tensor): place for place, tensor in enumerate(tensors)}


def changed_places(tensors: list[torch.Tensor]) -> list[int]:
    """The places of the tensors that are still to be computed.

    What was in these places before the step is not needed any more.
    """
    is_pending = _XLAC._check_tensor_need_materialization(tensors)
    return [place for place, pending in enumerate(is_pending) if pending]


class XLAProgram:
    """function(batch), traced at its first call.

    function: changes the tensors of `state`, in place or by putting others into their places, and
        returns nothing. Everything else that it reads, such as numbers and configuration, is fixed
        by the first call.
    state: returns the list of all tensors on the device that `function` reads or changes, besides
        those of `batch`. At every call they have the same places and shapes.
    """

    def __init__(
        self,
        function: Callable[[dict[str, torch.Tensor]], None],
        state: Callable[[], list[torch.Tensor]],
    ):
        self.function, self.state = function, state
        self.key: str | None = None  # torch_xla's, of the compiled program
        # (place of an argument in the state and the batch, None), or (None, a constant)
        self.arguments: list[tuple[int | None, Any]] = []

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        """Start the program. batch: on the device; the same names and shapes at every call."""
        if self.key is None:
            arguments = self._trace(batch)
        else:
            given = self.state() + list(batch.values())
            arguments = [
                constant if place is None else given[place] for place, constant in self.arguments
            ]
        results = _XLAC._run_cached_graph(self.key, arguments)
        state = self.state()
        for place, result in zip(self.changed, results, strict=True):
            state[place].data = result

    def _trace(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Trace and compile; returns the program's arguments at this call."""
        given = self.state() + list(batch.values())
        torch_xla.sync(wait=True)  # what is pending would become part of the program
        known = places(given)
        with torch.enable_grad():
            self.function(batch)
        state = self.state()
        self.changed = changed_places(state)
        outputs = [state[place] for place in self.changed]
        ids, arguments = _XLAC._get_tensors_xla_device_data_node(outputs)
        # An argument that is neither state nor batch is a number of the function's own, which
        # torch_xla keeps on the device.
        self.arguments = [
            (known.get(tensor_id), None if tensor_id in known else value)
            for tensor_id, value in zip(ids, arguments)
        ]
        # a changed tensor's memory goes to the tensor that replaces it
        with alias_with_buffer_donor_config():
            for (place, _), value in zip(self.arguments, arguments):
                if place in self.changed:
                    _XLAC._set_buffer_donation(value, True)
            self.key = _XLAC._get_graph_hash(outputs)
            _XLAC._xla_warm_up_cache(outputs, [])
        _XLAC._clear_pending_irs(str(torch_xla.device()))
        return arguments
