"""Contradictions in a recipe: pairs of keys that no single section can check."""

from collections.abc import Iterator

from pydantic import BaseModel

from silotune.data.chat_templates import TEMPLATES
from silotune.models.adapters import PROMPT_KINDS
from silotune.recipes.algorithm import ALGORITHM_CONFIGS, chosen_algorithm
from silotune.recipes.each_algorithm import each_algorithm, foreign
from silotune.recipes.personal import kept_by, what_is_kept
from silotune.recipes.preferences import of_preferences
from silotune.recipes.schema import RunConfig
from silotune.recipes.secure_sums import of_secure_sums
from silotune.recipes.together import of_shared_work
from silotune.recipes.wire import of_the_wire

MAX_ROWS_UNDER_PRIVACY = (
    "keeps a fixed number of rows, so one row more may push another one out: "
    "privacy.unit = 'record' promises that one row more changes one row"
)
"""Why data.max_rows is refused, in the recipe and in a client's own file."""


def contradictions(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Every contradiction that no single section can see, as (key, reason)."""
    by_clients = run.evaluate.choose_by == "clients"
    if run.checkpoint.keep == "best" and run.evaluate.every == 0 and by_clients:
        yield "checkpoint.keep", "'best' needs held-out losses, but evaluate.every is 0"
    if run.evaluate.metric and run.evaluate.every == 0 and run.evaluate.server_path is None:
        yield "evaluate.metric", "has no effect, because evaluate.every is 0"
    yield from run.runtime.contradictions()
    if run.plan.measure and run.runtime.name == "flower":
        yield (
            "plan.measure",
            "cannot be used with runtime.name = 'flower': the server has no rows to measure a "
            "step on, and clients run on other machines",
        )
    yield from _of_the_task(run)
    yield from of_preferences(run)
    yield from _of_the_server(run)
    yield from _of_own_steps(run)
    yield from _of_what_clients_keep(run)
    if "no-end-token" in run.train.compat and TEMPLATES.get(run.data.template) is None:
        own = ", ".join(name for name, text in TEMPLATES.items() if text is not None)
        yield "train.compat", f"'no-end-token' needs data.template to be one of: {own}"
    yield from _of_an_early_stop(run)
    arms = run.compare.algorithms
    if any(arm in arms[:i] for i, arm in enumerate(arms)):
        yield "compare.algorithms", "names an algorithm twice"
    yield from _of_the_adapter(run)
    yield from _of_the_optimizer(run)
    yield from _of_privacy(run)
    yield from of_secure_sums(run)
    yield from of_the_wire(run)
    yield from of_shared_work(run)


def _of_an_early_stop(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What an early stop needs: scores of rows that may decide something, and a best round."""
    if run.stop.patience is None:
        if run.stop.min_delta > 0:
            yield "stop.min_delta", "only has an effect with stop.patience"
        return
    if run.evaluate.choose_by == "clients":
        if run.privacy.unit != "none":
            yield "stop.patience", "ends a run by validation losses, which have no noise"
        if run.evaluate.every == 0:
            yield "stop.patience", "needs validation losses, but evaluate.every is 0"
        if run.data.validation_fraction == 0:
            yield (
                "stop.patience",
                "needs data.validation_fraction: the held-out rows must not decide when a run ends",
            )
    if run.checkpoint.keep != "best":
        yield (
            "stop.patience",
            "needs checkpoint.keep = 'best': the last rounds of such a run are those that did not "
            "get better",
        )


def _of_privacy(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that would weaken what [privacy] says."""
    cfg, own = run.privacy, type(run.privacy).model_fields
    if cfg.unit == "none":
        given = [key for key in own if getattr(cfg, key) != own[key].default]
        yield from (
            (f"privacy.{key}", 'only has an effect with unit = "client" or "record"')
            for key in given
        )
        return
    if (cfg.noise_multiplier is None) == (cfg.target_epsilon is None):
        yield "privacy.noise_multiplier", "give either noise_multiplier or target_epsilon"
    if cfg.delta is None:
        yield (
            "privacy.delta",
            f"is missing: it should be well below 1 divided by the number of {cfg.unit}s",
        )
    if cfg.clipping == "fixed":
        adaptive = [k for k in ("quantile", "clip_lr") if getattr(cfg, k) != own[k].default]
        yield from (
            (f"privacy.{k}", 'only has an effect with clipping = "adaptive"') for k in adaptive
        )
    if run.checkpoint.keep == "best" and run.evaluate.choose_by == "clients":
        yield "checkpoint.keep", "'best' selects by held-out losses, which have no noise"
    if run.checkpoint.keep_updates:
        yield (
            "checkpoint.keep_updates",
            "cannot be used with [privacy]: a contribution is computed from single updates and "
            "held-out losses, which have no noise",
        )
    if run.runtime.name == "flower":
        if run.evaluate.every > 0:
            yield (
                "evaluate.every",
                "must be 0 with [privacy] and runtime.name = 'flower': real clients keep their "
                "losses to themselves, because losses have no noise",
            )
        if cfg.noise == "seeded":
            yield (
                "privacy.noise",
                "'seeded' is for simulations: it would not protect real clients",
            )
    if cfg.unit == "record":
        yield from _of_records(run)
    if cfg.is_at_client:
        yield from _of_noise_at_the_client(run)
    else:
        yield from _of_noise_at_the_server(run)


def _of_records(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that would weaken the protection of rows, or give no gradients for single rows."""
    if run.privacy.noise_at != "server":
        yield (
            "privacy.noise_at",
            'only has an effect with unit = "client": the noise for rows is always at the client',
        )
    if run.data.max_rows is not None:
        yield "data.max_rows", MAX_ROWS_UNDER_PRIVACY
    if run.train.loss is not None:
        yield (
            "train.loss",
            "cannot be used with privacy.unit = 'record', which needs losses that depend on one "
            "row each: nothing says that of your own function",
        )
    if run.train.packing:
        yield (
            "train.packing",
            "merges rows, but privacy.unit = 'record' needs the gradient of each row",
        )
    if "same-samples" in run.train.compat:
        yield "train.compat", "'same-samples' rules out a secret draw of rows"
    if run.model.gradient_checkpointing:
        yield (
            "model.gradient_checkpointing",
            "hides the gradients of single rows that privacy.unit = 'record' needs",
        )
    if run.adapter.kind != "lora" or run.adapter.dora:
        kind = "dora" if run.adapter.kind == "lora" else f"kind = '{run.adapter.kind}'"
        yield (
            "adapter.kind",
            f"must be 'lora' without dora for privacy.unit = 'record': {kind} gives no "
            "gradients for single rows",
        )


def _of_noise_at_the_client(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that only work if the server adds the noise."""
    if run.privacy.clipping == "adaptive":
        yield (
            "privacy.clipping",
            "'adaptive' only works with noise at the server, which knows the norms",
        )


def _of_noise_at_the_server(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that would weaken the protection of clients, or need noise at the client."""
    if run.privacy.max_participations is not None:
        yield "privacy.max_participations", "only has an effect with noise at the client"
    for where, arm in each_algorithm(run).items():
        if kind := foreign(arm):
            yield where, f"{kind} cannot be made private: what it releases is unknown"
        elif arm.weights != "uniform":
            yield (
                f"{where}.weights",
                "must be 'uniform' with [privacy]: weighting by rows would let a large client "
                "move the mean by more than the noise covers",
            )
        elif not arm.facts.linear or arm.facts.remembers:
            name = chosen_algorithm(arm)
            why = (
                "its clients' memories take part" if arm.facts.remembers else "it is no sum of them"
            )
            yield (
                where,
                f"'{name}' cannot be used with privacy.unit = 'client' and noise at the server: "
                f"the noise covers one client's share in the mean of the changes, and {why}",
            )


def _of_the_adapter(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Adapters that cannot be trained on this base, or for this task."""
    kind, model = run.adapter.kind, run.model
    if kind == "full" and model.dtype in ("float16", "bfloat16"):
        yield (
            "model.dtype",
            f"'{model.dtype}' cannot represent the small steps of full training; use float32",
        )
    if kind == "full" and model.quantization != "none":
        yield (
            "model.quantization",
            "cannot be used with adapter.kind = 'full': quantised weights cannot be trained",
        )
    arms = (run.algorithm, *run.compare.algorithms)
    for name in dict.fromkeys(chosen_algorithm(arm) for arm in arms if arm.facts.needs_lora):
        if kind != "lora":
            why = f"with algorithm '{name}', which works on LoRA's two factors; use lora"
            yield "adapter.kind", f"'{kind}' cannot be used {why}"
        elif run.adapter.dora:
            why = "DoRA is not linear in the two factors, so means are not exact"
            yield "adapter.dora", f"cannot be used with algorithm '{name}': {why}"
    if run.adapter.ranks:
        for name in dict.fromkeys(
            chosen_algorithm(arm) for arm in arms if not arm.facts.mixed_ranks
        ):
            others = ", ".join(n for n, cfg in ALGORITHM_CONFIGS.items() if cfg.facts.mixed_ranks)
            yield (
                "adapter.ranks",
                f"cannot be used with algorithm '{name}', which averages factors of one rank; use "
                f"one of: {others}",
            )
        if run.finish.local_steps:
            yield (
                "adapter.ranks",
                "cannot be used with finish.local_steps: the result has the server's rank, which "
                "these clients do not train",
            )
    if kind in PROMPT_KINDS and run.task == "classify":
        yield "adapter.kind", f"'{kind}' does not work with task = \"classify\""
    if kind in PROMPT_KINDS and run.server.work == "distill":
        yield "adapter.kind", f"'{kind}' cannot learn from a teacher; use lora, ia3 or full"
    if kind in PROMPT_KINDS and run.train.packing:
        yield "train.packing", f"cannot be used with adapter.kind = '{kind}'"
    if kind == "prefix" and model.gradient_checkpointing:
        yield (
            "model.gradient_checkpointing",
            "cannot be used with adapter.kind = 'prefix', which needs the cache that it drops",
        )


def _of_the_optimizer(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Local optimizers that an algorithm is not defined for."""
    train = run.train
    plain = {"optimizer": "sgd", "clip_norm": 0, "weight_decay": 0}
    for arm in (run.algorithm, *run.compare.algorithms):
        if not arm.needs_plain_sgd:
            continue
        for key, value in plain.items():
            if getattr(train, key) != value:
                shown = f'"{value}"' if isinstance(value, str) else value
                yield (
                    f"train.{key}",
                    f"must be {shown} with algorithm '{chosen_algorithm(arm)}', whose variates "
                    'are gradients. Or set algorithm.variates = "displacement", about which '
                    "nothing is proved",
                )


def _of_the_task(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys that the recipe's task does not use."""
    used_by = {
        ("adapter", "head"): ("classify",),
        ("data", "labels"): ("classify",),
        ("data", "text"): ("classify", "text"),
        ("data", "text_pair"): ("classify",),
        ("data", "prompt"): ("instruct",),
        ("data", "completion"): ("instruct",),
        ("data", "system"): ("instruct", "prefer"),
        ("data", "template"): ("instruct", "text", "prefer"),
        ("train", "packing"): ("instruct", "text"),
        ("compare", "max_new_tokens"): ("instruct",),
    }
    for (section, key), tasks in used_by.items():
        part: BaseModel = getattr(run, section)
        changed = getattr(part, key) != type(part).model_fields[key].default
        if changed and run.task not in tasks:
            its = " or ".join(f'"{task}"' for task in tasks)
            yield f"{section}.{key}", f"only has an effect with task = {its}"
    if run.task == "text" and "no-end-token" in run.train.compat:
        yield "train.compat", "'no-end-token' only has an effect with task = \"instruct\""


def _of_the_servers_test(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What the server needs for its own scores."""
    path, chooses = run.evaluate.server_path, run.evaluate.choose_by == "server"
    if path is None:
        if chooses:
            yield "evaluate.choose_by", "'server' needs evaluate.server_path"
        return
    if path in (run.data.path, run.data.eval_path, run.server.data_path):
        yield "evaluate.server_path", "names rows that others have; the server needs its own"
    if kept := kept_by(run):
        yield kept.partition(" ")[0], _without(run, "to score with")
    if chooses and run.checkpoint.keep != "best":
        yield "evaluate.choose_by", "'server' only has an effect with checkpoint.keep = 'best'"


def _of_own_steps(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What clients need for steps of their own after the last round."""
    own = run.finish
    if not own.local_steps:
        given = {"lr": own.lr is not None, "interpolate": bool(own.interpolate)}
        yield from (
            (f"finish.{key}", "only has an effect with finish.local_steps")
            for key, is_given in given.items()
            if is_given
        )
        return
    if own.interpolate and run.data.validation_fraction == 0:
        yield (
            "finish.interpolate",
            "needs validation rows to choose a share by: set data.validation_fraction",
        )
    if run.train.warmup_steps >= own.local_steps:
        yield "finish.local_steps", "must be more than train.warmup_steps"
    if run.budget.hours is not None:
        yield (
            "finish.local_steps",
            "cannot be used with budget.hours, which ends before the steps after the last round",
        )
    if run.runtime.name == "flower":
        yield (
            "finish.local_steps",
            "cannot be used with runtime.name = 'flower': so far, only the clients of a simulation "
            "take steps of their own after the last round",
        )


def _of_the_server(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What the server needs for its own training."""
    yield from _of_the_servers_test(run)
    server, distill = run.server, run.distill
    if server.data_path is not None and server.data_fraction > 0:
        yield "server.data_path", "cannot be used with data_fraction; give one of them"
    if server.data_path is not None and server.data_path in (
        run.data.path,
        run.data.eval_path,
    ):
        yield "server.data_path", "names the clients' rows; the server needs its own"
    has_rows = server.data_path is not None or server.data_fraction > 0
    if server.work != "none" and not has_rows:
        yield (
            "server.work",
            f"'{server.work}' needs rows at the server: set server.data_fraction or "
            "server.data_path",
        )
    if server.work == "distill" and distill.teacher is None:
        yield "distill.teacher", "is missing: name a larger model with the same tokenizer"
    if server.work == "none":
        return
    if kept := kept_by(run):
        yield kept.partition(" ")[0], _without(run, "to train with")
    for i, arm in enumerate(run.compare.algorithms):
        if arm.facts.keeps:
            what = f"'{chosen_algorithm(arm)}' leaves the server without a factor {arm.facts.keeps}"
            yield f"compare.algorithms.{i}", f"{what} to train with"


def _without(run: RunConfig, purpose: str) -> str:
    """Why a server cannot use a model of which its clients keep a part."""
    _, _, value = kept_by(run).partition(" = ")
    return f"{value} leaves the server without a {what_is_kept(run)} {purpose}"


def _of_what_clients_keep(run: RunConfig) -> Iterator[tuple[str, str]]:
    """What cannot be done where each client keeps a part of the adapter."""
    if run.checkpoint.keep == "best" and run.algorithm.result_differs:
        yield (
            "checkpoint.keep",
            f"'best' cannot be used with algorithm.name = '{chosen_algorithm(run.algorithm)}' and "
            "residual = 'export': no round's score is that of the result",
        )
    if not (kept := kept_by(run)):
        return
    if run.checkpoint.keep == "best":
        yield (
            "checkpoint.keep",
            f"'best' cannot be used with {kept}: clients keep their {what_is_kept(run)} of the "
            "last rounds only, which belongs to no earlier adapter",
        )
    if run.algorithm.facts.keeps and run.runtime.name == "flower":
        yield (
            "algorithm.name",
            f"'{chosen_algorithm(run.algorithm)}' cannot be used with runtime.name = 'flower': "
            "so far, only the clients of a simulation can use what they keep",
        )
