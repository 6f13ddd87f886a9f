"""What tests/test_processes.py runs in each of several processes: one training step after the other, recorded."""

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # as DistributedDataParallel does: once, before all forks
import torch.distributed as dist
import torch.nn.functional as F
from networks import convolutional_network, images, normalised_network, sequences, smooth_network, vectors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from dynamics import Recorder
from dynamics.loop.moments import Moments
from dynamics.recording.step import Measurement

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

_SKIPPED = (1, 3)
_PATIENCE = 120  # seconds: then they wait for each other in vain


def train(path: Path, *, kind: str, group: dist.ProcessGroup | None = None) -> None:
    """Three steps on this process's half of each batch; the ``group`` of those that train is by default all."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    convolutional = kind == "ddp with batchnorm"
    model = convolutional_network() if convolutional else smooth_network()
    batches = images(3) if convolutional else vectors(5) if kind == "ddp with skips" else vectors(3)
    mine = [tuple(part.chunk(world)[rank] for part in batch) for batch in batches]
    if accumulates := kind == "ddp with unequal batches":
        mine = [tuple(part[: 8 - 5 * (number % 2)] for part in batch) for number, batch in enumerate(vectors(6))]
    if kind == "fsdp of a part":
        model[0].requires_grad_(False)
        fully_shard(model[2])
    elif kind.startswith("fsdp"):
        fully_shard(model[0])
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if kind == "fsdp after an evaluation":  # FSDP2 leaves the last parameters as they were gathered for it
        with torch.no_grad():
            model(mine[0][0])
    sharded = kind.startswith("fsdp")
    joins = kind == "ddp with a process that ends first"
    if joins and rank:
        mine = mine[:2]
    settings = {"curvature_every": 64 if kind == "fsdp with curvature" else 0 if sharded else 1}
    with Recorder(path, model, optimizer, **settings) as recorder, model.join() if joins else nullcontext():
        told = not (kind == "ddp that tells one of its batches" and rank)
        for number, (inputs, labels) in enumerate(recorder.watch(mine) if told else mine):
            if not (accumulates and number % 2):
                optimizer.zero_grad()
            if kind == "ddp with a failure in one" and number == rank == 0:
                Measurement.step_values = {}.__getitem__  # which only the process that writes needs
            if kind == "ddp with a batch that one cannot keep" and number == rank == 1:
                Moments.now = {}.__getitem__
            if kind == "ddp with skips" and number in _SKIPPED:
                continue
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            if kind == "ddp with disturbed gradients":  # as by compression, and the mean loss is logged
                for parameter in model.parameters():
                    parameter.grad[0] *= 2
                dist.all_reduce(mean := loss.detach() / world)
                recorder.log(loss=mean)
            if kind == "fsdp":
                recorder.log(norm=nn.utils.clip_grad_norm_(model.parameters(), 1e9))
                try:
                    recorder.log(size=model[0].weight.norm())
                except ValueError as error:
                    Path(f"{path}.size.{rank}").write_text(str(error))
            if not accumulates or number % 2:
                optimizer.step()
        if kind == "ddp":
            with recorder.event("look", probe=mine):
                pass
            try:
                with recorder.event("look", probe=[(mine[0][0][:, rank:], mine[0][1])]):
                    pass
            except ValueError as error:
                Path(f"{path}.failed.{rank}").write_text(str(error))
            try:
                with recorder.event("prune", probe=mine), torch.no_grad():
                    model.module[0].weight[rank] = 0
            except ValueError as error:
                Path(f"{path}.unlike.{rank}").write_text(str(error))
        if kind == "fsdp":
            try:
                with recorder.event("look", probe=mine):
                    pass
            except ValueError as error:
                Path(f"{path}.{rank}").write_text(str(error))
    if kind == "ddp":  # the second recorder is refused in every process, not in the first alone
        try:
            Recorder(path, model, optimizer)
        except FileExistsError as error:
            Path(f"{path}.{rank}").write_text(str(error))
        try:  # each for itself, at the same place
            Recorder(f"{path}.own", model.module, optimizer).close()
        except FileExistsError as error:
            Path(f"{path}.note").write_text(*error.__notes__)


def train_by_samples(path: Path) -> None:
    """Three steps of two batches in each of two processes, which count by their samples: as a whole batch would."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(smooth_network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in vectors(3):
            optimizer.zero_grad()
            parts = list(zip(inputs.split([7, 2, 4, 3]), labels.split([7, 2, 4, 3]), strict=True))[2 * rank :][:2]
            for number, part in enumerate(parts):
                recorder.observe(part)
                with nullcontext() if number else model.no_sync():
                    loss = F.cross_entropy(model(part[0]), part[1], reduction="sum")
                    (loss * world / len(inputs)).backward()
            optimizer.step()


def train_a_part(path: Path) -> None:
    """Two steps of two batches each, of a model of which a replica is a part; the weights with a record and without."""
    rank, weights = dist.get_rank(), []
    for recorded in (False, True):
        torch.manual_seed(0)
        replica = nn.parallel.DistributedDataParallel(convolutional_network())
        model, optimizer = nn.ModuleDict({"replica": replica}), torch.optim.SGD(replica.parameters(), 0.1)
        recorder = Recorder(path, model, optimizer, objective=of_part, curvature_every=1) if recorded else None
        for number, batch in enumerate(images(4)):
            mine = tuple(part.chunk(dist.get_world_size())[rank] for part in batch)
            if recorder:
                recorder.observe(mine)
            with nullcontext() if number % 2 else replica.no_sync():
                of_part(model, mine).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        if recorder:
            recorder.close()
        weights.append(model.state_dict())
    one, other = weights
    Path(f"{path}.same.{rank}").write_text(str(all(torch.equal(one[name], other[name]) for name in one)))


def of_part(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model["replica"](batch[0]), batch[1])


def train_in_turn(path: Path, *, sharded: bool) -> None:
    """Six steps of two optimizers in turn: in between the first process writes alone, and in the end it fails."""
    rank, wrapped = dist.get_rank(), fully_shard if sharded else nn.parallel.DistributedDataParallel
    torch.manual_seed(0)
    parts = nn.ModuleDict({name: wrapped(smooth_network()) for name in "ab"})
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in parts.values()]
    settings = {"objective": of_turn, "curvature_every": 0 if sharded else 1}
    try:
        with Recorder(path, parts, optimizers, **settings) as recorder:
            for number, (inputs, labels) in enumerate(vectors(6)):
                optimizer = optimizers[number % 2]
                batch = "ab"[number % 2], inputs.chunk(2)[rank], labels.chunk(2)[rank]
                recorder.observe(batch)
                optimizer.zero_grad()
                of_turn(parts, batch).backward()
                optimizer.step()
                if rank == 0:
                    recorder.log_epoch(seconds=number) if number % 2 else recorder.flush()
                if number == 5 and rank == 0:
                    raise KeyError("one process fails")
                dist.all_reduce(torch.zeros(7))
            raise KeyError("the others end")
    except KeyError:
        if rank == 0:
            dist.all_reduce(torch.zeros(7))


def of_turn(parts: nn.Module, batch: tuple[str, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(parts[batch[0]](batch[1]), batch[2])


def train_in_parallel(path: Path) -> None:
    """Three steps of a network whose layers are split, and whose normalisation sees a part of each sequence."""
    plan = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(output_layouts=Shard(1)),
        "3": SequenceParallel(),
        "4": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    torch.manual_seed(0)
    model = parallelize_module(normalised_network(), init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Recorder(path, model, optimizer, curvature_every=0) as recorder:
        for inputs, labels in recorder.watch(sequences(3)):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
            optimizer.step()


def train_beside_an_actor(path: Path) -> None:
    """Two of three processes train."""
    learners = dist.new_group([1, 2])
    if dist.get_rank():
        train(path, kind="ddp", group=learners)


OTHERS = {
    "ddp beside an actor": train_beside_an_actor,
    "ddp as a part": train_a_part,
    "ddp by samples": train_by_samples,
    "ddp in turn": partial(train_in_turn, sharded=False),
    "fsdp in turn": partial(train_in_turn, sharded=True),
    "tensor parallel": train_in_parallel,
}


def orders(path: Path) -> Iterator[tuple[str, str, int]]:
    """What is appended to a file, line by line, until standard input ends."""
    with path.open() as lines:
        while not select.select([sys.stdin], [], [], 0.01)[0]:
            if line := lines.readline():
                yield json.loads(line)


def obey(path: Path, kind: str, count: int) -> None:
    """As one of ``count`` processes that torchrun might have started for this kind alone."""
    signal.alarm(_PATIENCE)
    os.environ["WORLD_SIZE"], rank = str(count), int(os.environ["RANK"])
    with Path(f"{path}.said.{rank}").open("w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    dist.init_process_group("gloo", f"file://{path}.rendezvous", rank=rank, world_size=count)
    OTHERS.get(kind, partial(train, kind=kind))(path)
    dist.barrier()  # one that leaves while another still talks to it may end that one, too


if __name__ == "__main__":  # forked for each order, so that nothing is imported anew
    for path, kind, count in orders(Path(sys.argv[1])):
        if (rank := int(os.environ["RANK"])) >= count:
            continue
        if not (child := os.fork()):
            status = 1
            try:
                obey(Path(path), kind, count)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)  # gloo's threads sometimes abort a process that takes leave
        _, status = os.waitpid(child, 0)
        Path(f"{path}.status.{rank}").write_text(str(os.waitstatus_to_exitcode(status)))
