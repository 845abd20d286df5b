"""What other tools call a setting -> what it is called here, or why there is no such thing.

Names as they stand in Transformers (TrainingArguments, BitsAndBytesConfig, from_pretrained), PEFT (LoraConfig,
AdaLoraConfig), TRL (SFTConfig, ModelConfig), Axolotl, LLaMA-Factory and Unsloth, today or in versions still in use.
What is called the same in one of our sections is not listed: it is found there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """The answer to a name of another tool."""

    here: tuple[str, ...]
    """Our keys, the nearest one first; empty: there is no such setting."""
    note: str = ""
    """How values translate, or what does it instead."""

    def __str__(self) -> str:
        if not self.here:
            return self.note
        keys = " and ".join(self.here)
        return f"Here: {keys}; {self.note}" if self.note else f"Here: {keys}."


_ACCUMULATION = "accumulation follows: global_batch / (micro_batch × processes)."
_ANSWERS = "Only answers are trained on (of chats, what the assistant says); prompts never are."
_BFLOAT = "bfloat16, float16 or float32 for the base; adapters and their optimizer stay in float32."
_DROPOUT = "dropout of the adapter's input, PEFT's, is adapter.method=input_dropout; lora_dropout is another."
_HEAD = "a classifier's new head is trained beside the adapter by itself; nothing else of the base is."
_STEPS = "a number of steps."
_FOLDER = "Give the folder as --run-dir."
_LAYERS = "one regular expression over module names chooses layers, too."
_SINGLE = "examples per process in one pass; train.global_batch counts those of a step."

_TABLE: tuple[tuple[str, tuple[str, ...], str], ...] = (
    # names, ours, note
    ("model_name_or_path base_model model_name pretrained_model_name_or_path model_id model.name model.id",
     ("model.path",), ""),
    ("model_revision revision_of_model", ("model.revision",), ""),
    ("load_in_4bit", ("model.quantization",), "true is nf4, the default; false is none."),
    ("load_in_8bit", ("model.quantization",), "true is int8."),
    ("quantization_bit", ("model.quantization",), "4 is nf4, 8 is int8."),
    ("bnb_4bit_quant_type quantization_type", ("model.quantization",), "nf4; there is no fp4."),
    ("bnb_4bit_use_double_quant use_bnb_nested_quant", ("model.double_quantization",), ""),
    ("bf16 fp16 torch_dtype dtype bnb_4bit_compute_dtype", ("model.compute_dtype",), _BFLOAT),
    ("attn_implementation flash_attention flash_attn use_flash_attention_2", ("model.attention",),
     "sdpa, which takes a flash kernel where there is one, or eager."),
    ("device_map", ("launch.processes",), "every process holds the whole base; train.deepspeed=zero3 shards it."),
    ("lora_r lora_rank r target_r", ("adapter.rank",), ""),
    ("lora_alpha", ("adapter.alpha",), ""),
    ("lora_dropout dropout", ("adapter.rate", "adapter.method"), _DROPOUT),
    ("lora_target_modules lora_target", ("adapter.target_modules",), ""),
    ("lora_target_linear", ("adapter.target_modules",), "true is all-linear, the default."),
    ("layers_to_transform peft_layers_to_transform exclude_modules", ("adapter.target_modules",), _LAYERS),
    ("use_rslora peft_use_rslora", ("adapter.rslora",), ""),
    ("peft_type", ("adapter.kind",), "lora or adalora."),
    ("finetuning_type", ("adapter.kind",), "lora or adalora; the base itself is never trained."),
    ("use_dora peft_use_dora", (), "DoRA is not offered: adapter.kind is lora or adalora."),
    ("bias lora_bias", (), "Biases are not trained, as with PEFT's bias=none."),
    ("modules_to_save lora_modules_to_save additional_target", ("model.kind",), _HEAD),
    ("init_lora_weights", ("adapter.init_from",), "else A starts Kaiming-uniform and B as zero, as with PEFT's true."),
    ("adapter_name_or_path lora_model_dir", ("adapter.init_from",), ""),
    ("loraplus_lr_ratio", ("train.lora_plus_ratio",), ""),
    ("init_r", ("adapter.adalora.initial_rank",), ""),
    ("tinit", ("adapter.adalora.warmup",), ""),
    ("tfinal", ("adapter.adalora.final",), ""),
    ("deltaT", ("adapter.adalora.interval",), ""),
    ("orth_reg_weight", ("adapter.adalora.orthogonality",), ""),
    ("lr", ("train.learning_rate",), ""),
    ("batch_size train_batch_size batch", ("train.global_batch", "train.micro_batch"),
     "the first counts the examples of a step, the second those of one pass of a process."),
    ("per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu", ("train.micro_batch",), _SINGLE),
    ("gradient_accumulation_steps", ("train.global_batch",), _ACCUMULATION),
    ("per_device_eval_batch_size eval_batch_size", ("evaluate.batch_tokens",), "in tokens."),
    ("num_train_epochs num_epochs", ("train.epochs",), ""),
    ("max_train_steps num_train_steps steps", ("train.max_steps",), ""),
    ("warmup_ratio", ("train.warmup_fraction",), ""),
    ("lr_scheduler_type lr_scheduler", ("train.schedule",), ""),
    ("optim optimizer_name", ("train.optimizer",), "adamw, adamw_8bit, paged_adamw or paged_adamw_8bit."),
    ("adam_beta1 adam_beta2 adam_epsilon", (), "AdamW's 0.9, 0.999 and 1e-8 are fixed."),
    ("max_grad_norm gradient_clipping", ("train.max_gradient_norm",), ""),
    ("label_smoothing_factor", ("train.label_smoothing",), ""),
    ("seed", ("train.seed", "data.seed"), "the first is that of initialisation, row order and masks, the second that of"
     " the splits."),
    ("random_state", ("train.seed",), ""),
    ("data_seed", ("train.seed", "data.seed"), "row order follows from the first, the splits from the second."),
    ("max_steps", ("train.max_steps",), "search.max_steps is the length of a trial."),
    ("eval_steps eval_strategy evaluation_strategy evals_per_epoch", ("train.validate_every_steps",), _STEPS),
    ("save_steps save_strategy saves_per_epoch", ("train.checkpoint_every_steps",), _STEPS),
    ("save_total_limit", ("train.keep_checkpoints",), ""),
    ("load_best_model_at_end", ("train.keep_best",), "it is on."),
    ("predict_with_generate", ("evaluate.generate",), "{} for its defaults."),
    ("num_beams generation_num_beams", ("evaluate.generate.beams",), ""),
    ("max_new_tokens generation_max_length", ("evaluate.generate.max_tokens",), ""),
    ("no_repeat_ngram_size", ("evaluate.generate.no_repeat_ngram",), ""),
    ("metric_for_best_model", ("select.by",), "the best step goes by validation NLL."),
    ("early_stopping_patience", ("train.patience",), "validations without improvement."),
    ("logging_steps", (), "Every step is a row of metrics.jsonl in the run folder."),
    ("report_to", ("logging.wandb", "logging.tensorboard"), "for example logging.tensorboard=true."),
    ("use_tensorboard", ("logging.tensorboard",), ""),
    ("wandb_project", ("logging.wandb.project",), ""),
    ("run_name wandb_name", ("logging.wandb.name",), "the run itself is called by its folder, --run-dir."),
    ("wandb_mode", ("logging.wandb.mode",), ""),
    ("output_dir", (), _FOLDER),
    ("overwrite_output_dir", (), "A run folder is never overwritten: give another --run-dir."),
    ("resume_from_checkpoint auto_resume_from_checkpoints", (), "The same command with the same --run-dir continues."),
    ("gradient_checkpointing use_gradient_checkpointing", ("train.activation_checkpointing",), ""),
    ("fsdp fsdp_config", ("train.deepspeed",), "zero3 shards the base, zero2 gradients and optimizer state."),
    ("neftune_noise_alpha", ("adapter.method",), "noise on embeddings is not offered; dropout regularizes here."),
    ("group_by_length", ("train.micro_tokens",), "a step's examples are passed through the model by length."),
    ("sample_packing neat_packing", ("train.packing",), ""),
    ("torch_compile use_liger_kernel enable_liger_kernel", (), "Kernels cannot be chosen, but for adapter.fused."),
    ("push_to_hub hub_model_id", (), "Nothing is uploaded: `loradrop export` writes folders that PEFT loads and you can"
     " upload."),
    ("do_train do_eval do_predict", (), "Name the stage: `loradrop train`, `loradrop evaluate`."),
    ("num_processes nproc_per_node num_gpus", ("launch.processes",), ""),
    ("num_machines nnodes", ("launch.nodes",), ""),
    ("dataset datasets dataset_name dataset_path data_path data_files train_file dataset_dir data.file data.files"
     " data.name", ("data.path",), ""),
    ("eval_dataset test_datasets", ("data.evaluation",), ""),
    ("dataset_text_field chat_template", ("data.template",), "chats take the tokenizer's own chat template."),
    ("max_seq_length max_seq_len max_length sequence_len cutoff_len model_max_length", ("data.max_tokens",), ""),
    ("val_set_size val_size", ("data.validation_rows",), "a number of rows."),
    ("max_samples max_train_samples", ("data.train_rows",), ""),
    ("train_on_inputs train_on_prompt completion_only_loss assistant_only_loss", (), _ANSWERS),
    ("buffer_size", ("data.shuffle_rows",), "with data.streaming=true."),
    ("split dataset_split", ("data.splits",), "as {train: train, test: validation}."),
    ("lora peft lora_config peft_config", ("adapter",), "a section: see loradrop keys adapter."),
    ("training training_arguments training_args", ("train",), "a section: see loradrop keys train."),
    ("bnb_config bnb_config_kwargs quantization_config", ("model.quantization",), "nf4, int8 or none."),
)

FOREIGN: dict[str, Foreign] = {
    name: Foreign(here, note) for names, here, note in _TABLE for name in names.split()
}
"""Name of another tool -> the answer."""
