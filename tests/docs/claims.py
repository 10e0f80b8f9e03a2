"""What the pages say in figures, filled in from the committed CSVs and constants."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks import prediction, traffic
from llave import index
from llave_kernels.backends import products, strip_gemm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
TRAFFIC, PREDICTIONS = "../static/traffic.csv", "../static/predictions.csv"
EMOJI, DOCSTRINGS = (
    f"../../../examples/results/{name}/runs.csv" for name in ("emoji", "finetune_docstrings")
)
STAND_IN, SLOW = "stand-in, 500 ms a batch", 10.0  # as in the CSV of feeding
PYPROJECT = ROOT / "pyproject.toml"
VIT = "ViT-B/16 and CLIP's text model (150M)"
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """Of a CSV, or of the only one in a folder."""
    (file,) = [RESULTS / name] if name.endswith(".csv") else (RESULTS / name).glob("*.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def row(name: str, **wanted: object) -> Row:
    (found,) = (r for r in rows(name) if all(r[key] == str(value) for key, value in wanted.items()))
    return found


def step(name: str, impl: str, n: int = 8192, d: int = 384, data: str = "random") -> float:
    return float(row(name, impl=impl, n=n, d=d, data=data)["step_ms"])


def cost(name: str, impl: str, n: int) -> str:
    found = row(name, impl=impl, n=n, d=384, data="random")
    return f"{float(found['step_ms']) / 1000:.0f} s and {float(found['extra_mib']):,.0f} MiB"


def faster(name: str, other: str, d: int) -> str:
    return f"{step(name, other, d=d) / step(name, 'llave-torch', d=d):.1f}"


def wider(other: str, d: int) -> str:
    return f"{step('widths', other, 4096, d) / step('widths', 'llave-torch', 4096, d):.1f}"


def feeding(device: str, delay: float, workers: int) -> str:
    found = row("feeding", device=device, decoder_ms=delay, workers=workers)
    return f"{100 * float(found['busy']):.1f} %, {float(found['pictures_per_s']):.1f}"


def of_loss(name: str, other: str, d: int = 384) -> str:
    ours, theirs = (step(f"losses/{name}", impl, 4096, d) for impl in ("llave-torch", other))
    return f"{theirs / ours:.1f}"


def host(way: str) -> str:
    return f"{float(row('host_time', way=way)['ratio']):.1f}"


def rate(name: str, impl: str) -> str:
    return f"{float(row(name, impl=impl, n=8192, d=384)['tflops']):.2f}"


def plain_product(name: str) -> str:
    return f"{float(rows(name)[0]['ceiling_tflops']):.2f} TFLOP/s"


def received(processes: int) -> str:
    """Milliseconds with C = 1, and on the grid."""
    wide, grid = (
        row(TRAFFIC, way=way, processes=processes)["ms_at_50_gb_s"]
        for way in ("llave, C = 1", "llave")
    )
    return f"{float(wide):.0f} ms, {float(grid):.0f} ms"


def held(way: str) -> float:
    return float(row(TRAFFIC, way=way, processes=1024)["held_mib"])


def encoder(name: str, n: int) -> str:
    """Milliseconds of 1,024 pairs."""
    (found,) = (r for r in rows("share") if (r["encoder"], r["n"]) == (name, str(n)))
    return f"{float(found['encoder_ms']) * 1024 / n:,.0f} ms"


def precision(alpha: str, task: str) -> list[float]:
    """Of each seed."""
    chosen = [r for r in rows(EMOJI) if (r["alpha"], r["task"]) == (alpha, task)]
    return [float(r["precision"]) for r in chosen]


def over_chance() -> str:
    """From the worst mean over the seeds to the best. Chance is 2 %."""
    means = [mean(precision(r["alpha"], r["task"])) / 2 for r in rows(EMOJI)]
    return f"{min(means):.0f} to {max(means):.0f} times as often as chance"


def dense_gib() -> float:
    """With 8,192 rows on both sides."""
    return float(row("both", impl="dense", n=8192, d=384)["extra_mib"]) / 1024


def of_trainings(column: str) -> str:
    """What all trainings on docstrings share."""
    (found,) = {r[column] for r in rows(DOCSTRINGS) if r["alpha"]}
    return f"{int(found):,}"


def estimated(billions: float) -> str:
    """Hours of a training."""
    return f"{662e3 * 2000 * 10 * billions * 1e9 / (8 * 0.4 * 989e12) / 3600:.0f}"


def gib(size: float) -> str:
    return f"{size / 2**30:g} GiB"


OF_ALL_CPUS = [
    faster(name, "authors", 384) for name in ("both", "both_half_rate", "both_intel", "sizes")
]
# From a page to a part of it, with the figures filled in.
CLAIMS: list[tuple[str, Callable[[], str]]] = [
    (
        "README.md",
        lambda: (
            f"{min(OF_ALL_CPUS)} to {max(OF_ALL_CPUS)} times "
            "as fast as the authors' loss at N = M = 8,192 and D = 384"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"our loss is {faster('both', 'authors', 384)} (D = 384) and "
            f"{faster('both', 'authors', 1024)} (D = 1,024) times as fast as the authors' loss"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"it is {faster('one_direction', 'sentence-transformers', 384)} and "
            f"{faster('one_direction', 'sentence-transformers', 1024)} times as fast as the loss "
            "of sentence-transformers"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"then {faster('both_half_rate', 'authors', 384)} and "
            f"{faster('both_half_rate', 'authors', 1024)} times as fast as the authors'"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"Our loss is {faster('both_intel', 'authors', 384)} (D = 384) and "
            f"{faster('both_intel', 'authors', 1024)} (D = 1,024) times as fast as the authors'."
        ),
    ),
    *(
        (
            "docs/results.md",
            lambda name=name: (
                f"{name}/loss_bench.csv)): at N = 1,024 the compiled dense loss is faster "
                f"({step(name, 'dense-compiled', 1024):.0f} ms against "
                f"{step(name, 'llave-torch', 1024):.0f}), at N = 4,096 ours is "
                f"({step(name, 'llave-torch', 4096):.0f} ms against "
                f"{step(name, 'dense-compiled', 4096):.0f})"
            ),
        )
        for name in ("default_half_rate", "default_intel")
    ),
    (
        "docs/results.md",
        lambda: (
            "On the real pairs ours takes {} ms, the compiled dense loss {} ms and the".format(
                *(
                    round(step("default_intel", impl, 2037, data="docstrings"))
                    for impl in ("llave-torch", "dense-compiled")
                )
            )
            + f" authors' {step('default_intel', 'authors', 2037, data='docstrings'):.0f} ms"
        ),
    ),
    (
        "docs/results.md",
        lambda: f"use AVX-512, and a plain product reaches {plain_product('both_intel')}",
    ),
    (
        "docs/results.md",
        lambda: (
            f"At N = 8,192 our loss is {faster('sizes', 'authors', 384)} times as fast as the "
            "authors'. At N = 32,768"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"Our loss is {wider('authors', 128)} (D = 128) to {wider('authors', 2048)} "
            f"(D = 2,048) times as fast as the authors'. It is {wider('dense-compiled', 128)} to "
            f"{wider('dense-compiled', 2048)} times as fast as the compiled dense loss"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"Ours takes {cost('sizes', 'llave-torch', 32768)} a step there, OpenCLIP's takes "
            f"{cost('sizes', 'open-clip', 32768)}."
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"a step takes {step('default', 'llave-torch', 1024):.1f} ms, and the compiled dense "
            f"loss takes {step('default', 'dense-compiled', 1024):.1f} ms"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"At N = 4,096 our call is {of_loss('supcon', 'pytorch-metric-learning')} (SupCon), "
            f"{of_loss('within', 'sentence-transformers')} (within both sides), "
            f"{of_loss('matryoshka', 'sentence-transformers', 768)} (five lengths) and "
            f"{of_loss('sigmoid', 'open_clip')} (SigLIP) times as fast as the trainer's own class"
        ),
    ),
    (
        "docs/performance.md",
        lambda: (
            f"In eager calls it takes {host('ours')} times as long as the dense loss, and "
            f"{host('ours, by the operator that graphs take')} times as long where a graph"
        ),
    ),
    (
        "docs/when.md",
        lambda: (
            f"{dense_gib():.1f} GiB at N = M = 8,192, and some {16 * dense_gib():.0f} GiB at 32,768"
        ),
    ),
    *(
        (
            "docs/scale.md",
            lambda device=device, name=name, delay=delay, decoder=decoder: (
                f"| {name} | {decoder} | {feeding(device, delay, 0)} "
                f"| {feeding(device, delay, 2)} |"
            ),
        )
        for device, name in (
            ("cpu", "small model on the CPU"),
            (STAND_IN, "stand-in for a GPU"),
        )
        for decoder, delay in (("plain", 0.0), ("slow", SLOW))
    ),
    (
        "docs/results.md",
        lambda: (
            f"our loss reaches {rate('both_half_rate', 'llave-torch')} TFLOP/s there instead of "
            f"{rate('both', 'llave-torch')}. The authors' loss, whose products do not use AVX-512, "
            f"takes {step('both_half_rate', 'authors'):,.0f} ms instead of "
            f"{step('both', 'authors'):,.0f}."
        ),
    ),
    ("docs/results.md", lambda: f"a plain product reaches {plain_product('sizes')}"),
    (
        "docs/results.md",
        lambda: (
            "The nine trainings took "
            f"{sum(float(r['seconds']) for r in rows(DOCSTRINGS)) / 60:.0f} minutes"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"trains on {of_trainings('train_pairs')} (docstring, signature) pairs with scale 50, "
            f"both directions, and {of_trainings('steps')} batches of {of_trainings('batch')}. It "
            f"then retrieves among {of_trainings('test_pairs')} pairs"
        ),
    ),
    ("docs/results.md", over_chance),
    (
        "docs/distributed.md",
        lambda: f"| {VIT} | {encoder(VIT, 4096)} | {received(64)} | {received(1024)} |",
    ),
    (
        "docs/distributed.md",
        lambda: (
            f"| 2B, 2,000 tokens a pair, gradient caching | {encoder('2B', 1024)} "
            f"| {received(64)} | {received(1024)} |"
        ),
    ),
    (
        "docs/distributed.md",
        lambda: (
            f"holds {held('llave, C = 1') / 1024:.1f} GiB of embeddings and gradients with C = 1, "
            f"and {held('llave'):.0f} MiB on the grid"
        ),
    ),
    (
        "docs/devices.md",
        lambda: (
            f"fit {strip_gemm.WORKSPACE >> 20} MiB (N = M = 8,192) and a row of embeddings has at "
            f"least {strip_gemm.KEPT_ROW:,} bytes, or if they fit {strip_gemm.L2 >> 20} MiB "
            f"(N = M = 2,048) and a row has at least {strip_gemm.KEPT_ROW_IN_L2:,} bytes"
        ),
    ),
    ("docs/performance.md", lambda: f"of at most {strip_gemm.WORKSPACE >> 20} MiB"),
    ("docs/when.md", lambda: f"Ours keeps a part of one, at most {strip_gemm.WORKSPACE >> 20} MiB"),
    ("docs/performance.md", lambda: f"assumes {prediction.PRODUCT / 1e12:.0f} TFLOP/s"),
    ("docs/performance.md", lambda: prediction.markdown(rows(PREDICTIONS))),
    (
        "docs/performance.md",  # dT in float32 and the workspace, as counted in test_memory.py
        lambda: (
            "At N = M = 65,536 and D = 1,536 in bfloat16 it takes "
            f"{(65536 * 1536 * 4 + strip_gemm.WORKSPACE) / 1e9:.1f} GB"
        ),
    ),
    (
        "docs/llave.md",
        lambda: (
            f"up to {index.FLAT_ROWS:,} rows, a graph up to {gib(index.GRAPH_BYTES)} of float32"
        ),
    ),
    ("docs/devices.md", lambda: f"in parts of {products.WIDENED * 4 >> 20} MiB"),
    ("docs/distributed.md", lambda: f"at {traffic.RATES['ms_at_50_gb_s'] / 1e9:.0f} GB/s:"),
    ("docs/results.md", lambda: f"at most 50 candidates, so chance is {100 / 50:.0f} %"),
    ("docs/scale.md", lambda: f"sleeps {STAND_IN.split()[1]} ms per batch of 32"),
    ("docs/scale.md", lambda: f"decoder waits {SLOW:g} ms before each picture"),
    (
        "docs/scale.md",
        lambda: (
            f"waits {SLOW:g} ms for each picture reads at most {1000 / SLOW:.0f} pictures a "
            f"second, so a model that takes {feeding('cpu', 0.0, 2).split()[-1][:3]} needs three"
        ),
    ),
    (
        "CONTRIBUTING.md",
        lambda: "test that takes {:.0f} minutes ends".format(
            int(re.findall(r"faulthandler_timeout = (\d+)", PYPROJECT.read_text())[0]) / 60
        ),
    ),
    (
        "docs/llave.md",
        lambda: (
            f"{estimated(0.9)} hour for 0.5B, {estimated(1.9)} for 2B, {estimated(8.0)} for 7B. "
            "The estimate assumes 662K pairs with 2,000 tokens each, and 8 H100 at 40 % of 989 "
            "TFLOP/s. It counts 10 FLOP per parameter and token for two forwards, a recomputation "
            "and a backward, and 0.9, 1.9 and 8.0 billion parameters with the vision tower"
        ),
    ),
]
# Figures that stand in no file, with what made them.
BY_HAND = {
    "README.md": {"4.5 minutes": "the commands above it"},
    "docs/devices.md": {
        "2 s": "tests/llave_kernels/backends/test_triton_compile.py --durations=0; ptxas",
        "1.3 to 1.9 s": "ptxas -arch=sm_120 of the PTX in the extension",
    },
    "docs/input.md": {"1 GB": "files of LLAVE_MAX_PIXELS", "2 GB": "the same"},
    "docs/llave.md": {"4.5 minutes": "the commands above it"},
    "docs/results.md": {"24 GB": "memory of the machine"},
}
