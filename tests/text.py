"""A tokenizer and small data sets of words, for the tiny text models."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import EOS, PAD, VOCAB_SIZE


WORDS = [f"w{i}" for i in range(VOCAB_SIZE)]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = list(WORDS)
    words[PAD], words[EOS], words[1], words[2], words[3] = "<pad>", "</s>", "<user>", "<assistant>", "<unk>"
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def conversations(count: int = 8, vary_length: bool = True) -> Dataset:
    """Questions of two to four words, each answered by its last word twice."""
    rows = []
    for index in range(count):
        words = [WORDS[10 + (7 * index + 3 * place) % 80] for place in range(2 + (index % 3 if vary_length else 0))]
        rows.append(
            {
                "prompt": [{"role": "user", "content": " ".join(words)}],
                "completion": [{"role": "assistant", "content": f"{words[-1]} {words[-1]}"}],
                "kind": "even" if index % 2 == 0 else "odd",
            }
        )
    return Dataset.from_list(rows)
