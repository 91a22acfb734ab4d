import torch

from ordmoe_peft.data.responses import content_mask, end_of_sequence_ids
from tests import models, text


def test_content_is_what_comes_before_the_last_end():
    """Prompt (no label), two words, an end token (9) and the template's newline (5) after it."""
    labels = torch.tensor([[-100, 3, 4, 9, 5], [-100, -100, 7, 8, 6], [-100, 3, 9, 4, 9]])
    mask = labels != -100
    assert content_mask(labels, mask, torch.tensor([9])).tolist() == [
        [False, True, True, False, False],
        [False, False, True, True, True],
        [False, True, False, True, False],
    ]


def test_end_tokens_are_the_tokenizers_and_the_models():
    model = models.qwen3_moe()
    model.generation_config.eos_token_id = [7, 8]
    assert end_of_sequence_ids(text.tokenizer(), model).tolist() == [7, 8, models.EOS]
