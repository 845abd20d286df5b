"""The frozen base model: which, and in which precision."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, WithJsonSchema, model_validator

from pipeline.config.extensions import TASKS, listed, offered
from pipeline.config.section import Name, Section
from pipeline.errors import ConfigError

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"


_KINDS = ("auto", "causal", "classifier")


def _check_task(kind: str) -> str:
    base, separator, task = kind.partition(":")
    if kind in _KINDS:
        return kind
    if not separator or base not in ("causal", "classifier"):
        raise ValueError("must be auto, causal, classifier, or causal:TASK or classifier:TASK")
    if task not in offered(TASKS):
        raise ValueError(f"there is no task {task!r}; {listed(TASKS)}")
    return kind


Kind = Annotated[str, AfterValidator(_check_task), WithJsonSchema({"anyOf": [
    {"enum": list(_KINDS), "type": "string"}, {"type": "string", "pattern": "^(causal|classifier):"},
]})]


class ModelConfig(Section):
    """The frozen base model."""

    path: Name = EMBEDDED_MODEL
    """A local folder, a hub name, or an embedded model (`embedded:smollm2-135m-instruct`,
    `embedded:all-minilm-l6-v2`)."""
    kind: Kind = "auto"
    """`causal`: answers are the tokens that follow the prompt. `classifier`: the prompt alone is read, and a head that
    is trained beside the adapter gives one logit per choice. auto = classifier for encoders (BERT, RoBERTa, …) and for
    models saved with a classification head, else causal. `causal:NAME` and `classifier:NAME`: the task of that name,
    which an installed package adds (docs/python.md), in the place of what such a model is trained on by itself."""
    revision: Name | None = None
    """Commit or tag of a hub model."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """bitsandbytes 4-bit NormalFloat, 8-bit, or the stored 16/32-bit weights."""
    double_quantization: bool = True
    """Quantize the 4-bit scales too (arXiv 2305.14314, section 3)."""
    hold: Literal["auto", "quantized", "dequantized"] = "auto"
    """4-bit weights in memory: `quantized`, and dequantized again in every product; or `dequantized` once, to the
    compute dtype: the same results to the bit, about a tenth faster on CPUs, 2 or 4 bytes per weight in each process.
    auto = dequantized on CPUs with four times that memory available, quantized on accelerators and under ZeRO-3."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; auto = bfloat16 on an accelerator that has it, float16 on older ones. On CPUs the
    command times a training pass of the run's shapes in float32 and bfloat16, once per machine, takes bfloat16 where
    that is 15 % faster, and writes which it is into config.yaml, where it stays; float32 for models of a few million
    parameters, and for `launch.nodes`. Under float16 the loss of a step is scaled by a power of two, which is undone
    before gradients are used."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """transformers attention implementation."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Off unless you set it on the command line or in your own --config file: it is
    never taken from a run folder, so later stages need it again."""

    @model_validator(mode="after")
    def _check_hold(self) -> ModelConfig:
        if self.hold == "dequantized" and self.quantization != "nf4":
            raise ConfigError(
                "model.hold", self.hold, f"is for 4-bit weights, and model.quantization is {self.quantization}",
                "Leave it at auto.",
            )
        return self
