"""The host's trainer with checkpoints that are whole or not there, and that a signal asks for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import torch
from sentence_transformers import SentenceTransformerTrainer
from transformers import TrainerCallback

from llave import runs, sealing
from llave.processes import from_first, largest, part_at_exit, several
from llave.stopping import SAME_REQUEST, SIGNALS, Stopped
from llave_kernels.atomic_files import new_folder, sync

_PROGRESS = "progress.json"
_GONE = 1 << 16  # above the numbers of signals


class CheckpointingTrainer(SentenceTransformerTrainer):
    """The host's trainer, of which a run may be killed at any moment, or stopped.

    Folders are made beside, sealed and renamed. Of a run's own checkpoints ``save_total_limit`` are
    kept. At SIGINT or SIGTERM the step is finished and a checkpoint kept.

    Attributes:
        run: the id of the run, which must be set before the training.
    """

    run: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.signal = 0  # that asked this process to stop
        self.stopping = 0  # what all processes stop for
        self.resumed: Path | None = None
        self._made: Path | None = None  # where a checkpoint is made
        self._saved = 0  # the step of the last one
        self.add_callback(_Steps(self))

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.args.output_dir)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """The host's.

        Raises:
            Stopped: a signal asked for it; there is a checkpoint of the last step.
            OSError: the run's folder was removed, or a checkpoint could not be saved.
        """
        self.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        with self._noticing():
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self.stopping = largest(self.signal)
        part_at_exit()
        if self.stopping:
            raise Stopped(self.stopping)
        return result

    @contextmanager
    def saving(self, target: Path) -> Iterator[Path]:
        """Where to make a folder that then stands at ``target``. Every process must enter.

        Raises:
            OSError: it could not be saved, or another's stands there. What was there stays.
        """
        place = Path(from_first(partial(self._begin, target)))
        failure: Exception | None = None
        try:
            yield place / target.name
        except Exception as error:  # of many types, where a disk is full
            waiting = (
                self.is_fsdp_enabled or self.is_deepspeed_enabled or self.state.best_global_step
            )
            if several() and waiting:
                raise  # the other processes wait for this one in the middle of it
            failure = error
        failed = largest(int(failure is not None))
        if not failed:
            try:
                from_first(partial(self._publish, place, target))
            except (OSError, ValueError) as error:
                failed, failure = 1, error
        from_first(partial(_clear, place))
        if failed:
            part_at_exit()
            raise _unsaved(target, failure) from failure

    def tidy(self, *, at_end: bool = False) -> None:
        """Remove the run's checkpoints beyond ``save_total_limit``, but the newest and the best.

        Args:
            at_end: the newest one is not needed where the best is the only one to keep.
        """
        from_first(partial(self._tidy, at_end))

    def removed(self) -> OSError:
        """What to raise where the run's folder is not there any more, or another."""
        return OSError(
            f"trainer.output_dir={str(self.folder)!r} was removed or replaced while a run trained "
            "in it; the same command begins a new one"
        )

    def _begin(self, target: Path) -> str:
        if not runs.is_of(self.folder, self.run):
            raise self.removed()
        try:
            return str(new_folder(runs.workplace(self.folder, self.run)))
        except OSError as error:
            raise _unsaved(target, error) from error

    def _publish(self, place: Path, target: Path) -> None:
        made, old = place / target.name, place / f"{target.name}.old"
        runs.seal(self.folder, made, self.state.global_step)
        if os.path.lexists(target):
            if not runs.wrote(self.folder, target) or sealing.problem(target) is not None:
                beside = target.with_name(f"{target.name}-{uuid4().hex[:8]}")
                made.rename(beside)
                raise FileExistsError(f"it is not as this run left it, so {beside} was made")
            target.rename(old)
        try:
            made.rename(target)
        except OSError:
            if os.path.lexists(old):
                old.rename(target)
            raise
        sync(target.parent)

    def _tidy(self, at_end: bool) -> None:
        if self.limit is None:
            return
        there = runs.checkpoints(self.folder).values()
        ours = [path for path in there if runs.wrote(self.folder, path)]
        best = f"checkpoint-{self.state.best_global_step}"
        kept = {best} if at_end else {best, f"checkpoint-{self.state.global_step}"}
        spare = [path for path in ours if path.name not in kept]
        for path in spare[max(0, self.limit - len(ours) + len(spare)) :]:
            if sealing.problem(path, contents=False) is None:  # else a user put something into it
                away = new_folder(runs.workplace(self.folder, self.run))
                path.rename(away / path.name)  # so that all of it goes, or nothing
                shutil.rmtree(away)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._made or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        target = self.folder / f"checkpoint-{self.state.global_step}"
        losses = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        with self.saving(target) as made:
            self._made = made.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._made = None
            self._set_best(target)
            if self.args.should_save:
                self.state.save_to_json(str(made / "trainer_state.json"))
                progress = {
                    "losses": losses,
                    "since": self._globalstep_last_logged,
                    "card": self.accelerator.unwrap_model(self.model).model_card_data.training_logs,
                }
                (made / _PROGRESS).write_text(json.dumps(progress))
        self._saved = self.state.global_step
        if self.args.push_to_hub:
            self._push(target)
        self.tidy()

    def _set_best(self, made: Path | None = None) -> None:
        """Name the best checkpoint by where it stands, or will: runs may be moved."""
        best = self.folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == made or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called before the folder stands where it is sent from; ``_push`` does it later."""

    def _push(self, checkpoint: Path) -> None:
        # The host sends all of output_dir, and writes the model there, over what there is.
        folder, self.args.output_dir = self.args.output_dir, str(self.folder / runs.HUB)
        try:
            if self.is_world_process_zero():
                Path(self.args.output_dir).mkdir(exist_ok=True)
            super()._push_from_checkpoint(str(checkpoint))
        finally:
            self.args.output_dir = folder

    def _load_best_model(self) -> None:
        # The host goes on with the last model where it cannot load the best.
        if self.stopping:
            return
        best = Path(self.state.best_model_checkpoint)
        if (why := from_first(partial(sealing.problem, best))) is not None:
            raise ValueError(f"{best}, the best checkpoint, is not as it was saved: {why}")
        self.model.model_card_data.set_best_model_step(runs.step_of(best))
        self._load_from_checkpoint(str(best))

    def _run_epoch(self, *, train_dataloader: Any, epoch: int, **kwargs: Any) -> None:
        # The host stops only after a step: a finished run would make one more.
        if self.state.global_step >= self.state.max_steps:
            return
        # Where several processes go on within an epoch, the host does not reach the innermost
        # sampler, which would draw the first epoch's batches again.
        sampler = train_dataloader.batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None)
        super()._run_epoch(train_dataloader=train_dataloader, epoch=epoch, **kwargs)
        if self.stopping and self._saved != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)

    def take_progress(self) -> None:
        """Go on with what a checkpoint of the host lacks: the losses not logged yet, and the card.

        Durations are left out of the model card: they would be those since the last start.
        """
        card = self.accelerator.unwrap_model(self.model).model_card_data
        card._training_start_time = None
        self._set_best()
        if self.resumed is None:
            return
        self.args.eval_on_start = False
        if (self.resumed / _PROGRESS).exists():
            there = json.loads((self.resumed / _PROGRESS).read_text())
            losses, card.training_logs = there["losses"], there["card"]
            mean = sum(losses) / len(losses)
            same = len(losses) == self.args.world_size
            loss = losses[self.args.process_index] if same else mean
            self._tr_loss = torch.tensor(loss, device=self.args.device)
            self._total_loss_scalar = -mean  # the mean that ends a training is of its own steps
            self._globalstep_last_logged = there["since"]

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Note a first SIGINT or SIGTERM. A later one stops at once, but not under torchrun.

        Ctrl-C there reaches a process twice, from the terminal and from torchrun, which waits and
        then kills.
        """
        self.signal = self.stopping = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner, launched, first = os.getpid(), "TORCHELASTIC_RUN_ID" in os.environ, 0.0

        def notice(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if os.getpid() != owner:  # a data loader's worker, which this process ends
                return
            if not self.signal:
                self.signal, first = number, time.monotonic()
            elif not launched and time.monotonic() - first > SAME_REQUEST:
                raise Stopped(number)

        before = {number: signal.signal(number, notice) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _unsaved(target: Path, error: Exception | None) -> OSError:
    said = "another process failed"
    if error is not None:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return OSError(
        f"{target} could not be saved ({said}); what was saved before stays, and the same command "
        "goes on from it"
    )


def _clear(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)  # what stays is removed at the next start


class _Steps(TrainerCallback):
    """What a trainer does at the ends of steps and epochs beside the host's."""

    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self.trainer, self.late = trainer, False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.take_progress()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        here = trainer.signal
        if trainer.is_world_process_zero() and not (trainer.folder / runs.RECORD).exists():
            here = _GONE
        trainer.stopping = largest(here)
        if trainer.stopping == _GONE:
            part_at_exit()
            raise trainer.removed()
        if trainer.stopping:
            control.should_training_stop = True
        # What an epoch ends with, such as its evaluation, belongs into a checkpoint of its end.
        self.late = control.should_save and float(state.epoch).is_integer()
        if self.late:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.late:
            control.should_save, self.late = True, False
        elif self.trainer.stopping and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False
