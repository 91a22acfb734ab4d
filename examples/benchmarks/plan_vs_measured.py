"""Hold `ordmoe plan`'s estimate of activations against what a training step allocates, on CPU.

    python -m examples.benchmarks.plan_vs_measured                # all cases, a few minutes
    python -m examples.benchmarks.plan_vs_measured --cases 3 12   # two

Each case trains a small model of a real class with random weights, in a process of its own, with the real trainer and
4-bit loader. Measured is the most that torch's allocator held during a training step above what it held at its start:
the running sum of the profiler's memory events, which is exact and repeats, where resident memory depends on malloc.
The step is the second of two that accumulate, so gradients exist before it, as the plan assumes.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.cli.tables import percent, print_table
from ordmoe_peft.tools.plan.activations import step_inputs
from ordmoe_peft.tools.plan.plan import plan_memory
from ordmoe_peft.tools.plan.settings import PlanSettings
from ordmoe_peft.tools.plan.weights import model_class

from .measuring import in_a_fresh_process, print_cpu
from .trainers import MeasuringTrainer, trainer_on


MIB = 2**20
COMMON = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QWEN = COMMON | {"head_dim": 64, "num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 256}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8], "mrope_interleaved": True}
VISION = {
    "depth": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_heads": 4,
    "patch_size": 8,
    "out_hidden_size": 512,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [1],
}
CONFIGS = {
    "qwen3_moe": QWEN | {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
    "qwen3_vl_moe": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": QWEN | {"rope_parameters": ROPE},
        "vision_config": VISION,
        "image_token_id": 1000,
        "video_token_id": 1001,
        "vision_start_token_id": 1002,
        "vision_end_token_id": 1003,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "gpt_oss": COMMON
    | {
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 256,
        "sliding_window": 128,
    },
    "mixtral": COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 1024,
    },
    "deepseek_v2": COMMON
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_key_value_heads": 8,
        "n_routed_experts": 32,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "intermediate_size": 1024,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
}


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None

    @property
    def plan_settings(self) -> PlanSettings:
        quantization = None if self.quantization is None else MoeBitsAndBytesConfig(**self.quantization)
        common = {"r": 8, "batch_size": 2, "tier_passes": "batched"}
        return PlanSettings(quantization=quantization, device="cpu", **common | self.settings)

    @property
    def config(self) -> PretrainedConfig:
        return AutoConfig.for_model(self.model, **CONFIGS[self.model])


BF16 = {"bnb_4bit_compute_dtype": torch.bfloat16}
PLAIN = {"gradient_checkpointing": False, "sequence_length": 256}
CASES = [
    Case("qwen3_moe", PLAIN | {"num_tiers": 1}),
    Case("qwen3_moe", PLAIN | {"batch_size": 4, "r": 16}),
    Case("qwen3_moe", {"sequence_length": 512}),
    Case("qwen3_moe", {"sequence_length": 1024, "batch_size": 1, "num_tiers": 2}),
    Case("qwen3_moe", PLAIN, BF16),
    Case("qwen3_moe", {"sequence_length": 512}, BF16 | {"bnb_4bit_use_double_quant": True}),
    Case("qwen3_moe", PLAIN | {"targets": ("router", "experts", "attention")}, BF16),
    Case("qwen3_vl_moe", PLAIN | {"images_per_sample": 1, "image_tokens": 64}),
    Case("qwen3_vl_moe", {"sequence_length": 512, "images_per_sample": 2, "image_tokens": 100}, BF16),
    Case("gpt_oss", {"sequence_length": 512}, BF16),
    Case("deepseek_v2", PLAIN | {"num_tiers": 4}),
    Case("mixtral", {"sequence_length": 512, "num_tiers": 2}, BF16),
    Case("qwen3_moe", PLAIN | {"batch_size": 4, "r": 16, "tier_passes": "sequential"}),
    Case("qwen3_moe", {"sequence_length": 512, "tier_passes": "sequential"}, BF16),
    Case("qwen3_vl_moe", PLAIN | {"images_per_sample": 1, "image_tokens": 64, "tier_passes": "sequential"}),
]


# -------------------------------------------------------------------------------------------------------------- cases
def measure(case: Case) -> int:
    """The peak of one training step over its start, in bytes."""
    settings, config = case.plan_settings, case.config
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model_class(config)(config).to(torch.bfloat16).save_pretrained(folder)
        model = model_class(config).from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=settings.quantization
        )
        model = get_peft_model(model, settings.adapter_config())
        batch = step_inputs(config, settings)
        batch = {name: make() if callable(make) else make for name, make in batch.items()}
        trainer = trainer_on(model, batch, settings, folder, MeasuringTrainer)
        trainer.train()
    return trainer.peaks[-1]


def run(index: int) -> list[str]:
    """A row of the table."""
    logging.set_verbosity_error()
    case = CASES[index]
    settings = case.plan_settings
    planned, measured = plan_memory(case.config, settings).activations.peak, measure(case)
    images = f"{settings.images_per_sample} x {settings.image_tokens}" if settings.images_per_sample else ""
    bits = "bf16" if case.quantization is None else "nf4" + ", double" * settings.quantization.bnb_4bit_use_double_quant
    shape = [settings.batch_size, settings.sequence_length, settings.num_tiers, settings.tier_passes]
    return [
        f"{index}: {case.model}",
        *map(str, shape),
        images,
        "on" if settings.gradient_checkpointing else "off",
        bits,
        f"{planned / MIB:.0f}",
        f"{measured / MIB:.0f}",
        percent(planned / measured - 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), default=range(len(CASES)))
    parser.add_argument("--only", type=int, choices=range(len(CASES)), help="measure one, here, and print it as JSON")
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(run(options.only)))
        return
    print_cpu()
    rows = [in_a_fresh_process("examples.benchmarks.plan_vs_measured", only=case) for case in options.cases]
    columns = [
        "model",
        "batch",
        "seq",
        "C",
        "passes",
        "images",
        "ckpt",
        "bits",
        "planned MiB",
        "measured MiB",
        "off by",
    ]
    print_table("Peak of a training step over weights, gradients and optimizer", columns, rows)


if __name__ == "__main__":
    main()
