"""transformers' `Trainer` with training checkpoints of our own: only what is trained, and loaded whole or not at all.

The loop stays the Trainer's. Its checkpoints hold the whole model under published names, and are loaded without asking
whether a name fits. Ours hold nothing that depends on who wrote them: a run goes on with any number of processes, with
any stage of ZeRO or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import SCHEDULER_NAME

from eqat_mm.errors import EqatError
from eqat_mm.train.checkpoints import (
    KEPT,
    STATE,
    TRAINED,
    Facts,
    complete,
    newest,
    optimizer_file,
    partial_of,
    path_of,
    read_trained,
    written,
)
from eqat_mm.train.moments import KEYS, Moments
from eqat_mm.train.parallel import shape_of, whole

T = TypeVar("T")

_BEST = "best-{}.safetensors"


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
            ConfigError: it is of another kind of run.
        """
        return self._from_first(lambda: newest(self.folder, self._run(), self._shapes()))

    def take_over(self, path: Path) -> None:
        """Give the model what was trained until a checkpoint, and the Trainer its state."""
        self._take_trained(path)
        self.state = transformers.TrainerState.load_from_json(str(path / STATE))

    def note_best(self, step: int) -> None:
        """Write what is trained now, beside what was noted before; all processes do at once."""
        path = self.folder / _BEST.format(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        with written(path):
            self._write_tensors(path, ((name, whole(value)) for name, value in self.trained()))
        if self.is_world_process_zero():
            noted = sorted(self.folder.glob(_BEST.format("*")), key=lambda file: file.stat().st_mtime_ns)
            for old in noted[:-KEPT]:  # a run that goes on from before the last may need the one before
                old.unlink()

    @torch.no_grad()
    def take_noted(self, step: int) -> bool:
        """Give the model, whole in every process, what was noted at a step; return whether it is there."""
        path = self.folder / _BEST.format(step)
        if not path.is_file():
            return False
        values = load_file(path)
        for name, parameter in self.trained():
            parameter.copy_(values[name])
        return True

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
            facts = Facts(self.state.global_step, self.total, self._run(), self._shapes())
            complete(path, facts, self.args.world_size)
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path) -> None:
        assert self.lr_scheduler is not None
        folder.mkdir(parents=True, exist_ok=True)
        self._write_tensors(folder / TRAINED, ((name, whole(value)) for name, value in self.trained()))
        moments = self._moments()
        for key in KEYS:  # one after the other: each may be as large as the model
            self._write_tensors(folder / optimizer_file(key), moments.whole(key).items())
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / STATE))
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        self._save_rng_state(str(folder))

    def _write_tensors(self, path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors in the first process; under ZeRO to make them whole is the work of all, one at a time."""
        values = {}
        for name, value in tensors:
            if self.is_world_process_zero():
                values[name] = value.detach().cpu().contiguous()
        if self.is_world_process_zero():
            save_file(values, path)

    def _moments(self) -> Moments:
        optimizer: Any = self.optimizer
        return Moments(dict(self.trained()), optimizer.optimizer)  # inside accelerate's wrapper

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load nothing yet: `_prepare_for_training` does, for every kind of run in one place."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            self._take_trained(Path(resume_from_checkpoint))
        prepared: Any = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        if resume_from_checkpoint is not None:
            self._take_optimizer(Path(resume_from_checkpoint))
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load nothing: `_prepare_for_training` has."""

    def _take_optimizer(self, path: Path) -> None:
        """Give the optimizer its moments, and the schedule its place."""
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        self._moments().take({key: load_file(path / optimizer_file(key)) for key in KEYS})
        self.lr_scheduler.load_state_dict(torch.load(path / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

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
