"""Plain LoRA, and every mask draw, against stock PEFT on the same base with the same matrices.

Tolerances, relative to the adapter's largest effect on a logit (or to the largest entry of a gradient): fp32, and
NF4 computing in fp32, 1e-5 (gradients 2e-5). bf16 5 % (gradients 10 %), because stock PEFT multiplies the adapter in
fp32 and this layer in the base's bf16; but it may be at most a quarter further from the exact result than PEFT.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.families import load_tiny, trained_start
from helpers.reference import dense_update
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.masks import element_mask
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.peft_format import adapter_matrices, load_matrices, masked_matrices, read_adapter, write_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.support.tiny import tiny_llama

TOLERANCE = {"fp32": 1e-5, "nf4": 1e-5, "bf16": 0.05}
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))

PLAIN = AdapterSpec(rank=4, alpha=8.0)
PATTERNS = AdapterSpec(
    rank=4, alpha=8.0, rslora=True, rank_pattern={"q_proj": 2, "layers.1.mlp.*": 8}, alpha_pattern={"q_proj": 1.0},
)
GPT2_PATTERNS = replace(PATTERNS, rank_pattern={"c_fc": 3, "h.1.attn.c_attn": 7}, alpha_pattern={"c_fc": 20.0})


def stock(model: nn.Module, spec: AdapterSpec) -> PeftModel:
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.rslora, target_modules="all-linear", lora_dropout=0.0,
        rank_pattern=dict(spec.rank_pattern), alpha_pattern=dict(spec.alpha_pattern), task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    return get_peft_model(model, config)


def stock_matrices(model: PeftModel) -> dict[str, nn.Parameter]:
    """`layer.A` and `layer.B` -> PEFT's parameter."""
    return {
        name.removeprefix("base_model.model.").replace(f".lora_{side}.default.weight", f".{side}"): parameter
        for name, parameter in model.named_parameters() for side in "AB" if f".lora_{side}." in name
    }


def copy_to_stock(adapters: Adapters, model: PeftModel) -> None:
    theirs = stock_matrices(model)
    ours = adapter_matrices(adapters.layers, 0)
    assert {name.rpartition(".")[0] for name in theirs} == set(ours)
    with torch.no_grad():
        for name, (A, B) in ours.items():
            theirs[f"{name}.A"].copy_(A)
            theirs[f"{name}.B"].copy_(B)


def logits_of(model: nn.Module) -> Tensor:
    return model(IDS).logits.float()


def relative(ours: Tensor, theirs: Tensor, effect: float) -> float:
    return float((ours.detach() - theirs.detach()).abs().max()) / effect


@pytest.mark.parametrize("patterns", [False, True], ids=["plain", "patterns"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_plain_lora_equals_stock_peft(family: str, precision: str, patterns: bool, tmp_path: Path) -> None:
    """Logits, and the gradients of A and B of every layer."""
    spec = PLAIN if not patterns else GPT2_PATTERNS if family == "gpt2" else PATTERNS
    base, twin = (load_tiny(tmp_path, family, precision) for _ in range(2))
    exact = copy.deepcopy(base).float() if precision == "bf16" else None
    untouched = logits_of(base).detach()
    adapters = trained_start(attach(base, [spec], "all-linear", seed=0))
    peft = stock(twin, spec)
    copy_to_stock(adapters, peft)
    ours, theirs = logits_of(base), logits_of(peft)
    effect = float((theirs - untouched).detach().abs().max())
    assert effect > 0.5
    assert relative(ours, theirs, effect) <= TOLERANCE[precision]
    our_gradients, their_gradients = our_backward(adapters, ours), their_backward(peft, theirs)
    for name, wanted in their_gradients.items():
        assert float(wanted.abs().max()) > 0
        assert relative(our_gradients[name], wanted, float(wanted.abs().max())) <= 2 * TOLERANCE[precision], name
    if exact is not None:
        truth = trained_start(attach(exact, [spec], "all-linear", seed=0))
        exact_logits = logits_of(exact)
        exact_gradients = our_backward(truth, exact_logits)
        assert rms(ours, exact_logits) <= 1.25 * rms(theirs, exact_logits)
        errors = [[rms(g[name], wanted) / rms(wanted, 0 * wanted) for name, wanted in exact_gradients.items()]
                  for g in (our_gradients, their_gradients)]
        assert sum(errors[0]) <= 1.25 * sum(errors[1])


def direction_of(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))


def our_backward(adapters: Adapters, logits: Tensor) -> dict[str, Tensor]:
    (logits * direction_of(logits)).sum().backward()
    return {
        f"{name}.{side}": parameter.grad[0]
        for name, layer in adapters.layers.items()
        for side, parameter in (("A", layer.buckets[0].lora_A), ("B", layer.buckets[0].lora_B))
    }


def their_backward(peft: PeftModel, logits: Tensor) -> dict[str, Tensor]:
    (logits * direction_of(logits)).sum().backward()
    return {name: parameter.grad for name, parameter in stock_matrices(peft).items()}


def rms(x: Tensor, y: Tensor) -> float:
    return float((x - y).detach().double().square().mean()) ** 0.5


def test_the_start_follows_pefts_distribution() -> None:
    """A uniform in ±1/sqrt(I) on both sides (mean 0, standard deviation bound/√3), B zero on both sides."""
    adapters, peft = attach(tiny_llama(), [PLAIN], "all-linear", seed=0), stock(tiny_llama(), PLAIN)
    for name, (A, B) in adapter_matrices(adapters.layers, 0).items():
        theirs = stock_matrices(peft)[f"{name}.A"]
        bound = A.shape[1] ** -0.5
        for matrix in (A, theirs.detach()):
            assert float(matrix.abs().max()) <= bound
            assert abs(float(matrix.square().mean()) * 3 / bound**2 - 1) < 5 * (0.8 / matrix.numel()) ** 0.5
        assert not B.any() and not stock_matrices(peft)[f"{name}.B"].any()


class GivenMask(nn.Module):
    """Stands where PEFT has its `lora_dropout` module."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def test_input_dropout_is_pefts_lora_dropout_under_the_same_masks() -> None:
    """PEFT's own forward, with our masks in the place of its dropout module; logits and gradients."""
    spec = replace(PLAIN, sites=(Site(position="lora_input", rate=0.4),))
    adapters, peft = trained_start(attach(tiny_llama(), [spec], "all-linear", seed=0)), stock(tiny_llama(), PLAIN)
    copy_to_stock(adapters, peft)
    positions = torch.arange(IDS.shape[1]).repeat(3, 1)
    plan = with_row_keys(adapters.plan([Member(0, 0)], 3, MaskKey(0, 0)), torch.tensor([5, 6, 7]), positions)
    for name, layer in adapters.layers.items():
        _, layer_key = layer.input_sites[0]
        mask = element_mask(plan.row_keys, slice(None), layer_key, layer.buckets[0].inputs, 0.4)
        assert abs(float((mask == 0).double().mean()) - 0.4) < 0.06
        peft.get_submodule(f"base_model.model.{name}").lora_dropout["default"] = GivenMask(mask)
    with adapters.axis.active(plan):
        ours = logits_of(adapters.model)
    theirs = logits_of(peft)
    assert relative(ours, theirs, float(theirs.detach().abs().max())) <= 1e-5
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, layer in adapters.layers.items():
        for side, mine in (("A", layer.buckets[0].lora_A), ("B", layer.buckets[0].lora_B)):
            wanted = stock_matrices(peft)[f"{name}.{side}"].grad
            assert relative(mine.grad[0], wanted, float(wanted.abs().max())) <= 1e-5


def written(folder: Path, adapters: Adapters, matrices: dict[str, tuple[Tensor, Tensor]], spec: AdapterSpec) -> Path:
    folder.mkdir()
    write_adapter(folder, matrices, spec, adapters.layer_count, "tiny", adapters.suffixes)
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "layers.1.mlp.down_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("rescale", ["inverse", "none"])
@pytest.mark.parametrize("spec", [PLAIN, PATTERNS], ids=["plain", "patterns"])
def test_stock_peft_computes_the_mean_field_of_a_written_adapter(
    spec: AdapterSpec, rescale: str, targets: str | list[str], tmp_path: Path
) -> None:
    """Sites on a part of the layers as well: alpha then differs from layer to layer."""
    sites = (
        Site(position="lora_A", rate=0.5, compensation=rescale),
        Site(position="lora_B", rate=0.25, compensation=rescale),
        Site(position="lora_rank", rate=0.5, compensation=rescale, layers=(0.5, 1.0)),
    )
    spec = replace(spec, sites=sites)
    adapters = trained_start(attach(tiny_llama(), [spec], targets, seed=0))
    folder = written(tmp_path / "adapter", adapters, adapter_matrices(adapters.layers, 0), spec)
    with torch.no_grad():
        ours = logits_of(adapters.model)
        theirs = logits_of(PeftModel.from_pretrained(tiny_llama(), folder))
        base = logits_of(tiny_llama())
    assert relative(ours, theirs, float((theirs - base).abs().max())) <= 1e-5


@pytest.mark.parametrize("rescale", ["inverse", "none"])
def test_stock_peft_computes_each_exported_draw(rescale: str, tmp_path: Path) -> None:
    """A draw of the trained adapter = the draw after writing and reading = a plain LoRA that PEFT loads."""
    sites = tuple(
        Site(position=position, rate=rate, compensation=rescale)
        for position, rate in (("lora_A", 0.5), ("lora_B", 0.25), ("lora_rank", 0.5))
    )
    spec = replace(PATTERNS, sites=sites)
    adapters = trained_start(attach(tiny_llama(), [spec], "all-linear", seed=0))
    stored = read_adapter(written(tmp_path / "adapter", adapters, adapter_matrices(adapters.layers, 0), spec))
    again = attach(tiny_llama(), [stored.spec], "all-linear", seed=1)
    load_matrices(again.layers, 0, stored.matrices, "test")
    members = [Member(0, 0), Member(0, 1)]
    masks = again.plan(members, 1, MaskKey(7, "test")).masks
    plain = replace(stored.spec, sites=())
    with torch.no_grad():
        base = logits_of(tiny_llama())
        for m, member in enumerate(members):
            with adapters.axis.active(adapters.plan([member], 3, MaskKey(7, "test"))):
                trained = logits_of(adapters.model)
            with again.axis.active(again.plan([member], 3, MaskKey(7, "test"))):
                loaded = logits_of(again.model)
            folder = written(tmp_path / f"draw{m}", again, masked_matrices(stored.matrices, masks, m), plain)
            exported = logits_of(PeftModel.from_pretrained(tiny_llama(), folder))
            effect = float((exported - base).abs().max())
            assert relative(trained, exported, effect) <= 1e-5 and relative(loaded, exported, effect) <= 1e-5
            assert relative(trained, logits_of(adapters.model), effect) > 0.1  # it is a draw, not the mean field


def test_a_masked_draw_as_matrices_equals_the_equations() -> None:
    random = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 5, generator=random), torch.randn(4, 3, generator=random)
    masks = {"x": {"lora_A": torch.randn(2, 5), "lora_B": torch.randn(2, 4), "lora_rank": torch.randn(2, 6)}}
    masked = masked_matrices({"x": (A, B), "y": (A, B)}, masks, 1)
    wanted = dense_update(A, B, 1.0, masks["x"]["lora_A"][1], masks["x"]["lora_B"][1], masks["x"]["lora_rank"][1, :3])
    torch.testing.assert_close(masked["x"][1].double() @ masked["x"][0].double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(masked["y"][0], A) and torch.equal(masked["y"][1], B)


@pytest.mark.parametrize("spec", [PLAIN, PATTERNS], ids=["plain", "patterns"])
def test_a_checkpoint_that_stock_peft_wrote_is_read_exactly(spec: AdapterSpec, tmp_path: Path) -> None:
    peft = stock(tiny_llama(), spec)
    with torch.no_grad():
        for name, parameter in stock_matrices(peft).items():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
        theirs = logits_of(peft)
    peft.save_pretrained(tmp_path)
    stored = read_adapter(tmp_path)
    adapters = attach(tiny_llama(), [stored.spec], sorted(stored.matrices), seed=0)
    load_matrices(adapters.layers, 0, stored.matrices, "test")
    with torch.no_grad():
        ours = logits_of(adapters.model)
        assert relative(ours, theirs, float((theirs - logits_of(tiny_llama())).abs().max())) <= 1e-5
    for name, parameter in stock_matrices(peft).items():
        layer, _, side = name.rpartition(".")
        assert torch.equal(stored.matrices[layer]["AB".index(side)], parameter.detach())


def test_alphas_by_layer_are_those_of_their_layer_alone(tmp_path: Path) -> None:
    """One layer's full name may be the end of another's: each keeps its own alpha through a file."""
    sites = (Site(position="lora_A", rate=0.5, compensation="none", layers=(0.5, 1.0)),)
    spec = AdapterSpec(rank=2, alpha=8.0, sites=sites)
    names = ["layers.1.q", "other.layers.1.q", "layers.0.q", "q"]
    matrices = {name: (torch.ones(2, 3), torch.ones(4, 2)) for name in names}
    spec = replace(spec, alpha_pattern={"other.*": 3.0})
    write_adapter(tmp_path, matrices, spec, 2, "tiny", {})
    stored = read_adapter(tmp_path).spec
    assert [stored.alpha_of(name) for name in names] == [4.0, 1.5, 8.0, 4.0]  # `q` is outside the stack: covered
