"""Mutated configurations and files of weights: each is refused, or what was saved; none is silently wrong.

A mutation is what goes wrong in the wild: a field that is edited, lost or of another type, a file that is cut off, a
bit that flips, tensors that are missing, renamed, cast, transposed, swapped, or named like a weight of the base. Half
of those of tensors come with `ordmoe.json` written anew for them, as a tool that knows the format would; names, shapes
and dtypes are what is left to be seen by.
"""

import copy
import hashlib
import json
import math
import shutil
import warnings

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save

from ordmoe_peft import OrdMoEConfig
from ordmoe_peft.adapter.record import EDITABLE
from ordmoe_peft.adapter.saved import SavedAdapter, check_fits
from ordmoe_peft.errors import OrdMoEError
from tests import models


WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "ordmoe.json"
# 10,000 of the files alone, and some of whole loads.
OF_FILES, OF_LOADS = 10_000, 150
LIMITS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


KINDS = ("lose", "rename", "cast", "shape", "number", "of the base", "add", "swap", "transpose")


class Saved:
    """An adapter on disk and in memory, with a base to load mutations on, one after another."""

    def __init__(self, folder):
        self.folder = folder / "mutated"
        tuned = get_peft_model(models.qwen3_moe(num_hidden_layers=1), OrdMoEConfig(r=2, modules_to_save=["lm_head"]))
        models.randomize_adapter(tuned)
        tuned.save_pretrained(folder / "saved")
        self.files = {file.name: file.read_bytes() for file in (folder / "saved").iterdir()}
        self.tensors = load(self.files[WEIGHTS])
        self.config = json.loads(self.files[CONFIG])
        self.batch = models.text_batch()
        self.answer_saved = self.answer(tuned.eval())
        self.new_base()
        self.answer_of_base = self.answer(self.base)
        state = self.base.state_dict()
        self.of_base = {f"base_model.model.{name}": value for name, value in state.items() if "lm_head" not in name}

    def new_base(self):
        self.base = models.qwen3_moe(num_hidden_layers=1).eval()

    @torch.no_grad()
    def answer(self, model):
        return model(**self.batch).logits

    def write(self, files):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("adapter"))


json_values = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=5)),
    *(st.lists(st.integers(0, 3), max_size=3), st.just({}), st.just([math.nan])),
)


@st.composite
def configs(draw, saved):
    """The files with another configuration: one or two fields edited, lost or added."""
    config = copy.deepcopy(saved.config)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from([*config, "a_field_of_tomorrow"]))
        if draw(st.booleans()):
            config.pop(name, None)
        else:
            config[name] = draw(json_values)
    text = json.dumps(config).encode()
    if draw(st.integers(0, 9)) == 0:
        text = text[: draw(st.integers(0, len(text) - 1))]
    return saved.files | {CONFIG: text}


def mutate_tensor(draw, tensors, name, saved):
    """Change, lose, rename or add to one tensor."""
    kind = draw(
        st.sampled_from(["lose", "rename", "cast", "shape", "number", "of the base", "add", "swap", "transpose"])
    )
    value = tensors[name]
    if kind == "lose":
        del tensors[name]
    elif kind == "rename":
        part = draw(st.sampled_from(["lora_A", "base_layer.", "weight", "experts", "layers.0", "base_model.model."]))
        tensors[name.replace(part, draw(st.sampled_from(["lora_B", "layers.1", "x", ""])))] = tensors.pop(name)
    elif kind == "cast":
        dtypes = [torch.int8, torch.int32, torch.float8_e4m3fn, torch.float64, torch.bool, torch.uint8, torch.float16]
        tensors[name] = value.to(draw(st.sampled_from(dtypes)))
    elif kind == "shape":
        tensors[name] = value[: draw(st.integers(0, max(0, len(value) - 1)))].clone()
    elif kind == "number" and value.is_floating_point():
        values = value.clone()
        index = draw(st.integers(0, max(0, values.numel() - 1)))
        values.view(-1)[index : index + 1] = draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e30, 7.0]))
        tensors[name] = values
    elif kind == "of the base":
        other = draw(st.sampled_from(sorted(saved.of_base)))
        tensors[other] = torch.zeros_like(saved.of_base[other])
    elif kind == "add":
        tensors[draw(st.sampled_from(["x", "lora_A", f"{name}.bias", "base_model.model.lm_head.bias"]))] = value.clone()
    elif kind == "swap":
        other = draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "transpose":
        tensors[name] = value.T.contiguous()


@st.composite
def weights(draw, saved):
    """The files with other weights; perhaps a record that fits them."""
    tensors = dict(saved.tensors)
    for _ in range(draw(st.integers(1, 2))):
        mutate_tensor(draw, tensors, draw(st.sampled_from(sorted(tensors))), saved)
    content = save(tensors)
    is_known = draw(st.booleans())
    if not is_known and draw(st.integers(0, 3)) == 0:
        position = draw(st.integers(0, len(content) - 1))
        flipped = bytes([content[position] ^ (1 << draw(st.integers(0, 7)))])
        content = draw(st.sampled_from([content[:position], content[:position] + flipped + content[position + 1 :]]))
    files = saved.files | {WEIGHTS: content}
    if is_known:
        record = json.loads(files[RECORD])
        record["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
        files[RECORD] = json.dumps(record).encode()
    return files


def mutations(saved):
    return st.one_of(configs(saved), weights(saved))


def is_what_was_saved(files, saved):
    """Whether nothing that the adapter computes with was changed; numbers in their places may be, where the record says
    so."""
    config, tensors = json.loads(files[CONFIG]), load(files[WEIGHTS])
    same_settings = {name: value for name, value in config.items() if name not in EDITABLE} == {
        name: value for name, value in saved.config.items() if name not in EDITABLE
    }
    if not same_settings or tensors.keys() != saved.tensors.keys():
        return False
    if files[RECORD] == saved.files[RECORD]:
        return files[WEIGHTS] == saved.files[WEIGHTS]
    return all(
        tensors[name].shape == value.shape and tensors[name].is_floating_point() and tensors[name].isfinite().all()
        for name, value in saved.tensors.items()
    )


def test_of_ten_thousand_mutated_files_none_passes_that_is_not_what_was_saved(saved):
    @settings(max_examples=OF_FILES, **LIMITS)
    @given(files=mutations(saved))
    def check(files):
        saved.write(files)
        try:
            read = SavedAdapter.read(saved.folder)
            check_fits(read.check_weights(), saved.tensors, str(read.weights_file))
            read.check_checksum()
        except OrdMoEError as error:
            assert str(saved.folder) in str(error)  # it names the file
            event("refused")
        else:
            assert is_what_was_saved(files, saved)
            event("passed")

    check()


def test_of_mutated_adapters_that_are_loaded_none_is_silently_wrong(saved):
    @settings(max_examples=OF_LOADS, **LIMITS)
    @given(files=mutations(saved), again=st.booleans())
    def check(files, again):
        saved.write(files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # `peft_type` is read before the package is asked; without one, or with another's, PEFT is on its own.
                tuned = PeftModel.from_pretrained(saved.base, saved.folder)
                if again:
                    tuned.load_adapter(saved.folder, "default")
            except (OrdMoEError, ValueError, KeyError, TypeError):
                pass
            else:
                is_same = files[WEIGHTS] == saved.files[WEIGHTS]
                assert is_what_was_saved(files, saved)
                assert torch.equal(saved.answer(tuned), saved.answer_saved) or not is_same
                saved.new_base()
        assert torch.equal(saved.answer(saved.base), saved.answer_of_base)

    check()
