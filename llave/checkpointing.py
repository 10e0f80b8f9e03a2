"""A trainer whose checkpoints are either complete or absent. A signal makes it save one."""

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
    """sentence-transformers' trainer, for runs that may be killed or stopped at any moment.

    A checkpoint is written under a temporary name, sealed and renamed. The run keeps
    ``save_total_limit`` of its own checkpoints. At SIGINT or SIGTERM it finishes the step and saves
    a checkpoint.

    Attributes:
        run: the id of the run. It must be set before the training.
    """

    run: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.signal = 0  # the signal that asked this process to stop
        self.stopping = 0  # the signal that all processes stop for
        self.resumed: Path | None = None
        self._made: Path | None = None  # the folder in which a checkpoint is written
        self._saved = 0  # the step of the last checkpoint
        self.add_callback(_Steps(self))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.args.output_dir)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train as the base class does.

        Raises:
            Stopped: a signal asked for it. There is a checkpoint of the last step.
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
        """Yield a temporary path for a folder, and move the folder to ``target`` at the end.

        Every process must enter.

        Raises:
            OSError: the folder could not be saved, or ``target`` is not this run's. What was at
                ``target`` stays.
        """
        place = Path(from_first(partial(self._begin, target)))
        failure: Exception | None = None
        try:
            yield place / target.name
        except Exception as error:  # a full disk raises errors of many types
            waiting = (
                self.is_fsdp_enabled or self.is_deepspeed_enabled or self.state.best_global_step
            )
            if several() and waiting:
                raise  # the other processes wait inside a collective
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
        """Remove the run's checkpoints beyond ``save_total_limit``, except the newest and the best.

        Args:
            at_end: whether the training has ended. The newest checkpoint may then be removed.
        """
        from_first(partial(self._tidy, at_end))

    def removed(self) -> OSError:
        """Return the error for a run's folder that was removed or replaced."""
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
            if sealing.problem(path, contents=False) is None:  # else a user changed its files
                away = new_folder(runs.workplace(self.folder, self.run))
                path.rename(away / path.name)  # a kill leaves no partial checkpoint
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
        """Set the best checkpoint's path in the run's folder, since a run may have been moved.

        Args:
            made: the final path of a checkpoint that is being saved.
        """
        best = self.folder / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == made or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the checkpoint is not in its place yet. ``_push`` uploads it later."""

    def _push(self, checkpoint: Path) -> None:
        # The base class uploads all of output_dir. It also writes the model there and replaces
        # what is there.
        folder, self.args.output_dir = self.args.output_dir, str(self.folder / runs.HUB)
        try:
            if self.is_world_process_zero():
                Path(self.args.output_dir).mkdir(exist_ok=True)
            super()._push_from_checkpoint(str(checkpoint))
        finally:
            self.args.output_dir = folder

    def _load_best_model(self) -> None:
        # Where the base class cannot load the best model, it keeps the last one.
        if self.stopping:
            return
        best = Path(self.state.best_model_checkpoint)
        if (why := from_first(partial(sealing.problem, best))) is not None:
            raise ValueError(f"{best}, the best checkpoint, is not as it was saved: {why}")
        self.model.model_card_data.set_best_model_step(runs.step_of(best))
        self._load_from_checkpoint(str(best))

    def _run_epoch(self, *, train_dataloader: Any, epoch: int, **kwargs: Any) -> None:
        # The base class stops only after a step, so a finished run would make one more.
        if self.state.global_step >= self.state.max_steps:
            return
        # When several processes resume within an epoch, the base class does not set the epoch of
        # the innermost sampler. That sampler would draw the first epoch's batches again.
        sampler = train_dataloader.batch_sampler
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            sampler = getattr(sampler, "batch_sampler", None)
        super()._run_epoch(train_dataloader=train_dataloader, epoch=epoch, **kwargs)
        if self.stopping and self._saved != self.state.global_step:
            self._save_checkpoint(self.model_wrapped, None)

    def take_progress(self) -> None:
        """Restore what the base class does not: losses not logged yet, and the model card's logs.

        The model card shows no durations, because they would count from the last start.
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
            # The final mean loss covers only the steps since this start.
            self._total_loss_scalar = -mean
            self._globalstep_last_logged = there["since"]

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Note a first SIGINT or SIGTERM. A later one stops at once, but not under torchrun.

        Under torchrun a Ctrl-C reaches a process twice, from the terminal and from torchrun.
        torchrun then waits and kills the process.
        """
        self.signal = self.stopping = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        owner, launched, first = os.getpid(), "TORCHELASTIC_RUN_ID" in os.environ, 0.0

        def notice(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if os.getpid() != owner:  # a data loader's worker; this process ends it
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
    shutil.rmtree(place, ignore_errors=True)  # the next start removes what stays


class _Steps(TrainerCallback):
    """Agrees on a stop after each step. Delays the checkpoint of an epoch's last step."""

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
        # The checkpoint of an epoch's last step must include what follows at the epoch's end, such
        # as its evaluation.
        self.late = control.should_save and float(state.epoch).is_integer()
        if self.late:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.late:
            control.should_save, self.late = True, False
        elif self.trainer.stopping and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False
