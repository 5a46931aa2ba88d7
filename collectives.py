"""The workers of a run: what they exchange, and how they end together.

Two kinds of collectives. `all_reduce` sums tensors on their device (XLA, nccl or gloo) and is part
of the training step. All others pass host memory between the hosts over gloo, whatever the device:
on XLA a collective in a program that not all workers run alike would hang the slice.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from utils import UserError, WorkerGone

# A collective fails when another worker has not joined it for so long. It is more than the slowest
# thing that one worker does between two collectives while the others wait.
TIMEOUT_SECONDS = 300
T = TypeVar("T")


class Workers:
    """This worker (`rank`) and the others (`world_size` in all), which call the same methods in the
    same order.

    If there are several, the constructor waits until all have connected to MASTER_ADDR:MASTER_PORT.
    backend: as torch.distributed.init_process_group takes it. xla_model: torch_xla.core.xla_model
    where the device is an XLA device. The constructor and every method may raise WorkerGone.
    """

    def __init__(self, rank: int, world_size: int, backend: str = "gloo", xla_model: Any = None):
        self.rank, self.world_size, self.xla_model = rank, world_size, xla_model
        if world_size > 1:
            os.environ.setdefault("MASTER_PORT", "29500")
            with _stdout_closed():  # gloo prints a line from each worker
                self._collective(
                    lambda: dist.init_process_group(
                        backend,
                        rank=rank,
                        world_size=world_size,
                        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
                    )
                )

    def leave(self) -> None:
        """Wait for the other workers, then close the connections: nobody closes them while another
        still needs them."""
        if self.world_size > 1:
            self._collective(dist.barrier)
            dist.destroy_process_group()

    def _collective(self, operation: Callable[[], T]) -> T:
        """operation(); a failure means that another worker is gone, and becomes WorkerGone."""
        try:
            return operation()
        except (RuntimeError, ValueError) as error:  # gloo, nccl and the store raise these
            reason = str(error).strip().splitlines()[0][:200]
            raise WorkerGone(
                f"worker {self.rank}: another worker is gone or does not answer ({reason}): "
                "run the same command again, it goes on from the last checkpoint"
            ) from None

    # ----- how they end together -----
    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Collective, at the end of the block: wait for all workers, and learn whether one raised.

        If none raised, all continue. If any did, all end: a UserError is raised on rank 0 and the
        others exit with status 2; any other error is raised where it happened and becomes
        WorkerGone elsewhere. The block itself must contain no collective, since a worker that
        raised would be missing in it.
        """
        if self.world_size == 1:
            yield
            return
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failures: list[tuple[bool, str] | None] = [None] * self.world_size
        mine = failure and (isinstance(failure, UserError), str(failure))
        self._collective(lambda: dist.all_gather_object(failures, mine))
        mistakes = [text for is_mistake, text in filter(None, failures) if is_mistake]
        if mistakes:
            self.end_together(UserError(mistakes[0]))
        if failure:
            raise failure
        for _, text in filter(None, failures):
            raise WorkerGone(f"worker {self.rank}: another worker has failed ({text})")

    def end_together(self, error: UserError) -> NoReturn:
        """For an error that every worker has found: raise it on rank 0; the others exit with status
        2."""
        if self.rank == 0:
            raise error
        sys.exit(2)

    # ----- what they exchange -----
    def all_reduce(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Sums over the workers of a list of float32 tensors on the device: one collective for all
        of them.

        Overlapping it with the backward pass would gain nothing: every weight is used until the
        end of that pass, so no gradient is complete earlier.
        """
        if self.world_size == 1:
            return tensors
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        if self.xla_model:
            flat = self.xla_model.all_reduce(self.xla_model.REDUCE_SUM, flat)
        else:
            self._collective(lambda: dist.all_reduce(flat))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]

    def gather(self, tensors: list[torch.Tensor]) -> list[list[torch.Tensor]] | None:
        """On rank 0 [[tensor of worker 0, of worker 1, ...] for each of `tensors`], elsewhere None.

        tensors: on the CPU; of the same shapes and dtypes on every worker.
        """
        if self.world_size == 1:
            return [[tensor] for tensor in tensors]
        ours = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        flat = torch.cat(ours)
        received = (
            [torch.empty_like(flat) for _ in range(self.world_size)] if self.rank == 0 else None
        )
        self._collective(lambda: dist.gather(flat, received, dst=0))
        if received is None:
            return None
        pieces = [worker.split([len(part) for part in ours]) for worker in received]
        return [
            [worker[k].clone().view(tensor.dtype).view(tensor.shape) for worker in pieces]
            for k, tensor in enumerate(tensors)
        ]

    def broadcast_bytes(self, data: bytes | None) -> bytes | None:
        """What rank 0 gives, on every worker; what the others give is ignored."""
        if self.world_size == 1:
            return data
        length = torch.tensor([-1 if data is None else len(data)])
        self._collective(lambda: dist.broadcast(length, src=0))
        if length < 0:
            return None
        if self.rank == 0:
            buffer = torch.from_numpy(np.frombuffer(data or b"", np.uint8).copy())
        else:
            buffer = torch.empty(int(length), dtype=torch.uint8)
        self._collective(lambda: dist.broadcast(buffer, src=0))
        return buffer.numpy().tobytes()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor on the CPU with the one of rank 0; of the same shape and dtype on
        every worker."""
        if self.world_size > 1:
            self._collective(lambda: dist.broadcast(tensor, src=0))

    def any(self, flag: bool) -> bool:
        """Collective. Whether `flag` is true on any worker."""
        flags = torch.tensor([int(flag)])
        if self.world_size > 1:
            self._collective(lambda: dist.all_reduce(flags))
        return bool(flags.item())

    def start_vote(self, votes: torch.Tensor) -> Any:
        """Begin to sum `votes` (integers on the CPU) over the workers, in place. Returns what
        `wait_for_vote` takes."""
        return self._collective(lambda: dist.all_reduce(votes, async_op=True))

    def wait_for_vote(self, vote: Any) -> None:
        """Return when the sum that `start_vote` has begun is there."""
        self._collective(vote.wait)

    # ----- the key-value store, for preemption.py -----
    def second_store(self) -> "dist.PrefixStore | None":
        """A second connection to the run's key-value store, for use in another thread; None if
        there is one worker."""
        if self.world_size == 1:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(address, port, is_master=False)
        # a number of its own for each restart under torchrun, whose store outlives the workers
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        return dist.PrefixStore(f"preemption/{start}", client)

    def store_is_apart(self) -> bool:
        """Whether the store is in a process that is no worker (the parent, or torchrun). Otherwise
        it is in the process of rank 0, and is lost with it."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextlib.contextmanager
def _stdout_closed() -> Iterator[None]:
    """Discards what C++ code prints to file descriptor 1 in the block."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
