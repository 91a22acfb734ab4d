"""What loading a MoE checkpoint costs: bf16, stock `load_in_4bit`, and 4-bit experts.

    python -m examples.benchmarks.load_4bit        # some minutes on two cores, nearly all of them packing

Makes a sharded bf16 checkpoint of the Qwen3-MoE class with random weights (2.2 GB) in both forms that experts have on
disk, loads it in a fresh process for each way, and prints a table. The files go to a temporary folder and are removed.

Memory is what the process holds beyond what it held before the load. On CPU it is resident memory without the pages of
checkpoint files that are mapped into memory: they are clean, so the kernel takes them back when it needs room. A tensor
in bf16 may stay in the mapped file, so bf16 experts can look smaller than they are. On a CUDA device it is what torch
allocated there.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig

from ordmoe_peft import MoeBitsAndBytesConfig, quantization_census
from ordmoe_peft.cli.tables import print_table
from ordmoe_peft.quantization.memory_by_role import in_units

from .measuring import in_a_fresh_process, print_cpu, private_peak_of


HIDDEN, EXPERT_WIDTH, EXPERTS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1024, 384, 128, 16, 4, 64, 1024
LARGEST_STACK = EXPERTS * 2 * EXPERT_WIDTH * HIDDEN * torch.bfloat16.itemsize
FORMS = ("per expert", "fused")
WAYS = {
    "bf16": None,
    "stock load_in_4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "4-bit experts": MoeBitsAndBytesConfig(),
    "4-bit experts, double": MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=7, help="decoder layers, 0.31 GB each")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="how experts are on disk")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:3], help="how they are loaded")
    parser.add_argument("--folder", help="where the temporary folder is made; the system's place by default")
    parser.add_argument("--load", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load, *options.ways)))
        return
    print_cpu()
    rows = []
    for form in options.forms:
        with tempfile.TemporaryDirectory(dir=options.folder) as checkpoint:
            write_checkpoint(Path(checkpoint), options.layers, form)
            size = sum(file.stat().st_size for file in Path(checkpoint).glob("*.safetensors"))
            for way in options.ways:
                result = in_a_fresh_process("examples.benchmarks.load_4bit", load=checkpoint, ways=way)
                rows.append(row(form, way, **result))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"Loading {in_units(size)} of bf16 on {where}; largest fused stack {in_units(LARGEST_STACK)}"
    print_table(title, ["way", "on disk", "model", "peak", "(peak - model) / stack", "seconds"], rows)


def row(form: str, way: str, model: int, peak: int, seconds: float) -> list[str]:
    over = (peak - model) / LARGEST_STACK
    return [way, form, in_units(model), in_units(peak), f"{over:.2f}", f"{seconds:.1f}"]


def load(checkpoint: str, way: str) -> dict[str, float]:
    """Load `checkpoint` in this process."""
    device_map = {"": 0} if torch.cuda.is_available() else None
    arguments = {"dtype": torch.bfloat16, "quantization_config": WAYS[way], "device_map": device_map}
    loaded = []
    start = time.perf_counter()
    peak = private_peak_of(lambda: loaded.append(AutoModelForCausalLM.from_pretrained(checkpoint, **arguments)))
    return {"seconds": time.perf_counter() - start, "peak": peak, "model": quantization_census(*loaded).bytes}


def write_checkpoint(folder: Path, layers: int, form: str) -> None:
    """One shard for each layer, all with the same weights, and one for the rest."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        moe_intermediate_size=EXPERT_WIDTH,
        norm_topk_prob=True,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    rest = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shards = {"model-rest.safetensors": random_weights(rest | {"lm_head.weight": (VOCABULARY, HIDDEN)})}
    weights = random_weights(layer_shapes(form))
    index = {}
    for layer in range(layers):
        shards[f"model-{layer}.safetensors"] = {
            f"model.layers.{layer}.{name}": value for name, value in weights.items()
        }
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def layer_shapes(form: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one decoder layer's tensors on disk."""
    shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate.weight": (EXPERTS, HIDDEN),
    }
    if form == "fused":
        gate_up, down = (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN), (EXPERTS, HIDDEN, EXPERT_WIDTH)
        return shapes | {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}
    of_expert = {
        "gate_proj": (EXPERT_WIDTH, HIDDEN),
        "up_proj": (EXPERT_WIDTH, HIDDEN),
        "down_proj": (HIDDEN, EXPERT_WIDTH),
    }
    return shapes | {
        f"mlp.experts.{expert}.{name}.weight": shape for expert in range(EXPERTS) for name, shape in of_expert.items()
    }


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shapes.items()}


if __name__ == "__main__":
    main()
