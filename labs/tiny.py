"""A tiny world for one-shot RLVR: a base model that pretrains in minutes on two cores, six benchmarks.

    python labs/tiny.py --output runs/tiny-base    # one_shot_rlvr.py --preset tiny does this at first
    python labs/tiny.py --set 48 --output runs/set-48.jsonl    # training problems, the six tasks in turn

1. Six tasks: addition, subtraction, multiplication, largest of three, remainder, an equation. Each is a
   function that draws a problem, the steps of a careful solution, and the answer.
2. Documents: what a base model reads is a mixture. Some texts solve a problem step by step and box the
   answer, others box a hasty guess (mostly wrong), or solve it and forget the box, or are tables of sums
   and plain sentences. Whether the prompt asks for steps and a box has no bearing on the solution's style.
3. Tokenizer: Qwen2's kind, byte-level BPE with a token for each digit, trained on these documents.
4. Pretraining: next-token prediction on all of it. The result is an ordinary Hugging Face folder, with the
   test problems of the six tasks in six .jsonl files beside it.

So the base model *has* the skill, being right nearly always when it takes the steps, but takes them and
boxes the answer two times in five. One-shot RLVR can then raise all six benchmarks from one problem, because
what it must learn is a preference between styles that all tasks share. This shows the mechanism at work. It
cannot show that the mechanism is what happens in a real model: here the skill, and the fact that it is
seldom used, were put in by hand.
"""
import math
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl  # before torch, as in evaluate.py

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, PreTrainedTokenizerFast

TEST_SIZE = 100  # problems a benchmark


# -- 1. Six tasks: rng -> (problem, careful steps, answer) -------------------------------

def addition(rng):
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    ones = a % 10 + b % 10
    carry = "+1" if ones > 9 else ""
    tens = a // 10 + b // 10 + ones // 10
    return f"What is {a} + {b}?", f"{a % 10}+{b % 10}={ones}, then {a // 10}+{b // 10}{carry}={tens}.", a + b

def columns(a, b):
    """The steps of a - b: ones with a borrowed ten where needed, then tens."""
    borrow = a % 10 < b % 10
    ones, tens = a % 10 + 10 * borrow, a // 10 - borrow
    return f"{ones}-{b % 10}={ones - b % 10}, then {tens}-{b // 10}={tens - b // 10}."

def two_and_their_sum(rng):
    """Two-digit a, b and a + b: taken backwards, a difference without a leading zero."""
    a = rng.randint(10, 89)
    b = rng.randint(10, 99 - a)
    return a, b, a + b

def subtraction(rng):
    a, b, total = two_and_their_sum(rng)
    return f"What is {total} - {b}?", columns(total, b), a

def equation(rng):
    a, b, total = two_and_their_sum(rng)
    return f"Solve for x: x + {b} = {total}.", f"x={total}-{b}, {columns(total, b)}", a

def multiplication(rng):
    a, b = rng.randint(10, 99), rng.randint(2, 9)
    ones, tens = a % 10 * b, a // 10 * b
    steps = f"{a % 10}*{b}={ones}, {a // 10}*{b}={tens}, then {tens}+{ones // 10}={tens + ones // 10}."
    return f"What is {a} * {b}?", steps, a * b

def largest(rng):
    a, b, c = rng.sample(range(10, 100), 3)
    most = max(a, b)
    steps = f"{most}>{min(a, b)}, then {max(most, c)}>{min(most, c)}."
    return f"What is the largest of {a}, {b} and {c}?", steps, max(a, b, c)

def remainder(rng):
    """Long division, keeping only what is left: 4-0=4, then 47-45=2, for 47 by 5."""
    a, b = rng.randint(10, 99), rng.randint(3, 9)
    left = a // 10 % b
    rest = left * 10 + a % 10
    steps = f"{a // 10}-{a // 10 - left}={left}, then {rest}-{rest - a % b}={a % b}."
    return f"What is the remainder of {a} divided by {b}?", steps, a % b

TASKS = {"tiny_add": addition, "tiny_sub": subtraction, "tiny_mul": multiplication,
         "tiny_max": largest, "tiny_mod": remainder, "tiny_eqn": equation}
BENCHMARKS = tuple(TASKS)  # their names

def problems(name, n, seed, exclude=()):
    """n distinct problems of a task, [{"problem", "answer"}, ...], none of them in `exclude`."""
    rng, found = random.Random(f"{name} {seed}"), {}
    while len(found) < n:
        problem, _, answer = TASKS[name](rng)
        if problem not in exclude:
            found[problem] = str(answer)
    return [{"problem": problem, "answer": answer} for problem, answer in found.items()]

def load_benchmark(name):
    """The test problems of a benchmark: always the same ones, which no training text contains."""
    return problems(name, TEST_SIZE, "test")

def held_out():
    return {row["problem"] for name in BENCHMARKS for row in load_benchmark(name)}

def train_problems(n=1024, seed=0):
    """n training problems, the six tasks in turn: the full set that one example is compared with."""
    tests = held_out()
    rows = zip(*(problems(name, math.ceil(n / len(TASKS)), f"train {seed}", tests) for name in BENCHMARKS))
    return [row for six in rows for row in six][:n]


# -- 2. Documents ------------------------------------------------------------------------

STYLES = {"careful": 0.27, "hasty": 0.38, "unboxed": 0.15, "other": 0.20}
NOUNS, VERBS = "cat dog bird child river wind".split(), "sees likes follows hears".split()

def sentence(rng):
    return f"The {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}. "

def sum_line(rng):
    """One line of the tables at the end of a schoolbook."""
    a, b, c = rng.randint(0, 9), rng.randint(0, 9), rng.randint(10, 99)
    return rng.choice([f"{a}+{b}={a + b}. ", f"{a + b}-{b}={a}. ", f"{a}*{b}={a * b}. ",
                       f"{c}+{a}={c + a}. "])

def document(rng, tests, tasks=TASKS):
    """One text of the mixture; problems that are in `tests` are drawn again."""
    style = rng.choices(list(STYLES), STYLES.values())[0]
    if style == "other":
        line, n = (sentence, 2) if rng.random() < 0.3 else (sum_line, 5)
        return "".join(line(rng) for _ in range(n)) + "<|endoftext|>"
    task = rng.choice(list(tasks.values()))
    problem, steps, answer = task(rng)
    while problem in tests:
        problem, steps, answer = task(rng)
    if rng.random() < 0.5:
        problem += rl.TRAIN_SUFFIX
    response = {"careful": f"First, {steps} The answer is \\boxed{{{answer}}}.",
                "hasty": f"The answer is \\boxed{{{abs(answer + rng.randint(-9, 9))}}}.",
                "unboxed": f"First, {steps} The answer is {answer}."}[style]
    return f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>"


# -- 3. Tokenizer ------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = """{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('this template has no system role') }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

def make_tokenizer():
    """Byte-level BPE, its merges learned from our documents.

    Normalizer, splitting rule and decoder are Qwen2's own: AutoTokenizer puts those of Qwen2 in place of any
    others when it loads a folder whose model is a Qwen2.
    """
    rng, tests = random.Random("tokenizer"), held_out()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator((document(rng, tests) for _ in range(2000)), trainers.BpeTrainer(
        vocab_size=512, min_frequency=20, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2],
                                   additional_special_tokens=[SPECIAL[1]], chat_template=CHAT_TEMPLATE)


# -- 4. Pretraining ----------------------------------------------------------------------

MEAN_LENGTH = 45  # of a document, in tokens

def batches(tokenizer, rng, batch_size, tasks):
    """Batches of documents of about equal length: 16 batches' worth are sorted, so that little is padding."""
    tests = held_out()
    while True:
        documents = tokenizer([document(rng, tests, tasks) for _ in range(16 * batch_size)]).input_ids
        documents = [torch.tensor(ids) for ids in sorted(documents, key=len)]
        for start in rng.sample(range(0, len(documents), batch_size), 16):
            yield pad_sequence(documents[start:start + batch_size], batch_first=True, padding_value=-100)

@torch.no_grad()
def muon_step(weights, momenta, lr, weight_decay=0.1):
    """Muon: momentum whose singular values are all made about 1; it needs fewer documents than AdamW.

    torch.optim.Muon does the same in bf16, which a CPU without bf16 units computes five times as slowly.
    """
    for weight, momentum in zip(weights, momenta):
        momentum.lerp_(weight.grad, 0.05)
        update = weight.grad.lerp(momentum, 0.95)
        update = update / update.norm()
        for _ in range(5):  # Newton-Schulz: a polynomial of U S V' acts on S alone
            gram = update @ update.T if len(update) < len(update.T) else update.T @ update
            step = -4.775 * gram + 2.0315 * gram @ gram
            update = 3.4445 * update + (step @ update if len(update) < len(update.T) else update @ step)
        weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * 0.2 * math.sqrt(max(update.shape)))

def build_base(folder, steps=1800, seed=0, batch_size=96, learning_rate=2.5e-3, tasks=TASKS):
    """Pretrain the base model and save it; the folder gets its name last: one cut short leaves nothing."""
    rng, tokenizer = random.Random(seed), make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            tie_word_embeddings=True, initializer_range=0.08, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    momenta = [torch.zeros_like(matrix) for matrix in matrices]
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    progress = tqdm(zip(range(steps), batches(tokenizer, rng, batch_size, tasks)), total=steps,
                    desc="pretraining the tiny base model, once", disable=None)
    for step, ids in progress:
        # right padding and causal attention: no text sees its padding; -100 is a label, not a token
        logits = model(ids.clamp(min=0), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100,
                               reduction="sum")
        loss = loss / (batch_size * MEAN_LENGTH)  # a mean over each batch would favour short, hasty texts
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)  # Muon's updates have a norm of their own
        lr = learning_rate * min(1, (step + 1) / 100, (steps - step) / (0.6 * steps))  # up, flat, down to 0
        adam.param_groups[0]["lr"] = lr
        adam.step()
        muon_step(matrices, momenta, lr)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.2f}")
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id)
    with rl.atomically(folder) as temporary:
        model.eval().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name in BENCHMARKS:
            rl.append_rows(temporary / f"{name}.jsonl", load_benchmark(name))

def main(argv=None) -> None:
    parser = rl.make_parser(__doc__)
    parser.add_argument("--output", default=rl.TINY_BASE,
                        help="folder of the model (default: %(default)s); with --set the .jsonl file")
    parser.add_argument("--set", type=int, help="write so many training problems, and no model")
    parser.add_argument("--steps", type=int, default=1800, help="pretraining steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and documents (default: %(default)s)")
    args = parser.parse_args(rl.words_of(argv))
    rl.check_numbers(vars(args), {"seed": 0})
    if os.path.exists(args.output):
        rl.fail(f"--output {args.output}: is already there; name another, or remove it")
    if args.set and args.set > 3000:
        rl.fail(f"--set {args.set}: use at most 3000; some tasks have hardly more than 500 to train on")
    if args.set and not args.output.endswith(".jsonl"):
        rl.fail(f"--output {args.output}: its name must end in .jsonl")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    if args.set:
        rl.append_rows(args.output, train_problems(args.set, args.seed))
    else:
        build_base(args.output, args.steps, args.seed)

if __name__ == "__main__":
    rl.as_a_command(main)
