# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo study test soak bench gpu registers lint lines clean

demo: .venv/demo                     ## a toy base, mid-trained, then RL, evaluated, analysed, one report: ten minutes
	PYTHON=$(BIN)/python ./demo.sh

study: .venv/demo                    ## the paper's claims, tried on two toys x three seeds: over an hour; goes on if killed
	PYTHON=$(BIN)/python study/study.sh

test: .venv/test                     ## everything but the long loops: two processes, six minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: .venv/test                     ## the long loops: kills, whole families, every ablation
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

bench: .venv/test                    ## training beside transformers, data beside datasets and TRL, grading, sampling, RL beside TRL
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/verify.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/rl.py
	$(BIN)/python benchmarks/analyze.py

# on a machine with a CUDA GPU, with or without .venv; peers/: see the top of benchmarks/kernels.py
gpu: RESULTS ?= benchmarks/results
gpu: GPU_PYTHON = env -u TRITON_INTERPRET $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:                                 ## all that wants a GPU, in twelve minutes: tests, training, RL, decoding, kernels
	$(GPU_PYTHON) benchmarks/gpu.py --out=$(RESULTS)

registers: .venv/test                ## what the compiler makes of the kernels for three GPUs, on any machine
	$(BIN)/python tests/aot.py sm_90 sm_80 sm_100

lint: .venv/test
	$(BIN)/ruff check .

lines:                               ## lines by file
	@wc -l *.py */*.py */*/*.py

clean:
	rm -rf .venv runs data

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test: requirements.txt requirements-test.txt tests/install_vllm.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-test.txt
	@$(BIN)/python tests/install_vllm.py
	@touch $@ .venv/demo
