"""Rollouts: what each tier answers to each prompt of a data set, as a data set of its own.

[`~ordmoe_peft.data.preference_pairs.to_preference_pairs`] makes preferences of it, for any trainer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from torch import nn
from tqdm.auto import tqdm

from ..errors import OrdMoEConfigError, OrdMoEDataError
from ..moe_model import MoELayer, find_moe_layers, unwrapped
from ..monitoring.recording import recorded_routing_weight_sums
from ..objectives.expert_rank import label_log_probs, mean_log_likelihood
from ..tiers.plan import RandomDraw, layers_in_scope
from ..tiers.routing import adapter_config, tier_routing
from ..tiers.scope import tiers_of_labels
from .generation import check_one_response, evaluation_mode, generate_by_tier, with_responses, with_samples
from .positions import check_fits
from .responses import content_mask, end_of_sequence_ids
from .samples import ProcessingClass, check_counts, prompt_inputs
from .shards import ShardFolder, claim_folder, without_inner_bars
from .texts import check_texts, first_row


SETTINGS_FILE = "rollout_settings.json"
SCORED_BY = ("tier", "policy")

# What `rollout` adds to each row: a list of C values, tiers in order.
ROLLOUT_FEATURES = Features(
    {
        "tiers": List(Value("int32")),
        "responses": List(Value("string")),
        "response_token_counts": List(Value("int32")),
        "log_likelihood": List(Value("float32")),
        "log_likelihood_no_eos": List(Value("float32")),
        "gate_mass": List(Value("float32")),
    }
)
TEXT_COLUMNS = ("prompt", "completion")
SOURCE_COLUMNS = (*TEXT_COLUMNS, "images", "image")


# ------------------------------------------------------------------------------------------------------------- writing
def rollout(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    num_tiers: int | None = None,
    grouping: str | None = None,
    tiers: Sequence[int] | None = None,
    scored_by: str = "tier",
    batch_size: int = 32,
    rows_per_call: int | None = None,
    samples_per_shard: int = 256,
    seed: int = 42,
    keep_columns: Sequence[str] = (),
    sources: dict[str, Any] | None = None,
    **generation: Any,
) -> Dataset:
    """Let every tier answer every prompt, score the answers, and write both to `output_dir` as a data set.

    Rows keep `prompt`, `images` or `image`, `completion` and `keep_columns`, and add, with one value per tier:

    - `tiers`: the tiers, from the top;
    - `responses`: what each wrote, as plain text;
    - `response_token_counts`: its tokens, the one that ended it included;
    - `log_likelihood`, `log_likelihood_no_eos`: mean log-probability per response token in nats, with and without
      end-of-sequence tokens (null for a response of nothing else), at temperature 1 whatever it was sampled at;
    - `gate_mass`: what the K weights of the router sum to, averaged over the MoE layers in scope and the positions
      that predict a response token, under the tier that wrote it; null where routers return no such weights.

    A killed run leaves complete shards only. The same call goes on with it and ends with the same rows: each batch
    samples from (`seed`, its first sample). Settings are in `rollout_settings.json`, with digests of prompts and
    completions and of the router and adapter weights, but not of images.

    Args:
        model (`nn.Module`): a MoE model, wrapped by PEFT or not.
        processing_class: its tokenizer or processor.
        dataset ([`~datasets.Dataset`]): prompts, conversational or plain, with or without images.
        output_dir (`str` or `Path`): the folder to write, or to go on with; `load_dataset(output_dir)` reads it.
        num_tiers (`int`, *optional*), grouping (`str`, *optional*): how tiers are cut; as the active adapter says, or
            as [`OrdMoEConfig`] does by default.
        tiers (sequence of `int`, *optional*): the tiers that write, rising; all C by default.
        scored_by (`str`, defaults to `"tier"`): `"tier"` scores a response under the tier that wrote it, `"policy"`
            under tier 1, at the cost of one more forward.
        batch_size (`int`, defaults to 32): prompts at a time.
        rows_per_call (`int`, *optional*): most rows, prompts × tiers, in one `generate` call; all by default.
        samples_per_shard (`int`, defaults to 256): prompts in a file, the most that a kill can lose.
        seed (`int`, defaults to 42): seed of the sampling.
        keep_columns (sequence of `str`): further columns of `dataset` to keep.
        sources (`dict`, *optional*): where model and data came from; recorded with the settings, and compared.
        generation: arguments of `generate`, e.g. `max_new_tokens`, `do_sample`, `temperature`.

    Raises:
        [`OrdMoEDataError`]: no prompts, a row without one, or one that is longer than the model has positions; or a
            column that is not there.
        [`OrdMoEConfigError`]: settings that cannot work, or that differ from those that `output_dir` has.
    """
    columns = _kept_columns(dataset, keep_columns)
    _check_options(scored_by, generation)
    check_counts(batch_size=batch_size, samples_per_shard=samples_per_shard, rows_per_call=rows_per_call)
    config = adapter_config(model)
    num_tiers = config.num_tiers if num_tiers is None else num_tiers
    routing = {
        "num_tiers": num_tiers,
        "grouping": config.grouping if grouping is None else grouping,
        "layer_scope": config.layer_scope,
        "tier_weights": config.tier_weights,
        "seed": config.tier_seed,
    }
    writer = _TierWriter(
        model=model,
        processing_class=processing_class,
        tiers=_check_tiers(model, list(range(1, num_tiers + 1) if tiers is None else tiers), routing),
        routing=routing,
        token_scope=config.token_scope,
        scored_by=scored_by,
        seed=seed,
        rows_per_call=rows_per_call,
        generation=generation,
    )
    settings = {
        **writer.settings(),
        "batch_size": batch_size,
        "samples_per_shard": samples_per_shard,
        "num_samples": len(dataset),
        "columns": columns,
        "texts_sha256": _texts_digest(dataset.select_columns([name for name in columns if name in TEXT_COLUMNS])),
        "sources": sources or {},
    }
    folder = ShardFolder(Path(output_dir), len(dataset), samples_per_shard)
    claim_folder(folder.folder, SETTINGS_FILE, settings)
    _write_missing(folder, dataset, columns, writer, batch_size)
    return load_dataset(str(output_dir), split="train")


def _write_missing(
    folder: ShardFolder, dataset: Dataset, columns: list[str], writer: "_TierWriter", batch_size: int
) -> None:
    missing = folder.missing()
    done = folder.num_samples - sum(len(folder.samples(index)) for index in missing)
    with (
        evaluation_mode(writer.model),
        without_inner_bars(),
        tqdm(total=folder.num_samples, initial=done, desc="Rollouts", unit="sample") as bar,
    ):
        for index in missing:
            samples, rows = folder.samples(index), []
            for start in samples[::batch_size]:
                batch = [dataset[place] for place in range(start, min(start + batch_size, samples.stop))]
                rows += writer.rows(batch, first_sample=start)
                bar.update(len(batch))
            kept = dataset.select(samples).select_columns(columns)
            written = Dataset.from_list(rows, features=ROLLOUT_FEATURES)
            folder.write(index, concatenate_datasets([kept, written], axis=1))


def _kept_columns(dataset: Dataset, keep_columns: Sequence[str]) -> list[str]:
    there = list(dataset.column_names)
    if "prompt" not in there:
        raise OrdMoEDataError(
            f"The data set has no column 'prompt', which rollouts answer; it has {sorted(there)}. Use TRL's "
            "prompt-only or prompt-completion format."
        )
    first_row(dataset, "rollout")
    check_texts(dataset, ["prompt"], "rollout")
    for name in keep_columns:
        if name not in there or name in ROLLOUT_FEATURES:
            reason = "a name that rollouts use themselves" if name in there else f"not a column; there are {there}"
            raise OrdMoEDataError(f"keep_columns has {name!r}, which is {reason}.")
    return [name for name in there if name in SOURCE_COLUMNS or name in keep_columns]


def _check_options(scored_by: str, generation: dict[str, Any]) -> None:
    if scored_by not in SCORED_BY:
        raise OrdMoEConfigError(f"scored_by must be one of {SCORED_BY}, got {scored_by!r}.")
    check_one_response(generation)


def _check_tiers(model: nn.Module, tiers: list[int], routing: dict[str, Any]) -> list[int]:
    if tiers != sorted(set(tiers)):
        raise OrdMoEConfigError(f"tiers must rise, each named once, got {tiers}.")
    with tier_routing(model, tiers, **routing):  # refuses what the model cannot do, before a file is written
        return tiers


def _texts_digest(texts: Dataset) -> str:
    digest = hashlib.sha256()
    for sample in texts:
        digest.update(json.dumps(sample, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _weights_digest(model: nn.Module, layers: list[MoELayer]) -> str:
    """What tells one training state from another without reading a whole base: routers and LoRA factors."""
    digest = hashlib.sha256()
    weights = {layer.router_name: unwrapped(layer.router).weight for layer in layers}
    weights |= {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- writing and scoring
@dataclass(frozen=True)
class _TierWriter:
    """Lets the tiers of a model answer a batch of samples, and scores what they wrote."""

    model: nn.Module
    processing_class: ProcessingClass
    tiers: list[int]
    routing: dict[str, Any]
    token_scope: str
    scored_by: str
    seed: int
    rows_per_call: int | None
    generation: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """All that decides what is written, with the model's own generation defaults spelled out."""
        defaults = self.model.generation_config.to_diff_dict()
        defaults.pop("transformers_version", None)
        routing = {"tier_seed" if name == "seed" else name: value for name, value in self.routing.items()}
        return {
            **routing,
            "token_scope": self.token_scope,
            "tiers": self.tiers,
            "scored_by": self.scored_by,
            "seed": self.seed,
            "rows_per_call": self.rows_per_call,
            "generation": defaults | self.generation,
            "router_and_adapter_sha256": _weights_digest(self.model, find_moe_layers(self.model)),
        }

    def rows(self, samples: list[dict[str, Any]], first_sample: int) -> list[dict[str, list]]:
        """The columns of `ROLLOUT_FEATURES` for each sample; `first_sample` is the place of the first."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        end_ids = end_of_sequence_ids(tokenizer, self.model)
        inputs = prompt_inputs(samples, self.processing_class).to(self.model.device)
        check_fits(self.model, inputs)
        # Random groups, too, are drawn anew for each batch, and alike in writing and scoring.
        routing = self.routing | {"draw": RandomDraw(step=first_sample)}
        written = generate_by_tier(
            self.model,
            inputs,
            self.tiers,
            seed=_batch_seed(self.seed, first_sample),
            end_ids=end_ids,
            pad_token_id=tokenizer.pad_token_id,
            rows_per_call=self.rows_per_call,
            routing=routing,
            **self.generation,
        )
        rows = [{name: [] for name in ROLLOUT_FEATURES} for _ in samples]
        for tier, ids_BS, mask_BS in zip(self.tiers, written.ids_CBS, written.mask_CBS, strict=True):
            values = self._score(inputs, ids_BS, mask_BS, tier, routing, end_ids)
            values["responses"] = [
                self.processing_class.decode(ids[mask], skip_special_tokens=True)
                for ids, mask in zip(ids_BS, mask_BS, strict=True)
            ]
            values["tiers"] = [tier] * len(samples)
            for name, per_sample in values.items():
                for row, value in zip(rows, per_sample, strict=True):
                    row[name].append(value)
        return rows

    def _score(
        self,
        inputs: dict[str, Any],
        ids_BS: torch.Tensor,
        mask_BS: torch.Tensor,
        tier: int,
        routing: dict[str, Any],
        end_ids: torch.Tensor,
    ) -> dict[str, list]:
        """Likelihood and gate mass of one tier's responses, from their own tokens."""
        full_inputs = with_responses(inputs, ids_BS, mask_BS)
        log_probs_BS, gate_mass_B = self._forward(full_inputs, ids_BS, mask_BS, tier, routing)
        if self.scored_by == "policy" and tier != 1:
            log_probs_BS, _ = self._forward(full_inputs, ids_BS, mask_BS, 1, routing)
        content_BS = content_mask(ids_BS, mask_BS, end_ids)
        no_eos_B = mean_log_likelihood(log_probs_BS, content_BS).tolist()
        return {
            "response_token_counts": mask_BS.sum(1).tolist(),
            "log_likelihood": mean_log_likelihood(log_probs_BS, mask_BS).tolist(),
            "log_likelihood_no_eos": [
                value if has_content else None
                for value, has_content in zip(no_eos_B, content_BS.any(1).tolist(), strict=True)
            ],
            "gate_mass": gate_mass_B.tolist() if gate_mass_B is not None else [None] * len(ids_BS),
        }

    def _forward(
        self,
        full_inputs: dict[str, Any],
        ids_BS: torch.Tensor,
        mask_BS: torch.Tensor,
        tier: int,
        routing: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probability of each response token (`(B, S)`) and the mean gate mass over them (`(B,)`) under `tier`."""
        layers = find_moe_layers(self.model)
        in_scope = [layers[index] for index in sorted(layers_in_scope(routing["layer_scope"], len(layers)))]
        batch_size, length = ids_BS.shape
        tiers = torch.full((batch_size,), tier)
        tiers = tiers_of_labels(tiers, full_inputs["labels"], self.token_scope)
        full_inputs = {name: value for name, value in full_inputs.items() if name != "labels"}
        with (
            tier_routing(self.model, tiers, **with_samples(routing, batch_size)),
            recorded_routing_weight_sums(self.model, in_scope) as masses,
        ):
            logits = self.model(**full_inputs, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        log_probs_BS = label_log_probs(logits, ids_BS)
        if not masses or any(mass is None for mass in masses):
            return log_probs_BS, None
        mass_BS = torch.stack(masses).mean(0).view(batch_size, -1)[:, -length - 1 : -1]
        return log_probs_BS, (mass_BS * mask_BS).sum(1) / mask_BS.sum(1)


def _batch_seed(seed: int, first_sample: int) -> int:
    return int(np.random.SeedSequence([seed, first_sample]).generate_state(1)[0])
