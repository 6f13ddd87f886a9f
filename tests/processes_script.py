"""What tests/test_processes.py runs in each of several processes: a function for each kind of training."""

import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo  # as DistributedDataParallel does: once, before all forks
import torch.distributed as dist
import torch.nn.functional as F
from networks import (
    Batch,
    convolutional_network,
    images,
    normalised_network,
    plain_step,
    sequences,
    smooth_network,
    vectors,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from dynamics import Recorder
from dynamics.loop import processes
from dynamics.loop.moments import Moments
from dynamics.measuring.step import Measurement
from dynamics.pruning import Pruner

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

_PATIENCE = 120  # seconds: then they wait for each other in vain


class Training(NamedTuple):
    """A model, of which every process has a replica or a part, and this one's part of every batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Batch]
    rank: int


def training(
    spread: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
    network: Callable[[], nn.Module] = smooth_network,
    batches: list[Batch] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Training:
    torch.manual_seed(0)
    model, rank, world = spread(network()), dist.get_rank(group), dist.get_world_size(group)
    mine = [tuple(part.chunk(world)[rank] for part in batch) for batch in batches or vectors(3)]
    return Training(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), mine, rank)


def train(path: Path, of: Training, *, curvature_every: int = 1) -> None:
    with Recorder(path, of.model, of.optimizer, curvature_every=curvature_every) as recorder:
        for batch in recorder.watch(of.batches):
            plain_step(of.model, of.optimizer, batch)


@contextmanager
def noting(path: Path, what: str, error: type[Exception]) -> Iterator[None]:
    """Write down what this process was told, for the test to read."""
    try:
        yield
    except error as raised:
        said = "\n".join([str(raised), *getattr(raised, "__notes__", ())])
        Path(f"{path}.{what}.{dist.get_rank()}").write_text(said)


# replicas, by DistributedDataParallel


def replicas(path: Path, group: dist.ProcessGroup | None = None) -> None:
    of = training(partial(DistributedDataParallel, process_group=group), group=group)
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(of.batches):
            plain_step(of.model, of.optimizer, batch)
        with recorder.event("look", probe=of.batches):
            pass
        inputs, labels = of.batches[0]
        with noting(path, "failed", ValueError), recorder.event("look", probe=[(inputs[:, of.rank :], labels)]):
            pass
        with noting(path, "unlike", ValueError), recorder.event("prune", probe=of.batches), torch.no_grad():
            of.model.module[0].weight[of.rank] = 0
    with noting(path, "second", FileExistsError):  # in every process, not in the first alone
        Recorder(path, of.model, of.optimizer)
    with noting(path, "own", FileExistsError):  # each for itself, at the same place
        Recorder(f"{path}.own", of.model.module, of.optimizer).close()


def replicas_beside_an_actor(path: Path) -> None:
    """Two of three processes train."""
    learners = dist.new_group([1, 2])
    if dist.get_rank():
        replicas(path, learners)


def replicas_with_batchnorm(path: Path) -> None:
    train(path, training(network=convolutional_network, batches=images(3)))


def replicas_that_skip(path: Path) -> None:
    of = training(batches=vectors(5))
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(of.batches)):
            if number not in (1, 3):
                plain_step(of.model, of.optimizer, batch)


def replicas_of_which_one_changes_its_batches(path: Path) -> None:
    """It flips what it has read, in the batch, before its forward pass."""
    of = training()
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch([list(batch) for batch in of.batches]):
            batch[0] = batch[0].flip(0) if of.rank else batch[0]
            plain_step(of.model, of.optimizer, batch)


def replicas_that_accumulate(path: Path) -> None:
    """The gradients of two batches of unlike sizes, which count equally."""
    of = training()
    batches = [tuple(part[: 8 - 5 * (number % 2)] for part in batch) for number, batch in enumerate(vectors(6))]
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(batches)):
            F.cross_entropy(of.model(inputs), labels).backward()
            if number % 2:
                of.optimizer.step()
                of.optimizer.zero_grad()


def replicas_that_say_their_batches_as_they_pass(path: Path) -> None:
    """Two a step, with dropout; a hook says them, as a framework's callback does, when the forward pass has begun."""
    of = training(network=partial(convolutional_network, dropout=0.4), batches=images(6))

    def says(model: nn.Module, inputs: tuple[Tensor]) -> None:
        if not recorder.measuring:
            recorder.observe((*inputs, labels))

    losses = []
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        of.model.module.register_forward_pre_hook(says, prepend=True)
        for number, (inputs, labels) in enumerate(of.batches):
            losses.append(F.cross_entropy(of.model(inputs), labels) / 2)
            losses[-1].backward()
            if number % 2:
                of.optimizer.step()
                of.optimizer.zero_grad()
    losses = torch.stack(losses).detach()
    dist.all_reduce(losses)
    Path(f"{path}.losses.{of.rank}").write_text(json.dumps(losses.view(3, 2).mean(1).tolist()))


def replicas_with_turns_on_a_batch(path: Path) -> None:
    """Three times on each batch one of two optimizers steps, and before its backward pass its loss is logged."""
    of, losses = training(), []
    network = of.model.module
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (network[:1], network[1:])]
    with Recorder(path, of.model, optimizers, curvature_every=0) as recorder:
        for inputs, labels in recorder.watch(of.batches):
            for turn in (0, 0, 1):
                of.model.zero_grad()
                loss = F.cross_entropy(of.model(inputs), labels)
                recorder.log(loss=loss)
                losses.append(loss.item())
                loss.backward()
                optimizers[turn].step()
    Path(f"{path}.losses.{of.rank}").write_text(json.dumps(losses))


def replicas_by_samples(path: Path) -> None:
    """Two batches a step in each process count by their samples: as the whole batch would. Each logs its own mean loss.

    Of three processes the first has two thirds of the samples.
    """
    of, world = training(), dist.get_world_size()
    sizes = [7, 2, 4, 2] if world == 2 else [7, 3, 2, 1, 1, 1]
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for inputs, labels in (tuple(part[:15] for part in batch) for batch in vectors(3)):
            parts, total = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))[2 * of.rank :][:2], 0
            for number, part in enumerate(parts):
                recorder.observe(part)
                with nullcontext() if number else of.model.no_sync():
                    loss = F.cross_entropy(of.model(part[0]), part[1], reduction="sum")
                    (loss * world / len(inputs)).backward()
                total += loss.detach()
            of.optimizer.step()
            of.optimizer.zero_grad()
            recorder.log(loss=total / sum(sizes[2 * of.rank :][:2]))


def replicas_with_disturbed_gradients(path: Path) -> None:
    """As by compression; and the mean loss of all is logged."""
    of = training()
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(of.batches):
            of.optimizer.zero_grad()
            loss = F.cross_entropy(of.model(inputs), labels)
            loss.backward()
            for parameter in of.model.parameters():
                parameter.grad[0] *= 2
            dist.all_reduce(mean := loss.detach() / dist.get_world_size())
            recorder.log(loss=mean)
            of.optimizer.step()


def replicas_that_end_apart(path: Path) -> None:
    of = training()
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder, of.model.join():
        for batch in recorder.watch(of.batches[: 2 if of.rank else 3]):
            plain_step(of.model, of.optimizer, batch)


def replicas_of_which_one_fails(path: Path) -> None:
    if dist.get_rank() == 0:
        Measurement.step_values = {}.__getitem__  # which only the process that writes needs
    train(path, training())


def replicas_of_which_one_cannot_keep_a_batch(path: Path) -> None:
    of = training()
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(of.batches)):
            if number == of.rank == 1:
                Moments.now = {}.__getitem__
            plain_step(of.model, of.optimizer, batch)


def replicas_of_which_one_has_no_loss_of_its_batches(path: Path) -> None:
    """It only evaluates every other batch, so it knows two that a step may be of; it has no loss of the step's."""
    of = training(batches=vectors(6))

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        if of.rank and any(torch.equal(batch[0], used) for used, _ in of.batches[1::2]):
            raise LookupError("no loss of this batch")
        return F.cross_entropy(model(batch[0]), batch[1])

    with Recorder(path, of.model, of.optimizer, objective=objective, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(of.batches if of.rank else of.batches[1::2])):
            if number % 2 or not of.rank:
                plain_step(of.model, of.optimizer, batch)
            else:
                with torch.no_grad():
                    of.model.module(batch[0])


def replicas_of_which_one_is_told_of_batches(path: Path) -> None:
    of = training()
    with Recorder(path, of.model, of.optimizer, curvature_every=1) as recorder:
        for batch in of.batches if of.rank else recorder.watch(of.batches):
            plain_step(of.model, of.optimizer, batch)


def replicas_of_which_one_comes_late(path: Path) -> None:
    processes._LONG, of = 1.0, training()
    time.sleep(2 * of.rank)
    train(path, of)


def replicas_in_turn(path: Path) -> None:
    in_turn(path, DistributedDataParallel, curvature_every=1)


def replicas_going_on_in_turn(path: Path) -> None:
    going_on_in_turn(path, DistributedDataParallel, curvature_every=1)


def replicas_flushing_between(path: Path) -> None:
    flushing_between(path, DistributedDataParallel, curvature_every=2)


def replica_within_a_model(path: Path) -> None:
    """Two steps of two batches each, of a model of which a replica is a part; the weights with a record and without."""

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model["replica"](batch[0]), batch[1])

    weights = []
    for recorded in (False, True):
        of = training(network=convolutional_network, batches=images(4))
        model = nn.ModuleDict({"replica": of.model})
        recorder = Recorder(path, model, of.optimizer, objective=objective, curvature_every=1) if recorded else None
        for number, batch in enumerate(of.batches):
            if recorder:
                recorder.observe(batch)
            with nullcontext() if number % 2 else of.model.no_sync():
                objective(model, batch).backward()
            if number % 2:
                of.optimizer.step()
                of.optimizer.zero_grad()
        if recorder:
            recorder.close()
        weights.append(model.state_dict())
    one, other = weights
    Path(f"{path}.same.{of.rank}").write_text(str(all(torch.equal(one[name], other[name]) for name in one)))


# shards, by FSDP2 and others


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model[0])
    return fully_shard(model)


def shards(path: Path) -> None:
    of = training(sharded)
    with Recorder(path, of.model, of.optimizer, curvature_every=0) as recorder:
        for inputs, labels in recorder.watch(of.batches):
            of.optimizer.zero_grad()
            F.cross_entropy(of.model(inputs), labels).backward()
            recorder.log(norm=nn.utils.clip_grad_norm_(of.model.parameters(), 1e9))
            with noting(path, "size", ValueError):
                recorder.log(size=of.model[0].weight.norm())
            of.optimizer.step()
        with noting(path, "event", ValueError), recorder.event("look", probe=of.batches):
            pass
    with noting(path, "prune", ValueError):
        Pruner(of.model, of.optimizer, "magnitude", granularity="weight").prune(0.5)


def shards_of_a_part(path: Path) -> None:
    def spread(model: nn.Module) -> nn.Module:
        model[0].requires_grad_(False)
        fully_shard(model[2])
        return model

    train(path, training(spread), curvature_every=0)


def shards_after_an_evaluation(path: Path) -> None:
    """FSDP2 leaves the last parameters as they were gathered for it."""
    of = training(sharded)
    with torch.no_grad():
        of.model(of.batches[0][0])
    train(path, of, curvature_every=0)


def shards_with_curvature(path: Path) -> None:
    train(path, training(sharded), curvature_every=64)


def shards_in_two_dimensions_beside_an_actor(path: Path) -> None:
    """Two of three processes train, as a stage of a pipeline does, in which each shard might have copies."""
    mesh = DeviceMesh("cpu", [[1, 2]], mesh_dim_names=("copies", "parts"))
    if dist.get_rank():
        train(path, training(partial(fully_shard, mesh=mesh), group=mesh.get_group("parts")), curvature_every=0)


def shards_in_turn(path: Path) -> None:
    in_turn(path, fully_shard, curvature_every=0)


def shards_going_on_in_turn(path: Path) -> None:
    going_on_in_turn(path, fully_shard, curvature_every=0)


def shards_flushing_between(path: Path) -> None:
    flushing_between(path, fully_shard, curvature_every=0)


def layers_in_parallel(path: Path) -> None:
    """Layers are split, and the normalisation sees a part of each sequence."""
    plan = {
        "0": ColwiseParallel(),
        "2": RowwiseParallel(output_layouts=Shard(1)),
        "3": SequenceParallel(),
        "4": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    train_on_sequences(path, training(lambda model: parallelize_module(model, mesh, plan), normalised_network))


def layers_in_parallel_and_shards(path: Path) -> None:
    """Some layers are split, and all are sharded among those processes that hold the same part of them."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("sharded", "split"))

    def spread(model: nn.Module) -> nn.Module:
        parallelize_module(model, mesh["split"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["sharded"])

    train_on_sequences(path, training(spread, normalised_network))


def train_on_sequences(path: Path, of: Training) -> None:
    with Recorder(path, of.model, of.optimizer, curvature_every=0) as recorder:
        for inputs, labels in recorder.watch(sequences(3)):
            of.optimizer.zero_grad()
            F.cross_entropy(of.model(inputs).flatten(0, 1), labels.flatten()).backward()
            of.optimizer.step()


# two networks, each of which has an optimizer


class Two(NamedTuple):
    """Both of them in one module, and an optimizer of each."""

    parts: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def step(self, recorder: Recorder, number: int, which: str, *, between: Callable[[], None] = lambda: None) -> None:
        """A step of some; each is followed by what comes ``between``."""
        mine = [part.chunk(dist.get_world_size())[dist.get_rank()] for part in vectors(number + 1)[number]]
        recorder.observe((which, *mine))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = loss_of(self.parts, (which, *mine))
        recorder.log(loss=number)
        loss.backward()
        for name, optimizer in zip("ab", self.optimizers, strict=True):
            if name in which:
                optimizer.step()
                between()


def two(spread: Callable[[nn.Module], nn.Module]) -> Two:
    torch.manual_seed(0)
    parts = nn.ModuleDict({name: spread(smooth_network()) for name in "ab"})
    return Two(parts, [torch.optim.SGD(part.parameters(), 0.1) for part in parts.values()])


def loss_of(parts: nn.Module, batch: tuple[str, Tensor, Tensor]) -> Tensor:
    which, inputs, labels = batch
    return F.cross_entropy(sum(parts[name](inputs) for name in which), labels)


def in_turn(path: Path, spread: Callable[[nn.Module], nn.Module], *, curvature_every: int) -> None:
    """Six steps of two optimizers in turn: in between the first process writes alone, and in the end it fails."""
    rank, of = dist.get_rank(), two(spread)
    try:
        with Recorder(path, *of, objective=loss_of, curvature_every=curvature_every) as recorder:
            for number in range(6):
                of.step(recorder, number, "ab"[number % 2])
                if rank == 0:
                    recorder.log_epoch(seconds=number) if number % 2 else recorder.flush()
                if number == 5 and rank == 0:
                    raise KeyError("one process fails")
                dist.all_reduce(torch.zeros(7))
            raise KeyError("the others end")
    except KeyError:
        if rank == 0:
            dist.all_reduce(torch.zeros(7))


def going_on_in_turn(path: Path, spread: Callable[[nn.Module], nn.Module], *, curvature_every: int) -> None:
    """Two optimizers in turn: after a flush one of them has stepped, and a copy of the record is what goes on."""
    of, options = two(spread), {"objective": loss_of, "curvature_every": curvature_every}
    with Recorder(f"{path}.first", *of, **options) as recorder:
        for number in range(4):
            of.step(recorder, number, "ab"[number % 2])
        recorder.flush()
        if dist.get_rank() == 0:
            shutil.copytree(f"{path}.first", path)
        dist.barrier()
    with Recorder(path, *of, **options, resume=True) as recorder:
        for number in range(4, 6):
            of.step(recorder, number, "ab"[number % 2])


def flushing_between(path: Path, spread: Callable[[nn.Module], nn.Module], *, curvature_every: int) -> None:
    """Two optimizers in one step: the first process flushes when one of them is through; and without."""
    options = {"objective": loss_of, "curvature_every": curvature_every, "every": 2}
    for flushes, where in ((True, path), (False, f"{path}.plain")):
        of = two(spread)
        with Recorder(where, *of, **options) as recorder:
            between = recorder.flush if flushes and dist.get_rank() == 0 else lambda: None
            for number in range(5):
                of.step(recorder, number, "ab", between=between)


# what a process of torchrun's does


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
    globals()[kind](path)
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
