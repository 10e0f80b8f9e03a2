"""Training runs on disk: where one goes on, and the settings it was started with."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from llave.files import publish
from llave.recipe import SECTIONS, Recipe

RECORD = "run.json"
# What a run may go on with others of: its losses stay what they would have been, or its length is
# what was meant to change.
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


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; unfinished ones are set aside."""
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for step, path in sorted(numbered, reverse=True):
        try:
            if step_of(path) == step:
                return str(path)
        except (OSError, ValueError, KeyError):
            pass
        path.rename(path.with_name(f"unfinished-{path.name}-{os.getpid()}"))
    return None


def step_of(checkpoint: str | Path) -> int:
    """The step a checkpoint was made at, from the file that is written last."""
    step: int = json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]
    return step


def check(folder: Path, recipe: Recipe, rows: dict[str, int] | None = None) -> list[str]:
    """A line for each setting that a run goes on with others of than it had.

    Args:
        folder: the run's, ``trainer.output_dir``.
        recipe: its sections, completed.
        rows: of each subset, once they are loaded.

    Raises:
        ValueError: settings or rows differ that must not, or the folder holds a model and no
            checkpoint to go on from.
    """
    if not any(folder.glob("checkpoint-*/trainer_state.json")):
        if (folder / "model" / "modules.json").exists():
            raise ValueError(
                f"trainer.output_dir={str(folder)!r} holds a model and no checkpoint to go on "
                "from; choose another, or move the model away"
            )
        return []
    try:
        there = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return [f"{folder} has no {RECORD}: the settings of its checkpoints are not known"]
    except ValueError as error:
        raise ValueError(
            f"{folder / RECORD} cannot be read ({error}); choose another trainer.output_dir"
        ) from error
    here = _record(recipe, rows)
    both = [name for name in here if name in there]
    if rows is not None:  # of subsets that one of the two lacks, too
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


def finished(folder: Path) -> int:
    """The step at which the run in this folder ended, 0 if it did not."""
    try:
        step: int = json.loads((folder / RECORD).read_text()).get("finished", 0)
    except FileNotFoundError:
        return 0
    return step


def record(folder: Path, recipe: Recipe, rows: dict[str, int], *, finished: int = 0) -> None:
    """Write down what a run is started with, for ``check``, or that it ended at a step."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_record(recipe, rows) | {"finished": finished}, indent=1)
    publish(folder / RECORD, partial(Path.write_text, data=text))


def _record(recipe: Recipe, rows: dict[str, int] | None) -> dict[str, Any]:
    whole = recipe | {"trainer": SECTIONS["trainer"] | recipe["trainer"]}
    flat = {f"{name}.{key}": value for name in whole for key, value in whole[name].items()}
    flat |= {f"rows.{name}": count for name, count in (rows or {}).items()}
    del flat["trainer.output_dir"]  # a run may be moved
    del flat["trainer.hub_token"]  # a secret
    found: dict[str, Any] = json.loads(json.dumps(flat, default=str))
    return found
