"""The counted figures: machine code that is known by heart, the model, and the committed files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llave_kernels
from benchmarks import machine_code, prediction, traffic

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "static"
BUILT = next(Path(llave_kernels.__file__).parent.glob("_cuda*.so"), None)


def code(*lines: str) -> machine_code.Code:
    """Instructions 16 bytes apart, as cuobjdump prints them."""
    text = (f"        /*{16 * i:04x}*/    {line} ;   /* 0x0 */" for i, line in enumerate(lines))
    return machine_code.Code("\n".join(text))


# A product, then two roads to the next tile: 0x20 takes one exponential, 0x50 takes two.
ROADS = (
    "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24",
    "@P0 BRA 0x50",
    "MUFU.EX2 R1, R1",
    "NOP",
    "BRA 0x90",
    "FADD R1, R1, R2",
    "MUFU.EX2 R1, R1",
    "@!P1 MUFU.EX2 R2, R2",
    "STG.E desc[UR4][R2.64], R1",
    "@P2 BRA 0x0",
    "EXIT",
)


def test_the_epilogue_is_the_cheapest_road_with_its_exponentials() -> None:
    found = code(*ROADS)
    assert len(found.instructions) == 10  # without the NOP
    # To the next product: two jumps and an exponential, then the last jump.
    assert [found.epilogue(k) for k in (0, 1, 2, 3)] == [4, 4, 6, None]


def test_a_road_may_need_shuffles() -> None:
    found = code(
        "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24",
        "MUFU.EX2 R1, R1",
        "@P0 BRA 0x50",
        "SHFL.BFLY PT, R2, R1, 0x1, 0x1f",
        "FADD R1, R1, R2",
        "EXIT",
    )
    assert [found.epilogue(1, shuffles) for shuffles in (0, 1, 2)] == [3, 5, None]


def test_a_loop_takes_an_exponential_in_each_round() -> None:
    found = code("HMMA.16816.F32.BF16 R4, R8, R10, R4", "MUFU.EX2 R1, R1", "@P0 BRA 0x10", "EXIT")
    assert [found.epilogue(k) for k in (1, 2, 5)] == [3, 5, 11]


def test_spills_count_by_their_width() -> None:
    found = code("STL [R1], R2", "STL.64 [R1+0x8], R2", "LDL.LU.128 R4, [R1]", "LDG.E R1, [R2]")
    assert found.spill_bytes == 4 + 8 + 16


def test_the_model_is_bounded_by_its_parts() -> None:
    """A step takes no less than its products at the library's rate."""
    for d in (384, 1536, 3584):
        free = prediction.Kernel(128, 192, 128, 0, 2, 2)
        slow = prediction.Kernel(128, 192, 128, 100000, 2, 2)
        figures = [prediction.step(free, kernel, slow, 16384, 16384, d) for kernel in (free, slow)]
        assert 0.8e-12 * prediction.PRODUCT < figures[0]["tflops"] < 1e-12 * prediction.PRODUCT
        assert figures[1]["backward_ms"] > 1.5 * figures[0]["backward_ms"]
        assert figures[1]["forward_ms"] == figures[0]["forward_ms"]
        parts = sum(value for name, value in figures[0].items() if name.endswith("_ms")) / 2
        assert parts == pytest.approx(figures[0]["step_ms"])


def test_kept_similarities_are_read_instead_of_computed() -> None:
    free, slow = (prediction.Kernel(128, 192, 128, count, 2, 2) for count in (0, 100000))
    kept, again = (prediction.step(free, slow, free, 4096, 4096, d) for d in (1536, 384))
    # Four bytes for a similarity and two for dS.
    assert kept["backward_ms"] == pytest.approx(6e3 * 4096**2 / prediction.MEMORY)
    assert again["backward_ms"] > 10 * kept["backward_ms"]


def test_a_resident_tile_hides_another_ones_epilogue() -> None:
    one, two = (prediction.Kernel(128, 128, 128, 1200, count, 1) for count in (1, 2))
    assert one.seconds(8192, 8192, 1536) > 1.05 * two.seconds(8192, 8192, 1536)


@pytest.mark.long
@pytest.mark.skipif(BUILT is None, reason="the CUDA extension is not built")
def test_the_extensions_kernels_are_read() -> None:
    script = "import json; from pathlib import Path; from benchmarks import static; "
    script += f"print(json.dumps(list(static.extension(Path({str(BUILT)!r})))))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = json.loads(run.stdout)
    assert {row["kernel"] for row in rows} == {"forward", "backward", "kept", "sigmoid"}
    assert {row["element"] for row in rows} == {"bfloat16", "float16", "tf32"}
    for row in rows:
        assert row["label"] == "counted"
        assert 32 < row["registers"] <= 255
        assert row["shared_bytes"] <= prediction.SHARED
        # An element takes an exponential, a sum of it and more.
        assert 3 < row["per_element"] < 60
        assert row["epilogue"] < row["instructions"]


def test_a_triton_kernel_is_read() -> None:
    pytest.importorskip("triton")
    script = "from benchmarks import static; from llave_kernels.backends import tiles; import json;"
    script += "tile = tiles.TABLE[tiles.Kind(9, 2)].small;"
    script += "print(json.dumps(static.triton_kernel('strip_kernel', 'bf16', tile)))"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    row = json.loads(run.stdout)
    assert row["kernel"] == "backward"
    assert row["spill_bytes"] == 0
    assert 3 < row["per_element"] < 60


def test_the_page_shows_the_committed_predictions() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    with (RESULTS / "predictions.csv").open(newline="") as file:
        assert prediction.markdown(list(csv.DictReader(file))) in page


@pytest.mark.parametrize("name", ["kernels", "predictions"])
def test_committed_figures_are_labelled_counted(name: str) -> None:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert {row["label"] for row in rows} == {"counted"}
    assert {row["backend"] for row in rows} == {"cuda", "triton"}


def test_the_committed_traffic_is_what_the_formulas_give(tmp_path: Path) -> None:
    traffic.main(["--out", str(tmp_path)])
    committed = (RESULTS / "traffic.csv").read_text()
    assert (tmp_path / "traffic.csv").read_text() == committed
    assert (tmp_path / "traffic.png").stat().st_size > 10_000
    rows = list(csv.DictReader(committed.splitlines()))
    assert {row["label"] for row in rows} == {"counted"}
    # In units of a process's targets: 62 against 1,023, there and back.
    side = 2 * traffic.N * traffic.D * traffic.ITEMSIZE / traffic.MIB
    last = {row["way"]: float(row["received_mib"]) / side for row in rows[-5:]}
    assert last["llave"] == pytest.approx(62, rel=2e-3)
    assert last["llave, C = 1"] == pytest.approx(1023, rel=2e-3)
