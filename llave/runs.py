"""Training runs on disk: the run that a folder belongs to, its settings and its checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from llave import sealing
from llave.files import publish, reading, refuse_damaged
from llave.recipe import SECTIONS, Recipe
from llave_kernels.atomic_files import leftovers, lock

RECORD = "run.json"
MODEL = "model"
HUB = "hub"  # folder of what the training uploads to the hub
_LOCK = ".run.lock"
_PATIENCE = 10  # seconds to wait until a killed process releases the lock
# Settings that may change when a run goes on. They do not change its losses, or they change its
# length on purpose.
MAY_CHANGE = {
    *("data.images", "data.on_error", "loss.backend", "loss.mini_batch_size"),
    *(
        f"trainer.{name}"
        for name in (
            *("max_steps", "num_train_epochs", "save_total_limit"),
            *("activation_checkpointing", "activation_checkpointing_kwargs"),
            *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
            *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
            *("dataloader_persistent_workers", "torch_empty_cache_steps"),
            *("disable_tqdm", "log_level", "log_level_replica", "report_to", "run_name"),
        )
    ),
}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a lock that keeps other processes from training in a folder.

    Raises:
        ValueError: another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # Windows lacks O_NOFOLLOW
    descriptor = os.open(folder / _LOCK, flags, 0o666)
    try:
        until = time.monotonic() + _PATIENCE
        with suppress(OSError):  # some file systems have no locks
            # inherited=False: a data loader's worker that outlives its process holds no lock.
            while not lock(descriptor, inherited=False):
                if time.monotonic() > until:
                    raise ValueError(
                        f"another process trains in trainer.output_dir={str(folder)!r}; wait for "
                        "it, or choose another"
                    )
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def check(folder: Path, recipe: Recipe, rows: dict[str, int] | None = None) -> list[str]:
    """Check that a recipe can start or continue a run in a folder. Nothing is written.

    Args:
        folder: the run's folder, ``trainer.output_dir``.
        recipe: its sections, completed.
        rows: rows of each subset, once they are loaded.

    Returns:
        A line for each setting that differs from before and may differ.

    Raises:
        ValueError: settings or rows differ that must not, the run would replace what it did not
            write, it would write into what it reads, or the folder cannot be written to.
    """
    _refuse_inputs(folder, recipe)
    there = _read(folder)
    _refuse_others(folder, there, recipe)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ValueError(
            f"trainer.output_dir={str(folder)!r} cannot be written to: {nearest} is read-only or "
            "no folder; choose another"
        )
    if there is None or not (checkpoints(folder) or (folder / MODEL).exists()):
        return []
    here = _flat(recipe, rows)
    both = [name for name in here if name in there]
    if rows is not None:  # also subsets that only one of the two has
        both += sorted(n for n in here.keys() ^ there.keys() if n.startswith("rows."))
    changed = {
        name: f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in both
        if there.get(name) != here.get(name)
    }
    if refused := [line for name, line in changed.items() if name not in MAY_CHANGE]:
        raise ValueError(
            f"trainer.output_dir={str(folder)!r} holds a run with other settings: "
            f"{'; '.join(refused)}. Choose another, or go back to its settings"
        )
    return [f"{folder} goes on with other settings: {line}" for line in changed.values()]


def take_up(folder: Path, *, best: bool) -> dict[str, Any]:
    """Put a run's folder in order, and find where the run goes on.

    What killed processes left is removed. Damaged checkpoints are set aside. Only one process calls
    this, under ``alone`` and after ``check``.

    Args:
        folder: the run's folder.
        best: whether the run ends with its best model. A checkpoint then needs the best one so far.

    Returns:
        A dict of ``run`` (the run's id), ``checkpoint`` (the one to go on from, or None), ``saved``
        (the step of the saved model, or 0) and ``lines`` (messages about damage).

    Raises:
        ValueError: the saved model is damaged.
    """
    there = _read(folder) or {}
    if "run" not in there:
        there |= {"run": uuid4().hex, "models": []}
        if (folder / RECORD).exists():
            _adopt(folder, there)
    run: str = there["run"]
    for left in leftovers(workplace(folder, run)):
        if left.is_symlink() or not left.is_dir():
            continue
        for name in (MODEL, f"{MODEL}.old"):  # the run may have been killed between two renames
            ours = _wrote(there, left / name) and sealing.problem(left / name) is None
            if ours and not os.path.lexists(folder / MODEL):
                (left / name).rename(folder / MODEL)
        shutil.rmtree(left)
    saved = 0
    if (folder / MODEL).exists():
        if (why := sealing.problem(folder / MODEL)) is not None:
            raise ValueError(
                f"{folder / MODEL} is not as this run saved it: {why}; move it away, and the same "
                "command saves it again"
            )
        saved = sealing.facts(folder / MODEL)["step"]
    checkpoint, lines = newest(folder, best=best)
    found = checkpoint and str(checkpoint)
    return {"run": run, "checkpoint": found, "saved": saved, "lines": lines}


def record(folder: Path, recipe: Recipe, rows: dict[str, int], run: str | None = None) -> None:
    """Write down a run's settings and rows, for ``check``.

    Args:
        folder: the run's folder.
        recipe: its sections, completed.
        rows: rows of each subset.
        run: the run's id. Default: a new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = (_read(folder) or {}).get("models", [])
    _write(folder, {"run": run or uuid4().hex, "models": models} | _flat(recipe, rows))


def workplace(folder: Path, run: str) -> Path:
    """Return the prefix path of a run's temporary folders. It contains the run's id."""
    return folder / f".{run}"


def is_of(folder: Path, run: str) -> bool:
    """Whether a folder still belongs to a run."""
    return (_read(folder) or {}).get("run") == run


def wrote(folder: Path, path: Path) -> bool:
    """Whether the run of ``folder`` wrote the folder ``path``. It may have changed since."""
    return _wrote(_read(folder) or {}, path)


def seal(folder: Path, path: Path, step: int) -> None:
    """Seal a checkpoint or a model.

    A checkpoint's seal has the run's id. A model's seal does not, so that runs with the same
    settings make models with the same bytes. The run's record lists its models instead.
    """
    there = _read(folder) or {}
    if path.name.startswith("checkpoint-"):
        sealing.seal(path, run=there["run"], step=step)
    else:
        sealing.seal(path, step=step)
        found = sealing.identity(path)
        if found not in there["models"]:
            _write(folder, there | {"models": [*there["models"], found]})


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the folders named like checkpoints, by step, the newest first."""
    named = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return dict(sorted(((int(n), p) for n, p in named.items() if n.isdigit()), reverse=True))


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that is as it was written. Newer ones are set aside."""
    found, _ = newest(folder)
    return None if found is None else str(found)


def newest(folder: Path, *, best: bool = False) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is as it was written, and a line for each newer one.

    The line says what is wrong with the newer one. A damaged checkpoint is renamed and kept.

    Args:
        folder: the run's folder.
        best: whether the best checkpoint so far must be whole, too.
    """
    older = "run" not in (_read(folder) or {})
    lines: list[str] = []
    for step, path in checkpoints(folder).items():
        if (why := _problem(path, step, older)) is None:
            kept = (best and _state(path)["best_global_step"]) or step
            why = None if kept == step else _problem(folder / f"checkpoint-{kept}", kept, older)
            if why is None:
                return path, lines
            lines.append(f"{path} is passed over: of the best so far, checkpoint-{kept}, {why}")
            continue
        kind = "damaged" if (path / sealing.MARKER).exists() else "unfinished"
        aside = path.with_name(f"{kind}-{path.name}-{uuid4().hex[:8]}")
        path.rename(aside)
        lines.append(f"{path} is passed over: {why}; it is kept as {aside.name}")
    return None, lines


def step_of(checkpoint: str | Path) -> int:
    """Return the step of a checkpoint."""
    step: int = _state(Path(checkpoint))["global_step"]
    return step


def _state(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())
    return found


def _problem(checkpoint: Path, step: int, older: bool) -> str | None:
    """Return what is wrong with a checkpoint, or None.

    Args:
        checkpoint: its folder.
        step: the step in its name.
        older: whether the run is from before runs had ids. Such a checkpoint may have no seal.
    """
    if older and not (checkpoint / sealing.MARKER).exists():
        try:
            with reading(checkpoint / "trainer_state.json"):
                found = step_of(checkpoint)
            refuse_damaged(checkpoint)
            for file in (*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")):
                with reading(file), zipfile.ZipFile(file) as archive:
                    if (name := archive.testzip()) is not None:
                        raise LookupError(f"{name} has other contents than were written")
        except ValueError as error:
            return str(error)
    elif (why := sealing.problem(checkpoint)) is not None:
        return why
    else:
        found = sealing.facts(checkpoint)["step"]
    return None if found == step else f"it was made at step {found}"


def _adopt(folder: Path, there: dict[str, Any]) -> None:
    """Give a run from before runs had ids its id, and seal what it wrote."""
    for step, path in checkpoints(folder).items():
        if _problem(path, step, older=True) is None:
            sealing.seal(path, run=there["run"], step=step)
    if there.get("finished") and (folder / MODEL / "modules.json").exists():
        sealing.seal(folder / MODEL, step=there["finished"])
        there["models"] = [sealing.identity(folder / MODEL)]
    _write(folder, there)


def _wrote(there: dict[str, Any], path: Path) -> bool:
    if path.is_symlink() or "run" not in there:
        return False
    return (
        sealing.identity(path) in there["models"] or sealing.facts(path).get("run") == there["run"]
    )


def _refuse_inputs(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError where the run would write into what it reads. Links are followed."""
    places = [("model", "backbone"), ("data", "train"), ("data", "images")]
    places += [("trainer", "deepspeed"), ("trainer", "fsdp_config")]
    outputs = [folder / name for name in (MODEL, RECORD, HUB, "eval")]
    outputs += checkpoints(folder).values()
    for section, setting in places:
        value = recipe.get(section, {}).get(setting)
        if not isinstance(value, str) or not os.path.exists(value):
            continue
        # The output folder must not be in these two. Its files would be read as weights or data.
        taken = setting in ("backbone", "train") and _within(folder, Path(value)) and value
        written = next((str(path) for path in outputs if _within(Path(value), path)), None)
        if there := taken or written:
            raise ValueError(
                f"trainer.output_dir={str(folder)!r}: the run would write into {there}, and it "
                f"reads {section}.{setting}={value!r}; choose another trainer.output_dir"
            )


def _within(path: Path, folder: Path) -> bool:
    """Whether a path equals ``folder`` or lies in it. Links are followed."""
    real = Path(os.path.realpath(path))
    return folder.exists() and any(
        place.exists() and place.samefile(folder) for place in (real, *real.parents)
    )


def _refuse_others(folder: Path, there: dict[str, Any] | None, recipe: Recipe) -> None:
    """Raise ValueError where the run would write over what it did not write."""
    numbered = list(checkpoints(folder).values())
    if there is None:
        names = [RECORD, MODEL, *(["eval"] if recipe["data"]["held_out"] else [])]
        names += [HUB] if recipe["trainer"].get("push_to_hub") else []
        found = [name for name in names if os.path.lexists(folder / name)]
        found += [path.name for path in numbered]
    elif "run" not in there:  # a run from before runs had ids; only a finished one wrote a model
        found = [] if there.get("finished") or not os.path.lexists(folder / MODEL) else [MODEL]
    else:
        found = [p.name for p in numbered if sealing.identity(p) and not _wrote(there, p)]
        model = folder / MODEL
        damaged = (model / sealing.MARKER).exists() and not sealing.identity(model)
        if os.path.lexists(model) and not damaged and not _wrote(there, model):
            found.append(MODEL)
    if found:
        bare = found == [MODEL] and not numbered
        what = "a model and no checkpoint to go on from" if bare else ", ".join(found)
        raise ValueError(
            f"trainer.output_dir={str(folder)!r} holds {what}, which this run did not write; "
            "choose another, or move it away"
        )


def _read(folder: Path) -> dict[str, Any] | None:
    """Return a run's record, or None where the folder has none."""
    file = folder / RECORD
    try:
        there = sealing.unsigned(file, must=False)
        if "run" in there:
            sealing.unsigned(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{error}; choose another trainer.output_dir") from error
    return there if "loss.alpha" in there else None


def _write(folder: Path, content: dict[str, Any]) -> None:
    publish(folder / RECORD, partial(Path.write_text, data=sealing.signed(content)))


def _flat(recipe: Recipe, rows: dict[str, int] | None) -> dict[str, Any]:
    whole = recipe | {"trainer": SECTIONS["trainer"] | recipe["trainer"]}
    flat = {f"{name}.{key}": value for name in whole for key, value in whole[name].items()}
    flat |= {f"rows.{name}": count for name, count in (rows or {}).items()}
    del flat["trainer.output_dir"]  # a run may be moved
    del flat["trainer.hub_token"]  # a secret
    found: dict[str, Any] = json.loads(json.dumps(flat, default=str))
    return found
