"""The distributed loss in 1, 2 and 4 processes, compared with one process and the global batch."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from llave_kernels import HardnessWeightedContrastiveLoss
from llave_kernels.distributed import distributed_contrastive_loss
from tests.helpers import embeddings, relative_error
from tests.processes import cases, run

CASES = "tests.processes.cases"
MISTAKES = "tests.processes.mistakes"


@lru_cache
def results(function: str, world: int, module: str = CASES) -> list[Any]:
    return run(module, function, world)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rule_equals_one_process(world: int) -> None:
    """Four processes form a grid of 2 x 2."""
    by_rank = results("rules", world)
    for case in cases.combinations():
        average = torch.stack([found[case] for found in by_rank]).mean(0)
        truth = cases.of_one_process(world, case)
        for name, part in cases.PARTS.items():
            assert relative_error(average[part], truth[part]) < 1e-9, (case, name)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_a_step_inside_a_wrapper_is_that_of_one_process(wrapper: str) -> None:
    batch = cases.Batch(4, (), uneven=False)
    query, target, _ = batch.whole()
    model = cases.encoder()
    loss_fn = HardnessWeightedContrastiveLoss(20.0, learnable=True).double()
    loss_fn(*(normalize(model(x), dim=1) for x in (query, target))).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for found in results("wrapped", 4):
        for a, b in zip(found[wrapper], model.parameters(), strict=True):
            assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("function", ["open_clip_settings", "weighted_settings"])
@pytest.mark.parametrize(
    "world", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)]
)
def test_clip_classes_equal_their_host_in_every_process(function: str, world: int) -> None:
    """The scale's gradient is compared after averaging over the processes.

    In one setting the processes' parts of it differ from the host's.
    """
    pytest.importorskip("open_clip")
    by_rank = results(function, world)
    for position, (setting, host, _) in enumerate(by_rank[0]):
        scales = torch.tensor([[x[3] for x in found[position][1:]] for found in by_rank])
        assert relative_error(*scales.mean(0).flip(0)) < 1e-5, setting
        for rank, found in enumerate(by_rank):
            _, host, ours = found[position]
            for i in (0, 1, 2, 4)[: len(host) - 1]:
                close = relative_error(ours[i], host[i]) < 1e-5
                assert close or float((ours[i] - host[i]).norm()) < 1e-7, (rank, setting, i)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_step_gives_the_same_numbers(world: int) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("sentence_transformers")
    for found in run("tests.processes.compiled", "steps", world, timeout=240):
        for name, (plain, compiled) in found.items():
            for a, b in zip(compiled, plain, strict=True):
                assert relative_error(a, b) < 1e-5, name


def test_a_process_that_differs_is_an_error_on_all() -> None:
    first, second = results("losses", 2, MISTAKES)
    for name, message in (
        ("width", "the width of the embeddings is 6 on rank 1 and 5 here"),
        ("dtype", "their dtype is torch.float64 on rank 1 and torch.float32 here"),
        ("alpha", "alpha is 2.0 on rank 1 and 1.0 here"),
        ("margin", "false_negative_margin is 0.1 on rank 1 and None here"),
        ("ids", "presence of ids is True on rank 1 and False here"),
        ("a bias", "presence of target_bias is True on rank 1 and False here"),
        ("a bias's gradient", "requires_grad of query_bias is True on rank 1 and False here"),
        ("symmetric", "symmetric is False on rank 1 and True here"),
        ("within", "within is ('query',) on rank 1 and () here"),
        ("hardness", "hardness is all on rank 1 and in_batch here"),
        ("target_alpha", "target_alpha is 2.0 on rank 1 and 0.0 here"),
        ("logit_scale", "logit_scale is 51.0 on rank 1 and 50.0 here"),
        ("its gradient", "requires_grad of logit_scale is True on rank 1 and False here"),
        ("queries' gradient", "requires_grad of query is True on rank 1 and False here"),
        ("gradient", "requires_grad of target is True on rank 1 and False here"),
        ("reductions", "reduction is mean on rank 1 and sum here"),
        ("a scale's tensor", "logit_scale is 51.0 on rank 1 and 50.0 here"),
        ("backend", "backend is torch on rank 1 and auto here"),
        ("precision", "float32's matmul precision is high on rank 1 and highest here"),
        ("autocast", "their dtype is torch.bfloat16 on rank 1 and torch.float32 here"),
    ):
        assert first[name] == f"ValueError: {message}; it must be the same on every process"
        assert second[name].startswith("ValueError: ")
    assert first["refused"] == (
        "RuntimeError: rank 1 refused its arguments; its own error says why"
    )
    assert second["refused"].startswith("ValueError: alpha must be >= 0")
    assert second["reduction"].startswith("ValueError: reduction must be one of")
    assert "logit_scale is 22.66" in first["drift"]
    assert "logit_scale is 20.0" in second["drift"]
    for each in (first, second):
        assert each["group"].startswith(
            "TypeError: group must be a process group, a 2-D DeviceMesh or None, got"
        )
        assert "cannot be transformed by torch.func" in each["transform"]
    assert first["transform of one"] == first["refused"]
    assert second["transform of one"] == second["transform"]
    for name in ("zeros", "the same as a tensor", "afterwards"):
        assert first[name] == second[name] == "nothing"


@pytest.mark.long
def test_every_setting_of_a_host_is_compared() -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("sentence_transformers")
    first, second = results("hosts", 2, MISTAKES)
    same = "; it must be the same on every process"
    for name, message in (
        ("local_loss", "local_loss is True on rank 1 and False here"),
        ("local_loss, constants", "local_loss is True on rank 1 and False here"),
        ("gather_with_grad", "gather_with_grad is True on rank 1 and False here"),
        ("alpha", "alpha is 1.0 on rank 1 and 0.0 here"),
        ("alpha, constants", "alpha is 1.0 on rank 1 and 0.0 here"),
        (
            "class",
            "the loss is gathered_clip_loss on rank 1 and DistributedContrastiveLoss here",
        ),
        ("scale_loss", "scale_loss is True on rank 1 and False here"),
        ("temperature", "logit_scale is 4.0 on rank 1 and 2.0 here"),
        ("reduction", "reduction is sum on rank 1 and mean here"),
        ("scale", "logit_scale is 21.0 on rank 1 and 20.0 here"),
        ("directions", "directions is ('query_to_doc', 'doc_to_query') on rank 1 and"),
        ("partition_mode", "partition_mode is joint on rank 1 and per_direction here"),
        ("hardness_mode", "hardness_mode is all_negatives on rank 1 and hard_negatives here"),
        ("hardness_strength", "hardness_strength is 2.0 on rank 1 and 1.0 here"),
        ("target_hardness_strength", "target_hardness_strength is 2.0 on rank 1 and 0.0 here"),
        ("false_negative_margin", "false_negative_margin is 0.1 on rank 1 and None here"),
        ("backend of ranking", "backend is torch on rank 1 and auto here"),
        ("similarity_fct", "similarity_fct is dot_score on rank 1 and cos_sim here"),
        ("who computes", "similarity_fct is manhattan_sim on rank 1 and cos_sim here"),
        ("columns", "the number of columns is 3 on rank 1 and 2 here"),
        ("rows", "their shape is (5, 5) on rank 1 and (4, 5) here"),
    ):
        assert first[name].startswith(f"ValueError: {message}"), first[name]
        assert first[name].endswith(same)
        assert second[name].startswith("ValueError: "), second[name]
        assert second[name].endswith(same)
    for name, message in (
        ("world_size", "ValueError: world_size must be torch.distributed's, 2, got 3"),
        ("world_size, constants", "ValueError: world_size must be torch.distributed's, 2, got 3"),
        ("n_hard_negatives", "ValueError: y has 4 rows for 4 queries, expected 8"),
        ("target", "ValueError: target must be None"),
        ("unknown", "TypeError: "),
    ):
        assert first[name] == "RuntimeError: rank 1 refused its arguments; its own error says why"
        assert second[name].startswith(message), second[name]
    assert first["afterwards"] == second["afterwards"] == 3 * "nothing"


def test_a_scale_on_a_device_is_compared_when_it_has_arrived() -> None:
    """The scales of calls 1, 3, 5 are compared. On process 1 each arrives at the second query."""
    for rank, found in enumerate(results("losses", 2, MISTAKES)):
        *before, last = found["late"]
        assert before == 6 * ["nothing"]
        there, here = ((51.0, 50.0), (50.0, 51.0))[rank]
        message = f"the logit_scale of an earlier call is {there} on rank {1 - rank} and {here}"
        assert last.startswith(f"ValueError: {message} here")


def test_processes_agree_over_a_group_on_the_host_made_once() -> None:
    """The group claims to take only GPU tensors, as nccl does."""
    found = run(CASES, "on_hosts", 3)
    assert [[made for _, made in each] for each in found] == [[1, 2, 3], [1, 2, 3], [1, 2]]
    for each in found:
        assert each[-1][0] == each[-2][0]


def test_a_process_that_dies_is_an_error_on_the_others() -> None:
    start = time.monotonic()
    found = run(CASES, "death", 4, timeout=60)
    assert found[1] is None
    for message in (found[0], *found[2:]):
        assert message.startswith(("RuntimeError", "DistBackendError", "DistNetworkError")), message
    assert time.monotonic() - start < 60


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_linear_in_the_global_batch() -> None:
    """A block of 8,192 x 16,384 float32 similarities would take 537 MB, of twice the batch 2,147.

    The backend keeps up to 101 MB of them for the backward. Measured: 114 to 152 MB in both.
    """
    for small, large in results("peak_memory", 2):
        assert small < 200
        assert large < 300


def test_without_a_process_group_the_error_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed_contrastive_loss(*embeddings(4, 4, 3))
    with pytest.raises(ValueError, match="gather_group must be one of world, got 'all'"):
        HardnessWeightedContrastiveLoss(gather_group="all")
