"""A saved folder runs in mteb like any SentenceTransformer."""

from __future__ import annotations

from pathlib import Path

import pytest

mteb = pytest.importorskip("mteb")
for needed in ("sentence_transformers", "torchvision"):
    pytest.importorskip(needed)

from mteb.models import SentenceTransformerEncoderWrapper  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from llave.modeling import build  # noqa: E402
from tests.llave import tiny  # noqa: E402


@pytest.mark.filterwarnings("ignore")  # scores of two rows are often undefined
def test_all_mock_tasks_of_text_and_images_run(tmp_path: Path) -> None:
    build(tiny.llava_onevision(), max_seq_length=256, device="cpu").save_pretrained(str(tmp_path))
    model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(tmp_path), device="cpu"))
    # mteb reads modalities from the hub's metadata. For a local folder it assumes text.
    model.mteb_model_meta.modalities = ["text", "image"]
    ran = {name: result for name, result in mteb.mock_run(model).items() if result is not None}
    failed = {name: e.exception for name, e in ran.items() if hasattr(e, "exception")}
    assert failed == {}
    assert len(ran) >= 40
    assert {"MockRetrievalTask", "MockAny2AnyRetrievalT2I", "MockImageClassification"} <= set(ran)
    assert all(result.scores for result in ran.values())
