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
    """{torch_xla's id of a tensor: its index in `tensors`}. All are tensors on an XLA device."""
    return {_XLAC._xla_get_tensor_id(tensor): place for place, tensor in enumerate(tensors)}


def changed_places(tensors: list[torch.Tensor]) -> list[int]:
    """The indices of the tensors whose value is a traced operation that has not run yet.

    These are the ones that the traced step replaces, so the memory of their old values is free for
    the results.
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
        self.key: str | None = None  # torch_xla's hash of the graph; None: not yet compiled
        # for each argument of the program: (its index in state + batch, None), or (None, the value
        # of a constant)
        self.arguments: list[tuple[int | None, Any]] = []

    @torch.no_grad()
    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        """Start the program, and return before the device has finished it.

        batch: tensors on the device, with the same names, order, shapes and dtypes at every call.
        """
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
        # operations that are still pending would become part of the program
        torch_xla.sync(wait=True)
        known = places(given)
        with torch.enable_grad():
            self.function(batch)
        state = self.state()
        self.changed = changed_places(state)
        outputs = [state[place] for place in self.changed]
        ids, arguments = _XLAC._get_tensors_xla_device_data_node(outputs)
        # An argument that is neither state nor batch is a constant of the function, such as a
        # Python number. torch_xla keeps it on the device, and every call gets the same one.
        self.arguments = [
            (known.get(tensor_id), None if tensor_id in known else value)
            for tensor_id, value in zip(ids, arguments)
        ]
        # donate the memory of each tensor that changes to the results
        with alias_with_buffer_donor_config():
            for (place, _), value in zip(self.arguments, arguments):
                if place in self.changed:
                    _XLAC._set_buffer_donation(value, True)
            self.key = _XLAC._get_graph_hash(outputs)
            _XLAC._xla_warm_up_cache(outputs, [])
        _XLAC._clear_pending_irs(str(torch_xla.device()))
        return arguments
