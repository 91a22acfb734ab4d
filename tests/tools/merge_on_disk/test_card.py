from ordmoe_peft import MoeBitsAndBytesConfig, OrdMoEConfig
from ordmoe_peft.merging.delta_retention import DeltaRetention, RequantizationReport
from ordmoe_peft.tools.merge_on_disk.card import model_card


def test_a_dense_model():
    card = model_card("org/base", "my-adapter", OrdMoEConfig(r=6, lora_alpha=4), recipe=None, report=None)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "transformers",
        "tags": ["ordmoe", "merge"],
    }
    assert "| base | org/base, as it is stored |" in card.text
    assert "| adapter | my-adapter: LoRA of rank 6, alpha 4, on router, experts |" in card.text
    assert "needs no other package" in card.text


def test_a_model_in_4_bits():
    recipe = MoeBitsAndBytesConfig(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)
    report = RequantizationReport([DeltaRetention("w", 1.0, 0.93, 0.1), DeltaRetention("v", 1.0, 0.97, 0.1)])
    card = model_card("base", "adapter", OrdMoEConfig(), recipe, report)
    assert "rounded to 4 bits first (fp4, with nested quantisation), as the adapter was trained on it" in card.text
    assert "which left 93% and more of the norm" in card.text
    assert "after `import ordmoe_peft`" in card.text


def test_names_that_yaml_would_read_as_something_else():
    card = model_card("12: base", "adapter", OrdMoEConfig(), recipe=None, report=None)
    assert card.data.base_model == "12: base"
