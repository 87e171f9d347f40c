"""The adapter: what is trained next to a frozen base, built by PEFT and found by name.

The only file that chooses PEFT's configuration. It knows modules, but not clients or rounds.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from silotune.core.errors import ConfigError, ModelError
from silotune.core.seeds import derive
from silotune.core.types import Config
from silotune.core.wording import counted, did_you_mean
from silotune.models.heads import Head
from silotune.models.peft_options import check_option
from silotune.models.quantization import Quantization, spare_bitsandbytes

Kind = Literal["lora", "ia3", "prompt", "prefix", "peft", "full"]

OWN_KEYS: Mapping[str, Mapping[str, str]] = {
    "lora": {
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "targets",
        "use_rslora": "rslora",
        "use_dora": "dora",
    },
    "ia3": {"target_modules": "targets"},
    "prompt": {"num_virtual_tokens": "virtual_tokens"},
    "prefix": {"num_virtual_tokens": "virtual_tokens"},
    "peft": {"target_modules": "targets"},
    "full": {},
}
"""By kind: PEFT's options that have a key of their own in a recipe."""

NOT_OURS = {
    **dict.fromkeys(
        ("task_type", "inference_mode", "base_model_name_or_path", "modules_to_save", "revision"),
        "follows from other keys",
    ),
    "layer_replication": "would change the base, which all clients share",
}
"""PEFT's options that a recipe may not set for another reason than their type, and why."""

NEEDS_ROWS = ("eva", "corda", "lora_ga")
"""Initialisations of LoRA that need rows first, which the server does not have."""

TARGETS = {"distilbert": ("q_lin", "v_lin")}
"""Modules to adapt in model families that PEFT has no default for, by `model_type`."""

PROMPT_KINDS = ("prompt", "prefix")
"""Kinds that train vectors in front of the text instead of weights next to the base's."""


class AdapterConfig(Config):
    """What is trained and sent."""

    kind: Kind = "lora"
    """lora trains small factors next to a frozen base (Hu et al. 2021, arXiv:2106.09685); ia3
    scales activations (Liu et al. 2022, arXiv:2205.05638); prompt and prefix train vectors in front
    of the text (Lester et al. 2021, arXiv:2104.08691; Li and Liang 2021, arXiv:2101.00190); peft is
    any other PEFT method, named by peft.peft_type; full trains all weights."""
    rank: int = Field(default=8, ge=1)
    """lora: rank of the factors."""
    ranks: dict[str, Annotated[int, Field(ge=1, strict=True)]] = Field(default={})
    """lora, in simulation: lower ranks of single clients by name, for example { north = 4 }. Only
    with an algorithm that accepts mixed ranks: hetlora, flexlora or flora. A real client sets rank
    in [limits] of its own configuration instead."""
    alpha: float = Field(default=16, gt=0)
    """lora: scaling. The product is multiplied by alpha / rank. Clients of a lower rank use the
    same number, so that equal factors are equal functions everywhere."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """lora: dropout in front of the factors during training."""
    targets: tuple[str, ...] | None = None
    """Names of the modules to adapt; if absent, PEFT's default for the model family.
    ["all-linear"]: every linear layer except the output."""
    start: str | None = Field(default=None, min_length=1)
    """A finished run or a PEFT folder whose adapter training starts from, instead of a fresh one,
    for example instruction tuning before task = "prefer". Its rank, alpha and targets must be the
    recipe's. Clients receive it as the first adapter; in deployment they check its hash."""
    head: Literal["train", "freeze", "local"] = "train"
    """classify: what happens to the classification head, which starts at random values. train:
    trained and sent with the adapter. freeze: not trained. local: trained, but kept at each
    client."""
    rslora: bool = False
    """lora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """lora: also train the magnitude of each weight's columns (Liu et al. 2024,
    arXiv:2402.09353). Slower, and much slower on a quantised base."""
    virtual_tokens: int = Field(default=16, ge=1)
    """prompt and prefix: number of trained vectors in front of the text."""
    peft: dict[str, Any] = Field(default={})
    """Further options of PEFT's configuration for this kind, under PEFT's names, for example
    rank_pattern: numbers, switches, choices and names of modules. An option that would change the
    base itself, or could name a path or a model, is refused."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "AdapterConfig":
        mistakes: list[str] = []
        ours = OWN_KEYS[self.kind].values()
        for key in ("rslora", "dora", "virtual_tokens"):
            moved = getattr(self, key) != type(self).model_fields[key].default
            if moved and key not in ours and self.kind != "full":
                kinds = [f"'{kind}'" for kind, keys in OWN_KEYS.items() if key in keys.values()]
                mistakes.append(f"{key} only has an effect with kind = {' or '.join(kinds)}")
        if self.ranks and self.kind != "lora":
            mistakes.append("ranks only has an effect with kind = 'lora'")
        for client, rank in self.ranks.items():
            if rank > self.rank:
                above = f"above rank = {self.rank}, the server's; raise rank"
                mistakes.append(f"ranks.{client} = {rank} is {above}")
        patterns = sorted(self.peft.keys() & {"rank_pattern", "alpha_pattern"})
        if self.ranks and patterns:
            mistakes.append(f"ranks cannot be used with peft.{patterns[0]}")
        if self.kind == "full" and self.start is not None:
            mistakes.append("start is an adapter, so it cannot be used with kind = 'full'")
        if self.kind == "full" and self.peft:
            mistakes.append("peft has no effect with kind = 'full'")
        for option, key in OWN_KEYS[self.kind].items():
            if option in self.peft:
                mistakes.append(f"peft.{option} is set with adapter.{key}")
        mistakes += [f"peft.{o} {why}" for o, why in NOT_OURS.items() if o in self.peft]
        if (begin := self.peft.get("init_lora_weights")) in NEEDS_ROWS:
            mistakes.append(f"peft.init_lora_weights = '{begin}' needs rows before the first round")
        if self.kind == "peft" and "peft_type" not in self.peft:
            mistakes.append("peft.peft_type is missing: name the method, for example 'LOHA'")
        if self.kind != "peft" and "peft_type" in self.peft:
            mistakes.append("peft.peft_type needs kind = 'peft'")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def rank_of(self, client: str) -> int:
        """The rank at which a client of a simulation trains."""
        return self.ranks.get(client, self.rank)

    @property
    def highest_rank(self) -> int:
        """The highest rank of any module."""
        pattern = self.peft.get("rank_pattern") or {}
        return max([self.rank, *(rank for rank in pattern.values() if isinstance(rank, int))])

    def at_rank(self, rank: int) -> "AdapterConfig":
        """This adapter at a client of another rank: its factors are scaled by the same number."""
        share = rank / self.rank
        alpha = self.alpha * (share**0.5 if self.rslora else share)
        return self.model_copy(update={"rank": rank, "alpha": alpha, "ranks": {}})


def check_adapter(cfg: AdapterConfig, quantization: Quantization, device: torch.device) -> None:
    """Find an adapter that cannot work, without loading a model.

    Raises:
        ConfigError: PEFT has no method or option with that name (the closest is suggested), or the
            adapter does not work on such a base.
    """
    if cfg.dora and quantization == "int8" and device.type == "cpu":
        raise ConfigError(  # PEFT 0.21 with bitsandbytes 0.50 loses the weights' scales
            "adapter.dora cannot be used with model.quantization = 'int8' on a CPU.\n"
            "  Set model.quantization = 'nf4', or adapter.dora = false."
        )
    if cfg.peft:
        _peft_config(cfg, {})


def _peft_config(cfg: AdapterConfig, more: Mapping[str, Any]) -> Any:
    """PEFT's configuration object for a recipe."""
    spare_bitsandbytes()
    import peft

    given = {k: v for k, v in cfg.peft.items() if k != "peft_type"}
    if cfg.kind == "peft":
        kind = _config_class(str(cfg.peft["peft_type"]))
    else:
        kind = {
            "lora": peft.LoraConfig,
            "ia3": peft.IA3Config,
            "prompt": peft.PromptTuningConfig,
            "prefix": peft.PrefixTuningConfig,
        }[cfg.kind]
    known = [f.name for f in dataclasses.fields(kind) if f.init]
    for option in given:
        if option not in known:
            raise ConfigError(
                f"adapter.peft.{option}: PEFT's {kind.__name__} has no such option."
                f"{did_you_mean(option, known)}"
            )
        check_option(kind, option, given[option])
    own = {
        option: getattr(cfg, key) for option, key in OWN_KEYS[cfg.kind].items() if key != "targets"
    }
    try:
        return kind(**own, **given, **more)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"adapter.peft: PEFT rejects these options: {error}") from error


def _config_class(name: str) -> Any:
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    found = {
        kind.value: config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if not issubclass(config, PromptLearningConfig)
    }
    if name.upper() not in found:
        raise ConfigError(
            f"adapter.peft.peft_type: PEFT has no method '{name}' that adapts weights."
            f"{did_you_mean(name, found)}\n  Use one of: {', '.join(sorted(found))}."
        )
    return found[name.upper()]


def put_adapter(base: Any, cfg: AdapterConfig, seed: int, head: Head | None) -> Any:
    """Put a fresh adapter on a plain model.

    Args:
        base: The plain model; its weights stay as they are.
        cfg: Which adapter; not "full".
        seed: Initial values are drawn from (seed, "adapter"), the same at every client.
        head: Modules whose weights are all trained in addition to the adapter.

    Raises:
        ModelError: No module has the targets' names, or PEFT cannot adapt this model.
        ConfigError: See `check_adapter`.
    """
    spare_bitsandbytes()
    from peft import TaskType, get_peft_model

    more: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM if head is None else TaskType.SEQ_CLS}
    if cfg.kind not in PROMPT_KINDS:
        targets = list(cfg.targets or TARGETS.get(base.config.model_type, ()))
        more["target_modules"] = "all-linear" if targets == ["all-linear"] else targets or None
        if head is not None:
            more["modules_to_save"] = list(head.modules)
        _check_targets(base, cfg.targets)
    config = _peft_config(cfg, more)
    before = _marks(base) if cfg.peft else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "adapter"))
        try:
            model = get_peft_model(base, config)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            what = str(cfg.peft.get("peft_type", cfg.kind))
            fix = (
                f"Change or remove adapter.peft.{', adapter.peft.'.join(cfg.peft)}."
                if cfg.peft
                else "Name the modules in [adapter] targets, for example the query and value "
                f"projections. The model has: {', '.join(_leaf_names(base))}."
            )
            raise ModelError(
                f"adapter: PEFT cannot put '{what}' on this model: {error}\n  {fix}"
            ) from error
    if cfg.peft and _base_changed(base, before):
        raise ConfigError(
            f"adapter.peft: {', '.join(sorted(cfg.peft))} would change weights of the base, which "
            "all clients share and every comparison starts from.\n  Remove the option."
        )
    if cfg.kind == "peft":
        _try_out(model, str(cfg.peft["peft_type"]))
    return model


def _try_out(model: Any, method: str) -> None:
    """Run a forward pass with and without the adapter.

    Not every PEFT method works on every quantised base: some read packed weights as if they were
    plain numbers, without an error.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    model.eval()  # some methods draw random numbers in training mode
    why = "it changes the output of the base before any training"
    try:
        with torch.inference_mode():
            fresh = model(input_ids=ids).logits
            with model.disable_adapter():
                plain = model(input_ids=ids).logits
        quantised = getattr(model.get_base_model(), "is_quantized", False)
        fits = not quantised or (fresh - plain).abs().max() <= 0.02 * plain.abs().max()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        fits, why = False, str(error)
    if not fits:
        raise ModelError(
            f"adapter.peft.peft_type = '{method}' does not work on this base: {why}\n"
            "  Use another method, or a base that is not quantised."
        )


def _base_changed(base: nn.Module, before: Mapping[int, float]) -> bool:
    """Whether weights of the base are now trainable, or differ from what `_marks` recorded."""
    learning = {p.data_ptr() for p in base.parameters() if p.requires_grad}
    return bool(learning & before.keys()) or not _marks(base).items() >= before.items()


def _marks(base: nn.Module) -> dict[int, float]:
    """Each tensor's address in memory and a sum over it, which show any change."""
    return {
        p.data_ptr(): float(p.detach().double().abs().sum())
        for p in base.parameters()
        if not p.is_meta
    }


def _leaf_names(base: Any) -> list[str]:
    modules = base.named_modules()
    return sorted({name.rsplit(".", 1)[-1] for name, m in modules if not list(m.children())})


def _check_targets(base: Any, targets: tuple[str, ...] | None) -> None:
    names = _leaf_names(base)
    for target in targets or ():
        last = target.rsplit(".", 1)[-1]
        if last not in names and targets != ("all-linear",):
            near = difflib.get_close_matches(last, names, n=3, cutoff=0.4)
            offer = f"Did you mean {', '.join(near)}?" if near else f"It has: {', '.join(names)}."
            raise ModelError(f"adapter.targets: this model has no module '{target}'.\n  {offer}")


def trained_parameters(model: Any, kind: Kind) -> dict[str, nn.Parameter]:
    """Names as saved -> the live parameters.

    They are matched by storage, because PEFT decides the names.

    Raises:
        ModelError: A trainable tensor would not be saved.
    """
    learning = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    if kind == "full":
        saved = dict(model.named_parameters())  # tied weights appear once
    elif kind in PROMPT_KINDS:
        # PEFT saves a copy of the single table of vectors under this name; there are more trainable
        # tensors if an option adds a network after it
        saved = {"prompt_embeddings": next(iter(learning.values()))}
    else:
        from peft import get_peft_model_state_dict

        # False: "auto" asks the hub for the base's config, whatever the base is called
        saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = {
        n: learning[t.data_ptr()] for n, t in sorted(saved.items()) if t.data_ptr() in learning
    }
    if len(found) != len(learning):
        raise ModelError(
            f"adapter: {counted(len(learning), 'tensor')} would be trained, but PEFT saves "
            f"{len(found)} of them.\n"
            "  This kind of adapter, or an option in adapter.peft, cannot be sent between clients."
        )
    return cast(dict[str, nn.Parameter], found)


def without_frozen(model: Any, kind: Kind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved adapter without its frozen tensors, which PEFT also saves for some methods.

    They are drawn from the seed when the adapter is built.
    """
    if kind == "full" or kind in PROMPT_KINDS:
        return dict(state)
    from peft import get_peft_model_state_dict

    learning = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    frozen = {name for name, tensor in saved.items() if tensor.data_ptr() not in learning}
    return {name: tensor for name, tensor in state.items() if name not in frozen}
