"""Checks that need neither a model nor torch: every fault is found before anything is written."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import DataConfig, RunConfig, TrainConfig
from pipeline.config.deepspeed import (
    combination_fault,
    decided_by,
    fill_ds_config,
    find_ds_config,
    optimizer_fault,
    read_ds_config,
    zero_stage,
)
from pipeline.config.evaluate import check_generation, check_selection
from pipeline.data.encode_classifier import refuse_choice_score
from pipeline.distributed.hosts import read_hosts
from pipeline.distributed.launcher import has_accelerator
from pipeline.errors import ConfigError
from pipeline.files import ADAPTER_CONFIG
from pipeline.run_folder.metrics import check_loggers
from pipeline.terminal import say


def check_inputs(config: RunConfig) -> RunConfig:
    """Model path, stored adapter, hostfile, loggers, DeepSpeed file, all local data rows, how batches are formed.

    Returns:
        `config` with the template that local rows without one are read by, which is said.

    Raises:
        UserError: the first fault, with the way out.
    """
    check_model_path(config.model.path)
    if config.adapter.init_from is not None and not (Path(config.adapter.init_from) / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            "adapter.init_from",
            config.adapter.init_from,
            f"holds no {ADAPTER_CONFIG}",
            "Give the folder of a PEFT adapter.",
        )
    if config.launch.hostfile is not None:
        read_hosts(config.launch)
    check_loggers(config.logging)
    decided = decided_by(config.train, micro_steps=None, bf16=None)
    name = config.train.deepspeed
    ds_config = fill_ds_config(read_ds_config(name), decided, find_ds_config(name).name)
    on_cpu = config.launch.hostfile is None and not has_accelerator()
    for fault in (combination_fault(ds_config, config.model), optimizer_fault(ds_config, config.train, on_cpu)):
        if fault is not None:
            raise fault
    if config.adapter.kind == "adalora" and zero_stage(ds_config) == 3:
        raise ConfigError(
            "adapter.kind", "adalora", f"cannot be trained under {config.train.deepspeed}, which is ZeRO-3: importance"
            " and orthogonality need whole matrices", "Set train.deepspeed to zero2, zero1 or zero0.",
        )
    from pipeline.data.check import look_at
    from pipeline.data.shapes.also import check_also
    from pipeline.model.kind import local_kind

    kind = local_kind(config.model)
    found = look_at(config.data, classifier=None if kind is None else kind == "classifier")
    if rows := found.rows:
        answered = "completion" if rows[0].kind == "chat" else rows[0].kind
        check_selection(config.select.by, answered, max(len(row.choices) for row in rows))
        check_generation(config.evaluate.generate, answered)
    also = check_also(config.evaluate.also, found.config, found.rows, None if kind is None else kind == "classifier")
    _check_rows(config.data, config.train, classifier=kind == "classifier")
    for line in found.lines:
        say(line)
    if (found.config, also) == (config.data, config.evaluate.also):
        return config
    evaluate = config.evaluate.model_copy(update={"also": also})
    return config.model_copy(update={"data": found.config, "evaluate": evaluate})


def read_fetched(config: RunConfig) -> RunConfig:
    """`config` with the templates of sources that lie elsewhere, which are fetched here where one is missing.

    Raises:
        DataError: they cannot be fetched, or have rows that cannot be trained on.
    """
    from pipeline.data.shapes.reading import read_sources, said_of, with_templates
    from pipeline.data.sources import EMBEDDED, is_local, sources_of
    from pipeline.model.kind import local_kind

    away = {
        source.path for source in sources_of(config.data)
        if source.template is None and not is_local(source.path) and not source.path.startswith(EMBEDDED)
    }
    if not away:
        return config
    sources = read_sources(config.data, local_kind(config.model) == "classifier")
    for source in sources:
        if source.path in away:
            say(said_of(source))
    return config.model_copy(update={"data": with_templates(config.data, sources)})


def _check_rows(data: DataConfig, train: TrainConfig, classifier: bool) -> None:
    """Refuse ways of forming batches, and of scoring choices, that do not go together."""
    if classifier:
        refuse_choice_score(data)
    packing, streaming = ("train.packing", train.packing), ("data.streaming", data.streaming)
    for (field, wanted), refused, reason in (
        (packing, classifier, "a classifier reads one text per row; train.micro_tokens saves padding, too"),
        (streaming, classifier, "a classifier needs to know that all rows have the same choices"),
        (packing, data.streaming, "rows are packed by the lengths of all of them, which a stream does not know"),
        (packing, data.train_path is not None, "what distill writes has several answers per row, which are not packed"),
        (packing, train.epochs is not None, "train.epochs counts rows before they are packed"),
        (streaming, train.epochs is not None, "train.epochs needs the number of rows; set train.max_steps"),
    ):
        if wanted and refused:
            raise ConfigError(field, True, reason, f"Set {field}=false.")


def check_model_path(path: str) -> None:
    """Refuse what looks like a local folder and is none, or has no model in it. Hub names pass."""
    if path.startswith("embedded:"):
        from pipeline.model.embedded import check_embedded_name

        check_embedded_name(path)
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError("model.path", path, "holds no config.json", "Give the folder of a transformers model.")
        return
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.suffix in (".gguf", ".safetensors")
    if looks_local and ("/" in path or folder.suffix):
        raise ConfigError("model.path", path, "does not exist", "Give a model folder or a hub name (owner/name).")
