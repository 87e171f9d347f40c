"""What a round refuses only after all updates are in: those far larger than the others.

Each update has been checked alone in `acceptance.py`. Here they are compared by the L2 norms of
their deltas, and the state that they lead to is checked before it replaces a checkpoint. Finds
updates that would end the run for everybody. Does not find poison of the usual size: nothing here
replaces trust in the clients.

Norm thresholding: Sun et al. 2019, "Can You Really Backdoor Federated Learning?" arXiv:1911.07963.
Differs from the paper: the threshold follows the median of the round's norms, and an update above
it is refused and named, not scaled.
"""

import math
from collections.abc import Sequence

from silotune.core.errors import UpdateError
from silotune.core.tree import check_finite, check_representable, l2_norm
from silotune.core.types import Failure, ServerState, Update
from silotune.core.wording import counted
from silotune.federation.progress import Progress
from silotune.federation.run_folder import Spool
from silotune.recipes.schema import RunConfig

ENOUGH = 3
"""Fewest updates of which most can be right: of two, either could be the wrong one."""
SMALLEST_RMS = 0.01
"""An adapter counts as at least this large in the root mean square of its values. Some kinds start
at 0; LoRA's random factor for a layer with d inputs starts at (3 d)^-1/2, 0.018 for d = 1024."""


def refuse_outliers(
    run: RunConfig, state: ServerState, spool: Spool, progress: Progress
) -> list[Failure]:
    """Drop the updates whose delta is far larger than the round's others, and name their clients.

    Args:
        run: The recipe; `sampling.max_norm_ratio` is the limit.
        state: What the clients received.
        spool: The round's accepted updates; those refused are removed.
        progress: Told who is refused.
    """
    # the guard clips every update by itself. Who is left out must not depend on the others there:
    # one client would then move the sum by more than its clipped change.
    # Under masks, no update has a norm.
    if run.privacy.clips_at_server or run.secure_sum.is_on:
        return []
    limit, why = _limit(run, state, [_norm(update) for update in spool.reports()])
    failures: list[Failure] = []
    for update in spool.reports():
        if (norm := _norm(update)) > limit:
            place = (
                f"client '{update.client}', round {update.round}: its delta has norm {norm:.3g}, "
                f"above {limit:.3g}: {why}.\n  Its update is not used. Lower train.lr or set "
                "train.clip_norm at this client, or start a run with a higher "
                "sampling.max_norm_ratio."
            )
            spool.discard(update.client)
            failures.append(Failure(update.client, update.round, "refused", place))
            progress.client_failed(failures[-1])
    return failures


def _limit(run: RunConfig, state: ServerState, norms: Sequence[float]) -> tuple[float, str]:
    """The largest norm that is accepted, and in words where it comes from."""
    ratio = run.sampling.max_norm_ratio
    num_values = sum(tensor.numel() for tensor in state.adapter.values())
    size = max(l2_norm(state.adapter), SMALLEST_RMS * math.sqrt(num_values))
    if len(norms) >= ENOUGH:
        # the lower median, so that one of four cannot move it towards itself
        middle = sorted(norms)[(len(norms) - 1) // 2]
        why = (
            f"{ratio:g} times (sampling.max_norm_ratio) the median {middle:.3g} of the round's "
            f"{len(norms)} updates, or the adapter's norm"
        )
        return max(ratio * middle, size), why
    if run.privacy.is_at_client:  # noise in every number may be far larger than the adapter
        return math.inf, ""
    why = (
        f"{ratio:g} times (sampling.max_norm_ratio) the adapter's norm {size:.3g}, as "
        f"{counted(len(norms), 'update')} cannot be compared with a median"
    )
    return ratio * size, why


def check_state(state: ServerState, spool: Spool) -> ServerState:
    """Refuse a state that no client could use, before it replaces the checkpoint of the last one.

    Args:
        state: After the algorithm's step.
        spool: The round's updates. The largest is removed if the state is refused, so that its
            client is asked again when the run is resumed.

    Raises:
        UpdateError: The adapter holds a value beyond those of float16, or the algorithm's memory
            holds NaN or infinity. The client with the largest update is named.
    """
    who = f"round {state.round}, the new state"
    try:
        check_representable(state.adapter, who=who)
        for purpose, tensors in state.extra.items():
            # a single number may be infinite: a strategy's lowest loss so far, for example
            many = {name: t for name, t in tensors.items() if t.numel() > 1}
            check_finite(many, who=f"{who}, {purpose}")
    except UpdateError as error:
        what = str(error).split("\n", 1)[0]
        largest = max(spool.reports(), key=_norm)
        spool.discard(largest.client)
        raise UpdateError(
            f"{what} The last checkpoint is kept.\n"
            f"  The largest update came from client '{largest.client}' (norm "
            f"{_norm(largest):.3g}). Fix or remove that client and resume: it is asked again. Or "
            "start a run with a lower algorithm.server_lr or sampling.max_norm_ratio."
        ) from None
    return state


def _norm(update: Update) -> float:
    return float(update.metrics.get("delta_norm", 0.0))
