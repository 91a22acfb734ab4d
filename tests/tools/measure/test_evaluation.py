import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import processors

from ordmoe_peft import OrdMoEConfig, OrdMoETrainer, OrdMoETrainingArguments, tier_routing
from ordmoe_peft.data.samples import prompt_inputs, scoring_inputs
from ordmoe_peft.errors import OrdMoEConfigError, OrdMoEDataError
from ordmoe_peft.tools.measure.evaluation import TierMeans, evaluate_tiers, generate_answers, tier_table
from tests import models, text


TOKENIZER = text.tokenizer()


def test_accuracy_is_the_share_of_exact_matches_per_group_and_tier():
    """The reference answers are the model's own under tier 1, but for one sample."""
    model, dataset = models.qwen3_moe(), text.conversations(6)
    answers = generate_answers(model, TOKENIZER, list(dataset), max_new_tokens=3)
    answers[1] = "something else"

    def with_answer(row, index):
        return row | {"completion": [{"role": "assistant", "content": answers[index]}]}

    dataset = dataset.map(with_answer, with_indices=True)
    top, bottom = evaluate_tiers(model, TOKENIZER, dataset, (1, 3), group_by="kind", batch_size=4, max_new_tokens=3)
    assert top.samples == {"overall": 6, "even": 3, "odd": 3}
    assert top.accuracy == {"overall": 5 / 6, "even": 1.0, "odd": 2 / 3}
    assert bottom.accuracy["overall"] < 0.5
    assert top.items.is_right == [True, False, True, True, True, True]
    assert top.items.answers[0] == answers[0]


def test_likelihood_is_that_of_each_sample_alone():
    model, dataset = models.qwen3_moe(), text.conversations(5)
    for result in evaluate_tiers(model, TOKENIZER, dataset, (1, 2), batch_size=3, max_new_tokens=1):
        whole, content = [], []
        for sample in dataset:
            prompt = TOKENIZER.apply_chat_template(sample["prompt"], add_generation_prompt=True, tokenize=False)
            full = TOKENIZER.apply_chat_template(sample["prompt"] + sample["completion"], tokenize=False)
            ids = TOKENIZER(full, return_tensors="pt").input_ids
            start = len(TOKENIZER(prompt).input_ids)
            with torch.no_grad(), tier_routing(model, result.tier):
                log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            token = log_probs.gather(1, ids[0, 1:, None])[start - 1 :, 0]
            assert ids[0, -1] == models.EOS
            whole.append(token.mean())
            content.append(token[:-1].mean())
        assert result.items.log_likelihood == pytest.approx(torch.stack(whole).tolist(), abs=1e-5)
        assert result.log_likelihood == pytest.approx(torch.stack(whole).mean().item(), abs=1e-5)
        assert result.log_likelihood_no_eos == pytest.approx(torch.stack(content).mean().item(), abs=1e-5)


def test_plain_text_samples_are_evaluated_too():
    dataset = text.conversations(3).remove_columns(["prompt", "completion"])
    dataset = dataset.add_column("prompt", ["w10 w11"] * 3).add_column("completion", [" w12 </s>"] * 3)
    (result,) = evaluate_tiers(models.qwen3_moe(), TOKENIZER, dataset, max_new_tokens=2)
    assert result.samples == {"overall": 3}
    assert result.log_likelihood < 0


def test_the_model_is_left_in_its_mode():
    model = models.qwen3_moe().train()
    evaluate_tiers(model, TOKENIZER, text.conversations(2), max_new_tokens=1)
    assert model.training


def test_missing_columns_are_refused():
    dataset = text.conversations(2)
    with pytest.raises(OrdMoEDataError, match="no column 'completion'"):
        evaluate_tiers(models.qwen3_moe(), TOKENIZER, dataset.remove_columns("completion"))
    with pytest.raises(OrdMoEDataError, match="group_by='color'"):
        evaluate_tiers(models.qwen3_moe(), TOKENIZER, dataset, group_by="color")
    with pytest.raises(OrdMoEDataError, match="no samples"):
        evaluate_tiers(models.qwen3_moe(), TOKENIZER, dataset.select([]))
    with pytest.raises(OrdMoEConfigError, match="batch_size must be at least 1, got 0"):
        evaluate_tiers(models.qwen3_moe(), TOKENIZER, dataset, batch_size=0)


def test_plain_text_is_scored_with_the_tokens_that_the_trainer_adds(tmp_path):
    """TRL ends a plain completion and lets the tokenizer begin the prompt."""
    tokenizer = text.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "w5"})
    begin = processors.TemplateProcessing(single="w5 $A", special_tokens=[("w5", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    dataset = Dataset.from_list([{"prompt": "w10 w11", "completion": " w12"}])
    inputs = scoring_inputs(list(dataset), tokenizer)
    args = OrdMoETrainingArguments(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    model = get_peft_model(models.qwen3_moe(), OrdMoEConfig(r=4))
    trainer = OrdMoETrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    (trained,) = trainer.get_train_dataloader()
    for name in ("input_ids", "labels"):
        assert inputs[name].tolist() == trained[name].tolist()
    assert prompt_inputs(list(dataset), tokenizer)["input_ids"].tolist() == [inputs["input_ids"][0, :3].tolist()]


def test_a_group_may_be_called_as_another_column_of_the_table_is():
    means = TierMeans(tier=2, accuracy={"tier": 0.5, "overall": 0.25}, log_likelihood=-1.0, log_likelihood_no_eos=-2.0)
    assert tier_table([means]).texts().to_numpy().tolist() == [["2", "50.0 %", "25.0 %", "-1.000", "-2.000"]]
