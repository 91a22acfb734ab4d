# `make demo` runs the main job, `make test` the tests. Each sets up its own environment in .venv first.
# `make test-newest` and `make test-oldest` run what leans on other libraries on the newest and the oldest versions that
# pyproject.toml allows, each in an environment of its own.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = -m pip install --quiet --disable-pip-version-check
# What leans on other libraries. The oldest versions, which `make test` does not have, run every family, which has tiers,
# LoRA, 4 bits and exports of each, and what trains, saves and loads.
ON_RANGES := tests/contract tests/test_forward.py \
	$(addprefix tests/adapter/test_,model.py saved.py peft_model.py lora_users.py) \
	$(addprefix tests/training/test_,trainer.py images.py arguments.py checkpoints.py router_rate.py stopping.py)
test-newest: ON_RANGES += tests/tiers tests/experts tests/adapter tests/data tests/training
test-oldest: ON_RANGES += tests/families tests/remote_code
versions = $(1)/bin/python -m pip freeze --disable-pip-version-check --exclude-editable

.PHONY: demo test test-newest test-oldest clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/easy_vqa/demo.py

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n 2 -m "not gpu"

# Looked up anew each time: what is newest changes.
test-newest test-oldest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(INSTALL) --upgrade --upgrade-strategy eager --constraint constraints-$*.txt --editable ".[dev]"
	.venv-$*/bin/python -m pip list --format freeze | grep -E "^(torch|transformers|peft|trl|bitsandbytes|accelerate)="
	@if [ -x $(BIN)/python ] && [ "$$($(call versions,$(VENV)))" = "$$($(call versions,.venv-$*))" ]; then \
		echo "All versions are those of $(VENV): make test is what tests them."; \
	else \
		.venv-$*/bin/python -m pytest -n 2 -m "not gpu" $(ON_RANGES); \
	fi

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest outputs
