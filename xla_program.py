"""A training step on XLA that is traced once and then replayed.

torch_xla traces a step anew each time, operation by operation: for TRM some thousands of them, and more host time than a slice
needs to compute the step. Here the first call traces and compiles; each later one hands the compiled program its arguments and
gives the results to the tensors that the step changes. What torch_xla's own torch.compile backend does with a captured graph,
without the capture.
"""

import torch
import torch_xla
from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

_XLAC = torch_xla._XLAC


def places(tensors):
    """{what torch_xla knows a tensor by: its place among `tensors`}."""
    return {_XLAC._xla_get_tensor_id(tensor): place for place, tensor in enumerate(tensors)}


def changed_places(tensors):
    """[place] of those that are still to be computed: what was in these places before is done with."""
    return [
        place
        for place, pending in enumerate(_XLAC._check_tensor_need_materialization(tensors))
        if pending
    ]


class XLAProgram:
    """function(batch), traced at its first call.

    function: changes the tensors of `state` (in place, or by putting others in their places) and returns nothing. All else that
    it reads, numbers and configuration, is fixed by the first call.
    state: a function that returns the list of all tensors on the device that `function` reads or changes, besides those of
    `batch`; the same places at every call, with the same shapes.
    """

    def __init__(self, function, state):
        self.function, self.state, self.key = function, state, None

    @torch.no_grad()
    def __call__(self, batch):
        """batch: {name: tensor on the device}; the same names and shapes at every call."""
        if self.key is None:
            arguments = self._trace(batch)
        else:
            given = self.state() + list(batch.values())
            arguments = [
                given[place] if constant is None else constant for place, constant in self.arguments
            ]
        results = _XLAC._run_cached_graph(self.key, arguments)
        state = self.state()
        for place, result in zip(self.changed, results, strict=True):
            state[place].data = result

    def _trace(self, batch):
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
        # an argument that is neither state nor batch is a number of the function's own, which torch_xla keeps on the device
        self.arguments = [
            (known.get(tensor_id), None if tensor_id in known else value)
            for tensor_id, value in zip(ids, arguments)
        ]
        with alias_with_buffer_donor_config():  # a changed tensor's memory goes to its successor
            for (place, _), value in zip(self.arguments, arguments):
                if place in self.changed:
                    _XLAC._set_buffer_donation(value, True)
            self.key = _XLAC._get_graph_hash(outputs)
            _XLAC._xla_warm_up_cache(outputs, [])
        _XLAC._clear_pending_irs(str(torch_xla.device()))
        return arguments
