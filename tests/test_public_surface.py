import subprocess
import sys

import ordmoe_peft


PUBLIC = {
    "MoeBitsAndBytesConfig",
    "OrdMoEConfig",
    "OrdMoEError",
    "OrdMoEModel",
    "OrdMoETrainer",
    "OrdMoETrainingArguments",
    "RouterHealth",
    "coverage_report",
    "load_data",
    "quantization_census",
    "quantize_experts_",
    "rollout",
    "tier_routing",
    "to_preference_pairs",
}


def test_public_names():
    assert set(ordmoe_peft.__all__) == PUBLIC
    assert all(hasattr(ordmoe_peft, name) for name in PUBLIC)


def test_import_is_light():
    code = "import sys, ordmoe_peft; print([m for m in ('trl', 'datasets', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
