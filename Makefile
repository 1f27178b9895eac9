# `make help` lists what there is. Python 3.11 or newer: PYTHON names it.
PYTHON ?= python3
PYTHON312 ?= python3.12
PY := .venv/bin/python
MEGATRON312 := 0.19.2 0.18.2
FILE ?= tests/oracles/vectors.json
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2 shellcheck
SLURM_PROGRAMS := slurmctld slurmd sbatch munged ip shellcheck
INSTALL = $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends
ON_GPU = PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(PYTHON) -m tests.gpu
WHEEL = --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $(addprefix --platform manylinux,_2_28_x86_64 \
	_2_24_x86_64 _2_17_x86_64 2014_x86_64)
ON_CLUSTER = $(SUDO) $(PY) -m tests.slurm.cluster run
.DEFAULT_GOAL := help

## venv        the environment in .venv; does nothing where nothing changed
.PHONY: venv
venv: .venv/.installed

.venv/.installed: setup.py requirements/laptop.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: needs Python 3.11 or newer, and $(PYTHON) is not; name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "installing into .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c requirements/laptop.txt -e ".[laptop]"
	@touch $@

## quickstart  train, export and sample a small mixture of experts on this machine: a few minutes, no GPU, no download
.PHONY: quickstart
quickstart: venv
	$(PY) -m quickstart

## sglang      the environment of SGLang's servers in .venv-sglang; does nothing where nothing changed
.PHONY: sglang
sglang: .venv-sglang/.installed

.venv-sglang/.installed: requirements/sglang.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: needs Python 3.11 or newer, and $(PYTHON) is not; name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "installing SGLang into .venv-sglang (a few minutes and 3 GB, once)"
	$(PYTHON) -m venv .venv-sglang
	.venv-sglang/bin/python -m pip install --quiet --no-deps -r requirements/sglang.txt
	@touch $@

## nemo-run    the environment of nemo-run in .venv-nemo-run, for `megapsft submit --via nemo-run`; does nothing where nothing changed
.PHONY: nemo-run
nemo-run: .venv-nemo-run/.installed

.venv-nemo-run/.installed: requirements/nemo-run.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: needs Python 3.11 or newer, and $(PYTHON) is not; name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "installing nemo-run into .venv-nemo-run (a minute and 200 MB, once)"
	$(PYTHON) -m venv .venv-nemo-run
	.venv-nemo-run/bin/python -m pip install --quiet --no-deps -r requirements/nemo-run.txt
	@touch $@

## py312       environments of Python 3.12 in .venv-py312-MEGATRON, one for each newer Megatron-Core; does nothing where nothing changed
.PHONY: py312
py312: $(MEGATRON312:%=.venv-py312-%/.installed)

.venv-py312/.installed: setup.py requirements/laptop.txt requirements/py312.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' \
		|| { echo "make: needs Python 3.12, and $(PYTHON312) is not; name another: make $(MAKECMDGOALS) PYTHON312=..." >&2; exit 1; }
	@echo "installing into .venv-py312 (a few minutes and 5 GB, once)"
	$(PYTHON312) -m venv .venv-py312
	grep -vE '^(torch|megatron-core)==' requirements/laptop.txt > .venv-py312/laptop.txt
	.venv-py312/bin/python -m pip install --quiet --no-deps -r .venv-py312/laptop.txt -r requirements/py312.txt -e .
	@touch $@

# programs are those of .venv-py312, with this environment's interpreter
.venv-py312-%/.installed: .venv-py312/.installed
	.venv-py312/bin/python -m venv .venv-py312-$*
	.venv-py312-$*/bin/python -m pip install --quiet --no-deps megatron-core==$*
	echo "import site; site.addsitedir('$(CURDIR)/.venv-py312/lib/python3.12/site-packages')" \
		> .venv-py312-$*/lib/python3.12/site-packages/shared.pth
	for program in megapsft torchrun; do \
		sed '1s|/.venv-py312/|/.venv-py312-$*/|' .venv-py312/bin/$$program > .venv-py312-$*/bin/$$program; \
		chmod +x .venv-py312-$*/bin/$$program; done
	@touch $@

## slurm       Debian's Slurm, where there is none; nothing of it is started. As root, or with sudo
.PHONY: slurm
slurm:
	@PATH=$$PATH:/usr/sbin:/sbin; for program in $(SLURM_PROGRAMS); do command -v $$program >/dev/null || missing=1; done; \
		if [ -n "$${missing:-}" ]; then $(INSTALL) $(SLURM_PACKAGES); fi

## browser     Debian's Chromium, where there is none, which opens the pages that are written. As root, or with sudo
.PHONY: browser
browser:
	@command -v chromium >/dev/null || { $(INSTALL) chromium; }

## test        lint and the whole test suite
.PHONY: test
test: venv sglang nemo-run slurm browser
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not servers and not slurm"
	$(ON_CLUSTER) --clusters 3 $(PY) -m pytest -n 3 --dist loadgroup --no-loadscope-reorder -m "servers or slurm"

## test-py312  the whole suite on Python 3.12, with each newer Megatron-Core: hours; goes on where it was ended
.PHONY: test-py312
test-py312: py312 sglang nemo-run slurm browser
	status=0; for version in $(MEGATRON312); do .venv-py312-$$version/bin/python -m tests.py312 || status=1; done; exit $$status

## test-slurm  only what runs on a cluster: six nodes are started on this machine, and ended
.PHONY: test-slurm
test-slurm: venv sglang nemo-run slurm
	$(ON_CLUSTER) $(PY) -m pytest -m slurm

## test-long   the shipped configs on real rows: make test-long GSM8K=gsm8k-train.jsonl (without it, on generated ones)
.PHONY: test-long
test-long: venv
	$(PY) -m pytest tests/e2e/test_configs.py $(if $(GSM8K),--gsm8k $(GSM8K))

## invariants  every parallel split against one process: loss and gradient
.PHONY: invariants
invariants: venv
	$(PY) -m tests.invariants

## oracles     objectives against vectors computed elsewhere: make oracles FILE=vectors.json
.PHONY: oracles
oracles: venv
	$(PY) -m tests.oracles $(FILE)

## test-gpu    checks that need a GPU, by what PYTHON has installed: nothing is fetched; ARGS are of pytest
.PHONY: test-gpu
test-gpu:
	@$(ON_GPU) test $(ARGS)

## bench-gpu   what a GPU gives, in 8 minutes: docs/results/gpu.md; likewise; ARGS are of benchmarks/gpu.py
.PHONY: bench-gpu
bench-gpu:
	@$(ON_GPU) bench $(ARGS)

## gpu-wheels  what a GPU machine without network lacks beside PyTorch and Transformer Engine: wheels for Python 3.12 in wheels-gpu
.PHONY: gpu-wheels
gpu-wheels:
	rm -rf wheels-gpu
	$(PYTHON) -m pip download --quiet $(WHEEL) --dest wheels-gpu -r requirements/gpu.txt
	@du -ch wheels-gpu/*.whl

## bench-head  memory and time of the head beside plain logits and TRL's, which is installed for it
.PHONY: bench-head
bench-head: venv
	$(PY) -m pip install --quiet -c requirements/laptop.txt trl==1.16.0
	$(PY) benchmarks/head.py

## evidence    the papers' findings on a tiny model, from nothing to docs/results/evidence.html; goes on where it was ended
.PHONY: evidence
evidence: venv
	$(PY) -m evidence

## docs        write docs/configuration.md, docs/metrics.md and docs/commands.md again, from the source
.PHONY: docs
docs: venv
	$(PY) docs/generate.py
	$(PY) docs/commands.py

## site        the documentation as a site, in site/; to look at it: .venv/bin/python -m mkdocs serve
.PHONY: site
site: venv
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

## clean       remove the quickstart's output and the tools' caches; .venv, .venv-sglang and your runs stay
.PHONY: clean
clean:
	rm -rf runs/quickstart build dist site .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

## help        this list
.PHONY: help
help:
	@sed -n 's/^## /  make /p' Makefile
