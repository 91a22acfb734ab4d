"""Train the base that ships in `examples/easy_vqa/base`: a small Qwen3-VL-MoE, from scratch, on easy-VQA.

Three stages, each under transformers' `Trainer` or TRL's `SFTTrainer`:

1. The vision tower learns the shape and the colour of each training image, with flips and shifts as augmentation.
   Most of easy-VQA's questions can be answered by yes or no from the question alone, so a tower that only saw the
   questions' loss would hardly learn to see.
2. The model learns to answer in conversations of several questions about an image.
3. It learns to answer single questions, drawn equally from the four kinds.

Each stage ends when held-out validation images show what `STOP_AT` asks.

    python examples/easy_vqa/make_base.py --output_dir examples/easy_vqa/base

The test split is read at the end, for the card.
"""

import argparse
import json
import platform
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers
import trl
from datasets import Dataset, Features
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationConfig,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from data import SHAPES, load_easy_vqa


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
KINDS = ("shape", "color", "shape presence", "color presence")
# Validation accuracy at which each stage ends. All could go on to near 100 %; a base for fine-tuning experiments needs
# headroom, and half of all questions ask for the presence of a colour.
STOP_AT = {
    "tower": {"shape": 0.76},
    "conversations": {"shape presence": 0.72, "color presence": 0.9},
    "questions": {"overall": 0.87, "shape": 0.72, "shape presence": 0.7, "color presence": 0.9},
}
PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE, IMAGE_SIZE = 8, 2, 2, 64
SPECIAL_TOKENS = {
    "pad": "<|endoftext|>",
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
# ChatML with one placeholder per image, the form that Qwen3-VL's own template has for text and images. An answer begins
# with a space, so that a word is the same token in questions and answers.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set parts.text = parts.text + '<|vision_start|><|image_pad|><|vision_end|>' -%}
{%- elif part['type'] == 'text' -%}
{%- set parts.text = parts.text + part['text'] -%}
{%- endif -%}
{%- endfor -%}
{%- set text = parts.text -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + text + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- text + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


# ---------------------------------------------------------------------------------------------------------- processor
def train_tokenizer(texts: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; it encodes any text, and easy-VQA's words in one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS["pad"],
        eos_token=SPECIAL_TOKENS["turn_end"],
        extra_special_tokens={"image_token": SPECIAL_TOKENS["image"], "video_token": SPECIAL_TOKENS["video"]},
    )


def build_processor(texts: list[str]) -> PaddleOCRVLProcessor:
    """Tokenizer, PIL image processor and chat template in one processor.

    transformers builds `Qwen3VLProcessor` only where torchvision is installed, for its video half.
    `PaddleOCRVLProcessor` expands image placeholders by the same rule, has no video half and needs no torchvision.
    """
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        temporal_patch_size=TEMPORAL_PATCH_SIZE,
        merge_size=MERGE_SIZE,
        size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return PaddleOCRVLProcessor(image_processor, train_tokenizer(texts), chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLMoeConfig:
    """The 30B's architecture at 1/8000 of its size: 4 layers of 16 experts, 2 active."""
    token_id = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    hidden_size = 128
    return Qwen3VLMoeConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            # About 1/√hidden: at the default 0.02, the products that compare two words start too small to be found.
            "initializer_range": 0.08,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": token_id["pad"],
            "eos_token_id": token_id["turn_end"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": (IMAGE_SIZE // PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=token_id["image"],
        video_token_id=token_id["video"],
        vision_start_token_id=token_id["vision_start"],
        vision_end_token_id=token_id["vision_end"],
        tie_word_embeddings=True,
    )


# ------------------------------------------------------------------------------------------------- stage 1: to see
def facts_told(question: str, answer: str) -> list[str]:
    """The words among shapes and colours that a question and its answer say are true of the image."""
    named = [word for word in SHAPES + COLORS if word in question.rstrip("?").split()]
    if answer not in ("yes", "no"):
        return [*named, answer]
    negated = " no " in question or " not " in question
    return named if (answer == "yes") != negated else []


def label_images(split: Dataset) -> list[dict]:
    """One row per image: its pixels, and the shape and colour that its questions give away (-100 where they do not)."""
    images, facts = {}, defaultdict(set)
    for row in split:
        images.setdefault(row["image_id"], row["images"][0].convert("RGB"))
        facts[row["image_id"]].update(facts_told(row["prompt"][0]["content"], row["completion"][0]["content"]))

    def index_of(words: tuple[str, ...], told: set[str]) -> int:
        known = [i for i, word in enumerate(words) if word in told]
        return known[0] if known else -100

    return [
        {"image": image, "shape": index_of(SHAPES, facts[i]), "color": index_of(COLORS, facts[i])}
        for i, image in images.items()
    ]


def augment(image: PIL.Image.Image, rng: np.random.Generator, most: int = 8) -> PIL.Image.Image:
    """Flip left to right half of the time and shift by up to `most` pixels, repeating the border."""
    pixels = np.asarray(image)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    dy, dx = rng.integers(0, 2 * most + 1, size=2)
    padded = np.pad(pixels, ((most, most), (most, most), (0, 0)), mode="edge")
    return PIL.Image.fromarray(padded[dy : dy + IMAGE_SIZE, dx : dx + IMAGE_SIZE])


class VisionClassifier(nn.Module):
    """The vision tower with two linear heads on the mean of its merged tokens."""

    def __init__(self, tower: nn.Module, hidden_size: int):
        super().__init__()
        self.tower = tower
        self.shape_head = nn.Linear(hidden_size, len(SHAPES))
        self.color_head = nn.Linear(hidden_size, len(COLORS))

    def forward(self, pixel_values, image_grid_thw, labels):
        """`labels` has shape `(B, 2)`: shape and colour, -100 where unknown. Returns the loss and both logits."""
        tokens = self.tower(pixel_values, grid_thw=image_grid_thw).pooler_output
        features = tokens.view(len(labels), -1, tokens.shape[-1]).mean(dim=1)
        logits = self.shape_head(features), self.color_head(features)
        loss = sum(nn.functional.cross_entropy(logit, label) for logit, label in zip(logits, labels.T, strict=True))
        return {"loss": loss, "logits": logits}


def train_tower(model, processor, splits, args) -> dict[str, float]:
    """Stage 1, in place on `model`'s vision tower. Returns its accuracies on the validation images."""
    rng = np.random.default_rng(args.seed)
    training = [False]

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [augment(row["image"], rng) if training[0] else row["image"] for row in rows]
        batch = processor.image_processor(images, return_tensors="pt")
        return {**batch, "labels": torch.tensor([[row["shape"], row["color"]] for row in rows])}

    def accuracies(prediction) -> dict[str, float]:
        return {
            name: float((logits.argmax(-1) == labels)[labels != -100].mean())
            for name, logits, labels in zip(
                ("shape", "color"), prediction.predictions, prediction.label_ids.T, strict=True
            )
        }

    trainer = Trainer(
        VisionClassifier(model.model.visual, model.config.text_config.hidden_size),
        args=TrainingArguments(
            args.work / "tower",
            max_steps=args.tower_steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=128,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.05,
            eval_strategy="steps",
            eval_steps=25,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            seed=args.seed,
        ),
        data_collator=collate,
        train_dataset=label_images(splits["train"]),
        eval_dataset=label_images(splits["validation"]),
        compute_metrics=accuracies,
        callbacks=[AugmentOnlyInTraining(training), StopTower()],
    )
    saved = args.work / "tower.safetensors"
    if saved.exists():
        print(f"Tower of an earlier run: {saved}")
        load_model(model.model.visual, saved)
    else:
        trainer.train()
        save_model(model.model.visual, str(saved))
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in ("shape", "color")}


class AugmentOnlyInTraining(TrainerCallback):
    """Tells the collator whether it serves a training step."""

    def __init__(self, training: list[bool]):
        self.training = training

    def on_step_begin(self, args, state, control, **kwargs):
        self.training[0] = True

    def on_step_end(self, args, state, control, **kwargs):
        self.training[0] = not control.should_evaluate

    def on_train_end(self, args, state, control, **kwargs):
        self.training[0] = False


class StopTower(TrainerCallback):
    """Ends stage 1 once the validation images reach the accuracy that `STOP_AT` asks."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        control.should_training_stop = all(metrics[f"eval_{key}"] >= least for key, least in STOP_AT["tower"].items())


# ------------------------------------------------------------------------------------- stages 2 and 3: to answer
def conversations(split: Dataset, rng: np.random.Generator, orders: int = 4, turns: int = 6) -> Dataset:
    """For each image, `orders` conversations of `turns` of its questions and answers, drawn at random.

    Early turns can only be answered from the image; later ones also from what was said. So a model learns to compare
    a word that is asked for with a word that is known, before it must compare it with what it sees. Colours that are
    there are drawn three times as often as their one in eight: the rarer a "yes", the later it is learnt.
    """
    by_image = defaultdict(list)
    for index, image_id in enumerate(split["image_id"]):
        by_image[image_id].append(index)
    prompts, completions, kinds = split["prompt"], split["completion"], split["kind"]
    weight = [
        3.0 if kind == "color presence" and facts_told(prompt[0]["content"], completion[0]["content"]) else 1.0
        for prompt, completion, kind in zip(prompts, completions, kinds, strict=True)
    ]
    rows = []
    for indices in by_image.values():
        image = split[indices[0]]["images"]
        for _ in range(orders):
            weights = np.array([weight[i] for i in indices])
            size = min(turns, len(indices))
            drawn = rng.choice(indices, size=size, replace=False, p=weights / weights.sum()).tolist()
            rows.append({"images": image, "messages": [m for i in drawn for m in (*prompts[i], *completions[i])]})
    features = Features({"images": split.features["images"], "messages": split.features["prompt"]})
    return Dataset.from_list(rows, features=features)


def balanced(split: Dataset, seed: int) -> Dataset:
    """As many questions of each kind as the most frequent kind has, by repetition, shuffled."""
    kinds = np.array(split["kind"])
    rows_by_kind = [np.flatnonzero(kinds == kind) for kind in KINDS]
    most = max(len(rows) for rows in rows_by_kind)
    return split.select(np.concatenate([np.resize(rows, most) for rows in rows_by_kind])).shuffle(seed=seed)


@torch.no_grad()
def accuracy_by_kind(model, processor, split: Dataset, batch_size: int = 128) -> dict[str, float]:
    """Exact match of greedily generated answers, per kind and overall."""
    model.eval()
    right, asked = Counter(), Counter()
    for rows in split.iter(batch_size):
        texts = processor.apply_chat_template(
            [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt[0]["content"]}]}]
                for prompt in rows["prompt"]
            ],
            add_generation_prompt=True,
        )
        inputs = processor(images=rows["images"], text=texts, padding=True, padding_side="left", return_tensors="pt")
        # Left on for the balance loss, router logits break transformers' cached decoding (5.23).
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_router_logits=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for answer, completion, kind in zip(answers, rows["completion"], rows["kind"], strict=True):
            for key in (kind, "overall"):
                asked[key] += 1
                right[key] += answer.strip() == completion[0]["content"]
    return {kind: right[kind] / asked[kind] for kind in (*KINDS, "overall")}


def question_only_baseline(train: Dataset, test: Dataset) -> dict[str, float]:
    """Accuracy of answering each question by its most frequent training answer, images unseen."""
    answers = defaultdict(Counter)
    for prompt, completion in zip(train["prompt"], train["completion"], strict=True):
        answers[prompt[0]["content"]][completion[0]["content"]] += 1
    right, asked = Counter(), Counter()
    for prompt, completion, kind in zip(test["prompt"], test["completion"], test["kind"], strict=True):
        guess = answers[prompt[0]["content"]].most_common(1)
        for key in (kind, "overall"):
            asked[key] += 1
            right[key] += bool(guess) and guess[0][0] == completion[0]["content"]
    return {kind: right[kind] / asked[kind] for kind in (*KINDS, "overall")}


class StopAt(TrainerCallback):
    """Ends a stage once 600 validation questions reach the given accuracies."""

    def __init__(self, least: dict[str, float], processor, validation: Dataset, every: int = 25):
        self.least, self.processor, self.every = least, processor, every
        self.sample = validation.shuffle(seed=0).select(range(600))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        accuracy = accuracy_by_kind(model, self.processor, self.sample)
        model.train()
        print(f"step {state.global_step}: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items()), flush=True)
        control.should_training_stop = all(accuracy[key] >= least for key, least in self.least.items())


def train_answers(model, processor, splits, args) -> dict[str, int]:
    """Stages 2 and 3, in place on `model`, with the tower below its mergers frozen. Returns the steps of each."""
    for part in (model.model.visual.blocks, model.model.visual.patch_embed, model.model.visual.pos_embed):
        part.requires_grad_(False)
    stages = {
        "conversations": (conversations(splits["train"], np.random.default_rng(args.seed)), 32, 2e-3),
        "questions": (balanced(splits["train"], args.seed), 64, 5e-4),
    }
    steps = {}
    for name, (dataset, batch_size, learning_rate) in stages.items():
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                args.work / name,
                max_steps=args.answer_steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=50,
                weight_decay=0.05,
                router_aux_loss_coef=0.01,
                assistant_only_loss="messages" in dataset.column_names,
                gradient_checkpointing=False,
                bf16=False,
                max_length=None,
                logging_steps=25,
                save_strategy="no",
                report_to="none",
                seed=args.seed,
            ),
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[StopAt(STOP_AT[name], processor, splits["validation"])],
        )
        trainer.train()
        steps[name] = trainer.state.global_step
    return steps


# --------------------------------------------------------------------------------------------------------------- card
def model_card(record: dict) -> str:
    """The model card of a training record, in Markdown."""
    columns = {
        "validation": record["validation_accuracy"],
        "test": record["test_accuracy"],
        "test, from the question alone": record["question_only_test_accuracy"],
    }
    table = [f"| question kind | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for kind in (*KINDS, "overall"):
        table.append(f"| {kind} | " + " | ".join(f"{100 * column[kind]:.1f} %" for column in columns.values()) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    tower = ", ".join(f"{name} {100 * value:.1f} %" for name, value in record["tower_validation_accuracy"].items())
    return CARD.format(
        table="\n".join(table),
        versions_line=versions,
        tower=tower,
        conversation_steps=record["answer_steps"]["conversations"],
        question_steps=record["answer_steps"]["questions"],
        **record,
    )


CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
---

# A small Qwen3-VL-MoE that answers easy-VQA's questions

`Qwen3VLMoeForConditionalGeneration`, the classes of Qwen3-VL-30B-A3B, with {parameters:,} weights: 4 decoder layers of
16 experts with 2 active, a vision tower of 4 layers, and a tokenizer of 512 tokens. Trained from scratch on the
training split of [easy-VQA](https://pypi.org/project/easy-vqa/) (MIT), whose images show one coloured shape each. It
is a base for experiments with adapters, so it stopped with headroom, and it knows nothing else.

`AutoProcessor` and `AutoModelForImageTextToText` load it from this folder. Its processor class is PaddleOCR-VL's,
which expands image placeholders by the same rule: transformers builds Qwen3-VL's own only where torchvision is there.

{table}

Exact match of greedy answers. "From the question alone" answers each question by its most frequent answer in training.

## How it was made

`{script}`, seed {seed}: the vision tower alone on shape and colour labels (validation: {tower}),
then {conversation_steps} steps on conversations and {question_steps} on single questions. Each stage ended when
validation questions reached the accuracies in `training_record.json`. A tenth of the training images, with all their
questions, is the validation split. {seconds} seconds on two CPU cores, light work beside it.
Versions: {versions_line}.
"""


# --------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/easy_vqa/base"))
    parser.add_argument("--work", type=Path, default=Path("outputs/make_base"), help="folder for trainer state")
    parser.add_argument("--tower-steps", type=int, default=1200, help="upper bound; see STOP_AT")
    parser.add_argument("--answer-steps", type=int, default=2000, help="upper bound for stages 2 and 3 each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    started = time.perf_counter()
    set_seed(args.seed)
    splits = load_easy_vqa()
    texts = [m[0]["content"] for column in ("prompt", "completion") for m in splits["train"][column]]
    processor = build_processor([*texts, "user\n", "assistant\n", "system\n"])
    model = Qwen3VLMoeForConditionalGeneration(build_config(processor.tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.text_config.eos_token_id, pad_token_id=model.config.text_config.pad_token_id
    )

    tower_accuracy = train_tower(model, processor, splits, args)
    steps = train_answers(model, processor, splits, args)
    model.config.text_config.output_router_logits = False
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    record = {
        "script": "examples/easy_vqa/make_base.py",
        "seed": args.seed,
        "answer_steps": steps,
        "stop_at": STOP_AT,
        "seconds": round(time.perf_counter() - started),
        "parameters": model.num_parameters(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "tower_validation_accuracy": tower_accuracy,
        "validation_accuracy": accuracy_by_kind(model, processor, splits["validation"]),
        "test_accuracy": accuracy_by_kind(model, processor, splits["test"]),
        "question_only_test_accuracy": question_only_baseline(splits["train"], splits["test"]),
    }
    (args.output_dir / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.output_dir / "README.md").write_text(model_card(record))
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
