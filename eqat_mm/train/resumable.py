"""transformers' `Trainer` with training checkpoints of our own: only what is trained, and loaded whole or not at all.

The loop stays the Trainer's. Its checkpoints hold the whole model under published names, and are loaded without asking
whether a name fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from eqat_mm.errors import EqatError
from eqat_mm.train.checkpoints import (
    DEEPSPEED,
    STATE,
    TRAINED,
    Facts,
    complete,
    newest,
    partial_of,
    path_of,
    read_trained,
    written,
)
from eqat_mm.train.parallel import kind_of, shape_of, whole

T = TypeVar("T")


class ResumableTrainer(transformers.Trainer):
    """`Trainer` whose runs end with the same bytes whether they were stopped or not."""

    @property
    def folder(self) -> Path:
        """Where its checkpoints are."""
        return Path(str(self.args.output_dir))

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run, once training has begun."""
        return self.state.max_steps

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what is trained, by the names of the modules."""
        assert isinstance(self.model, nn.Module)
        return ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)

    def last_checkpoint(self) -> tuple[Path, Facts] | None:
        """Return the newest whole checkpoint of this run; the first process looks, for all.

        Raises:
            ConfigError: it is of another number of processes, or of another kind of run.
        """
        return self._from_first(lambda: newest(self.folder, self._run(), self._shapes()))

    def take_over(self, path: Path) -> None:
        """Give the model what was trained until a checkpoint, and the Trainer its state."""
        self._take_trained(path)
        self.state = transformers.TrainerState.load_from_json(str(path / STATE))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Create the schedule; behind its last step it stays where it is."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):  # DeepSpeed's own, where a user's file asks for it, is another
            scheduler.lr_lambdas = [_until(num_training_steps, factor) for factor in scheduler.lr_lambdas]
        return scheduler

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        path = path_of(self.folder, self.state.global_step)
        with written(path):
            self._write(partial_of(path))
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.is_world_process_zero():
            complete(path, Facts(self.state.global_step, self.total, self._run(), self._shapes()))
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        values = self._values()
        folder.mkdir(parents=True, exist_ok=True)
        if self.is_world_process_zero():
            save_file(values, folder / TRAINED)
            self.state.save_to_json(str(folder / STATE))
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        if self.is_deepspeed_enabled:
            self._write_engine(folder)
        elif self.is_world_process_zero():
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_NAME)
        self._save_rng_state(str(folder))

    def _values(self) -> dict[str, Tensor]:
        """Return what is trained, in the first process; under ZeRO-3 this is the work of all, a tensor at a time."""
        values = {}
        for name, parameter in self.trained():
            value = whole(parameter)
            if self.is_world_process_zero():
                values[name] = value.cpu().contiguous()
        return values

    def _write_engine(self, folder: Path) -> None:
        engine: Any = self.model_wrapped
        engine.module_state_dict = lambda **_: {}  # the module is in a file of ours; this would hold all its buffers
        engine.save_checkpoint(str(folder), tag=DEEPSPEED, save_latest=False, exclude_frozen_parameters=True)
        if self.is_world_process_zero():
            for script in folder.glob("zero_to_*.py"):  # they rebuild a module that is not there
                script.unlink()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load nothing yet: `_prepare_for_training` does, for every kind of run in one place."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            self._take_trained(Path(resume_from_checkpoint))
        prepared: Any = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            loaded, _ = engine.load_checkpoint(
                checkpoint, tag=DEEPSPEED, load_module_strict=False, load_lr_scheduler_states=False
            )
            assert loaded is not None, checkpoint
        super()._load_optimizer_and_scheduler(checkpoint)

    @torch.no_grad()
    def _take_trained(self, path: Path) -> None:
        values, parameters = read_trained(path), dict(self.trained())
        assert values.keys() == parameters.keys()  # `last_checkpoint` compared names and shapes
        for name, parameter in parameters.items():
            assert values[name].shape == parameter.shape, name
            parameter.copy_(values[name])

    def _run(self) -> dict[str, Any]:
        """Return what must stay the same for a checkpoint to be continued."""
        args = self.args
        return {
            "processes": args.world_size,
            "kind": kind_of(args),
            "samples per step": args.world_size * args.per_device_train_batch_size * args.gradient_accumulation_steps,
            "epochs": args.num_train_epochs,
            "max_steps": args.max_steps,
        }

    def _shapes(self) -> dict[str, list[int]]:
        return {name: shape_of(value) for name, value in self.trained()}

    def _from_first(self, work: Callable[[], T]) -> T:
        """Return what the first process finds, in all of them; its error is that of all."""
        found: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                found = [work()]
            except EqatError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], EqatError):
            raise found[0]
        return found[0]  # type: ignore[no-any-return]


def _until(last: int, factor: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: factor(min(step, last))
