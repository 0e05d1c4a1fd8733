# make demo | test | test-vllm | check | faults SEED=0:10000 | bench | bench-peers | venv
#
# Everything happens in .venv, made on first use with PYTHON (3.11 or newer) and held to constraints.txt.

PYTHON ?= python3
SEED ?= 0:1000
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/kvferry-install.stamp
PEERS_STAMP := .venv-peers/kvferry-install.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv demo test test-vllm check faults bench bench-peers clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,3s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

# The stamp is written last, so that an install that was broken off is taken up again.
$(STAMP): pyproject.toml constraints.txt Makefile $(wildcard src/kvferry/transport/*.c)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("kvferry needs Python 3.11 or newer; $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v[:2])'
	@echo "[1/3] virtual environment .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "[2/3] torch, held to constraints.txt: the largest part, a minute or two"
	@$(PIP) install --constraint constraints.txt torch
	@echo "[3/3] kvferry with its engine and the tools of its developers"
	@$(PIP) install --constraint constraints.txt --editable '.[engine,dev,plot,redis]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/kvferry demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest tests/unit tests/integration tests/faults -m "not vllm" -n 2 --dist loadfile --durations=15 $(PYTEST_ARGS)

test-vllm:
	@tools/install_vllm.sh .venv-vllm
	@.venv-vllm/bin/python -m pytest tests/vllm -m vllm --durations=15 $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

faults: $(STAMP)
	$(BIN)/kvferry sim faults --seeds $(SEED)
	$(BIN)/python tests/faults/catalogue/score.py

# Systems that are not installed are named and left out; `make bench-peers` installs those that need no GPU.
bench: $(STAMP)
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	@echo "== kvferry bench transfer"
	@$(BIN)/kvferry bench transfer
	@echo "== kvferry bench pool"
	@$(BIN)/kvferry bench pool

bench-peers: $(PEERS_STAMP)
	@$(MAKE) --no-print-directory bench

# Proxies to compare the router with, in an environment of their own: they pin other versions than kvferry does.
$(PEERS_STAMP):
	@echo "[1/1] vLLM's and Mooncake's demo proxies, Mooncake, NIXL and LMCache in .venv-peers"
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip --disable-pip-version-check install fastapi httpx uvicorn
	@sh tools/install_peers.sh .venv-peers || echo "Mooncake or NIXL can't be installed here and is left out"
	@touch $@

clean:
	rm -rf .venv .venv-peers build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
