"""The functions that tests/llave_kernels/test_distributed.py runs in several processes.

Every process draws the same global batch and takes its own rows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from llave_kernels import HardnessWeightedContrastiveLoss
from llave_kernels.distributed import distributed_contrastive_loss
from llave_kernels.reference import reference_loss
from tests.processes import DIED

D_IN, D = 6, 5
HARDNESS = ("in_batch", "hard_negatives", "all")
KINDS = ((), ("labels",), ("ids",), ("margin",), ("target_alpha",), ("mined",), ("biases",))
KINDS += (("labels", "ids", "margin", "target_alpha", "mined", "biases"),)
KINDS += (("within",), ("within", "labels", "ids", "margin", "target_alpha", "mined"))
EVERYTHING = [KINDS[-3], KINDS[-1]]  # biases and within do not go together


def rows_of(world: int, *, uneven: bool) -> list[int]:
    return [4 + 3 * (rank % 3) if uneven else 6 for rank in range(world)]


class Batch:
    """The global batch: the encoder's inputs and the rules, in a list over the processes."""

    def __init__(self, world: int, kinds: tuple[str, ...], *, uneven: bool) -> None:
        generator = torch.Generator().manual_seed(len(kinds) * 10 + uneven)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.rows = rows_of(world, uneven=uneven)
        self.columns = [n * 3 if "mined" in kinds else n for n in self.rows]
        self.query = [draw(n, D_IN) for n in self.rows]
        self.target = [draw(m, D_IN) for m in self.columns]
        self.rules: list[dict[str, Any]] = []
        for n, m in zip(self.rows, self.columns, strict=True):
            rules: dict[str, Any] = {}
            if "labels" in kinds:
                rules["labels"] = torch.randperm(m, generator=generator)[:n]
                owners = rules["labels"][torch.randint(n, (m,), generator=generator)]
                rules["owners"] = owners.index_put((rules["labels"],), rules["labels"])
            if "ids" in kinds:
                rules["query_ids"] = torch.randint(8, (n,), generator=generator)
                rules["target_ids"] = torch.randint(8, (m,), generator=generator)
            self.rules.append(rules)
        self.biased = "biases" in kinds
        self.settings: dict[str, Any] = {}
        if "margin" in kinds:
            self.settings["false_negative_margin"] = 0.1
        if "target_alpha" in kinds:
            self.settings["target_alpha"] = 2.0
        if "within" in kinds:
            self.settings["within"] = ("query", "target")

    def whole(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The whole batch for one process. ``labels`` and ``owners`` are global column indices."""
        starts = [0, *itertools.accumulate(self.columns)]
        parts: dict[str, list[Tensor]] = {}
        for start, n, m, rules in zip(starts, self.rows, self.columns, self.rules, strict=False):
            full = {"labels": torch.arange(n), "owners": torch.arange(m) % n} | rules
            for name, value in full.items():
                shift = start if name in ("labels", "owners") else 0
                parts.setdefault(name, []).append(value + shift)
        rules = {name: torch.cat(values) for name, values in parts.items()}
        return torch.cat(self.query), torch.cat(self.target), rules | self.settings


def encoder() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(D_IN, D, dtype=torch.float64)


class Learned:
    """What a case trains: an encoder, a scale, and the biases of queries and targets."""

    def __init__(self) -> None:
        self.encoder = encoder()
        self.scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        self.heads = torch.linspace(-1, 1, 2 * D_IN, dtype=torch.float64).view(2, D_IN)
        self.heads.requires_grad_()

    def arguments(self, query: Tensor, target: Tensor, *, biased: bool) -> dict[str, Tensor]:
        """Those of a loss, from the encoder's inputs."""
        given = {"query": query, "target": target}
        found = {name: normalize(self.encoder(x), dim=1) for name, x in given.items()}
        if biased:
            pairs = zip(given.items(), self.heads, strict=True)
            found |= {f"{name}_bias": x @ head for (name, x), head in pairs}
        return found | {"logit_scale": self.scale}

    def vector(self, loss: Tensor) -> Tensor:
        """The loss and all gradients after its backward."""
        loss.backward()
        trained = self.encoder.weight, self.encoder.bias, self.heads, self.scale
        found = (torch.zeros_like(x) if x.grad is None else x.grad for x in trained)
        return torch.cat([x.flatten() for x in (loss.detach(), *found)])


def combinations() -> Iterator[tuple[Any, ...]]:
    for kinds, uneven, symmetric in itertools.product(KINDS, (False, True), (True, False)):
        for hardness in HARDNESS if "mined" in kinds else HARDNESS[:1]:
            yield kinds, uneven, symmetric, hardness


def of_one_process(
    world: int, case: tuple[Any, ...], dense: Callable[..., Tensor] = reference_loss, **more: Any
) -> Tensor:
    """The loss and the gradients over the whole batch, in one vector."""
    kinds, uneven, symmetric, hardness = case
    batch, learned = Batch(world, kinds, uneven=uneven), Learned()
    *pair, rules = batch.whole()
    arguments = learned.arguments(*pair, biased=batch.biased)
    rules |= {"symmetric": symmetric, "hardness": hardness, **more}
    return learned.vector(dense(**arguments, **rules))


# Where the parts of the vector are.
PARTS = {
    "loss": slice(0, 1),
    "weight": slice(1, 1 + D * D_IN),
    "bias": slice(1 + D * D_IN, -1 - 2 * D_IN),
    "biases": slice(-1 - 2 * D_IN, -1),
    "scale": slice(-1, None),
}


def outcome(case: tuple[Any, ...], group: Any, rank: int, world: int, **more: Any) -> Tensor:
    """The same of one process. The average over the processes is that of DDP."""
    kinds, uneven, symmetric, hardness = case
    batch, learned = Batch(world, kinds, uneven=uneven), Learned()
    loss = distributed_contrastive_loss(
        **learned.arguments(batch.query[rank], batch.target[rank], biased=batch.biased),
        group=group,
        symmetric=symmetric,
        hardness=hardness,
        **batch.rules[rank],
        **batch.settings,
        **more,
    )
    return learned.vector(loss)


def rules() -> dict[tuple[Any, ...], Tensor]:
    """The outcome of every case over all processes."""
    place = dist.get_rank(), dist.get_world_size()
    return {case: outcome(case, None, *place) for case in combinations()}


def wrapped() -> dict[str, list[Tensor]]:
    """The encoder's parameters after one step of SGD under DDP and under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    rank, world = dist.get_rank(), dist.get_world_size()
    batch = Batch(world, (), uneven=False)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder()
            self.loss = HardnessWeightedContrastiveLoss(
                20.0, learnable=True, gather_group="world"
            ).double()

        def forward(self, query: Tensor, target: Tensor) -> Tensor:
            pair = (normalize(self.encoder(x), dim=1) for x in (query, target))
            return self.loss(*pair)

    def fsdp(model: Model) -> Model:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model.encoder, mesh=mesh)
        return model

    results = {}
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", fsdp)):
        model = wrap(Model())
        inner = getattr(model, "module", model).encoder
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        model(batch.query[rank], batch.target[rank]).backward()
        optimizer.step()
        results[name] = [
            (p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in inner.parameters()
        ]
    return results


def open_clip_settings() -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """For each setting, this process's loss and gradients from OpenCLIP's class and from ours."""
    from open_clip.loss import ClipLoss as HostLoss

    from llave_kernels.integrations.open_clip import ClipLoss

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    image, text = (normalize(torch.randn(world, 5, 8), dim=-1)[rank] for _ in range(2))
    results = []
    flags = itertools.product((True, False), repeat=4)
    for local, with_grad, cache, output_dict in flags:
        both = []
        for kind in (HostLoss, ClipLoss):
            inputs = [x.clone().requires_grad_() for x in (image, text)]
            inputs += [torch.tensor(v, requires_grad=True) for v in (20.0, -3.0)]
            module = kind(local, with_grad, cache, rank, world)
            loss = module(*inputs, output_dict=output_dict)
            loss = loss["contrastive_loss"] if output_dict else loss
            loss.backward()
            both.append([loss.detach(), *(x.grad for x in inputs)])
        results.append((f"{local=} {with_grad=} {cache=} {output_dict=}", *both))
    return results


def weighted_settings() -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """The same for the LLaVE authors' class.

    Ours is compared with their formula on features that OpenCLIP gathers.
    """
    from open_clip.loss import gather_features
    from torch.nn.functional import cross_entropy

    from llave_kernels.integrations.llave_trainer import WeightedClipLoss

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    pair = [normalize(torch.randn(world, 5, 8), dim=-1)[rank] for _ in range(2)]

    def published(query: Tensor, target: Tensor, scale: Tensor, alpha: float) -> Tensor:
        every = (query, target)
        if world > 1:
            every = gather_features(query, target, local, with_grad, rank, world)
        rows = (query, target) if local else every
        labels = torch.arange(len(rows[0])) + (rank * len(query) if local else 0)
        total = torch.zeros(())
        for own, other in ((rows[0], every[1]), (rows[1], every[0])):
            cosine = own @ other.T
            weight = alpha * cosine.detach()
            weight[torch.arange(len(own)), labels] = 0.0
            total = total + cross_entropy(scale * cosine + weight, labels) / 2
        return total

    results = []
    for local, with_grad, alpha in itertools.product((True, False), (True, False), (0.0, 9.0)):
        both = []
        for loss_of in (published, WeightedClipLoss(local, with_grad, False, rank, world)):
            inputs = [x.clone().requires_grad_() for x in pair]
            scale = torch.tensor(50.0, requires_grad=True)
            loss = loss_of(*inputs, scale, alpha)
            loss.backward()
            both.append([loss.detach(), *(x.grad for x in (*inputs, scale))])
        results.append((f"{local=} {with_grad=} {alpha=}", *both))
    return results


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def on_hosts() -> list[tuple[float, int]]:
    """The loss and the number of gloo groups made when groups claim to take only GPU tensors.

    There are three entries: a group of the first two processes, all processes, and all processes
    after the process group was initialised again. Only the first two processes know their group,
    so the others lack the first entry.
    """
    pair = [normalize(torch.randn(4, 5), dim=1) for _ in range(2)]
    rank, world = dist.get_rank(), dist.get_world_size()
    made: list[Any] = []

    def loss(group: Any) -> tuple[float, int]:
        values = [float(distributed_contrastive_loss(*pair, group=group)) for _ in range(2)]
        assert values[0] == values[1]
        return values[0], len(made)

    def noted(*arguments: Any) -> Any:
        made.append(arguments)
        return original(*arguments)

    original, dist.ProcessGroupGloo = dist.ProcessGroupGloo, noted
    results = []
    with patched_backend():
        if rank < 2:
            results.append(loss(dist.new_group([0, 1], use_local_synchronization=True)))
        results.append(loss(None))
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    dist.destroy_process_group()
    again = dist.PrefixStore("again", store)
    dist.init_process_group("gloo", store=again, rank=rank, world_size=world)
    with patched_backend():
        results.append(loss(None))
    return results


@contextmanager
def patched_backend() -> Iterator[None]:
    """Let groups claim to take only GPU tensors, as nccl's groups do."""
    original, dist.get_backend_config = dist.get_backend_config, lambda group: "cuda:nccl"
    try:
        yield
    finally:
        dist.get_backend_config = original


def death() -> str:
    """The error in the other processes when process 1 dies between two steps."""
    pair = [normalize(torch.randn(4, 5), dim=1) for _ in range(2)]
    distributed_contrastive_loss(*pair)
    if dist.get_rank() == 1:
        os._exit(DIED)
    return said(lambda: distributed_contrastive_loss(*pair))


def peak_memory() -> list[float]:
    """Peak memory in MB beyond the inputs with 8,192 and 16,384 rows a process."""
    from pathlib import Path

    def status(field: str) -> float:
        text = Path("/proc/self/status").read_text()
        return int(text.split(field + ":")[1].split()[0]) * 1024 / 1e6

    def step(n: int) -> float:
        pair = [normalize(torch.randn(n, 64), dim=1).requires_grad_() for _ in range(2)]
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        distributed_contrastive_loss(*pair).backward()
        return status("VmHWM") - before

    step(512)
    return [step(8192), step(16384)]
