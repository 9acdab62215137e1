# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test soak bench gpu registers lint lines clean

demo: .venv/demo                     ## a toy base, mid-trained on the paper's mixture, then RL; evaluated, analysed, one report
	$(BIN)/python midtrain.py --model=toy --mixture=base --steps=400 --out=runs/base
	$(BIN)/python midtrain.py --model=toy --init=runs/base/model --out=runs/mt
	$(BIN)/python rl.py --model=toy --init=runs/mt/model --export_at=5,10,20,30,40 --out=runs/rl
	$(BIN)/python rl.py --model=toy --init=runs/base/model --steps=5 --eval_prompts=32 --out=runs/rl-base
	for stage in base mt rl; do $(BIN)/python evaluate.py --model=toy --init=runs/$$stage/model --out=runs/eval/$$stage || exit; done
	$(BIN)/python evaluate.py --compare runs/eval/base runs/eval/mt runs/eval/rl --out=runs/eval
	$(BIN)/python analyze.py weights runs/base/model runs/mt/model
	$(BIN)/python analyze.py weights runs/mt/model runs/rl/model --null=runs/rl --rank=sampled
	$(BIN)/python analyze.py cka runs/base/model runs/mt/model runs/rl/model
	$(BIN)/python analyze.py landscape runs/base/model runs/mt/model runs/rl/model --path=9 --grid=3 --problems=50
	$(BIN)/python analyze.py trajectory runs/rl runs/mt/model runs/base/model
	$(BIN)/python analyze.py behaviour runs/eval/base runs/eval/mt runs/eval/rl
	$(BIN)/python analyze.py report runs/mt runs/rl runs/eval runs/analysis --out=runs/report
	$(BIN)/python tests/check_demo.py runs

test: .venv/test                     ## everything but the long loops
	$(BIN)/python -m pytest

soak: .venv/test                     ## the long loops: 20 kills and the like
	$(BIN)/python -m pytest -m slow

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
gpu:                                 ## the kernels' tests on the GPU, then the kernels beside their peers
	$(GPU_PYTHON) -m pytest tests/gpu; tested=$$?; \
	$(GPU_PYTHON) benchmarks/kernels.py --out=$(RESULTS)/kernels.md && exit $$tested

registers: .venv/test                ## what the compiler makes of the kernels for three GPUs, on any machine
	$(BIN)/python tests/aot.py sm_90 sm_80 sm_100

lint: .venv/test
	$(BIN)/ruff check .

lines:                               ## lines by file
	@wc -l *.py kernels/*.py benchmarks/*.py tests/*.py

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
