"""Calls that take each path of the compiled kernels once. sanitize.sh runs them."""

from __future__ import annotations

import itertools

import torch

from llave_kernels import hardness_weighted_contrastive_loss
from tests.helpers import draw_rules, embeddings


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    torch.set_float32_matmul_precision("high")
    kinds: list[set[str]] = [set(), {"owners"}, {"ids"}, {"margin"}, {"labels", "target_alpha"}]
    shapes = (1, 1, 8), (130, 270, 40), (1700, 1700, 72)
    for shape, dtype in itertools.product(shapes, (torch.bfloat16, torch.float16, torch.float32)):
        for kind in kinds:
            query, target = (x.requires_grad_() for x in embeddings(*shape, dtype))
            rules = draw_rules(*shape[:2], kind)
            # 50: one shift a warp; 5000: one for each row and column
            for scale in (50.0, torch.tensor(5000.0, requires_grad=True)):
                loss = hardness_weighted_contrastive_loss(
                    query, target, logit_scale=scale, backend="cuda", **rules
                )
                loss.backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
