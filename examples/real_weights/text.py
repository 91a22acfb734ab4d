"""Text that installs from PyPI, to split and repair the base on: `reasoning-gym` (Apache-2.0) brings all of it.

Prose (Jules Verne's "In the Year 2889"), descriptions of problems with Python that solves them, and questions with
answers in the chat template, of tasks other than those in `tasks.py`. The last tenth of each is held out.
"""

import gzip
import json
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path

import reasoning_gym
from transformers import PreTrainedTokenizerBase


# Tasks of reasoning-gym with short questions in words.
QUESTIONS = (
    *("aiw", "basic_arithmetic", "calendar_arithmetic", "coin_flip", "family_relationships", "gcd", "gsm_symbolic"),
    *("leg_counting", "letter_counting", "number_sequence", "prime_factorization", "sentence_reordering"),
    *("simple_equations", "syllogism", "time_intervals", "word_sorting"),
)
QUESTIONS_OF_EACH = 80
PROBLEMS = 1500
HELD_OUT = 0.1
SEED = 30_000_000


@dataclass
class Texts:
    """Texts of one kind: those to train on, and those held out."""

    train: list[str]
    held_out: list[str]


def load_texts(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> dict[str, Texts]:
    """Kind → its texts, of at most `max_tokens` tokens each."""
    data = Path(reasoning_gym.__file__).parent / "data"
    prose = (data / "in_the_year_2889.txt").read_text(encoding="utf-8")
    kinds = {"prose": [prose], "problems": problems(data / "codeio.jsonl.gz"), "questions": questions()}
    return {
        kind: _parts([_text(tokenizer, document) for document in documents], tokenizer, max_tokens)
        for kind, documents in kinds.items()
    }


def problems(file: Path) -> list[tuple[str, str]]:
    """Descriptions of problems, and code that solves them."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, PROBLEMS)]
    return [
        (f"{row['task_description']}\n\n{row['input_output_spec']}\n\nWrite it in Python.", row["code_sample"])
        for row in rows
    ]


def questions() -> list[tuple[str, str]]:
    """Questions and answers of [`QUESTIONS`], the tasks in turn."""
    draw = partial(reasoning_gym.create_dataset, seed=SEED, size=QUESTIONS_OF_EACH)
    tasks = [[(entry["question"], str(entry["answer"])) for entry in draw(name)] for name in QUESTIONS]
    return [pair for pair in chain(*zip_longest(*tasks)) if pair is not None]


def _text(tokenizer: PreTrainedTokenizerBase, document: str | tuple[str, str]) -> str:
    """A document as it is, or a question and an answer in the chat template."""
    if isinstance(document, str):
        return document
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), document, strict=True)]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _parts(documents: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Texts:
    """Documents one after another, cut to `max_tokens`: no place of a batch is padding."""
    ids = tokenizer("".join(documents)).input_ids
    # Without its last token, so that a part that is read anew as text is no longer than `max_tokens`.
    parts = [tokenizer.decode(ids[start : start + max_tokens - 1]) for start in range(0, len(ids), max_tokens - 1)]
    held_out = max(1, round(HELD_OUT * len(parts)))
    return Texts(parts[:-held_out], parts[-held_out:])


def in_turn(texts: dict[str, Texts], number: int) -> list[str]:
    """`number` training texts, of all kinds in turn; where a kind ends, the others go on."""
    turns = chain(*zip_longest(*(of_kind.train for of_kind in texts.values())))
    return list(islice((text for text in turns if text is not None), number))
