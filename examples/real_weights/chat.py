"""Ask a question and read the answer of each tier; the model is loaded in 4 bits.

    python -m examples.real_weights.chat outputs/real_weights/base "What is the capital of France?"
    python -m examples.real_weights.chat outputs/real_weights/base --adapter outputs/real_weights/adapter \\
        --system "Answer in a few words." "Tom welcomes tea. Ann fears cats. Who welcomes tea?"

Tier 1 is the model as it is.
"""

import argparse

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ordmoe_peft import MoeBitsAndBytesConfig
from ordmoe_peft.tools.measure.evaluation import generate_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of the base")
    parser.add_argument("question")
    parser.add_argument("--adapter", help="folder or hub id of an adapter")
    parser.add_argument("--system", help="system message; an adapter answers best under the one it was trained with")
    parser.add_argument("--num_tiers", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=40)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=MoeBitsAndBytesConfig())
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    system = [{"role": "system", "content": args.system}] if args.system else []
    sample = {"prompt": [*system, {"role": "user", "content": args.question}]}
    for tier in range(1, args.num_tiers + 1):
        (answer,) = generate_answers(
            model, tokenizer, [sample], args.max_new_tokens, tier=tier, num_tiers=args.num_tiers
        )
        print(f"tier {tier}: {answer}")


if __name__ == "__main__":
    main()
