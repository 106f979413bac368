# make demo   environments, then one round on two CPU cores
# make test   environments, then the tests; make test-all also runs the slow ones
# make test-newest  training, checkpoints and the main job on the newest megatron-core (SHORT=1: two tests of them)
# make test-oldest  models, checkpoints, data and a training on the oldest transformers
# make nemo   an environment with NeMo-Run beside that of training: megavar launch --executors
# make check  formatting, lint and types
# make lock   the lock files in requirements/ from pyproject.toml and the lists beside them; a lock's versions stay as long
#             as they fit (delete it first for the newest)
# make audit  the locked versions against the known vulnerabilities
# make gpu-kit SITE=DIR  on a machine with a GPU: tests, log-probs, training, memory and speed in nine minutes (docs/gpu.md)
# make evidence  all methods on two easy and two hard tasks over seeds (hours; resumable)

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The CPU build of torch is small, and SGLang on CPUs needs it; where this index is out of reach, pip's own is asked.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
SGLANG := .venv-sglang
TOOLS := .venv-tools
NEMO := .venv-nemo
BIN := $(VENV)/bin
DEMO_FLAGS ?= --tp 2 --pp 2
export OMP_NUM_THREADS ?= 1

# $(call install_locked,BIN,LOCK): exactly what the lock names, each file compared with its hash, nothing built here.
install_locked = $(1)/pip install --quiet --no-deps --require-hashes --only-binary=:all: -r requirements/$(2).lock

# torch comes after the lock and is pinned by version alone: its files, so their hashes, differ from index to index.
install_torch = $(1)/pip install --quiet --retries 0 --index-url $(TORCH_INDEX) "$(TORCH)" 2>/dev/null || \
	$(1)/pip install --quiet "$(TORCH)"

# Two at a time, since tests wait a lot; those of one file stay together, because they share what is expensive to set up.
# Files begin in order of their names, so that the long ones in the middle (launch, rollout) are not the last.
pytest = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-newest test-oldest check lock audit evidence gpu-kit sglang nemo clean

demo: $(VENV)/.done $(SGLANG)/.done
	$(BIN)/python examples/pretrain_variational.py $(DEMO_FLAGS)

test: $(VENV)/.done $(SGLANG)/.done
	$(pytest) -m "not slow"

test-all: $(VENV)/.done $(SGLANG)/.done $(NEMO)/.done
	$(pytest)

# The ends of the ranges in pyproject.toml: pip picks neither of the two on Python 3.11. Each is installed into a folder
# that Python searches before the environment's packages; tests/versions fails if it is not what the tests import.
RELEASES := .releases
MEGATRON ?= 0.19.2
TRANSFORMERS ?= 4.57.1
ADAMW := "tests/training/test_engine.py::test_parameters_after_three_adamw_steps_are_the_same_at_every_split[tp2_pp2]"
ROUND_TRIP := "tests/checkpoints/test_convert.py::test_there_and_back_is_bit_exact[qwen3-True-plain]"
test_release = PYTHONPATH=$(CURDIR)/$(RELEASES)/$(1)-$(2)$(addprefix :,$(PYTHONPATH)) \
	RELEASE_UNDER_TEST=$(1)==$(2) $(pytest) tests/versions

test-newest: $(RELEASES)/megatron-core-$(MEGATRON)/.done $(if $(SHORT),,$(SGLANG)/.done)
	$(call test_release,megatron-core,$(MEGATRON)) \
		$(if $(SHORT),$(ROUND_TRIP) $(ADAMW),tests/training tests/checkpoints tests/integration)

test-oldest: $(RELEASES)/transformers-$(TRANSFORMERS)/.done
	$(call test_release,transformers,$(TRANSFORMERS)) tests/models tests/checkpoints tests/data $(ADAMW)

# It declares Python 3.12, but its sources run on 3.11. triton, which it imports, must be for the Python that runs here.
$(RELEASES)/megatron-core-%/.done: | $(VENV)/.done
	rm -rf $(@D)
	$(BIN)/pip install --quiet --target $(@D) --no-deps --ignore-requires-python --python-version 3.12 \
		--only-binary=:all: megatron-core==$*
	$(BIN)/pip install --quiet --target $(@D) --no-deps triton==3.7.0
	touch $@

$(RELEASES)/transformers-%/.done: | $(VENV)/.done
	rm -rf $(@D)
	$(BIN)/pip install --quiet --target $(@D) transformers==$*
	touch $@

check: $(VENV)/.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

compile = $(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-package torch \
	--config-file requirements/uv.toml --custom-compile-command "make lock"

lock: $(TOOLS)/.done
	$(compile) pyproject.toml --extra dev --output-file requirements/train.lock
	$(compile) pyproject.toml --extra nemo --output-file requirements/nemo.lock
	$(compile) requirements/sglang-cpu.txt --output-file requirements/sglang-cpu.lock
	$(compile) requirements/tools.txt --output-file requirements/tools.lock

# pip-audit prints a table of what it found; failing without one, it could not look up every package. It is given the
# versions alone: it takes hashes for all or for none, and torch has none.
audit: $(TOOLS)/.done
	@status=0; for lock in train sglang-cpu; do \
		versions=$(TOOLS)/$$lock.txt; \
		{ echo "$(TORCH)"; sed -n 's/^\([a-z0-9].*\) \\$$/\1/p' requirements/$$lock.lock; } > $$versions; \
		if found=$$(PIP_AUDIT_LOGLEVEL=error $(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps \
			--progress-spinner off --timeout 5 -r $$versions); then \
			echo "$$lock: no known vulnerabilities"; \
		elif [ -n "$$found" ]; then \
			echo "$$lock: known vulnerabilities"; echo "$$found"; status=1; \
		else \
			echo "$$lock: NOT AUDITED: pip-audit could not read its data (see above); the versions to look up:"; \
			cat $$versions; \
		fi; done; exit $$status

gpu-kit:
	tools/gpu_kit.sh $(SITE)

evidence: $(VENV)/.done $(SGLANG)/.done
	$(BIN)/python examples/evidence.py

sglang: $(SGLANG)/.done

nemo: $(NEMO)/.done

$(TOOLS)/.done: requirements/tools.lock
	$(PYTHON) -m venv $(TOOLS)
	$(call install_locked,$(TOOLS)/bin,tools)
	touch $@

# `pip check` fails where the lock no longer fits pyproject.toml: run `make lock`.
$(VENV)/.done: pyproject.toml requirements/train.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "megavar needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(call install_locked,$(BIN),train)
	$(call install_torch,$(BIN))
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	touch $@

# SGLang pins other versions of torch and transformers than training: it has a separate environment.
$(SGLANG)/.done: requirements/sglang-cpu.lock
	$(PYTHON) -m venv $(SGLANG)
	@$(call install_locked,$(SGLANG)/bin,sglang-cpu) && \
		{ $(call install_torch,$(SGLANG)/bin); } && \
		$(SGLANG)/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("sglang") is None)' || \
		{ echo "SGLang for CPUs could not be installed here (it needs Linux on x86-64 and the pinned wheels of"; \
		  echo "requirements/sglang-cpu.lock). Use a machine that has them, or start servers elsewhere and set"; \
		  echo "rollout.mode=external rollout.urls=[http://HOST:PORT] in the configuration."; exit 1; }
	touch $@

# NeMo-Run brings 125 packages, some in other versions than training's; what is the same is taken from there.
$(NEMO)/.done: requirements/nemo.lock | $(VENV)/.done
	$(PYTHON) -m venv $(NEMO)
	purelib='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		echo "import site; site.addsitedir('$$($(BIN)/python -c "$$purelib")')" \
		>"$$($(NEMO)/bin/python -c "$$purelib")/train.pth"
	$(call install_locked,$(NEMO)/bin,nemo)
	touch $@

clean:
	rm -rf $(VENV) $(SGLANG) $(NEMO) $(TOOLS) $(RELEASES)
