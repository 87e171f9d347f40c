"""The names that other tools give to keys of a recipe: transformers, TRL, PEFT, Flower and others.

Whoever comes from such a tool types its names. A name is only listed if it means one key here; what
differs in meaning is said beside it.
"""

from typing import NamedTuple

PASSES = "passes over a client's rows in each round, not in the whole run"
STEPS = "optimizer steps of a client in each round, not in the whole run"
EACH_ROUND = "counted in rounds, not in steps"


class Known(NamedTuple):
    """A key of a recipe, and how it differs from another tool's key of another name."""

    key: str
    remark: str = ""


_NAMES: dict[Known, str] = {
    Known("train.lr"): "learning_rate lr_rate client_lr local_lr",
    Known("train.lr_min"): "min_lr learning_rate_min",
    Known("train.batch_size"): (
        "per_device_train_batch_size train_batch_size micro_batch_size local_batch_size mini_batch"
    ),
    Known("evaluate.batch_size"): "per_device_eval_batch_size eval_batch_size",
    Known("train.accumulation"): (
        "gradient_accumulation_steps gradient_accumulation grad_accum accumulate_grad_batches"
    ),
    Known("train.local_epochs", PASSES): "epochs num_epochs num_train_epochs n_epochs max_epochs",
    Known("train.local_steps", STEPS): "steps max_steps num_steps num_train_steps total_steps",
    Known("train.schedule", "from round to round"): (
        "lr_scheduler_type lr_scheduler scheduler lr_schedule learning_rate_schedule"
    ),
    Known("train.optimizer"): "optim optimiser optimizer_name",
    Known("train.clip_norm"): "max_grad_norm gradient_clipping grad_clip gradient_clip_val",
    Known("train.warmup_steps", "at the start of every round"): "warmup num_warmup_steps",
    Known("train.warmup_steps", "in steps, at the start of every round"): "warmup_ratio",
    Known("train.max_length"): (
        "max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len model_max_length"
        " block_size context_length"
    ),
    Known("train.packing"): "sample_packing",
    Known("adapter.rank"): "r lora_r lora_rank lora_dim lora_attn_dim peft_lora_r",
    Known("adapter.alpha"): "lora_alpha peft_lora_alpha",
    Known("adapter.dropout"): "lora_dropout",
    Known("adapter.targets"): (
        "target_modules lora_target_modules lora_target lora_modules lora_targets modules"
    ),
    Known("adapter.kind"): "peft_type adapter_type finetuning_type peft_method use_peft",
    Known("adapter.rslora"): "use_rslora",
    Known("adapter.dora"): "use_dora",
    Known("adapter.virtual_tokens"): "num_virtual_tokens",
    Known("adapter.head", '"train" does what this does for a classification head'): (
        "modules_to_save"
    ),
    Known("model.name"): (
        "model_name_or_path model_name base_model model_id model_path pretrained_model_name_or_path"
        " checkpoint_path"
    ),
    Known("model.quantization", 'a word: "nf4" for 4 bits, "int8" for 8'): (
        "load_in_4bit load_in_8bit quantization_bit bits use_4bit bnb_4bit_quant_type"
    ),
    Known("model.double_quantization"): "bnb_4bit_use_double_quant use_double_quant",
    Known("model.dtype", 'a word, such as "bfloat16"'): "bf16 fp16 torch_dtype precision",
    Known("data.path"): "dataset dataset_name dataset_path data_path train_file datasets",
    Known("data.name"): "dataset_config dataset_config_name subset config_name",
    Known("data.split"): "train_split dataset_split dataset_train_split",
    Known("data.eval_path"): "validation_file eval_file test_file",
    Known("data.eval_fraction"): "val_set_size test_size validation_split val_size",
    Known("data.text"): "dataset_text_field text_column text_field",
    Known("data.label"): "label_column",
    Known("data.max_rows", "per client"): "max_samples max_train_samples",
    Known("data.template"): "chat_template prompt_template prompt_style",
    Known("data.system"): "system_prompt system_message",
    Known("rounds"): "num_rounds num_server_rounds n_rounds comm_round communication_rounds",
    Known("partition.num_clients"): (
        "num_supernodes num_partitions n_clients total_clients num_users client_num_in_total"
    ),
    Known("partition.alpha"): "dirichlet_alpha partition_alpha",
    Known("sampling.num_clients"): (
        "clients_per_round min_fit_clients min_train_nodes num_sample_clients client_num_per_round"
    ),
    Known("sampling.fraction"): "fraction_fit fraction_train client_fraction participation",
    Known("sampling.timeout_s"): "round_timeout timeout",
    Known("algorithm.name"): "strategy aggregator fed_alg aggregation",
    Known("algorithm.mu", 'a key of algorithm.name = "fedprox"'): "proximal_mu prox_mu fedprox_mu",
    Known("algorithm.server_lr"): "server_learning_rate global_lr",
    Known("privacy.target_epsilon"): "epsilon",
    Known("privacy.clip_norm"): "clipping_norm max_per_sample_grad_norm l2_norm_clip",
    Known("privacy.noise_multiplier"): "noise_scale",
    Known("evaluate.every", EACH_ROUND): "eval_steps evaluation_strategy eval_strategy eval_every",
    Known("checkpoint.every", EACH_ROUND): "save_steps save_strategy save_every save_every_round",
    Known("report.tracker"): "report_to logger wandb use_wandb",
    Known("runtime.device"): "device_map accelerator",
    Known("seed"): "random_state random_seed data_seed manual_seed",
}
OTHER_TOOLS: dict[str, Known] = {
    name: known for known, names in _NAMES.items() for name in names.split()
}
"""Another tool's name, in lower case with underscores -> the key that is meant."""
SECTIONS = {
    **dict.fromkeys(
        ("training", "trainer", "training_args", "sft", "optimizer", "hparams"), "train"
    ),
    **dict.fromkeys(("lora", "peft", "qlora", "lora_config", "peft_config"), "adapter"),
    **dict.fromkeys(("dataset", "datasets"), "data"),
    **dict.fromkeys(("strategy", "aggregator"), "algorithm"),
    **dict.fromkeys(("dp", "differential_privacy"), "privacy"),
    **dict.fromkeys(("eval", "evaluation"), "evaluate"),
    "base_model": "model",
}
"""Another tool's name of a table -> the section that is meant."""


def known_elsewhere(key: str) -> Known | None:
    """The key that another tool's name for it means; None if it is no such name.

    Args:
        key: As it was typed, dotted or not, with hyphens or underscores: the last part counts.
    """
    return OTHER_TOOLS.get(key.rpartition(".")[2].lower().replace("-", "_"))
