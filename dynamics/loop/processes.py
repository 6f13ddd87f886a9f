"""The processes that train one model together: which one writes the record, and what they sum or average."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..warning import warn

if TYPE_CHECKING:  # importing it takes long
    from torch.distributed.device_mesh import DeviceMesh

_Made = TypeVar("_Made")
_Name = TypeVar("_Name", bound=Hashable)
_LONG = 15.0  # seconds


class Processes:
    """How the parameters of a model are spread over processes.

    ``replicated`` (DistributedDataParallel): every process holds all parameters and the mean gradient, but sees its own
    batches; so losses and Hessian products are averaged. ``sharded`` (FSDP2): every process holds a shard of each
    parameter; so inner products are summed. Any other model belongs to this process alone.

    The group is that over which DistributedDataParallel averages or FSDP2 shards; other processes of the job, such as
    actors beside learners, take no part. Parameters that FSDP2 has unsharded for a forward pass without gradients, and
    would leave so until the next one, are sharded again.
    """

    def __init__(self, model: nn.Module) -> None:
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        modules: Iterable[Any] = model.modules() if together else ()
        for module in modules:
            if callable(getattr(module, "unshard", None)):
                module.reshard()
        self._wrappers = [one for one in model.modules() if isinstance(one, nn.parallel.DistributedDataParallel)]
        meshes = [one.device_mesh for one in model.parameters() if hasattr(one, "device_mesh")] if together else []
        self.sharded = bool(meshes)
        self.replicated = together and bool(self._wrappers) and not self.sharded
        self.together = self.sharded or self.replicated
        self._apart = together and not self.together
        first = next(model.parameters(), None)
        # NCCL sends objects by way of the present GPU, which is another process's where the loop chose none
        self._gpu = first.device.index if first is not None and first.is_cuda else -1
        self._group = None  # all
        if self.replicated:
            self._group = self._wrappers[0].process_group
        elif self.sharded:
            self._group = _group_of(max(meshes, key=lambda mesh: mesh.size()))
        self.place = dist.get_rank(self._group) if self.together else 0
        self.writes = self.place == 0
        if self.together:
            self._meet()
        elif self._apart and replica_of(model) is not None:
            warn(
                "the model is inside what DistributedDataParallel returned: its gradients are of the batches of "
                "all processes, but the recorder would evaluate those of this process only. Pass what "
                "DistributedDataParallel returned, in all processes"
            )

    def _meet(self) -> None:
        """Wait for the other processes for the first time; warn with a likely reason if they do not come."""
        text = (
            "Recorder() is waiting for other processes: create it in all processes that train the model "
            "together, not only in the first, which writes the record for all of them"
        )
        waits = threading.Timer(_LONG, warn, [text])
        waits.daemon = True
        waits.start()
        try:
            self.broadcast(None)
        finally:
            waits.cancel()

    @property
    def may_end_apart(self) -> bool:
        """Whether the loop is inside ``DDP.join()``, where one process may have batches when others have none left."""
        return self.replicated and any(one._join_config.enable for one in self._wrappers)

    def in_writer(self, make: Callable[[], _Made]) -> _Made | None:
        """Call ``make`` in the writing process: its result there, None in the others; all raise its exception."""
        made, error = None, None
        if self.writes:
            try:
                made = make()
            except Exception as raised:
                error = raised
        error = self.broadcast(error)
        if isinstance(error, OSError) and self._apart:
            error.add_note(
                "This is one of several processes, each with a recorder of its own: for one record of all of "
                "them, pass the model that DistributedDataParallel returned."
            )
        if error is not None:
            raise error
        return made

    def broadcast(self, value: _Made) -> _Made:
        """Broadcast the writing process's value to all processes."""
        if not self.together:
            return value
        told = [value]
        with torch.cuda.device(self._gpu):
            dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]

    def gathered(self, value: _Made) -> list[_Made]:
        """The values of all replicas, in the order of their ranks."""
        if not self.replicated:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(self._group)
        with torch.cuda.device(self._gpu):
            dist.all_gather_object(found, value, group=self._group)
        return found

    def all_agree(self, fine: bool, device: torch.device) -> bool:
        """Whether ``fine`` is true in every process."""
        if not self.together:
            return fine
        said = torch.tensor(float(fine), device=device)
        dist.all_reduce(said, dist.ReduceOp.MIN, self._group)
        return bool(said)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether the tensor is the same in every replica; NaN counts as 0."""
        if not self.replicated:
            return True
        first = tensor.clone()
        dist.broadcast(first, group=self._group, group_src=0)
        return self.all_agree(torch.equal(first.nan_to_num(), tensor.nan_to_num()), tensor.device)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over replicas of each tensor."""
        if self.replicated:
            tensors = [self._sendable(tensor) for tensor in tensors]
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)
            torch._foreach_div_(tensors, dist.get_world_size(self._group))
        return list(tensors)

    def _sendable(self, tensor: Tensor) -> Tensor:
        """The tensor, on the model's GPU if it has one, because NCCL takes no other."""
        return tensor.contiguous() if tensor.is_cuda or self._gpu < 0 else tensor.to(f"cuda:{self._gpu}")

    def sum(self, values: dict[_Name, Tensor]) -> dict[_Name, Tensor]:
        """The sum of each value over the sharding processes."""
        if not self.sharded or not values:
            return values
        stacked = torch.stack(list(values.values()))
        dist.all_reduce(stacked, group=self._group)
        return dict(zip(values, stacked.unbind(), strict=True))

    def mean_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over replicas of each value."""
        return dict(zip(values, self.mean([value.detach() for value in values.values()]), strict=True))


def replica_of(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DistributedDataParallel wrapper around a model or around a module that contains it; None if there is none.

    The model holds no reference to its wrapper, so all live objects are searched.
    """
    if not (dist.is_available() and dist.is_initialized()):  # the search takes a while
        return None
    made = [one for one in gc.get_objects() if issubclass(type(one), nn.parallel.DistributedDataParallel)]
    return next((one for one in made if any(module is model for module in one.modules())), None)


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of all processes of a mesh; None if these are all processes of the job."""
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) == dist.get_world_size():
        return None
    return dist.new_group(ranks, use_local_synchronization=True)  # type: ignore[return-value]  # an int elsewhere only
