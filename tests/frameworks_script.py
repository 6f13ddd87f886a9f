"""Train with each framework in several processes; run under torchrun by test_frameworks_together.py."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate
import lightning
import torch
import torch.nn.functional as F
import transformers
from networks import smooth_network, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynamics import Recorder, frameworks

FOLDER = Path(sys.argv[1])
DATA = TensorDataset(*(torch.cat(parts) for parts in zip(*vectors(4), strict=True)))


def squares(model: nn.Module) -> float:
    return sum(p.grad.double().square().sum().item() for p in model.parameters())


def network() -> nn.Module:
    torch.manual_seed(0)
    return smooth_network().double()


def with_lightning(path: Path) -> list[float]:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.applied = network(), []

        def forward(self, inputs: Tensor) -> Tensor:
            return self.network(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.applied.append(squares(self))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module, quiet = Module(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = frameworks.LightningRecorder(path, curvature_every=1)
    lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[callback], **quiet
    ).fit(module, DataLoader(DATA, 8))  # fmt: skip
    return module.applied


def with_accelerate(path: Path) -> list[float]:
    accelerator, model, applied = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(DATA, 8))
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(loader):
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(inputs), labels))
                if accelerator.sync_gradients:
                    applied.append(squares(model))
                optimizer.step()
                optimizer.zero_grad()
    return applied


class Squares(transformers.TrainerCallback):
    """‖g‖² as the optimizer is about to apply it."""

    def __init__(self) -> None:
        self.applied: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **training: Any) -> None:
        self.applied.append(squares(model))


def with_trainer(path: Path) -> list[float]:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11, "n_positions": 6}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    texts = torch.randint(11, (32, 6))
    arguments = transformers.TrainingArguments(
        FOLDER / "trainer", per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
        use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, optim="sgd", logging_steps=1,
    )  # fmt: skip
    squares_of, data = Squares(), [{"input_ids": text, "labels": text} for text in texts]
    callbacks = [frameworks.TrainerRecorder(path, curvature_every=1), squares_of]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return squares_of.applied


applied = {
    "lightning": with_lightning(FOLDER / "lightning.zarr"),
    "accelerate": with_accelerate(FOLDER / "accelerate.zarr"),
    "trainer": with_trainer(FOLDER / "trainer.zarr"),
}
if os.environ["RANK"] == "0":
    (FOLDER / "applied.json").write_text(json.dumps(applied))
torch.distributed.barrier()  # one that leaves while another still talks to it may end that one, too
os._exit(0)  # gloo's threads sometimes abort a process that takes leave
