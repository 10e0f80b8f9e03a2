"""Imports, errors and machine code of the compiled CUDA extension. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llave_kernels
from benchmarks import machine_code
from llave_kernels.backends import cuda, strip_gemm
from llave_kernels.backends.cuda import _cuda as simulated
from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.rules import HARDNESS_MODES, WITHIN, Rules
from tests.helpers import embeddings

ROOT = Path(__file__).parents[2]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")  # the folder may hold other Pythons' builds
BUILT = next(Path(llave_kernels.__file__).parent.glob(f"_cuda{SUFFIX}"), None)
needs_build = pytest.mark.skipif(BUILT is None, reason="the CUDA extension is not built")
needs_simulation = pytest.mark.skipif(
    getattr(simulated, "device", "") != "cpu", reason="no simulation"
)
ADDRESS = 1 << 20  # aligned, not null, never read

PROBLEM = {
    "type": "bfloat16",
    **dict.fromkeys(("query", "target", "scale", "labels"), ADDRESS),
    **dict.fromkeys(("owners", "query_ids", "target_ids", "row_limit", "column_limit"), 0),
    "query_stride": 64,
    "target_stride": 64,
    "n": 300,
    "m": 500,
    "d": 64,
    "alpha": 9.0,
    "target_alpha": 9.0,
    "hardness": "in_batch",
    "symmetric": True,
}
STRIP = {"device": 0, "architecture": 80, "start": 0, "stop": 300, "stream": 0}
LSES = {"query_lse": ADDRESS, "target_lse": ADDRESS}
FORWARD = STRIP | LSES | {"workspace": ADDRESS, "workspace_bytes": 1 << 30, "positive": ADDRESS}
BACKWARD = (
    STRIP
    | LSES
    | dict.fromkeys(("d_positive", "d_query_lse", "d_target_lse", "ds"), ADDRESS)
    | {"gain": 0, "pitch": 504}
)
LOSS = (
    {"device": 0, "stream": 0, "weight": 1.0}
    | LSES
    | dict.fromkeys(("positive", "total", "gain", "d_positive", "d_query_lse"), ADDRESS)
    | {"d_target_lse": ADDRESS}
)
ARGUMENTS = {"forward": FORWARD, "backward": BACKWARD, "loss": LOSS}
# (what is called, the wrong arguments, the message)
MISTAKES: list[tuple[str, dict[str, object], str]] = [
    ("problem", {"type": "float64"}, "type = 'float64'; expected float32, bfloat16 or float16"),
    ("problem", {"hardness": "hard"}, "hardness = 'hard'; expected one of in_batch, hard_neg"),
    ("problem", {"n": 0}, r"n = 0; expected 1 to 2\^31"),
    ("problem", {"m": 1 << 31}, "m = 2147483648; expected"),
    ("problem", {"d": -8}, "d = -8; expected"),
    ("problem", {"d": 60, "query_stride": 60}, "d = 60; expected a multiple of 16 bytes"),
    ("problem", {"query": 0}, "query is a null pointer"),
    ("problem", {"target": ADDRESS + 8}, "target = 1048584 is not aligned to 16 bytes"),
    ("problem", {"query_stride": 66}, "query_stride = 66; expected at least d and a multiple"),
    ("problem", {"target_stride": 8}, "target_stride = 8; expected at least d"),
    ("problem", {"labels": 0, "n": 501}, "labels is a null pointer: .* n = 501 exceeds m = 500"),
    ("problem", {"scale": ADDRESS + 1}, "scale = 1048577 is not aligned to 4"),
    ("problem", {"query_ids": ADDRESS}, "query_ids and target_ids go together"),
    ("problem", {"row_limit": ADDRESS}, "row_limit and column_limit go together"),
    ("forward", {"architecture": 75}, "architecture = 75 is not in this build"),
    ("forward", {"start": -1}, "rows -1 to 300; expected a range within 0 to n = 300"),
    ("forward", {"stop": 301}, "rows 0 to 301; expected"),
    ("forward", {"start": 300}, "rows 300 to 300; expected"),
    ("forward", {"workspace": 0}, "workspace is a null pointer"),
    ("forward", {"workspace_bytes": 100}, "workspace_bytes = 100; expected at least"),
    ("forward", {"positive": 0}, "positive is a null pointer"),
    ("forward", {"query_lse": 0}, "query_lse is a null pointer"),
    ("forward", {"target_lse": 0}, "target_lse is a null pointer"),
    ("backward", {"architecture": 0}, "architecture = 0 is not in this build"),
    ("backward", {"ds": ADDRESS + 4}, "ds = 1048580 is not aligned to 16"),
    ("backward", {"pitch": 500}, "pitch = 500; expected a multiple of 8 not below m = 500"),
    ("backward", {"pitch": 496}, "pitch = 496; expected"),
    ("backward", {"d_target_lse": 0}, "d_target_lse is a null pointer"),
    ("backward", {"d_positive": 0}, "d_positive is a null pointer"),
    ("backward", {"kept": ADDRESS + 8, "kept_pitch": 504}, "kept = 1048584 is not aligned to 16"),
    ("backward", {"kept": ADDRESS, "kept_pitch": 496}, "kept_pitch = 496; expected a multiple"),
    ("backward", {"scale_parts": ADDRESS}, "positive is a null pointer"),
    ("backward", {"scale_parts": ADDRESS + 2}, "scale_parts = 1048578 is not aligned to 4"),
    ("forward", {"kept": ADDRESS}, "kept_pitch = 0; expected a multiple of 8 not below m = 500"),
    *(
        ("loss", {name: 0}, f"{name} is a null pointer")
        for name in ("total", "gain", "d_target_lse")
    ),
    ("loss", {"query_lse": ADDRESS + 2}, "query_lse = 1048578 is not aligned to 4"),
]

# This runs in its own process, where `_cuda` is the compiled extension.
CALLS = """
import json, sys
from llave_kernels import _cuda, available_backends
problem, arguments, mistakes = json.load(sys.stdin)
said = []
for name, wrong in mistakes:
    try:
        if name == "problem":
            _cuda.Problem(**(problem | wrong))
        else:
            getattr(_cuda, name)(problem=_cuda.Problem(**problem), **(arguments[name] | wrong))
        said.append(["nothing", ""])
    except Exception as error:
        said.append([type(error).__name__, str(error)])
print(json.dumps([available_backends()["cuda"], list(_cuda.architectures), said]))
"""


def call_built(mistakes: list[tuple[str, dict[str, object]]]) -> list:
    run = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps([PROBLEM, ARGUMENTS, mistakes]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_build
def test_built_module_refuses_every_mistake() -> None:
    *_, said = call_built([(name, wrong) for name, wrong, _ in MISTAKES])
    for (name, wrong, message), (kind, text) in zip(MISTAKES, said, strict=True):
        assert kind == "ValueError", (name, wrong, kind, text)
        assert re.search(message, text), (name, wrong, text)


@needs_simulation
def test_hardness_modes_are_those_of_the_rules() -> None:
    assert simulated.hardness_modes == (*HARDNESS_MODES, WITHIN)


@needs_simulation
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"owners": None}, "owners = None is not of the expected type"),
        ({"owner": 0}, "unknown argument: owner"),
        ({}, "missing argument: type"),
    ],
    ids=str,
)
def test_a_problem_takes_its_arguments_and_no_others(
    wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        simulated.Problem(**(PROBLEM | wrong if wrong else {}))


NOT_INSTALLED = "import llave_kernels; print(llave_kernels.available_backends()['cuda'])"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "not built: llave_kernels is not installed; run pip install . in the folder of py"),
        ({"cuda_build.txt": "LLAVE_CUDA=0"}, "not built: LLAVE_CUDA=0$"),
        ({"cuda_build.txt": "built with nvcc"}, rf"not built for this Python: .*{SUFFIX}.*reins"),
        ({f"_cuda{SUFFIX}": "damaged"}, "cannot be loaded: .*; reinstall"),
    ],
    ids=str,
)
def test_a_package_without_its_extension_says_why(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    package = Path(llave_kernels.__file__).parent
    leave_out = shutil.ignore_patterns("_cuda*", "cuda_build.txt", "__pycache__")
    copy = shutil.copytree(package, tmp_path / "llave_kernels", ignore=leave_out)
    for name, content in files.items():
        (copy / name).write_text(content)
    run = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED], cwd=tmp_path, capture_output=True, text=True,
        check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert re.match(message, run.stdout), run.stdout


@needs_simulation
@pytest.mark.parametrize("workspace", [1 << 12, 256 << 20])
def test_rows_whose_positives_lie_in_order_need_no_labels(
    monkeypatch: pytest.MonkeyPatch, workspace: int
) -> None:
    """The results are also equal when the rows are processed in several strips."""
    monkeypatch.setattr(strip_gemm, "WORKSPACE", workspace)
    n, m = 150, 200
    query, target = embeddings(n, m, 8)
    rules = Rules(*[None] * 8, 9.0, 9.0, "in_batch", None, True)
    for named in (rules, rules._replace(owners=torch.arange(m) % n, target_alpha=2.0)):
        each = [
            outputs_and_gradients(query, target, given)
            for given in (named, named._replace(labels=torch.arange(n)))
        ]
        for without, with_labels in zip(*each, strict=True):
            assert torch.equal(without, with_labels)


def outputs_and_gradients(query: Tensor, target: Tensor, rules: Rules) -> tuple[Tensor, ...]:
    scale, kept = torch.tensor(20.0), torch.empty(0)
    outputs = cuda.forward(query, target, scale, rules, kept)
    upstream = LogSumExps(*(torch.ones_like(x) for x in outputs))
    gradients = cuda.backward(
        upstream, query, target, scale, outputs, kept, rules, scale_gradient=True
    )
    return *outputs, *gradients[:3]


@needs_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_device_says_what_cuda_says() -> None:
    reason, architectures, said = call_built([("forward", {}), ("backward", {})])
    assert reason == "no GPU: torch.cuda.is_available() is False"
    assert set(architectures) <= {80, 90}
    for kind, text in said:
        assert kind == "RuntimeError"
        assert re.search("device: .*(driver|no CUDA-capable device)", text), text


@needs_simulation
def test_workspace_grows_with_a_strip_not_with_its_square() -> None:
    """The forward's workspace is at most a tenth of the strip's dS plus 1 MiB."""
    problem = simulated.Problem(**(PROBLEM | {"n": 1 << 16, "m": 1 << 16}))
    for rows in (128, 1024, 2048):
        assert simulated.forward_workspace(problem, rows) <= rows * (1 << 16) * 2 / 10 + (1 << 20)


PER_DEVICE = """
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>
#include "per_device.h"
int main() {
  llave::PerDevice<int> values;
  int made[3] = {0, 0, 0};
  try {
    values(2, []() -> int { throw std::runtime_error("no device"); });
  } catch (const std::runtime_error&) {
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 3000; ++i) {
        const int d = i % 3, found = values(d, [&] { return 10 * d + ++made[d]; });
        if (found != 10 * d + 1) throw 1;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::printf("%d %d %d", made[0], made[1], made[2]);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler g++")
def test_a_device_is_asked_once_whatever_the_threads(tmp_path: Path) -> None:
    """A query that failed is repeated."""
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PER_DEVICE)
    command = ["g++", "-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", source, "-o", program]
    subprocess.run(command, check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert found == "1 1 1"


@lru_cache
def kernels(kind: str) -> list[tuple[str, str]]:
    assert BUILT is not None
    return list(machine_code.functions(BUILT, kind))


@pytest.mark.long
@needs_build
def test_machine_code_uses_tensor_cores_and_spills_nothing() -> None:
    _, architectures, _ = call_built([])
    seen = []
    kept = 0
    for name, code in kernels("-sass"):
        assert not [word for word in ("LDL", "STL") if word in code], name
        if "kept_kernel" in name:  # it multiplies nothing
            kept += 1
            continue
        found = re.search(r"(Forward|Backward|Sigmoid)Epilogue.*?4TileILi(\d+)E", name)
        if found is None:
            assert re.search("combine_kernel|loss_kernel", name)
            continue
        seen.append((found[1], int(found[2])))
        instruction = r"\bHGMMA\." if found[2] == "90" else r"\bHMMA\."
        assert re.search(instruction, code), name
    # Each target has three dtypes. sm_90 has three tile sizes, others have two, and the
    # sigmoid loss has one.
    for kind in ("Forward", "Backward", "Sigmoid"):
        for architecture in architectures:
            count, least = seen.count((kind, architecture)), 9 if architecture == 90 else 6
            least = 3 if kind == "Sigmoid" else least
            assert count >= least
            assert count % least == 0
    assert kept >= 3 * len(architectures)


@pytest.mark.long
@needs_build
@pytest.mark.parametrize("kind", ["-sass", "-ptx"])
def test_no_kernel_holds_a_trap(kind: str) -> None:
    """CUTLASS compiles a primitive that an architecture lacks to a trap.

    GPUs of a later architecture take the PTX, so it is checked too.
    """
    _, architectures, _ = call_built([])
    assert kernels(kind) or (kind == "-ptx" and architectures == [90])
    for name, code in kernels(kind):
        assert not [word for word in ("BPT", "brkpt", "trap") if word in code], name


@needs_build
def test_module_links_neither_torch_nor_python_nor_the_cuda_runtime() -> None:
    listing = subprocess.run(["ldd", str(BUILT)], capture_output=True, text=True, check=True)
    libraries = re.findall(r"^\s*(\S+)", listing.stdout, re.MULTILINE)
    assert not [name for name in libraries if re.search("torch|c10|python|cuda", name)]


@needs_build
def test_build_log_has_no_finding() -> None:
    log = ROOT / "build" / f"cuda-{sys.implementation.cache_tag}" / "build.log"
    if not log.exists():
        pytest.skip("built elsewhere")
    text = log.read_text()
    assert "Building CUDA object" in text
    assert "serialized" not in text
    assert not re.search(r"[1-9]\d* bytes spill", text)
