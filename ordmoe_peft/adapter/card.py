"""The card of an adapter, its `README.md`: what it was made from, how and with what result, and how it is loaded."""

import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .config import OrdMoEConfig


# What is written anew at each save stands between these two lines.
BEGIN, END = "<!-- ordmoe: written anew at each save, from here -->", "<!-- ordmoe: to here -->"
TITLE = "OrdMoE adapter of "
TAGS = ("peft", "ordmoe", "mixture-of-experts")
LICENSE = ("license", "license_name", "license_link")
ADAPTER_OF = "base_model:adapter:"
ACCURACY = "accuracy"  # in `ordmoe evaluate`: the share of exact matches
MISSING = "—"
RECIPE = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_blocksize")
# (model classes, the hub's tag of what they do, the class that loads them). Some do both.
TASKS = (
    (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "image-text-to-text", "AutoModelForImageTextToText"),
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text-generation", "AutoModelForCausalLM"),
)

USE = """`ADAPTER` is this folder, or its id on the hub{local}. With the package `ordmoe-peft`, which `pip install .` in
its repository installs:

```python
{code}
```
{verify}
Without the package PEFT stops with `KeyError: 'ORDMOE'`, because it does not know this type of adapter. Export it once
as plain LoRA, where the package is installed:

```bash
ordmoe export ADAPTER --output_dir my-plain-lora
```

Then PEFT loads it without the package, on the dense base{rounded}:

```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({base})
model = PeftModel.from_pretrained(base, "my-plain-lora")
```"""
LOCAL = "; `BASE` is the folder of the base, which is on no hub ({name})"
VERIFY = """
`ordmoe verify` says whether the adapter does on your base and machine what it did where it was saved:

```bash
ordmoe verify ADAPTER {base}
```
"""
ROUNDED = ", where likelihoods are somewhat other than on the 4-bit one of training"


def adapter_card(config: OrdMoEConfig, record: Mapping[str, Any]) -> ModelCard:
    """The card of an adapter.

    Args:
        config ([`OrdMoEConfig`]): its configuration.
        record (`dict`): its `ordmoe.json`. Read of it are `versions`; of `base` the `id`, `name`, `revision`, `class`,
            `quantization`, and as `license` what [`~ordmoe_peft.adapter.card_file.base_license`] returns; and of
            `training` what [`~ordmoe_peft.training.run_summary.run_summary`] returns. Each of `evaluations` says what
            it is `of`, `"base"` or `"adapter"`, its `metrics`, of which `accuracy` is a share of exact matches, and,
            where known, `data`, `split`, `part`, `rows` and `step`. What is not there is left out of the card.
    """
    base, training = _mapping(record.get("base")), _mapping(record.get("training"))
    recipe = _mapping(base.get("quantization") or config.base_quantization)
    name, loader = base_name(config, base), _task(base)[1]
    source = _line(base.get("id") or base.get("name") or "BASE")
    use = {
        "code": _code_to_load(config, base, source, loader, recipe),
        "local": LOCAL.format(name=_code(name)) if source == "BASE" else "",
        "verify": VERIFY.format(base=shlex.quote(source)) if record.get("probes") else "",
        "rounded": ROUNDED if recipe else "",
        "loader": loader,
        "base": _literal(source),
    }
    rows = [
        *_rows_of_adapter(config, base, name, recipe, is_trained=bool(training)),
        *_rows_of_training(training),
        ("versions", _named(record.get("versions"))),
    ]
    parts = [
        f"# {TITLE}{_code(name)}",
        _summary(config, name, is_trained=bool(training)),
        "## Use",
        USE.format(**use),
        "## What it is, and how it was trained",
        _table(("", ""), [row for row in rows if row[1]]),
        *_results(_mappings(training.get("evaluations"))),
        *_curves(_mappings(training.get("curves"))),
    ]
    text = "\n\n".join([BEGIN, *parts, END])
    return ModelCard(f"---\n{_metadata(base, training, name).to_yaml()}\n---\n\n{text}\n")


def base_name(config: OrdMoEConfig, base: Mapping[str, Any]) -> str:
    """What the base is called: its id, the `name` that its owner gave it, or that of its folder alone, so that no path
    of a machine is published."""
    folder = str(config.base_model_name_or_path or "")
    last = (PureWindowsPath if "\\" in folder else PurePosixPath)(folder).name
    return _line(base.get("id") or base.get("name") or last or base.get("class") or "the base")


def _metadata(base: Mapping[str, Any], training: Mapping[str, Any], name: str) -> ModelCardData:
    """What the hub reads of the card. It refuses a card with names that cannot be ids where it expects ids."""
    tag, data = _task(base)[0], _mapping(training.get("data"))
    results: dict[Any, EvalResult] = {}
    for evaluation in _mappings(training.get("evaluations")):
        accuracy, on = _mapping(evaluation.get("metrics")).get(ACCURACY), _line(evaluation.get("data") or "held-out")
        if evaluation.get("of") == "adapter" and _is_number(accuracy):
            split = _line(evaluation["split"]) if evaluation.get("split") else None
            options = {"dataset_split": split, "metric_name": "exact match"}
            result = EvalResult(tag or "text-generation", on, on, "exact_match", accuracy, **options)
            results.setdefault((on, split), result)  # a part of the same data stands in the text alone
    base_id, data_id = _hub_id(base.get("id")), _hub_id(data.get("id"))
    return ModelCardData(
        base_model=base_id,
        library_name="peft",
        pipeline_tag=tag,
        tags=[*TAGS, *([ADAPTER_OF + base_id] if base_id else [])],
        datasets=[data_id] if data_id else None,
        eval_results=list(results.values()) or None,
        model_name=TITLE + name if results else None,
        **{name: value for name, value in _mapping(base.get("license")).items() if name in LICENSE},
    )


def _hub_id(name: Any) -> str | None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _task(base: Mapping[str, Any]) -> tuple[str | None, str]:
    """The hub's tag of what the base does, where its class says so, and the class that loads it."""
    for classes, tag, loader in TASKS:
        if base.get("class") in classes.values():
            return tag, loader
    return None, "AutoModelForCausalLM"


# ------------------------------------------------------------------------------------------------------------ sections
def _summary(config: OrdMoEConfig, name: str, is_trained: bool) -> str:
    places = " and ".join(role.replace("_", " ") for role in config.targets)
    text = f"LoRA of rank {config.rank_in_words} on {places} of the Mixture-of-Experts model {_code(name)}"
    if not is_trained:
        return f"{text}. How it was trained is not recorded."
    text += ", trained by"
    if config.num_tiers == 1:
        return f"{text} supervised fine-tuning with the package `ordmoe_peft`."
    return (
        f"{text} OrdMoE ([arXiv 2511.19023](https://arxiv.org/abs/2511.19023)): the router's ranking of the experts is "
        f"cut into {config.num_tiers} tiers, and training raises the likelihood of a response under high tiers and "
        "lowers it under low ones. Used as it is, the model is on tier 1."
    )


def _code_to_load(
    config: OrdMoEConfig, base: Mapping[str, Any], source: str, loader: str, recipe: Mapping[str, Any]
) -> str:
    lines = ["from peft import PeftModel", f"from transformers import {loader}", "", "import ordmoe_peft", "", ""]
    arguments, dtype = [_literal(source)], _mapping(base.get("config")).get("dtype")
    if isinstance(dtype, str):
        arguments.append(f"dtype={_literal(dtype)}")
    if recipe.get("quant_method") == "ordmoe_peft":
        options = [f"{option}={_literal(recipe[option])}" for option in RECIPE[:3] if recipe.get(option)]
        lines[-1] = f"in_4_bits = ordmoe_peft.MoeBitsAndBytesConfig({', '.join(options)})"
        arguments.append("quantization_config=in_4_bits")
    given = ", ".join(arguments)
    given = given if len(given) < 60 else f"\n    {given}\n"
    lines += [
        f"base = {loader}.from_pretrained({given})",
        'model = PeftModel.from_pretrained(base, "ADAPTER")',
    ]
    if config.num_tiers > 1:
        last = config.num_tiers
        lines += [f"with ordmoe_peft.tier_routing(model, tier={last}):  # the lowest; tier 1 is the model as it is"]
        lines += ["    model.generate(**inputs)"]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _rows_of_adapter(
    config: OrdMoEConfig, base: Mapping[str, Any], name: str, recipe: Mapping[str, Any], is_trained: bool
) -> Iterator[tuple[str, str]]:
    revision = f"revision {_code(base['revision'])}" if base.get("revision") else ""
    yield "base", _joined([_code(name), revision, _code(base["class"]) if base.get("class") else ""])
    packed = {option: recipe.get(option) for option in ("quant_method", *RECIPE)}
    if recipe or is_trained:
        yield "its weights in training", _named(packed) if recipe else "not quantised"
    patterns = {option: _by_layer(getattr(config, option)) or None for option in ("rank_pattern", "alpha_pattern")}
    scaling = {"r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora or None}
    chosen = config.expert_selection or {}
    number = f"trained on {sum(map(len, chosen.values()))} experts of {len(chosen)} layers" if chosen else ""
    yield "LoRA", _joined([f"on {', '.join(config.targets)}", number, _named(scaling | patterns)])
    if config.num_tiers == 1:
        yield "method", "supervised fine-tuning (one tier)" if is_trained else ""
        return
    yield "method", "OrdMoE" if is_trained else ""
    options = ("num_tiers", "grouping", "layer_scope", "token_scope", "tier_weights", "rewards", "advantages")
    seed = ("tier_seed",) if config.grouping == "random" else ()
    yield "tiers", _named({option: getattr(config, option) for option in (*options, *seed)})


def _rows_of_training(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for label, key in (("objective", "objective"), ("settings", "settings"), ("data", "data"), ("run", "figures")):
        yield label, _named(training.get(key))


def _results(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Figures on data that were not trained on, before and after."""
    if evaluations:
        columns = list(
            dict.fromkeys(metric for evaluation in evaluations for metric in _mapping(evaluation.get("metrics")))
        )
        yield "## Results"
        yield "Of each tier the mean log-likelihood per response token, in nats; exact matches are tier 1's."
        yield _table(
            ["", "on", *map(_column, columns)],
            [
                [
                    "base" if evaluation.get("of") == "base" else "with the adapter",
                    _named({key: evaluation.get(key) for key in ("data", "split", "rows", "part", "step")}),
                    *(_figure(metric, _mapping(evaluation.get("metrics")).get(metric)) for metric in columns),
                ]
                for evaluation in evaluations
            ],
        )


def _curves(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was logged in training, from first to last."""
    if points:
        columns = [name for name in dict.fromkeys(name for point in points for name in point) if name != "step"]
        yield "## While it was trained"
        yield (
            "On training data: `loss` is what was minimised, and of each tier the mean log-likelihood per response "
            "token, in nats. Each is a mean over the steps since the log before."
        )
        rows = [[_plain(point.get("step")), *(_figure(name, point.get(name)) for name in columns)] for point in points]
        yield _table(["step", *map(_column, columns)], rows)


# ---------------------------------------------------------------------------------------------------------------- text
def _line(value: Any) -> str:
    """A value in one line, in characters that a file can hold."""
    return " ".join(str(value).split()).encode("utf-8", "replace").decode()


def _code(value: Any) -> str:
    """A value as it is: whatever is in it, nothing is markup."""
    return f"`{_line(value).replace('`', chr(39))}`"


def _literal(value: Any) -> str:
    """A text or a truth value in Python."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _plain(value: Any) -> str:
    """A number in full, texts and the like as they are; a dash for what is missing."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (f"{value:,}" if isinstance(value, int) else f"{value:g}") if math.isfinite(value) else MISSING
    return MISSING if value is None else _code(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    """A part of a record, which others may have written: what is no mapping says nothing."""
    return value if isinstance(value, Mapping) else {}


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)] if isinstance(values, list) else []


def _by_layer(pattern: Mapping[str, int]) -> Mapping[str, int]:
    """A pattern with a star for the number of the layer, where that says all."""
    starred = {name: re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in pattern}
    short = {starred[name]: value for name, value in pattern.items()}
    return short if all(short[starred[name]] == value for name, value in pattern.items()) else pattern


def _named(values: Any) -> str:
    """Names with their values, those that are not there left out; what is no mapping as it is."""
    if not isinstance(values, Mapping):
        return _plain(values) if values else ""
    names = {name: name.replace("_", " ") if re.fullmatch(r"[\w.-]+", name) else _code(name) for name in values}
    return _joined(f"{names[name]} {_plain(value)}" for name, value in values.items() if value is not None)


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)


def _column(metric: str) -> str:
    tier = re.fullmatch(r"tier_(\d+)/log_likelihood", metric)
    if tier:
        return f"tier {tier[1]}"
    name, _, group = metric.partition("/")
    return f"exact match{group and f', {_line(group)}'}" if name == ACCURACY else _code(metric)


def _figure(metric: str, value: Any) -> str:
    if not _is_number(value):
        return MISSING
    return f"{100 * value:.1f} %" if metric.startswith(ACCURACY) else f"{value:.4g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
