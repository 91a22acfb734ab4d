"""`ordmoe merge`: an adapter and its base become a model on disk that needs no adapter."""

import json
import shutil
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ordmoe import main
from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig, quantize_experts_
from ordmoe_peft.tools.export.plain_peft import export_plain_lora
from ordmoe_peft.tools.merge_on_disk.checkpoint import open_checkpoint
from ordmoe_peft.tools.merge_on_disk.merge import MergeOptions, merge_checkpoint
from tests import models, text
from tests.test_ordmoe import error_of as wrong


FAMILIES = {
    **models.FAMILIES,
    "gpt_oss": models.gpt_oss,
    "qwen2_moe": models.qwen2_moe,
    "deepseek_v3": models.deepseek_v3,
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Per-expert and fused forms on disk; transposed and biased experts; shared experts."""
    return request.param


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def saved(model, folder, **settings):
    """The base in `folder / "base"` and an adapter for it in `folder / "adapter"`."""
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    text.tokenizer().save_pretrained(folder / "base")
    base = type(model).from_pretrained(folder / "base")
    default = {"r": 6, "lora_alpha": 4, "targets": ["router", "experts", "attention"]}
    tuned = get_peft_model(base, OrdMoEConfig(**(default | settings)))
    models.randomize_adapter(tuned)
    tuned.save_pretrained(folder / "adapter")
    return tuned


def merged(folder, *options):
    arguments = ["merge", folder / "adapter", "--output_dir", folder / "merged", *options]
    assert main(list(map(str, arguments))) == 0
    return folder / "merged"


def error_of(capsys, *arguments) -> str:
    return wrong(capsys, ["merge", *map(str, arguments)])


def layout(checkpoint) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.tensors.items()}


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_merged_model_computes_what_the_adapter_does(family, tmp_path):
    roles = ["router", "experts", "attention", *(["shared_experts"] if family in ("qwen2_moe", "deepseek_v3") else [])]
    tuned = saved(FAMILIES[family](), tmp_path, targets=roles, tier_weights="match")
    batch, before = models.batch_for(family), contents(tmp_path / "base")
    wanted = logits(tuned, batch)
    output = merged(tmp_path, "--max_shard_size", "50KB")
    assert contents(tmp_path / "base") == before

    there, here = open_checkpoint(tmp_path / "base"), open_checkpoint(output)
    assert layout(here) == layout(there)
    assert len(set(here.files.values())) > len(set(there.files.values())) > 1
    loaded, report = type(tuned.get_base_model()).from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(loaded, batch), wanted, rtol=1e-4, atol=1e-5)
    in_memory = tuned.merge_and_unload().state_dict()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, in_memory[name], rtol=1e-6, atol=1e-6, msg=name)


def test_a_process_without_the_package_loads_it(tmp_path, capsys):
    tuned, batch = saved(models.qwen3_moe(), tmp_path, use_rslora=True), models.text_batch()
    torch.save((batch, logits(tuned, batch)), tmp_path / "expected.pt")
    output = merged(tmp_path)
    assert f"│ {7 * models.NUM_LAYERS} " in capsys.readouterr().out
    script = f"""
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained({str(output)!r}).eval()
        AutoTokenizer.from_pretrained({str(output)!r})
        assert not {{"ordmoe_peft", "peft"}} & set(sys.modules)
        batch, expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=False)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    beside = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert beside < {path.name for path in output.iterdir()}
    card = (output / "README.md").read_text()
    assert f"base_model: {tmp_path / 'base'}" in card
    assert "rank 6, alpha 4, on router, experts, attention" in card


@pytest.mark.parametrize("build", [models.qwen3_moe, models.gpt_oss])
def test_4_bit_options_round_the_base_as_training_saw_it(build, tmp_path):
    saved(build(), tmp_path)
    recipe = MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    base = type(build()).from_pretrained(tmp_path / "base", quantization_config=recipe)
    tuned, batch = get_peft_model(base, OrdMoEConfig(r=6, lora_alpha=4)), models.text_batch()
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    output = merged(
        tmp_path, "--load_in_4bit", "true", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "true"
    )
    loaded = type(build()).from_pretrained(output)
    torch.testing.assert_close(logits(loaded, batch), logits(tuned, batch), rtol=1e-4, atol=1e-4)
    in_memory = tuned.merge_and_unload().state_dict()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, in_memory[name], rtol=1e-6, atol=1e-6, msg=name)


def test_merging_past_the_recipe_of_training_is_said_once(tmp_path, caplog, recwarn):
    saved(models.qwen3_moe(), tmp_path)
    merged(tmp_path)
    assert "as they are stored" not in caplog.text
    recipe = MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4")
    base = type(models.qwen3_moe()).from_pretrained(tmp_path / "base", quantization_config=recipe)
    get_peft_model(base, OrdMoEConfig()).save_pretrained(tmp_path / "adapter")
    # Loading it on the dense base does not forget what it was trained on.
    dense = type(models.qwen3_moe()).from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(dense, tmp_path / "adapter").save_pretrained(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "merged")
    recwarn.clear()
    merged(tmp_path)
    assert "trained on its base quantised by ordmoe_peft, fp4" in caplog.text
    assert not [warning for warning in recwarn if "The adapter in" in str(warning.message)]


@pytest.mark.parametrize("build", [models.qwen3_moe, models.gpt_oss, models.mixtral, models.qwen3_vl_moe])
def test_a_base_that_is_stored_in_4_bits(build, tmp_path):
    dense, batch = build(), models.image_batch() if build is models.qwen3_vl_moe else models.text_batch()
    dense.save_pretrained(tmp_path / "dense")
    recipe = MoeBitsAndBytesConfig(bnb_4bit_use_double_quant=True, bnb_4bit_blocksize=128)
    base = type(dense).from_pretrained(tmp_path / "dense", quantization_config=recipe)
    base.save_pretrained(tmp_path / "base")
    base = type(dense).from_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, OrdMoEConfig(r=6, lora_alpha=4, targets=["router", "experts", "attention"]))
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    output = merged(tmp_path, "--max_shard_size", "50KB")
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    loaded, report = type(dense).from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(loaded, batch), logits(tuned, batch), rtol=1e-4, atol=1e-4)
    in_memory = tuned.merge_and_unload().state_dict()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, in_memory[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("stored", ["dense", "in 4 bits"])
@pytest.mark.parametrize("build", [models.qwen3_moe, models.gpt_oss, models.qwen3_vl_moe, models.deepseek_v3])
def test_requantising_gives_what_merging_in_memory_and_saving_does(build, stored, tmp_path, capsys):
    dense, batch = build(), models.image_batch() if build is models.qwen3_vl_moe else models.text_batch()
    dense.save_pretrained(tmp_path / "base")
    recipe = MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    base = type(dense).from_pretrained(tmp_path / "base", quantization_config=recipe)
    options = ["--load_in_4bit", "true", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant", "true"]
    if stored == "in 4 bits":
        base.save_pretrained(tmp_path / "packed")
        base, options = type(dense).from_pretrained(tmp_path / "packed"), []
    # The router is not packed, and some of what is packed is not adapted.
    tuned = get_peft_model(base, OrdMoEConfig(r=6, lora_alpha=4, targets=["router", "experts"]))
    models.randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    output = merged(tmp_path, "--requantize", "true", "--max_shard_size", "50KB", *options)
    printed = capsys.readouterr().out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        in_memory = tuned.merge_and_unload(requantize=True)
    in_memory.save_pretrained(tmp_path / "wanted")
    there, here = open_checkpoint(tmp_path / "wanted"), open_checkpoint(output)
    assert layout(here) == layout(there)
    assert len(set(here.files.values())) > 1
    for name in there.files:
        wanted, got = there.read([name])[name], here.read([name])[name]
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6, msg=name)
    loaded, report = type(dense).from_pretrained(output, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.quantization_config.to_dict() == in_memory.config.quantization_config.to_dict()
    torch.testing.assert_close(logits(loaded, batch), logits(in_memory, batch), rtol=1e-4, atol=1e-4)
    # In the order of the checkpoint, rather than the model's.
    assert set(str(in_memory.requantization_report).splitlines()) < set(printed.splitlines())
    assert "after `import ordmoe_peft`" in (output / "README.md").read_text()


def test_scales_of_what_stays_packed_keep_their_dtype(tmp_path):
    base = quantize_experts_(models.qwen3_moe(), MoeBitsAndBytesConfig(bnb_4bit_quant_storage=torch.float16))
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    get_peft_model(base, OrdMoEConfig(targets=["router"])).save_pretrained(tmp_path / "adapter")
    output = merged(tmp_path, "--requantize", "true", "--dtype", "bfloat16")
    there, here = open_checkpoint(tmp_path / "base"), open_checkpoint(output)
    experts = [name for name in there.files if "experts" in name]
    for name, tensor in here.read(experts).items():
        assert tensor.dtype == there.tensors[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), there.read([name])[name].view(-1).view(torch.uint8))
    assert here.tensors["lm_head.weight"].dtype == torch.bfloat16


def test_requantising_that_loses_the_deltas_warns(tmp_path, capsys):
    tuned = saved(models.qwen3_moe(), tmp_path)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.mul_(1e-3 if "lora_B" in name else 1)
    tuned.save_pretrained(tmp_path / "adapter")
    merged(tmp_path, "--requantize", "true", "--load_in_4bit", "true")
    assert "Warning: Rounding the merged weights to 4 bits left less than 90%" in capsys.readouterr().out


def test_a_stored_weight_without_its_scales_is_refused(tmp_path, capsys):
    dense = models.qwen3_moe()
    quantize_experts_(dense).save_pretrained(tmp_path / "base")
    tuned = get_peft_model(dense, OrdMoEConfig(r=6, lora_alpha=4))
    tuned.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "base" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.experts.down_proj." not in name}
    save_file(kept, file)
    error = error_of(
        capsys, tmp_path / "adapter", "--output_dir", tmp_path / "merged", "--model_name_or_path", tmp_path / "base"
    )
    assert "layers.1.mlp.experts.down_proj is in 4 bits, but lacks its scales" in error


def test_what_the_adapter_leaves_alone_is_copied_to_the_byte(tmp_path):
    """Even tensors that transformers has no parameter for."""
    saved(models.qwen3_moe(), tmp_path, targets=["experts"])
    base = tmp_path / "base"
    file = next(path.name for path in sorted(base.glob("*.safetensors")))
    save_file(load_file(base / file) | {"mtp.head.weight": torch.arange(6)}, base / file)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.head.weight"] = file
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    output = merged(tmp_path)
    there, here = open_checkpoint(base), open_checkpoint(output)
    changed = {name for name in there.files if not torch.equal(there.read([name])[name], here.read([name])[name])}
    assert "mtp.head.weight" in here.files
    assert changed == {name for name in there.files if ".experts." in name}


def test_dtype_is_what_is_written(tmp_path):
    tuned, batch = saved(models.qwen3_vl_moe(), tmp_path), models.image_batch()
    output = merged(tmp_path, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in open_checkpoint(output).tensors.values()} == {torch.bfloat16}
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    loaded = type(tuned.get_base_model()).from_pretrained(output)
    assert loaded.dtype == torch.bfloat16
    assert (logits(loaded, batch) - logits(tuned, batch)).norm() < 0.05 * logits(tuned, batch).norm()


def test_shards_are_no_larger_than_asked(tmp_path):
    saved(models.qwen3_moe(), tmp_path)
    output = merged(tmp_path, "--max_shard_size", "200KB")
    largest_stack = models.NUM_EXPERTS * 2 * models.EXPERT_WIDTH * models.HIDDEN_SIZE * 4
    assert largest_stack < 200e3
    files = sorted(output.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    for file in files:
        with safe_open(file, "pt") as opened:
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 200e3  # noqa: SIM118
    total = json.loads((output / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(parameter.nbytes for parameter in models.qwen3_moe().parameters())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_that_attention_alone_allows(settings, tmp_path):
    tuned, batch = saved(models.gpt_oss(), tmp_path, targets=["attention"], **settings), models.text_batch()
    loaded = type(tuned.get_base_model()).from_pretrained(merged(tmp_path))
    torch.testing.assert_close(logits(loaded, batch), logits(tuned, batch), rtol=1e-4, atol=1e-4)


class TestRefusals:
    """Each leaves no output behind."""

    @pytest.fixture
    def folder(self, tmp_path):
        saved(models.qwen3_moe(), tmp_path)
        yield tmp_path
        assert {path.name for path in tmp_path.iterdir()} <= {"base", "adapter", "other", "taken"}

    def test_what_is_no_ordmoe_adapter(self, folder, capsys):
        output = ("--output_dir", folder / "merged")
        assert "not a saved adapter" in error_of(capsys, folder / "base", *output)
        export_plain_lora(folder / "adapter", folder / "other")
        assert "holds an adapter of type LORA" in error_of(capsys, folder / "other", *output)

    def test_an_adapter_with_more_than_factors(self, tmp_path, capsys):
        saved(models.qwen3_moe(), tmp_path, modules_to_save=["lm_head"])
        error = error_of(capsys, tmp_path / "adapter", "--output_dir", tmp_path / "merged")
        assert "was trained with modules_to_save=['lm_head']" in error
        assert not (tmp_path / "merged").exists()

    def test_output_that_is_taken(self, folder, capsys):
        (folder / "taken").mkdir()
        (folder / "taken" / "notes.txt").write_text("mine")
        error = error_of(capsys, folder / "adapter", "--output_dir", folder / "taken")
        assert "exists already" in error
        assert [path.name for path in (folder / "taken").iterdir()] == ["notes.txt"]

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: models.qwen3_moe(num_experts=16), "made for another base"),
            (lambda: models.qwen3_moe(num_hidden_layers=2), "made for another base"),
            (models.qwen3_dense, "has no MoE layers"),
        ],
    )
    def test_another_base(self, folder, capsys, build, message):
        build().save_pretrained(folder / "other")
        arguments = ("--output_dir", folder / "merged", "--model_name_or_path", folder / "other")
        assert message in error_of(capsys, folder / "adapter", *arguments)

    def test_a_base_that_is_not_there(self, folder, capsys):
        arguments = ("--output_dir", folder / "merged", "--model_name_or_path", "/no/such/model")
        assert "/no/such/model" in error_of(capsys, folder / "adapter", *arguments)

    def test_a_base_that_others_quantised(self, folder, capsys):
        config = json.loads((folder / "base" / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "mxfp4"}
        (folder / "base" / "config.json").write_text(json.dumps(config))
        arguments = (folder / "adapter", "--output_dir", folder / "merged")
        assert "is quantised by 'mxfp4'" in error_of(capsys, *arguments)
        config["quantization_config"] = MoeBitsAndBytesConfig().to_dict()
        (folder / "base" / "config.json").write_text(json.dumps(config))
        assert "stored in 4 bits already" in error_of(capsys, *arguments, "--load_in_4bit", "true")

    def test_requantising_without_a_recipe(self, folder, capsys):
        error = error_of(capsys, folder / "adapter", "--output_dir", folder / "merged", "--requantize", "true")
        assert "is stored dense, so give `quantization_config` (`load_in_4bit`)" in error

    def test_weights_that_are_not_in_safetensors(self, folder, capsys):
        for path in (folder / "base").glob("model*"):
            path.unlink()
        torch.save({}, folder / "base" / "pytorch_model.bin")
        error = error_of(capsys, folder / "adapter", "--output_dir", folder / "merged")
        assert "lacks model.safetensors" in error
        assert "['pytorch_model.bin']" in error

    def test_weights_of_another_shape_than_the_config_says(self, folder, capsys):
        config = json.loads((folder / "base" / "config.json").read_text())
        (folder / "base" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
        error = error_of(capsys, folder / "adapter", "--output_dir", folder / "merged")
        assert "of shape [96, 64]" in error
        assert "[100, 64]" in error

    def test_a_checkpoint_that_lacks_a_stack(self, folder, capsys):
        model = models.qwen3_moe()
        state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.experts" not in name}
        (folder / "other").mkdir()
        save_file(state, folder / "other" / "model.safetensors")
        model.config.save_pretrained(folder / "other")
        arguments = ("--output_dir", folder / "merged", "--model_name_or_path", folder / "other")
        error = error_of(capsys, folder / "adapter", *arguments)
        assert "The adapter changes model.layers.1.mlp.experts." in error

    def test_an_adapter_that_is_not_finite(self, folder, capsys):
        file = folder / "adapter" / "adapter_model.safetensors"
        state = load_file(file)
        state[next(name for name in state if "layers.2.mlp.experts.lora_B" in name)][0, 0] = float("nan")
        save_file(state, file)
        assert "NaN" in error_of(capsys, folder / "adapter", "--output_dir", folder / "merged")

    def test_sizes_and_dtypes_that_are_none(self, folder, capsys):
        arguments = (folder / "adapter", "--output_dir", folder / "merged")
        assert "--dtype: invalid choice: 'int8'" in error_of(capsys, *arguments, "--dtype", "int8")
        assert "--max_shard_size five is not a size" in error_of(capsys, *arguments, "--max_shard_size", "five")
        assert "invalid choice: 'fp8'" in error_of(
            capsys, *arguments, "--load_in_4bit", "true", "--bnb_4bit_quant_type", "fp8"
        )


def test_from_python_with_the_fused_form_on_disk(tmp_path):
    """The other form that transformers reads for the same family."""
    tuned, batch = saved(models.qwen3_moe(), tmp_path), models.text_batch()
    fused = tmp_path / "fused"
    fused.mkdir()
    save_file(models.qwen3_moe().state_dict(), fused / "model.safetensors")
    tuned.get_base_model().config.save_pretrained(fused)
    summary = merge_checkpoint(tmp_path / "adapter", tmp_path / "merged", MergeOptions(base=fused))
    assert (summary.merged, summary.rounded, summary.shards) == (7 * models.NUM_LAYERS, 0, 1)
    loaded = type(tuned.get_base_model()).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, batch), logits(tuned, batch), rtol=1e-4, atol=1e-5)
