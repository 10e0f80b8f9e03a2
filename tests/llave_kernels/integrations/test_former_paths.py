"""What was public under another path is the same object there."""

from __future__ import annotations

from llave_kernels import scores
from llave_kernels.integrations import llave, llave_trainer
from llave_kernels.integrations import scores as former_scores


def test_former_paths_still_work() -> None:
    assert llave.WeightedClipLoss is llave_trainer.WeightedClipLoss
    assert former_scores.CrossEntropyLoss is scores.CrossEntropyLoss
    assert former_scores.scores_loss is scores.scores_loss
