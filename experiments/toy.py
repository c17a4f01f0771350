"""Makes the toy of `make demo`: a checkable task, a tokenizer, and a raw teacher and student to be trained on the task.

    python -m experiments.toy --out runs/toy/seed0 --seed 0        (about half a minute on two CPU cores)

The task is arithmetic from left to right modulo 10, for instance 7*8+3-4*2 -> 6, +3=9, -4=5, *2=0 -> \\boxed{0}. The
answer is found by working it out step by step, so a model that is careful on each of four steps is right at the end.

The raw models are pretrained on demonstrations of several habits, each announced by the response's first token:

    Carefully:  every step correct            Carefully:7*8=6+3=9-4=5*2=0 \\boxed{0}
    Roughly:    each step wrong with p = 0.4  Roughly:7*8=6+3=1-4=7*2=4 \\boxed{4}
    Guess:      straight to some digit        Guess: \\boxed{4}
    Hmm,        copies the problem and never ends; only the student has this habit, so it begins far from its teacher

Most demonstrations are rough, guessed or aimless, so a raw model is mostly wrong although it *can* be careful: as in
the paper, there is a better behaviour for the sparse reward to find. A part of each batch is careful work whose first
token is given and not learned, so that the skill grows without the habit. The student is smaller and its pretraining
stops earlier. Pretraining stops at a measured skill (`careful_accuracy`), because after a fixed number of steps students
of different seeds differ too much in skill.

Written: tokenizer and weights in raw_teacher/ and raw_student/ (Qwen3 architecture), and train.jsonl (labelled),
validation.jsonl and test.jsonl, which share no problem with one another or with the demonstrations.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import common
from common import INSTRUCTION, Problem, Rollout
from kernels import fused_linear_logprob
from lib.data import problem_id, tokenize_prompts
from lib.engines import Sampling, TorchEngine
from lib.packing import make_batches
from lib.policy import Policy
from lib.rollouts import sample_rollouts
from lib.verifier import extract_answer

TASK = "Left to right, modulo 10: "
HABITS = ("Carefully:", "Roughly:", "Guess:", "Hmm,")
MAX_RESPONSE_TOKENS = 24  # a careful response has 22
EOS, PAD = "<|im_end|>", "<|endoftext|>"
# How the stages render problems, by default and with the toy's --max-prompt-tokens.
WORDING = SimpleNamespace(prompt="{problem}" + INSTRUCTION, chat_template=True, thinking=False, max_prompt_tokens=64)
VOCABULARY = [PAD, EOS, "<|user|>", "<|assistant|>", TASK, INSTRUCTION, *HABITS, " \\boxed{", "}"] + list(
    "0123456789+-*="
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% else %}<|assistant|>{{ message.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class Config:
    out: str  # directory to write the models and problems to
    seed: int = 0  # decides the problems, the demonstrations and the weights
    train_problems: int = 160  # number of labelled problems
    test_problems: int = 250  # number of test problems, and of validation problems
    head_dim: int = 16  # size of the attention heads; vLLM needs at least 32 on a CPU


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 26 tokens, one of which is the whole instruction: a prompt has the usual form but is short."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    words = sorted(vocabulary, key=len, reverse=True)
    pattern = "|".join("".join(f"\\x{{{ord(character):x}}}" for character in word) for word in words)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )


def make_problem(rng: random.Random) -> Problem:
    digits = [rng.randrange(10) for _ in range(5)]
    operators = [rng.choice("+-*") for _ in range(4)]
    expression = str(digits[0]) + "".join(f"{op}{digit}" for op, digit in zip(operators, digits[1:]))
    prompt = TASK + expression
    return Problem(problem_id(prompt), prompt, work_out(expression, 0.0, rng)[-1])


def work_out(expression: str, error_rate: float, rng: random.Random) -> list[str]:
    """The running result after each operation; each is replaced by a wrong digit with probability `error_rate`."""
    results, value = [], int(expression[0])
    for op, digit in zip(expression[1::2], expression[2::2]):
        value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[op] % 10
        if rng.random() < error_rate:
            value = rng.choice([wrong for wrong in range(10) if wrong != value])
        results.append(str(value))
    return results


def demonstrate(problem: Problem, habit: str, rng: random.Random) -> str:
    """A demonstration of one habit; see the module's docstring."""
    expression = problem.prompt.removeprefix(TASK)
    if habit == "Hmm,":
        return habit + (expression + "=") * 2 + expression[:4]  # longer than the limit, without an answer
    if habit == "Guess:":
        # A guess is right a little more often than by chance, so that guessing is better than rambling.
        guess = problem.answer if rng.random() < 0.1 else str(rng.randrange(10))
        return f"Guess: \\boxed{{{guess}}}"
    results = work_out(expression, 0.0 if habit == "Carefully:" else 0.4, rng)
    steps = expression[0] + "".join(
        f"{op}{digit}={result}" for op, digit, result in zip(expression[1::2], expression[2::2], results)
    )
    return f"{habit}{steps} \\boxed{{{results[-1]}}}"


@dataclass(frozen=True)
class Recipe:
    """How one raw model is made."""

    hidden_size: int
    layers: int
    habits: dict[str, float]  # how often each habit is demonstrated
    skill: float  # pretraining stops at this careful accuracy


RECIPES = {
    "raw_teacher": Recipe(64, 2, {"Carefully:": 0.12, "Roughly:": 0.58, "Guess:": 0.30}, skill=0.9),
    # With less skill sparse reward finds too little; with more the student leaves no gap to its teacher.
    "raw_student": Recipe(32, 1, {"Carefully:": 0.10, "Roughly:": 0.35, "Guess:": 0.25, "Hmm,": 0.30}, skill=0.5),
}
PRACTICE = 0.6  # share of the demonstrations that are careful work whose first token is given
STEPS, BATCH, LR = 3000, 128, 4e-3  # at most so many steps, of so many demonstrations, at this peak learning rate


def pretrain(name: str, cfg: Config, validation: list[Problem], reserved: set[str]) -> None:
    """Pretrains one raw model on fresh demonstrations until it has its recipe's skill, and saves it.

    No demonstration is of a problem whose id is in `reserved`.
    """
    torch.set_num_threads(1)
    recipe, rng = RECIPES[name], random.Random(f"{cfg.seed}/{name}")
    torch.manual_seed(common.request_seed(cfg.seed, name))
    tokenizer = make_tokenizer()
    policy = Policy(
        transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=len(VOCABULARY),
                hidden_size=recipe.hidden_size,
                intermediate_size=4 * recipe.hidden_size,
                num_hidden_layers=recipe.layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=cfg.head_dim,
                initializer_range=0.1,  # the usual 0.02 is made for wide models, and trains these three times slower
                max_position_embeddings=128,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(STEPS), desc=f"pretraining {name}", unit="step")
    for step in bar:
        problems = [problem for problem in (make_problem(rng) for _ in range(BATCH)) if problem.id not in reserved]
        practised = int(PRACTICE * len(problems))
        chosen = rng.choices(list(recipe.habits), list(recipe.habits.values()), k=len(problems))
        habits = ["Carefully:"] * practised + chosen[: len(problems) - practised]
        responses = [demonstrate(problem, habit, rng) for problem, habit in zip(problems, habits)]
        rollouts = as_rollouts(tokenizer, problems, responses)
        for rollout in rollouts[:practised]:
            rollout.prompt_ids = rollout.prompt_ids + rollout.response_ids[:1]
            rollout.response_ids, rollout.logprobs = rollout.response_ids[1:], rollout.logprobs[1:]
        [batch] = make_batches(rollouts, 1 << 20, torch.device("cpu"), share_prompts=False)
        logprobs, _ = policy(batch, lambda hidden, weight: fused_linear_logprob(hidden, weight, batch.targets))
        loss = -logprobs.mean()
        loss.backward()
        lr = LR * min(1.0, (step + 1) / 50)
        common.optimizer_step(policy, optimizer, loss.item(), lr, max_grad_norm=1.0)
        if step % 10 == 9:
            skill = careful_accuracy(policy, tokenizer, validation)
            bar.set_postfix(loss=f"{loss.item():.3f}", skill=f"{skill:.2f}")
            if skill >= recipe.skill:
                break
    else:
        raise RuntimeError(f"{name} reached skill {skill:.2f} in {STEPS} steps, below {recipe.skill}")
    bar.close()
    directory = Path(cfg.out) / name
    policy.model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def as_rollouts(tokenizer: PreTrainedTokenizerFast, problems: list[Problem], responses: list[str]) -> list[Rollout]:
    prompts = tokenize_prompts(tokenizer, problems, WORDING)
    ended = tokenizer([text + EOS * text.endswith("}") for text in responses])["input_ids"]
    return [
        Rollout(problem, 0, prompts[problem.id], ids, [0.0] * len(ids), "stop", text)
        for problem, ids, text in zip(problems, ended, responses)
    ]


def careful_accuracy(policy: Policy, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> float:
    """Share of the problems that are answered rightly, at temperature 1, when the response has to begin "Carefully:"."""
    prompts = tokenize_prompts(tokenizer, problems, WORDING)
    prompts = {key: ids + tokenizer("Carefully:")["input_ids"] for key, ids in prompts.items()}
    engine = TorchEngine(policy.model, tokenizer)
    rollouts = sample_rollouts(engine, problems, prompts, 1, Sampling(MAX_RESPONSE_TOKENS), seed_key=("skill",))
    return sum(extract_answer(rollout.text) == rollout.problem.answer for rollout in rollouts) / len(rollouts)


def main(cfg: Config) -> None:
    common.check_settings(cfg)
    rng = random.Random(f"{cfg.seed}/problems")
    sizes = {"train": cfg.train_problems, "validation": cfg.test_problems, "test": cfg.test_problems}
    distinct: dict[str, Problem] = {}
    while len(distinct) < sum(sizes.values()):
        problem = make_problem(rng)
        distinct[problem.id] = problem
    remaining = iter(distinct.values())
    splits = {name: [next(remaining) for _ in range(size)] for name, size in sizes.items()}

    processes = [
        multiprocessing.get_context("spawn").Process(
            target=pretrain, args=(name, cfg, splits["validation"], set(distinct)), daemon=True
        )
        for name in RECIPES
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("error: pretraining failed; see the message above")
    for name, problems in splits.items():  # written last, because make takes their presence for completeness
        lines = (json.dumps({"problem": problem.prompt, "answer": problem.answer}) for problem in problems)
        (Path(cfg.out) / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    common.cli(main, Config)
