"""What a training leaves alone, what it notices, and how it ends and goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

import torch  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llave import runs, sealing  # noqa: E402
from llave.stopping import Stopped  # noqa: E402
from llave.trainer import EmbeddingTrainer  # noqa: E402
from llave.training import fit, read_recipe, train  # noqa: E402
from tests.drills.train import drill  # noqa: E402
from tests.llave import tiny, train_worker  # noqa: E402
from tests.llave.test_training import contents, logged, words  # noqa: E402

LORA = ("--model.lora", "{r: 2, target_modules: [q_proj]}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps that nobody disturbed."""
    out = tmp_path_factory.mktemp("durability") / "whole"
    train_worker.train(str(out))
    return out


class KilledError(Exception):
    """In place of a kill, where the process lives on."""


def killed(out: Path, point: str, times: int, *overrides: str) -> None:
    """A run that ends at a point as if killed there: nothing after it is done."""

    def die() -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        # What is undone on the way out would not be undone by a kill.
        patch.setattr("llave.checkpointing._clear", lambda place: None)
        owner, attribute, *_ = train_worker.POINTS[point]
        patch.setattr(owner, attribute, getattr(owner, attribute))
        train_worker.die_at(point, times, die)
        with pytest.raises((KilledError, OSError)):
            train_worker.train(str(out), *overrides)


def copied(run: Path, out: Path, *but: str) -> Path:
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(*but))
    return out
