"""Is 4 bits sound for a MoE? The same samples by a base as it is and by the same base in 4 bits, side by side.

One model is in memory at a time: first the one in 4 bits, of which what it did with each sample stays in RAM, and its
packed experts; then the dense one, which is compared with that. Shape suffixes as in `experts/__init__.py`; N answer
tokens of a batch.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import isfinite, prod, sqrt
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ...data.formats import as_prompt_completion
from ...data.generation import evaluation_mode
from ...data.rows import check_samples
from ...data.samples import ProcessingClass, check_counts, sample_batches, scoring_inputs
from ...errors import OrdMoEModelError
from ...forward import install_forward_hooks, running_forward
from ...moe_model import MoELayer, MoEModel
from ...monitoring.health import drift_columns
from ...monitoring.recording import Call, record
from ...monitoring.router_meter import RouterMeter, counted_tokens
from ...objectives.expert_rank import label_log_probs, mean_log_likelihood
from ...quantization.dequantization import dense_weight
from ...quantization.memory_by_role import quantization_census, role_finder
from ...quantization.storage import is_packed
from ...tiers.scope import IGNORED_LABEL
from ..tables import Table, number, percent, plain
from .evaluation import model_inputs
from .paired import mean_and_error


NOTE = (
    "Errors: norm of the difference over the norm of the dense, of a layer's experts; outputs are for the dense "
    "model's inputs, in the first batch. The rest compares each model on its own way through all layers: experts "
    "shared, of the K that the dense one chooses; tokens with all K shared; KL(dense ‖ 4 bits) of the softmax of the "
    "router's scores, in nats."
)


@dataclass(frozen=True)
class LayerPrecision:
    """What 4 bits change in a MoE layer; routing is `None` where the router cannot be read.

    Args:
        layer (`int`): index among the model's MoE layers, from 0.
        name (`str`): the module that holds router and experts.
        num_experts (`int`): E.
        top_k (`int`): K.
        weight_error (`float`): ‖W − Ŵ‖ / ‖W‖ over all weights of the routed experts.
        output_error (`float`, *optional*): ‖y − ŷ‖ / ‖y‖ of what the experts give for the dense model's hidden states
            and routing, over the first batch; `None` where no forward of their own gives a row for each token.
        overlap (`float`, *optional*): share of the K experts that the dense model chooses which the other chooses, too.
        all_shared (`float`, *optional*): share of tokens for which both choose the same K.
        kl (`float`, *optional*): KL(dense ‖ 4 bits) of the softmax of the router's scores, in nats.
    """

    layer: int
    name: str
    num_experts: int
    top_k: int
    weight_error: float
    output_error: float | None
    overlap: float | None
    all_shared: float | None
    kl: float | None


@dataclass(frozen=True)
class FourBits:
    """A base in 4 bits beside the same base dense.

    Args:
        model (`str`): name of the base.
        quantization (`dict`): how it was packed, as `config.json` has it.
        dtype (`str`): of the dense weights.
        num_samples (`int`), num_tokens (`int`), num_answer_tokens (`int`): what was compared, padding apart.
        dense_bits (`float`), bits (`float`): bits per weight of the routed experts, with all that is stored for them.
        dense_loss (`float`), loss (`float`): mean over samples of the mean cross-entropy per answer token, in nats.
        difference (`float`): `loss − dense_loss`.
        stderr (`float`, *optional*): standard error of `difference` over samples, which are paired; `None` for one.
        same_next_token (`float`): share of answer tokens in whose place both hold the same token for the likeliest.
        layers (list of [`LayerPrecision`]): the MoE layers.
        unread (`dict[str, str]`): layers whose routing is not compared, and why.
    """

    model: str
    quantization: dict[str, Any]
    dtype: str
    num_samples: int
    num_tokens: int
    num_answer_tokens: int
    dense_bits: float
    bits: float
    dense_loss: float
    loss: float
    difference: float
    stderr: float | None
    same_next_token: float
    layers: list[LayerPrecision]
    unread: dict[str, str]

    to_dict = asdict

    @property
    def verdict(self) -> str:
        """What the difference of the losses says, in a sentence."""
        if self.stderr is None:
            return "One sample says nothing of the loss."
        change = f"{self.difference:+.4f} ± {self.stderr:.4f} nats per answer token"
        if abs(self.difference) <= 1.96 * self.stderr:
            return f"No difference in loss shown: {change} in 4 bits."
        return f"In 4 bits the loss is {'higher' if self.difference > 0 else 'lower'}: {change}."

    def tables(self) -> list[Table]:
        """Two tables: the whole model, and a row for each layer with their mean."""
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        whole = [
            ("bits per weight of the experts", f"{self.dense_bits:.2f}", f"{self.bits:.2f}", None),
            (
                "loss per answer token (nats)",
                *(f"{loss:.4f}" for loss in (self.dense_loss, self.loss)),
                f"{self.difference:+.4f}{error}",
            ),
            ("same likeliest next token", None, percent(self.same_next_token), None),
        ]
        columns = {"error of weights": "weight_error", "of outputs": "output_error", "experts shared": "overlap"}
        columns |= {"all K shared": "all_shared", "KL": "kl"}
        rows = [[one.layer, one.num_experts, one.top_k, *map(vars(one).get, columns.values())] for one in self.layers]
        rows.append(["mean", None, None, *(_mean(self.layers, name) for name in columns.values())])
        shares = dict.fromkeys(columns, percent)
        return [
            Table(
                f"{self.num_samples:,} samples, {self.num_tokens:,} tokens, {self.num_answer_tokens:,} of answers",
                pd.DataFrame(whole, columns=["", self.dtype, "4 bits", "difference ± s.e."]),
            ),
            Table(
                "What 4 bits change, by layer",
                pd.DataFrame(rows, columns=["layer", "E", "K", *columns], dtype=object),
                shares | {"KL": _small, **dict.fromkeys(("layer", "E", "K"), plain)},
                NOTE + self._what_is_unread(),
            ),
        ]

    def _what_is_unread(self) -> str:
        reasons = list(self.unread.values())
        return f" Routing is not compared in {len(reasons)} layers; the first: {reasons[0]}." if reasons else ""


def _small(value: Any) -> str:
    return number(value, 4)


def _mean(layers: list[LayerPrecision], name: str) -> float | None:
    values = [value for value in (getattr(layer, name) for layer in layers) if value is not None]
    return fmean(values) if values else None


# ----------------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class _Batch:
    """What a model did with a batch, in RAM.

    Args:
        routing (`dict`): layer → router scores (T, E) and chosen experts (T, K) of tokens that are no padding.
        num_tokens (`int`): tokens that are no padding.
        loss_B (`torch.Tensor` of shape `(B,)`): mean cross-entropy per answer token.
        next_N (`torch.Tensor` of shape `(N,)`): the likeliest token in the place of each answer token.
    """

    routing: dict[int, tuple[torch.Tensor, torch.Tensor]]
    num_tokens: int
    loss_B: torch.Tensor
    next_N: torch.Tensor


@dataclass
class _Comparison:
    """Batches of the dense model beside those of the other.

    Args:
        kept (list of `_Batch`): those of the model in 4 bits, all of them.
        dense (list of `_Batch`): those of the dense one so far, without their routing.
        sums (`dict`): layer → sums over tokens of the overlap, of whether all K are shared, of KL, and of ones.
    """

    kept: list[_Batch]
    dense: list[_Batch] = field(default_factory=list)
    sums: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, dense: _Batch) -> None:
        other = self.kept[len(self.dense)]
        for index, (logits_TE, index_TK) in dense.routing.items():
            columns = drift_columns(*other.routing[index], logits_TE, index_TK)
            overlap_T1, kl_T1 = columns["drift_overlap"], columns["drift_kl"]
            columns_T4 = torch.cat([overlap_T1, (overlap_T1 == 1).float(), kl_T1, torch.ones_like(kl_T1)], dim=1)
            self.sums[index] = self.sums.get(index, torch.zeros(4)) + columns_T4.sum(0, dtype=torch.float64)
        self.dense.append(replace(dense, routing={}))

    def routing(self, index: int) -> list[float | None]:
        """Overlap, share of tokens with all K shared, and KL of a layer."""
        *sums, num_tokens = self.sums[index].tolist() if index in self.sums else [0]
        return [one / num_tokens for one in sums] or [None] * 3

    def outcome(self) -> dict[str, Any]:
        """Losses and likeliest tokens, by their names in [`FourBits`]."""
        loss_n, dense_loss_n = (torch.cat([batch.loss_B for batch in run]) for run in (self.kept, self.dense))
        next_N, dense_next_N = (torch.cat([batch.next_N for batch in run]) for run in (self.kept, self.dense))
        difference, stderr = mean_and_error((loss_n - dense_loss_n).tolist())
        return {
            "num_samples": len(loss_n),
            "num_tokens": sum(batch.num_tokens for batch in self.dense),
            "num_answer_tokens": len(next_N),
            "dense_loss": dense_loss_n.mean().item(),
            "loss": loss_n.mean().item(),
            "difference": difference,
            "stderr": stderr,
            "same_next_token": (next_N == dense_next_N).double().mean().item(),
        }


def measure_four_bits(
    load: Callable[[bool], nn.Module], processing_class: ProcessingClass, dataset: Any, *, batch_size: int = 32
) -> FourBits:
    """Score the answers of `dataset` by a base in 4 bits and by the same base dense, and compare the two.

    Beside one of the models, RAM holds the packed experts and the router scores of all tokens: tokens · layers · E
    numbers.

    Args:
        load (`Callable[[bool], nn.Module]`): loads the base, in 4 bits for `True`, dense for `False`. It is called with
            `True` first, and with `False` once that model is gone.
        processing_class: tokenizer or processor of the base.
        dataset ([`~datasets.Dataset`]): samples in TRL's prompt-completion format.
        batch_size (`int`, defaults to 32): samples at a time.

    Raises:
        [`OrdMoEConfigError`]: `batch_size` below 1.
        [`OrdMoEDataError`]: the data set has no samples, prompts or answers; a sample has more tokens than the model
            has positions.
        [`OrdMoEModelError`]: the model has no MoE layers, or none of its experts is packed, or it is stored in 4 bits;
            a loss is not finite.
    """
    dataset = as_prompt_completion(dataset, needs_answers=True)
    check_samples(dataset)
    check_counts(batch_size=batch_size)
    data = (processing_class, dataset, batch_size)
    kept: list[_Batch] = []
    model = load(True)
    if getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        raise OrdMoEModelError(
            f"{model.name_or_path} is stored in 4 bits, so it has no dense form to compare with. Give the checkpoint "
            "that it was made from."
        )
    packed, bits = _packed_experts(model), _expert_bits(model)
    quantization = model.config.quantization_config.to_dict()
    _run(model, *data, "In 4 bits", kept.append)
    del model  # before the dense one is loaded
    model, comparison = load(False), _Comparison(kept)
    layers = MoEModel.of(model).layers
    weight_errors = {layer.index: _weight_error(model, layer, packed) for layer in layers}
    output_errors: dict[int, float] = {}
    with record(model, experts=partial(_compare_outputs, output_errors, model, packed), layers=layers):
        _run(model, *data, "Dense", comparison.add)
    meter, outcome = RouterMeter(model), comparison.outcome()
    if not isfinite(outcome["difference"]):
        raise OrdMoEModelError(
            f"The loss of {model.name_or_path} is {outcome['dense_loss']} dense and {outcome['loss']} in 4 bits, which "
            "cannot be compared. Where only one is not finite, that is the answer; else look for such values in its "
            "weights, or set another dtype."
        )
    return FourBits(
        model=model.name_or_path,
        quantization=quantization,
        dtype=str(model.dtype).removeprefix("torch."),
        dense_bits=_expert_bits(model),
        bits=bits,
        **outcome,
        layers=[
            LayerPrecision(
                *(layer.index, layer.block_name, layer.num_experts, layer.top_k),
                weight_errors[layer.index],
                output_errors.get(layer.index),
                *comparison.routing(layer.index),
            )
            for layer in layers
        ],
        unread=meter.unsupported | meter.unread,
    )


def _run(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Any,
    batch_size: int,
    title: str,
    take: Callable[[_Batch], None],
) -> None:
    """Score the data by a model, and give `take` what it did with each batch."""
    meter, routing = RouterMeter(model), {}
    readable = [layer.layer for layer in meter.meters.values()]
    for text_model in MoEModel.of(model).text_models:
        install_forward_hooks(text_model)

    def keep(call: Call) -> None:
        routed = call.routing
        routing[call.layer.index] = tuple(_counted(call, part).cpu() for part in (routed.logits_TE, routed.index_TK))

    with (
        evaluation_mode(model, torch.no_grad),  # weights are exchanged for a while, which inference mode forbids
        record(model, router=keep, layers=readable),
        tqdm(total=len(dataset), desc=title, unit="sample") as bar,
    ):
        for samples in sample_batches(dataset, batch_size):
            inputs = model_inputs(scoring_inputs, samples, processing_class, model)
            labels_BS = inputs.pop("labels")[:, 1:]
            logits_BSV = model(**inputs).logits[:, :-1]
            mask_BS = labels_BS != IGNORED_LABEL
            loss_B = -mean_log_likelihood(label_log_probs(logits_BSV, labels_BS), mask_BS)
            next_N = logits_BSV[mask_BS].argmax(-1)
            take(_Batch(dict(routing), int(inputs["attention_mask"].sum()), loss_B.cpu(), next_N.cpu()))
            bar.update(len(samples))


def _counted(call: Call, values: torch.Tensor) -> torch.Tensor:
    """Those of the values, a row for each token of the call, that are of no padding."""
    forward = running_forward()
    assert forward is not None, "routers and experts run in a text model's forward"
    tokens = forward.tokens_of(call.layer.router_name, values, "Its routing cannot be compared.")
    return values[counted_tokens(forward, values.device)[tokens]]


# ------------------------------------------------------------------------------------------------------------- experts
def _packed_experts(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the packed weights of routed experts, in RAM, by name.

    Copies, since bitsandbytes' `to` moves the scales in place, and its layers may lay their bytes out anew as they run.
    """
    role_of = role_finder(model)
    packed = {
        name: copy.deepcopy(parameter).to("cpu")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if is_packed(parameter) and role_of(name) == "experts"
    }
    if not packed:
        raise OrdMoEModelError(
            f"No experts of {type(model).__name__} are in 4 bits, so there is nothing to compare: load it with "
            "quantization_config=MoeBitsAndBytesConfig()."
        )
    return packed


def _expert_bits(model: nn.Module) -> float:
    """Bits per weight of the routed experts."""
    rows = [row for row in quantization_census(model).rows if row.role == "experts"]
    return 8 * sum(row.bytes for row in rows) / sum(row.weights for row in rows)


def _in_4_bits(
    model: nn.Module, layer: MoELayer, packed: Mapping[str, torch.Tensor]
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """The dense weights of a layer's experts, each with what 4 bits make of it."""
    for name, weight in packed.items():
        if name.startswith(f"{layer.experts_name}."):
            parameter = model.get_parameter(name)
            yield parameter, dense_weight(copy.deepcopy(weight).to(parameter.device), parameter.dtype)


def _weight_error(model: nn.Module, layer: MoELayer, packed: Mapping[str, torch.Tensor]) -> float:
    of_difference, of_dense = 0.0, 0.0
    for parameter, weight in _in_4_bits(model, layer, packed):
        of_difference += torch.linalg.vector_norm(parameter.detach() - weight, dtype=torch.float32).item() ** 2
        of_dense += torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32).item() ** 2
    return sqrt(of_difference / of_dense) if of_dense else 0.0


def _compare_outputs(
    errors: dict[int, float], model: nn.Module, packed: Mapping[str, torch.Tensor], call: Call
) -> None:
    """In the first batch, note how far the experts' output is from what they give with weights from 4 bits."""
    layer, output, forward = call.layer, call.output, running_forward()
    if layer.index in errors or forward is None or not isinstance(output, torch.Tensor):
        return
    if output[..., 0].numel() > prod(forward.shape):  # Llama 4's experts all run on all tokens
        return
    dense = []
    for parameter, weight in _in_4_bits(model, layer, packed):
        dense.append((parameter, parameter.data))
        parameter.data = weight
    try:
        other = layer.experts.forward(*call.args, **call.kwargs)  # past the hooks
    finally:
        for parameter, weight in dense:
            parameter.data = weight
    own_TH, other_TH = (_counted(call, part.reshape(-1, part.shape[-1])).float() for part in (output, other))
    difference, norm = (torch.linalg.vector_norm(part).item() for part in (own_TH - other_TH, own_TH))
    errors[layer.index] = difference / norm if norm else 0.0
