"""FlexLoRA: the mean of the clients' products, cut to the adapter's rank by its singular values.

Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", section 3. arXiv:2402.11505
By Eckart and Young no adapter of this rank is nearer to the mean of the products. Differs from the
paper: the mean is decomposed from the stacked factors, never formed; the singular values go to the
factor that starts at 0 (the paper does not say which), so that the other one stays of the size at
which gradients through it are useful; the scaling is the same at every rank, so that products are
compared as functions. A client of a lower rank r receives the first r columns and rows, the nearest
product of its rank. Tensors that are no factors are averaged. A product of 0 keeps its factors.
"""

from typing import ClassVar

from silotune.algorithms.base import AlgorithmConfig, Facts
from silotune.algorithms.factors import needs_pairs, orthonormal
from silotune.algorithms.fedavg import move
from silotune.algorithms.products import mean_of_products
from silotune.core.algorithm import Algorithm
from silotune.core.tree import subtract
from silotune.core.types import Change, ServerState, Updates


class FlexLoRAConfig(AlgorithmConfig):
    """Settings of FlexLoRA; there are none beside the weights."""

    facts: ClassVar[Facts] = Facts(
        paper='Bai et al. 2024, "Federated Fine-tuning of Large Language Models under '
        'Heterogeneous Tasks and Client Resources", section 3, arXiv:2402.11505',
        differs="The mean product is decomposed from the stacked factors, never formed. The "
        "singular values go to the factor that starts at zero. LoRA's scaling is the same at every "
        "rank.",
        linear=False,
        exact="truncated",
        needs_lora=True,
        mixed_ranks=True,
    )


def flexlora(cfg: FlexLoRAConfig) -> Algorithm:
    """Build FlexLoRA.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """

    def combine(state: ServerState, updates: Updates) -> Change:
        mean, delta = mean_of_products(state.adapter, updates, cfg)
        for pair, left, right in mean:
            new = orthonormal(left, right, pair, like=state.adapter)
            delta |= subtract(new, {name: state.adapter[name] for name in new})
        return Change(delta)

    def step(state: ServerState, change: Change) -> ServerState:
        return move(state, change.delta)

    return Algorithm(
        name="flexlora", combine=combine, step=step, init=needs_pairs("flexlora"), linear=False
    )
