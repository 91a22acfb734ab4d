"""The model card of a merged model."""

from importlib.metadata import version

from huggingface_hub import ModelCard, ModelCardData

from ...adapter.config import OrdMoEConfig
from ...merging.delta_retention import RequantizationReport
from ...quantization.config import MoeBitsAndBytesConfig


def model_card(
    base: str,
    adapter: str,
    config: OrdMoEConfig,
    recipe: MoeBitsAndBytesConfig | None,
    report: RequantizationReport | None,
) -> ModelCard:
    """The card of `base` with `adapter` merged into it: what it is made of, and how."""
    rounded = "as it is stored"
    if recipe is not None:
        nested = ", with nested quantisation" if recipe.bnb_4bit_use_double_quant else ""
        rounded = f"rounded to 4 bits first ({recipe.bnb_4bit_quant_type}{nested}), as the adapter was trained on it"
    loading = "It loads with `from_pretrained` of transformers and needs no other package."
    if report is not None:
        kept = min((weight.survived for weight in report.weights), default=1.0)
        loading = (
            f"Its weights are packed in 4 bits again, which left {kept:.0%} and more of the norm of what the adapter "
            "added to each. It loads with `from_pretrained` of transformers after `import ordmoe_peft`."
        )
    packages = ", ".join(f"{name} {version(name)}" for name in ("ordmoe-peft", "transformers", "peft", "torch"))
    data = ModelCardData(base_model=base, library_name="transformers", tags=["ordmoe", "merge"])
    return ModelCard(f"""---
{data}
---

# {base} with an OrdMoE adapter merged into it

| | |
| --- | --- |
| base | {base}, {rounded} |
| adapter | {adapter}: LoRA of rank {config.rank_in_words}, alpha {config.lora_alpha}, on {", ".join(config.targets)} |
| tiers it was trained with | {config.num_tiers}, {config.grouping} |
| merged with | {packages} |

{loading}
""")
