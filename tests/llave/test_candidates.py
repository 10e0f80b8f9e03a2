"""An evaluation by several processes, and one that was killed within a task."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

for needed in ("sentence_transformers", "datasets", "PIL"):
    pytest.importorskip(needed)

from llave import evaluation  # noqa: E402
from llave.evaluation import evaluate  # noqa: E402
from tests.llave.test_evaluation import (  # noqa: E402, F401 (a fixture)
    COLOURS,
    ByColour,
    _fingerprint,
    write,
)


def many(folder: Path) -> Path:
    """Write a task of 602 inputs, which make three shards. Returns its folder."""
    data = folder / "data"
    data.mkdir()
    rows = [
        (f"{name} thing {n}", "", [f"{name} {n}", "red", "blue"], [""] * 3)
        for n in range(100)
        for name in COLOURS
    ]
    write(data, "many", *rows)
    return data


def test_several_processes_give_the_result_of_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": many(tmp_path), "workers": 0}
    (expected,) = evaluate(ByColour(), ["many"], out=tmp_path / "one", **settings)
    models = [ByColour() for _ in range(3)]
    for rank in (2, 1):
        out = tmp_path / "three"
        found = evaluate(models[rank], ["many"], out=out, rank=rank, world_size=3, **settings)
        assert found == []
        assert not (out / "many.json").exists()
    found = evaluate(models[0], ["many"], out=out, rank=0, world_size=3, **settings)
    assert found == [expected]
    assert [model.encoded for model in models] == [256, 256, 602 - 512]
    assert [path.name for path in out.iterdir()] == ["many.json"]
    assert (out / "many.json").read_bytes() == (tmp_path / "one" / "many.json").read_bytes()
    # A process that comes late, after its share was dropped, leaves nothing.
    (out / ".many.inputs").mkdir()
    assert evaluate(ByColour(), ["many"], out=out, rank=1, world_size=3, **settings) == []
    assert [path.name for path in out.iterdir()] == ["many.json"]


def test_a_killed_evaluation_goes_on_within_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(ByColour):
        def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
            if self.encoded > 300:
                raise KeyboardInterrupt
            return super().__call__(features)

    Killed.__name__ = "ByColour"  # the fingerprint of these models
    out, settings = tmp_path / "out", {"data": many(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Killed(), ["many"], out=out, **settings)
    capsys.readouterr()
    monkeypatch.setattr(evaluation, "tqdm", partial(tqdm, mininterval=0, miniters=1))
    other = tmp_path / "other"
    shutil.copytree(out, other)
    model = ByColour()
    (result,) = evaluate(model, ["many"], out=out, **settings)
    assert result.rows == 300
    assert model.encoded == 602 - 256
    assert "602/602" in capsys.readouterr().err  # the bar counts what was there
    assert [path.name for path in out.iterdir()] == ["many.json"]
    Killed.__name__ = "Another"
    with pytest.raises(ValueError, match=r"many: out=.*many\.inputs holds the embeddings of ano"):
        evaluate(Killed(), ["many"], out=other, **settings)
    shutil.rmtree(other / ".many.inputs")
    (other / ".many.inputs").symlink_to(out)
    with pytest.raises(ValueError, match=r"many\.inputs is a link; move it away"):
        evaluate(ByColour(), ["many"], out=other, **settings)
