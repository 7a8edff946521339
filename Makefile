# make chat and make test are all that a fresh machine needs: Python 3.11, a C++ compiler, a package index.
# What the steps have to say goes to stderr, and none of them reads stdin: both belong to the program opened last.

.DEFAULT_GOAL := help
.PHONY: help chat test test-parity test-gpu lint bench clean

# The first Python that is new enough; else python3, so that the script can say what is wrong with it.
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done),python3)

INSTALL = $(PYTHON) -B scripts/install.py
QUIETLY = </dev/null >&2
PARITY = --venv .venv-parity --extra test torch==2.13.0 'transformers>=5,<6' protobuf

# MODEL reaches the shell through the environment, as it was typed: neither make nor the shell reads anything into it.
unexport MODEL
export CHAT_MODEL := $(value MODEL)
export CUDA

help:
	@echo 'make chat               talk with the starter model; installs what it needs, the first time'
	@echo 'make chat MODEL=...     talk with another: a GGUF file, a name in the library, owner/repo, a folder'
	@echo 'make test               ruff, mypy, pytest'
	@echo 'make test-parity        compare with transformers and with llama.cpp'\''s own tools'
	@echo 'make test-gpu           the tests that need a GPU, and its speed beside llama-bench'
	@echo 'make bench              compare speed and memory with llama.cpp'\''s own tools'
	@echo 'make lint               ruff and mypy only'
	@echo 'make clean              remove the environments and build folders'
	@echo 'With CUDA=0 a GPU is left alone; PYTHON=python3.12 names the Python to use.'

chat:
	@$(INSTALL) $(QUIETLY)
	@starter=$$(.venv/bin/python -m models.starter </dev/null) && \
		exec .venv/bin/handmill chat -- "$${CHAT_MODEL:-$$starter}"

test: lint
	@.venv/bin/python -m models.starter $(QUIETLY)
	.venv/bin/python -m pytest -m 'not parity and not gpu'

test-parity:
	@$(INSTALL) $(PARITY) $(QUIETLY)
	@.venv-parity/bin/python -m scripts.build_peer llama-fit-params $(QUIETLY)
	@.venv-parity/bin/python -m models.starter $(QUIETLY)
	HANDMILL_NEED_PEER=1 .venv-parity/bin/python -m pytest -m parity

test-gpu:
	@$(INSTALL) --extra test $(QUIETLY)
	@.venv/bin/python -m models.starter $(QUIETLY)
	.venv/bin/python -m pytest -m gpu
	@.venv/bin/python -m scripts.build_peer llama-bench $(QUIETLY)
	.venv/bin/python -m benchmarks.engine --case speed --rounds 3 -g all

lint:
	@$(INSTALL) --extra test $(QUIETLY)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy

bench:
	@$(INSTALL) $(PARITY) $(QUIETLY)
	@.venv-parity/bin/python -m scripts.build_peer llama-bench llama-completion llama-lookup $(QUIETLY)
	.venv-parity/bin/python -m benchmarks.convert
	.venv-parity/bin/python -m benchmarks.engine

clean:
	rm -rf .venv .venv-parity build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
