"""Rollouts: what each tier answers to each prompt of a data set, as a data set of its own.

[`~ordmoe_peft.data.preference_pairs.to_preference_pairs`] makes preferences of it, for any trainer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from torch import nn
from tqdm.auto import tqdm

from ..errors import OrdMoEConfigError, OrdMoEDataError
from ..moe_model import MoEModel
from ..monitoring.recording import recorded_routing_weight_sums
from ..objectives.expert_rank import label_log_probs, mean_log_likelihood
from ..tiers.plan import RandomDraw, layers_in_scope
from ..tiers.ranking import GROUPINGS
from ..tiers.routing import adapter_config, settings_of, tier_routing
from ..tiers.scope import tiers_of_labels
from .formats import as_prompt_completion, has_prompts
from .generation import check_one_response, evaluation_mode, generate_by_tier, with_responses, with_samples
from .responses import content_mask, end_of_sequence_ids
from .rows import check_columns, check_fits, check_texts, first_row
from .samples import ProcessingClass, check_counts, prompt_inputs, sample_batches, tokenizer_of
from .shards import claim_folder, shards, without_inner_bars, write_shard


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


@dataclass(kw_only=True)
class RolloutOptions:
    """How tiers answer, and how the answers are scored and written; the help of each field says what it is."""

    num_tiers: int | None = field(default=None, metadata={"help": "Tiers C; the adapter's by default, else 3."})
    grouping: str | None = field(
        default=None,
        metadata={"help": "How tiers are cut; the adapter's by default, else uniform.", "choices": list(GROUPINGS)},
    )
    tiers: list[int] | None = field(default=None, metadata={"help": "Tiers that write, 1 is the top; all by default."})
    scored_by: str = field(
        default="tier",
        metadata={"help": "Score under the tier that wrote or, as the policy, tier 1.", "choices": list(SCORED_BY)},
    )
    batch_size: int = field(default=32, metadata={"help": "Samples at a time."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Most rows, prompts times tiers, to generate at once; all by default."}
    )
    samples_per_shard: int = field(default=256, metadata={"help": "Prompts in a file, the most an interruption loses."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    keep_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns to keep beside prompt, images and completion."}
    )

    def __post_init__(self):
        if self.scored_by not in SCORED_BY:
            raise OrdMoEConfigError(f"scored_by must be one of {SCORED_BY}, got {self.scored_by!r}.")
        for name in ("batch_size", "samples_per_shard", "generation_batch_size"):
            check_counts(**{name: getattr(self, name)})
        if self.tiers is not None and list(self.tiers) != sorted(set(self.tiers)):
            raise OrdMoEConfigError(f"tiers must rise, each named once, got {list(self.tiers)}.")


# ------------------------------------------------------------------------------------------------------------- writing
def rollout(
    model: nn.Module,
    processing_class: ProcessingClass,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    sources: dict[str, Any] | None = None,
    **options: Any,
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
        dataset ([`~datasets.Dataset`]): prompts, conversational or plain, with or without images; or whole
            conversations, whose last message is the completion if the assistant says it.
        output_dir (`str` or `Path`): the folder to write, or to go on with; `load_dataset(output_dir)` reads it.
        sources (`dict`, *optional*): where model and data came from; recorded with the settings, and compared.
        options: fields of [`RolloutOptions`], e.g. `num_tiers`, `seed`, `keep_columns`, and arguments of `generate`,
            e.g. `max_new_tokens`, `do_sample`, `temperature`.

    Raises:
        [`OrdMoEDataError`]: no prompts, a row without one, or with an empty one, or one that is longer than the model
            has positions; or a column that is not there.
        [`OrdMoEConfigError`]: settings that cannot work, or that differ from those that `output_dir` has.
    """
    dataset = _with_prompts(dataset)
    own = {item.name: options.pop(item.name) for item in fields(RolloutOptions) if item.name in options}
    columns = _kept_columns(dataset, own.get("keep_columns", ()))
    check_one_response(options)
    writer = _TierWriter(model, processing_class, RolloutOptions(**own), options)
    settings = {
        **writer.settings(),
        "num_samples": len(dataset),
        "columns": columns,
        "texts_sha256": _texts_digest(dataset.select_columns([name for name in columns if name in TEXT_COLUMNS])),
        "sources": sources or {},
    }
    folder = Path(output_dir)
    claim_folder(folder, SETTINGS_FILE, settings)
    _write_missing(shards(folder, len(dataset), writer.options.samples_per_shard), dataset, columns, writer)
    return load_dataset(str(output_dir), split="train")


def _write_missing(samples_of: dict[Path, range], dataset: Dataset, columns: list[str], writer: "_TierWriter") -> None:
    done = sum(len(samples) for path, samples in samples_of.items() if path.exists())
    with (
        evaluation_mode(writer.model),
        without_inner_bars(),
        tqdm(total=len(dataset), initial=done, desc="Rollouts", unit="sample") as bar,
    ):
        for path, samples in samples_of.items():
            if path.exists():
                continue
            shard = dataset.select(samples)
            rows: list[dict[str, list]] = []
            for batch in sample_batches(shard, writer.options.batch_size):
                rows += writer.rows(batch, first_sample=samples.start + len(rows))
                bar.update(len(batch))
            written = Dataset.from_list(rows, features=ROLLOUT_FEATURES)
            write_shard(path, concatenate_datasets([shard.select_columns(columns), written], axis=1))


def _with_prompts(dataset: Dataset) -> Dataset:
    if "text" in dataset.column_names and not {"prompt", "messages", "conversations"} & set(dataset.column_names):
        raise OrdMoEDataError(
            "The data set has `text` alone, without prompts: there is nothing that a tier can answer."
        )
    dataset = as_prompt_completion(dataset)
    if "prompt" in dataset.column_names and len(dataset) > 0 and not has_prompts(dataset):
        raise OrdMoEDataError("All prompts of the rollout data set are empty: there is nothing that a tier can answer.")
    return dataset


def _kept_columns(dataset: Dataset, keep_columns: Sequence[str]) -> list[str]:
    check_columns(dataset, ["prompt"], "rollouts answer", "prompt-only or prompt-completion")
    first_row(dataset, "rollout")
    check_texts(dataset, ["prompt"], "rollout")
    there = list(dataset.column_names)
    for name in keep_columns:
        if name not in there or name in ROLLOUT_FEATURES:
            reason = "a name that rollouts use themselves" if name in there else f"not a column; there are {there}"
            raise OrdMoEDataError(f"keep_columns has {name!r}, which is {reason}.")
    return [name for name in there if name in SOURCE_COLUMNS or name in keep_columns]


def _texts_digest(texts: Dataset) -> str:
    digest = hashlib.sha256()
    for sample in texts:
        digest.update(json.dumps(sample, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _weights_digest(model: nn.Module) -> str:
    """What tells one training state from another without reading a whole base: routers and LoRA factors."""
    digest = hashlib.sha256()
    weights = {layer.router_name: layer.router_weight for layer in MoEModel.of(model).layers}
    weights |= {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- writing and scoring
class _TierWriter:
    """Lets the tiers of a model answer a batch of samples, and scores what they wrote."""

    def __init__(
        self, model: nn.Module, processing_class: ProcessingClass, options: RolloutOptions, generation: dict[str, Any]
    ):
        self.model, self.processing_class, self.options, self.generation = model, processing_class, options, generation
        config = adapter_config(model)
        self.token_scope = config.token_scope
        self.routing = asdict(settings_of(config, num_tiers=options.num_tiers, grouping=options.grouping))
        every_tier = range(1, self.routing["num_tiers"] + 1)
        self.tiers = list(every_tier if options.tiers is None else options.tiers)
        with tier_routing(model, self.tiers, **self.routing):
            pass  # refuses what the model cannot do, before a file is written

    def settings(self) -> dict[str, Any]:
        """All that decides what is written, with the model's own generation defaults spelled out."""
        options = asdict(self.options)
        options.pop("keep_columns")
        options["rows_per_call"] = options.pop("generation_batch_size")  # its name in folders of earlier versions
        defaults = self.model.generation_config.to_diff_dict()
        defaults.pop("transformers_version", None)
        routing = {"tier_seed" if name == "seed" else name: value for name, value in self.routing.items()}
        return {
            **options,
            **routing,
            "tiers": self.tiers,
            "token_scope": self.token_scope,
            "generation": defaults | self.generation,
            "router_and_adapter_sha256": _weights_digest(self.model),
        }

    def rows(self, samples: list[dict[str, Any]], first_sample: int) -> list[dict[str, list]]:
        """The columns of `ROLLOUT_FEATURES` for each sample; `first_sample` is the index of the first."""
        tokenizer = tokenizer_of(self.processing_class)
        end_ids = end_of_sequence_ids(tokenizer, self.model)
        inputs = prompt_inputs(samples, self.processing_class).to(self.model.device)
        check_fits(self.model, inputs)
        # Random groups, too, are drawn anew for each batch, and alike in writing and scoring.
        routing = self.routing | {"draw": RandomDraw(step=first_sample)}
        written = generate_by_tier(
            self.model,
            inputs,
            self.tiers,
            seed=int(np.random.SeedSequence([self.options.seed, first_sample]).generate_state(1)[0]),
            end_ids=end_ids,
            pad_token_id=tokenizer.pad_token_id,
            rows_per_call=self.options.generation_batch_size,
            routing=routing,
            **self.generation,
        )
        by_tier = []
        for tier, ids_BS, mask_BS in zip(self.tiers, written.ids_CBS, written.mask_CBS, strict=True):
            full_inputs = with_responses(inputs, ids_BS, mask_BS)
            log_probs_BS, gate_mass_B = self._score(full_inputs, mask_BS, tier, routing)
            if self.options.scored_by == "policy" and tier != 1:
                log_probs_BS, _ = self._score(full_inputs, mask_BS, 1, routing)
            content_BS = content_mask(ids_BS, mask_BS, end_ids)
            has_content_B = content_BS.any(1).tolist()
            no_eos_B = mean_log_likelihood(log_probs_BS, content_BS).tolist()
            values = {
                "tiers": [tier] * len(samples),
                "responses": [
                    self.processing_class.decode(ids[mask], skip_special_tokens=True)
                    for ids, mask in zip(ids_BS, mask_BS, strict=True)
                ],
                "response_token_counts": mask_BS.sum(1).tolist(),
                "log_likelihood": mean_log_likelihood(log_probs_BS, mask_BS).tolist(),
                "log_likelihood_no_eos": [a if b else None for a, b in zip(no_eos_B, has_content_B, strict=True)],
                "gate_mass": gate_mass_B.tolist() if gate_mass_B is not None else [None] * len(samples),
            }
            by_tier.append(values)
        return [
            {name: [values[name][index] for values in by_tier] for name in ROLLOUT_FEATURES}
            for index in range(len(samples))
        ]

    def _score(
        self, full_inputs: dict[str, Any], mask_BS: torch.Tensor, tier: int, routing: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probability of each response token (`(B, S)`) and the mean gate mass over them (`(B,)`) under `tier`.

        The last S of `full_inputs`' tokens are the responses.
        """
        layers = MoEModel.of(self.model).layers
        in_scope = [layers[index] for index in sorted(layers_in_scope(routing["layer_scope"], len(layers)))]
        batch_size, length = mask_BS.shape
        tiers = tiers_of_labels(torch.full((batch_size,), tier), full_inputs["labels"], self.token_scope)
        unlabelled = {name: value for name, value in full_inputs.items() if name != "labels"}
        with (
            tier_routing(self.model, tiers, **with_samples(routing, batch_size)),
            recorded_routing_weight_sums(self.model, in_scope) as masses,
        ):
            logits = self.model(**unlabelled, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        log_probs_BS = label_log_probs(logits, full_inputs["input_ids"][:, -length:])
        known = [mass for mass in masses if mass is not None]
        if not known or len(known) < len(masses):
            return log_probs_BS, None
        mass_BS = torch.stack(known).mean(0).view(batch_size, -1)[:, -length - 1 : -1]
        return log_probs_BS, (mass_BS * mask_BS).sum(1) / mask_BS.sum(1)
