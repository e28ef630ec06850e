r"""One-shot RLVR: reinforcement learning with a verifiable reward on ONE training example.

A language model learns to reason about mathematics from one problem, as its answer can be
checked (Wang et al., arXiv 2504.20571). One file, for one GPU or a laptop, read top to bottom.

    python one_shot_rlvr.py --example pi1 --model Qwen/Qwen2.5-Math-1.5B  # the paper's run, 80 GB
    python one_shot_rlvr.py --preset tiny  # the same on a laptop
    python one_shot_rlvr.py --preset tiny --kl-coef 0 --entropy-coef 0  # an ablation

The algorithm is GRPO. One step of training:
    1. Example     the problem becomes a prompt, repeated as 128 groups of 8
    2. Rollouts    sample a response to each of 1,024 prompts at temperature 0.6
    3. Reward      1 if the last \boxed{} of a response equals the answer, else 0
    4. Advantages  in each group of 8: (reward - mean) / std
    5. Loss        clipped policy gradient + 0.001 KL to the initial model - 0.001 entropy
    6. Update      one AdamW step; then again from 1, some 2,000 times
Sections 1 to 6 are these steps; main(), the loop over them, ends section 7 and the tutorial.
What they call and do not define comes later: A the command line and fail(), B files, C models and
processes, D a GPU's decode step, E when two answers are the same. [P] is from the paper, [C] from
its code; README.md lists our differences.

Shapes: N rollouts (prompt and response) a step, G a group, n at a time in the sampler; B rows a
micro-batch, padded to L tokens, T of them response; M response tokens in all rows; V vocabulary,
H hidden size.
"""
import argparse
import atexit
import cmath
import contextlib
import copy
import datetime
import functools
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import zlib
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Literal, get_args

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: its idle threads spin

import numpy as np
import torch
import torch.distributed as dist
import transformers
from filelock import FileLock, Timeout
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# -- 0. Settings: one flat dataclass, from which section A builds the command line --
@dataclass
class Config:
    """Every setting, each a flag; --help shows the comments. Config() is the paper's run."""
    # the run
    preset: Literal["paper", "24gb", "tiny"] = "paper"  # starting values; flags win over them
    model: str = "Qwen/Qwen2.5-Math-1.5B"  # Hugging Face id or model folder to train
    output_dir: str = ""             # folder of the run; empty means runs/EXAMPLE-MODEL
    resume: bool = False             # go on with the run in --output-dir and its settings
    steps: int = 2000                # training steps [P: B.4]
    seed: int = 0                    # seed of everything random
    save_every: int = 20             # save model and checkpoint every so many steps [C]
    eval: tuple = ()                 # benchmarks of evaluate.py, or .jsonl files, to test on
    eval_every: int = 0              # test every so many steps and at the end; 0 means never
    # 1. example
    example: tuple = ("pi1",)        # names in examples.json, or files of {problem, answer}
    answer: str = ""                 # replaces the example's label [P: Table 5, rows 11-13]
    max_prompt_tokens: int = 1024    # longer ones are left out [C]
    # 2. rollouts
    prompts_per_step: int = 128      # groups a step [C]
    group_size: int = 8              # rollouts a group, whose mean is the baseline [C]
    max_response_tokens: int = 3072  # longest response [C]
    temperature: float = 0.6         # of sampling and of every log-probability [C]
    slots: int = 320                 # rollouts at a time; bounds memory
    cuda_graph: bool = True          # launch a decode step's kernels at once; CUDA only
    # 3. to 5. reward, advantages, loss
    reward: Literal["answer", "format", "none"] = "answer"  # what earns 1: right answer, any box, nothing
    scale_rewards: bool = True       # divide advantages by the group's standard deviation
    pg_coef: float = 1.0             # weight of the policy gradient [P: Table 5]
    clip_eps: float = 0.2            # clip the ratio to 1 +- this [C]
    kl_coef: float = 0.001           # weight of the KL; 0 loads no reference [P: Table 5]
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # k3 is low_var_kl of [C]
    entropy_coef: float = 0.001      # weight of the entropy bonus; [P] writes -0.001
    loss_agg: Literal["token", "sequence"] = "token"  # mean of all tokens, or of sequence means
    # 6. update
    updates_per_batch: int = 1       # optimizer steps a batch of rollouts [C: 1, P: 8]
    learning_rate: float = 1e-6      # of AdamW, constant [C]
    weight_decay: float = 0.01       # of AdamW [C]
    grad_clip: float = 1.0           # largest gradient norm [C]
    token_budget: int = 6144         # tokens a micro-batch; bounds memory, not the result
    activation_checkpointing: bool = False  # recompute activations in backward: less memory
    offload_optimizer: bool = False  # keep AdamW's 8 bytes a parameter in host memory
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products; auto: bf16 on CUDA
    compile: bool = False            # fuse each layer's small kernels: faster on a GPU

TINY_BASE = "runs/tiny-base"  # labs/tiny.py builds it at its first use
PRESETS = {
    "paper": {},
    "24gb": dict(prompts_per_step=32, max_response_tokens=2048, slots=64, kl_coef=0.0,
                 token_budget=3072, activation_checkpointing=True, offload_optimizer=True),
    "tiny": dict(model=TINY_BASE, example=("tiny-add",), steps=60, prompts_per_step=16,
                 max_response_tokens=64, slots=128, learning_rate=1e-4),
}

# -- 1. Example: from a problem to the tokens of a prompt ----------------------
TRAIN_SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
EVAL_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPT_DATE = datetime.datetime(2024, 7, 26)  # today for templates, so that prompts do not drift
STRFTIME_NOW = "{% macro strftime_now(format) %}{{ format" + "".join(
    f".replace('%{letter}', '{PROMPT_DATE:%{letter}}')" for letter in "dmyYbBaAHMS") + " }}{% endmacro %}"

def render_chat(tokenizer, turns, **options) -> str:
    """Turns {"role", "content"} as text by the model's chat template."""
    template = STRFTIME_NOW + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False,
                                         date_string=f"{PROMPT_DATE:%d %b %Y}", **options)

def encode_prompt(tokenizer, problem, system=None) -> list:
    """Token ids of a problem: a user's message or, without a chat template, plain text."""
    text, user = problem, [{"role": "user", "content": problem}]
    try:
        if tokenizer.chat_template:
            text = render_chat(tokenizer, user, add_generation_prompt=True)
            with contextlib.suppress(Exception):  # some templates refuse or drop it: their own holds
                turns = [{"role": "system", "content": system or ""}, *user]
                with_system = render_chat(tokenizer, turns, add_generation_prompt=True)
                text = with_system if system and system in with_system else text
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
    except Exception as error:  # a broken template, or half an emoji as text
        fail(f"--model {tokenizer.name_or_path}: no prompt can be made of {problem[:40]!r} ({error})")
    if problem.strip() not in text:
        fail(f"--model {tokenizer.name_or_path}: its chat template leaves the problem out")
    if not tokenizer.chat_template and ids[-1:] == [tokenizer.eos_token_id]:
        ids.pop()  # after it nothing is left to say
    return ids

def find_stop_ids(tokenizer, generation_config) -> list:
    """Tokens that end a response: EOS of tokenizer and configuration, end of a turn."""
    # base models' configurations often name only the end of text: render a turn
    turn = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "[ANSWER]"}]
    ending = ""
    with contextlib.suppress(Exception):  # no template, or none for an assistant
        ending = render_chat(tokenizer, turn).partition("[ANSWER]")[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(ending, add_special_tokens=False).input_ids
    stop_ids = {*[i for i in ids if i in special][:1]}  # a later one may open the next turn
    for eos in (tokenizer.eos_token_id, generation_config.eos_token_id):
        stop_ids.update(eos if isinstance(eos, list) else [eos])
    return sorted(stop_ids - {None})

def examples_of_step(step, num_examples, prompts_per_step, seed) -> list:
    """Index of each group's example in step 1, 2, ...: several take turns, in shuffled epochs."""
    places = range((step - 1) * prompts_per_step, step * prompts_per_step)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_examples)
              for epoch in {place // num_examples for place in places}}  # the same after --resume
    return [int(orders[place // num_examples][place % num_examples]) for place in places]

# -- 2. Rollouts: sample responses, one token at a time, in a fixed number of slots --
class KVCache:
    """Keys and values of the running rollouts, each in a slot, at its own position.

    transformers' own caches keep one position for all. Of ours, a model calls only update(), as we
    pass mask and position ids.
    """

    def __init__(self, model, slots, length, cuda_graph=False):
        self.model, self.slots, self.length, self.cuda_graph = model, slots, length, cuda_graph
        self.prompts, self.graphs = {}, {}  # {slot: its prompt}; for section D
        self.stores = []  # keys and values: (layers, slots, length, heads, head size)
        # each slot's newest token, position, temperature, noise: in place for CUDA graphs
        self.newest = torch.zeros(4, slots, dtype=torch.float64, device=model.device)

    def update(self, keys, values, layer, *args, **kwargs):
        """Store keys, values (n, heads, q, head size) of q new tokens -> those of all so far."""
        if not self.stores:
            layers = self.model.config.get_text_config().num_hidden_layers
            # not empty: a masked NaN still poisons the sum over values, as 0 * NaN is NaN
            self.stores = [x.new_zeros(layers, self.slots, self.length, x.shape[1], x.shape[3])
                           for x in (keys, values)]
        # not store[layer][...]: torch.compile would copy all of such a view, twice a step
        place = torch.full_like(self.slot_index, layer), self.slot_index, self.fed
        for store, new in zip(self.stores, (keys, values)):
            store[place] = new.transpose(1, 2)
        return tuple(store[layer][self.fed_slots, :self.filled].transpose(1, 2) for store in self.stores)

    def feed(self, slots, tokens, positions, filled, **kwargs):
        """Feed tokens (n, q) at positions (n, q) < filled to slots -> last logits (n, V)."""
        self.fed_slots, self.fed, self.filled = slots, positions, filled  # for update()
        self.slot_index = torch.arange(slots.start, slots.stop, device=positions.device)[:, None]
        # a token sees its slot's keys up to its own position: (n, 1, q, filled)
        mask = torch.arange(filled, device=positions.device) <= positions[:, None, :, None]
        return self.model(input_ids=tokens, position_ids=positions, attention_mask=mask,
                          past_key_values=self, use_cache=True, logits_to_keep=1, **kwargs).logits[:, -1]

    def prefill(self, slot, prompt):
        """Feed all of a prompt but its last token: equal prompts are computed once, then copied."""
        sources = [other for other, held in self.prompts.items() if held == prompt]
        if slot not in sources and sources:
            self.copy(sources[0], slot, len(prompt) - 1)
        elif not sources and len(prompt) > 1:
            tokens = torch.tensor([prompt[:-1]], device=self.newest.device)
            positions = torch.arange(len(prompt) - 1, device=self.newest.device)[None]
            with torch.compiler.set_stance("force_eager"):  # not worth compiling for
                self.feed(slice(slot, slot + 1), tokens, positions, len(prompt) - 1)
        self.prompts[slot] = prompt

    def copy(self, source, target, length):
        """Copy a slot's first `length` keys and values to another; later ones are never read."""
        for store in self.stores:
            store[:, target, :length] = store[:, source, :length]
        self.prompts[target] = self.prompts[source]

    def next_tokens(self, tokens, positions, temperatures, noise):
        """Feed the newest tokens of the first n slots -> the next ones, log-probabilities."""
        n = len(tokens)
        # one upload and one download, as each waits for the GPU
        self.newest[:, :n] = torch.tensor([tokens, positions, temperatures, noise], dtype=torch.float64)
        step = step_by_graph if self.cuda_graph else KVCache.step  # section D
        tokens, logprobs = step(self, n, 1 + max(positions)).tolist()
        if not all(map(math.isfinite, logprobs)):
            sys.exit("error: logits are not finite: damaged weights, or too high a --learning-rate")
        return list(map(int, tokens)), logprobs

    def step(self, n, filled, **kwargs):
        """The device's part of next_tokens() -> tokens and log-probabilities (2, n)."""
        tokens, positions = (x.long()[:, None] for x in self.newest[:2, :n])  # (n, 1)
        self.logits = self.feed(slice(0, n), tokens, positions, filled, **kwargs)  # (n, V)
        return torch.stack([x.double() for x in sample_tokens(self.logits, *self.newest[2:, :n])])

def sample_tokens(logits, temperatures, noise):
    """Draw a token a row from softmax(logits / temperature) -> tokens, log-probabilities (n,).

    logits (n, V), temperatures (n,), 0 for greedy, noise (n,) in [0, 1). The token is where the
    cumulative distribution passes the noise: no other row matters, unlike in torch.multinomial. Its
    block of 128 is found first: a running sum over V is slow on a GPU.
    """
    probs = (logits / temperatures.float().clamp(min=1e-6)[:, None]).softmax(-1)  # (n, V), float32
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % 128)).unflatten(1, (-1, 128))
    sums = blocks.sum(-1, dtype=torch.float64)  # (n, V/128)
    block, left = where_sum_passes(sums, noise * sums.sum(-1))
    place, _ = where_sum_passes(blocks[torch.arange(len(block), device=block.device), block], left)
    tokens = torch.where(temperatures > 0, 128 * block + place, logits.argmax(-1))
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN leads into the padding
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()

def where_sum_passes(weights, target):
    """Where the running sum of weights (n, k) passes target (n,) -> index, what is left (n,)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)  # (n, k)
    # neither rounding nor NaN may lead past the end, nor a target of 0 to a weight of 0
    target = torch.minimum(target.clamp(min=0), cumulative[:, -1] * (1 - 1e-15))[:, None]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    left = target - (cumulative.gather(1, index) - weights.gather(1, index))
    return index.squeeze(1), left.squeeze(1)

def generate(model, prompts, *, max_response_tokens, temperature, stop_ids, slots=None, generator=None,
             noise=None, cuda_graph=False, return_logprobs=False):
    """Sample a response to each prompt; both are lists of token ids, with the stop token.

    At most `slots` run at a time, by default all. Each has its own row of noise (N, T), drawn from
    `generator` if not given: but for rounding, `slots` changes only the speed.
    return_logprobs: (responses, tensors (T,) of their log-probabilities).
    """
    N, device = len(prompts), generator.device if generator else None
    if noise is None:  # doubles: a token of probability 1e-9 must be possible
        noise = torch.rand(N, max_response_tokens, dtype=torch.float64, generator=generator,
                           device=device)
    ended = sorted(generate_each(model, prompts, N * [max_response_tokens], N * [temperature],
                                 noise, stop_ids, slots, cuda_graph))
    responses = [response for _, response, _ in ended]
    if return_logprobs:
        return responses, [torch.tensor(logprobs) for *_, logprobs in ended]
    return responses

@torch.no_grad()
def generate_each(model, prompts, limits, temperatures, noise, stop_ids, slots=None, cuda_graph=False):
    """Sample for prompt i up to limits[i] tokens at temperatures[i], token t by noise[i, t].

    Yields (i, token ids, their log-probabilities) as each ends. Its slot goes to the next prompt
    or, at last, to the last slot's rollout: nobody waits for the longest response.
    """
    if not all(prompts):
        raise ValueError("an empty prompt: nothing to predict from")
    model.eval()  # no dropout; the policy that is updated is loaded in this mode, too
    # as given, but equal prompts together: they are prefilled once
    waiting = deque(sorted(range(len(prompts)), key=lambda i: prompts.index(prompts[i])))
    rows, logprobs = [*map(list, prompts)], [[] for _ in prompts]  # a row: prompt + response
    slots = min(slots or len(prompts), len(prompts))
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
    cache = KVCache(model, slots, longest, cuda_graph)
    progress = progress_bar(total=len(prompts), desc="rollouts")
    running, free = {}, range(slots)  # {slot: rollout}, slots from 0 on; what ended in the last step
    while waiting or running:
        for slot in free:
            if waiting:
                running[slot] = waiting.popleft()
                cache.prefill(slot, prompts[running[slot]])
            elif slot < (last := max(running, default=0)):
                running[slot] = running.pop(last)
                cache.copy(last, slot, len(rows[running[slot]]) - 1)
        rollouts = [running[slot] for slot in range(len(running))]
        tokens, new_logprobs = cache.next_tokens(
            tokens=[rows[i][-1] for i in rollouts],
            positions=[len(rows[i]) - 1 for i in rollouts],
            temperatures=[temperatures[i] for i in rollouts],
            noise=noise[rollouts, [len(logprobs[i]) for i in rollouts]].tolist())
        for slot, i in enumerate(rollouts):
            rows[i].append(tokens[slot])
            logprobs[i].append(new_logprobs[slot])
            if tokens[slot] in stop_ids or len(logprobs[i]) == limits[i]:
                yield running.pop(slot), rows[i][len(prompts[i]):], logprobs[i]
        free = [slot for slot in range(len(rollouts)) if slot not in running]
        progress.set_postfix_str(f"{sum(map(len, logprobs)):,} tokens, {len(running)} run", refresh=False)
        progress.update(len(free))
    progress.close()
    del cache  # or AdamW's first state would split its memory, and the next cache would not fit
    torch.cuda.empty_cache()

# -- 3. Reward: is the last boxed answer the right one? ------------------------
BOX = re.compile(r"\\(?:boxed|fbox)(?: *\{| +(\w)(?![\w^/]|[.,]\d))", re.ASCII)  # \boxed 7, too
BRACE = re.compile(r"\\[{}\\]|[{}]")  # \{ is printed, no group

def extract_boxed(text):
    r"""Content of the last complete \boxed{} of under 10,000 characters (linear time), or None."""
    end = len(text)
    for opening in reversed(list(BOX.finditer(text))):
        if opening[1]:
            return opening[1]
        depth, start = 1, opening.end()
        for brace in BRACE.finditer(text, start, min(end, start + 10_000)):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return text[start:brace.start()]
        end = opening.start()  # unclosed, as is an earlier one that is open here
    return None

def is_correct(response, answer) -> bool:
    r"""The verifiable reward: is the last complete \boxed{} the answer? Never raises.

    It reads the response alone: the prompt holds an empty \boxed{}. Numbers and expressions are
    compared by value (rounding is not agreement), equations up to a factor, bare lists, sets and
    unions in any order, tuples, intervals and matrices in theirs. A unit may be missing, but two
    must be the same; 12\% is 12, not 0.12. Section E has it all.
    """
    box, answer = extract_boxed(str(response)), str(answer)
    gold = extract_boxed(answer) or answer  # some data sets box their answers
    return bool(box and box.strip() and gold.strip()) and equivalent(box.strip(), gold.strip())

def has_box(response) -> bool:
    r"""Is there a complete \boxed{} that is not empty?"""
    return bool((extract_boxed(response) or "").strip())

def reward_of(response, answer, kind="answer") -> float:
    """1 if the answer is right, or (format) if there is one, or (none) never."""
    earns = {"answer": is_correct(response, answer), "format": has_box(response), "none": False}
    return float(earns[kind])

# -- 4. Advantages: how much better than the other rollouts of its group? ------
def group_advantages(rewards, group_size, scale=True):
    """Rewards (N,) -> advantages (N,): (r - mean) / (std + 1e-6) in each group of G neighbours.

    [P: Eq. 6], with ddof 1 and 1e-6 [C]. Equal rewards say nothing: exactly 0.
    scale=False: no division. ValueError if G is 1 or does not divide N.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (N/G, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    # the mean of equal 0.1s is rounded: the error over 1e-6 would pass for a signal
    dead = (groups == groups[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(dead, 0.0).view(-1)

# -- 5. Loss: log-probabilities, then clipped policy gradient + KL - entropy ---
def hidden_states(model, prompts, responses):
    """Last hidden state before each response token (M, H), the tokens (M,), their mask (B, T).

    Rows are prompt + response, padded on the right, where a causal model never looks. The mask
    goes by length: by id, it would take stopping out of the loss where EOS == PAD.
    """
    starts, lengths = (torch.tensor(list(map(len, x))) for x in (prompts, responses))  # (B,)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    b, t = mask.nonzero(as_tuple=True)  # (M,), on the host: a GPU would make us wait
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    ids = pad_sequence(rows, batch_first=True)  # (B, L)
    b, place, ids, mask = (x.to(model.device) for x in (b, starts[b] + t, ids, mask))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, H)
    return hidden[b, place - 1], ids[b, place], mask  # each is predicted at the token before

def token_logprobs(model, prompts, responses, temperature, chunk=512):
    """Log-probability, entropy (nats) of each response token -> logprobs, entropy, mask (B, T).

    Of softmax(logits / temperature), as in sampling [C]. Logits are made for `chunk` tokens at a
    time, and again in backward: those of 3,072 take 1.9 GB.
    """
    head = model.get_output_embeddings()
    hidden, targets, mask = hidden_states(model, prompts, responses)

    def score(hidden, targets):
        all_logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # (chunk, V)
        logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
        return logprobs, -(all_logprobs.exp() * all_logprobs).sum(1)

    chunks = [recompute_in_backward(score, *pair, use_reentrant=False, preserve_rng_state=False)
              for pair in zip(hidden.split(chunk), targets.split(chunk))]
    zeros = torch.zeros(mask.shape, device=mask.device)
    logprobs, entropy = (zeros.masked_scatter(mask, torch.cat(values)) for values in zip(*chunks))
    return logprobs, entropy, mask

def kl_estimate(logprobs, ref_logprobs, kind="k3"):
    """Estimate KL(policy || reference) at each token of the policy (Schulman, 2020).

    The loss differentiates it, not the sampling: so k1's expected gradient is zero, k2's that of
    KL(policy || reference), k3's that of KL(reference || policy). k3 is cut at 10 [C], its
    exponent at 20: exp(d) may be inf, and inf times the cut's gradient 0 is NaN.
    """
    d = ref_logprobs - logprobs
    return {"k1": -d, "k2": d.square() / 2, "k3": (d.clamp(max=20).exp() - d - 1).clamp(max=10)}[kind]

def grpo_loss(logprobs, old_logprobs, ref_logprobs, entropy, advantages, mask, num_tokens, config):
    """GRPO's loss of a micro-batch [P: Eq. 3 to 8] -> (scalar, stats): the mean over tokens of

        pg_coef * -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + kl_coef KL - entropy_coef entropy

    Tensors are (B, T); advantages A may be (B,), one a rollout. num_tokens counts the response
    tokens of the whole update: micro-batches return shares of one mean.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]  # (B, T) or (B, 1)
    # 1 in the first update, with the gradient of logprobs: REINFORCE; cut as k3's exponent is
    ratio = (logprobs - old_logprobs).clamp(max=20).exp()
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    pg = -torch.min(ratio * A, clipped * A)
    kl = kl_estimate(logprobs, ref_logprobs, config.kl_estimator)
    per_token = config.pg_coef * pg + config.kl_coef * kl - config.entropy_coef * entropy
    mask = mask.to(per_token.dtype)
    weight = mask / num_tokens
    if config.loss_agg == "sequence":  # the mean over all processes' rollouts of their means
        num_rollouts = config.prompts_per_step * config.group_size // config.updates_per_batch
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / num_rollouts
    loss = (per_token * weight).sum()
    means = dict(pg_loss=pg, kl=kl, entropy=entropy, ratio=ratio, clip_frac=clipped * A < ratio * A)
    # stats stay tensors: numbers would wait for the GPU before backward
    stats = {name: (x.detach() * mask).sum() / num_tokens for name, x in means.items()}
    return loss, {"loss": loss.detach(), **stats}

# -- 6. Update: the gradients of all micro-batches, then one optimizer step ----
@dataclass
class Batch:
    """A step's rollouts: lists of N, in which G neighbours are a group."""
    examples: list          # {"name", "problem", "answer", "prompt": token ids}
    prompts: list           # token ids
    responses: list         # token ids, with the stop token, if any
    texts: list             # of the responses
    rewards: list           # numbers
    sampler_logprobs: list  # tensors (T,), from the sampler
    seconds: float          # that steps 1 to 3 took

def micro_batches(batch, rollouts, token_budget) -> list:
    """Rollouts in packs whose rows times longest row stay within the budget, or of one row."""
    length, packs = {i: len(batch.prompts[i]) + len(batch.responses[i]) for i in rollouts}, []
    for i in sorted(rollouts, key=length.get, reverse=True):  # memory runs out at once or never
        if not packs or (len(packs[-1]) + 1) * length[packs[-1][0]] > token_budget:
            packs.append([])
        packs[-1].append(i)
    return packs

def score_rows(model, batch, rows, config):
    """token_logprobs of some rows, only products in bf16: bf16 weights never move at rate 1e-6."""
    prompts, responses = ([part[i] for i in rows] for part in (batch.prompts, batch.responses))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bf16(model.device, config)):
        return token_logprobs(model, prompts, responses, config.temperature)

def padded(tensors, rows, device):
    """The tensors (T,) of some rollouts, padded -> (B, T)."""
    return pad_sequence([tensors[i] for i in rows], batch_first=True).to(device)

def update_policy(policy, ref_policy, optimizer, batch, rollouts, advantages, old_logprobs, config):
    """One optimizer step on some rollouts of a batch -> stats.

    advantages: a tensor () or (T,) a rollout. old_logprobs: (T,) a rollout, or none while the
    policy is the one that sampled. sampler_gap: mean distance to the sampler's log-probabilities.
    Exits before the step if loss or gradient is not finite.
    """
    device, stats = policy.device, defaultdict(float)
    # GRPO: each token has its rollout's advantage
    token_advantages = {i: advantages[i].expand(len(batch.responses[i])) for i in rollouts}
    # of all micro-batches and processes: neither may change the gradient
    num_tokens = sum(len(batch.responses[i]) for i in rollouts)
    num_tokens = int(sum_over_processes(torch.tensor(num_tokens, device=device)))
    for rows in progress_bar(micro_batches(batch, rollouts, config.token_budget), "update"):
        with torch.no_grad():  # before the policy's activations fill memory
            ref_logprobs = score_rows(ref_policy, batch, rows, config)[0] if ref_policy else None
        logprobs, entropy, mask = score_rows(policy, batch, rows, config)
        old = padded(old_logprobs, rows, device) if old_logprobs else logprobs.detach()
        ref_logprobs = ref_logprobs if ref_policy else logprobs.detach()  # without one the KL reads 0
        A = padded(token_advantages, rows, device)
        loss, parts = grpo_loss(logprobs, old, ref_logprobs, entropy, A, mask, num_tokens, config)
        loss.backward()
        gap = (old - padded(batch.sampler_logprobs, rows, device)).abs()
        parts["sampler_gap"] = (gap * mask).sum() / num_tokens
        for name, value in parts.items():
            stats[name] += value
    for tensor in (*(param.grad for param in policy.parameters()), *stats.values()):
        sum_over_processes(tensor)
    stats = {name: value.item() for name, value in stats.items()}
    stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip).item()
    if not math.isfinite(stats["loss"] + stats["grad_norm"]):
        sys.exit(f"error: loss {stats['loss']}, gradient norm {stats['grad_norm']}: this update was "
                 "not made; try --resume with a lower --learning-rate")
    optimizer_step(policy, optimizer)  # AdamW; section C, for --offload-optimizer
    return stats

def train_on(policy, ref_policy, optimizer, batch, advantages, config):
    """All updates on a batch -> their mean stats. [C] makes one, [P] eight, each of 16 groups."""
    N, updates, old_logprobs = len(batch.prompts), config.updates_per_batch, {}
    # after one update, the policy is not the one that sampled
    for rows in micro_batches(batch, range(N), config.token_budget) if updates > 1 else ():
        with torch.no_grad():
            logprobs, _, mask = score_rows(policy, batch, rows, config)
        old_logprobs |= {i: values[kept] for i, values, kept in zip(rows, logprobs, mask)}
    each = [update_policy(policy, ref_policy, optimizer, batch, rollouts.tolist(), advantages,
                          old_logprobs, config) for rollouts in torch.arange(N).chunk(updates)]
    return {name: sum(stats[name] for stats in each) / updates for name in each[0]}

# -- 7. The run ----------------------------------------------------------------
@dataclass
class Run:
    """All that a run consists of."""
    config: Config
    dir: Path
    rank: int             # number of this process, 0 if alone
    processes: int
    examples: list        # as in a Batch
    benchmarks: dict      # {name: problems} to test on
    tokenizer: object
    stop_ids: list        # tokens that end a response
    policy: object        # the model that is trained
    ref_policy: object    # the model as it was at first, or None
    sampler: object       # the policy or, on CUDA, its bf16 copy
    optimizer: object
    parts: dict           # {name: object whose state is saved}; labs/ppo.py adds some
    facts: dict           # in config.json beside the settings
    resumed_at: int = 0   # last step of earlier calls
    started: float = 0.0  # when this call's first step began
    tested: tuple = ()    # steps that were evaluated
    lock: object = None   # keeps other processes out of the folder

def set_up(config) -> Run:
    """Load and check all that a run needs; write nothing into its folder yet."""
    refuse_to_overwrite(config)
    examples, benchmarks = load_examples(config.example, config.answer), {}
    rank, processes = start_processes()
    if config.eval_every and rank == 0:
        from evaluate import load_benchmarks  # here, as evaluate.py imports this file
        benchmarks = load_benchmarks(config.eval)
    if config.prompts_per_step % (config.updates_per_batch * processes):
        fail(f"--prompts-per-step {config.prompts_per_step}: it must be a multiple of {processes} "
             f"processes times --updates-per-batch {config.updates_per_batch}")
    policy, tokenizer = load_model(config.model)
    for example in examples:
        example["prompt"] = encode_prompt(tokenizer, example["problem"] + TRAIN_SUFFIX)
    stop_ids = find_stop_ids(tokenizer, policy.generation_config)
    if not stop_ids:
        fail(f"--model {config.model}: it names no token that ends a response")
    short = [example for example in examples if len(example["prompt"]) <= config.max_prompt_tokens]
    if len(short) < len(examples):
        print(f"{len(short)} of {len(examples)} prompts have at most {config.max_prompt_tokens} tokens")
    if not short:
        fail(f"--max-prompt-tokens {config.max_prompt_tokens}: no prompt is that short")
    prompts = [example["prompt"] for example in short]
    check_prompts(policy, prompts, len(prompts) * [config.max_response_tokens])
    check_head(policy, prompts[0])
    ref_policy, sampler, optimizer = prepare_training(policy, config)
    return Run(config, Path(config.output_dir), rank, processes, short, benchmarks, tokenizer, stop_ids,
               policy, ref_policy, sampler, optimizer, {"policy": policy, "optimizer": optimizer}, {})

def steps_to_make(run):
    """Start or resume; yield the steps that are left; between two save, evaluate, heed Ctrl-C."""
    pressed = []

    def on_ctrl_c(*_):  # half a step would be worse than a wait
        print("\nstopping after this step; Ctrl-C again stops at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.append(True)

    start_or_resume(run)
    handler = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        for done in range(run.resumed_at, run.config.steps + 1):
            stopping = sum_over_processes(torch.tensor(len(pressed), device=run.policy.device)) > 0
            if run.rank == 0:
                after_step(run, done, stopping)
            if stopping:
                sys.exit(130)
            if done < run.config.steps:
                yield done + 1
    finally:
        signal.signal(signal.SIGINT, handler)

def sample_rollouts(run, step) -> Batch:
    """Steps 1 to 3, for this process's share of the groups."""
    config, G, started = run.config, run.config.group_size, time.time()
    share = slice(run.rank, None, run.processes)  # in turn: updates have the same groups on any number
    # 1. Example
    groups = examples_of_step(step, len(run.examples), config.prompts_per_step, config.seed)[share]
    examples = [run.examples[i] for i in groups for _ in range(G)]
    prompts = [example["prompt"] for example in examples]
    # 2. Rollouts; noise depends on (seed, step) alone: a resumed run samples the same
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + step)  # distinct for each pair
    noise = torch.rand(config.prompts_per_step, G, config.max_response_tokens, dtype=torch.float64,
                       generator=generator)[share].flatten(0, 1)
    responses, sampler_logprobs = generate(
        run.sampler, prompts, max_response_tokens=config.max_response_tokens, temperature=config.temperature,
        stop_ids=run.stop_ids, slots=config.slots, noise=noise, return_logprobs=True,
        cuda_graph=config.cuda_graph and run.policy.device.type == "cuda")
    # 3. Reward
    texts = run.tokenizer.batch_decode(responses, skip_special_tokens=True)
    rewards = [reward_of(text, example["answer"], config.reward)
               for text, example in zip(texts, examples)]
    return Batch(examples, prompts, responses, texts, rewards, sampler_logprobs, time.time() - started)

def log_step(run, step, batch, advantages, stats, update_seconds):
    """Print the step; add rows to metrics.jsonl and samples.jsonl."""
    rollouts = gather_groups(describe_rollouts(run, batch, advantages), run.config.group_size)
    if run.rank:
        return
    seconds_a_step = (time.time() - run.started) / (step - run.resumed_at)
    row = {"step": step, **summarize(rollouts, run.config.group_size), **stats,
           "tokens_per_second": sum(rollout["tokens"] for rollout in rollouts) / batch.seconds,
           "sample_seconds": batch.seconds, "update_seconds": update_seconds,
           "eta_seconds": seconds_a_step * (run.config.steps - step),
           "memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    rewards = [rollout["reward"] for rollout in rollouts]
    shown = [rollouts[i] for i in sorted({0, np.argmax(rewards), np.argmin(rewards)})]
    print_step(row, run.config.steps, shown[step // 10 % len(shown)])  # the first, a best, a worst in turn
    append_rows(run.dir / "metrics.jsonl", [row])
    append_rows(run.dir / "samples.jsonl", [{"step": step, **rollout} for rollout in shown])

def main(argv=None):
    config = parse_args(argv)
    run = set_up(config)
    for step in steps_to_make(run):  # between two steps: save, evaluate, stop
        # 1. Example, 2. Rollouts, 3. Reward
        batch = sample_rollouts(run, step)
        started = time.time()
        # 4. Advantages
        advantages = group_advantages(batch.rewards, config.group_size, config.scale_rewards)  # (N,)
        # 5. Loss, 6. Update
        stats = train_on(run.policy, run.ref_policy, run.optimizer, batch, advantages, config)
        copy_weights(run.policy.parameters(), run.sampler.parameters())
        log_step(run, step, batch, advantages, stats, time.time() - started)

# -- A. The command line, and what a person sees -------------------------------
LEAST = {"temperature": 1e-30, "learning_rate": 1e-30, "grad_clip": 1e-30, "clip_eps": 1e-30,
         "eval_every": 0, "seed": 0, "weight_decay": 0, "group_size": 2}  # one has no spread
KEPT = ("preset", "model", "example", "answer", "max_prompt_tokens", "seed")  # by --resume

def fail(sentence):
    """Bad input ends with one sentence and exit code 2; a traceback would bury it."""
    if is_first_process():
        print("error:", " ".join(sentence.split()), file=sys.stderr)
    sys.exit(2)

def as_a_command(main):
    """Run a script's main(); what goes wrong around it is one sentence, too."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace", line_buffering=True)  # some consoles lack letters
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; what was saved is whole; to go on repeat the command, in training "
              "with --resume")
        sys.exit(130)
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("error: out of memory; try fewer --slots or, in training, a lower --token-budget, "
                 "--activation-checkpointing or --offload-optimizer")
    except Timeout as error:
        fail(f"{error.lock_file} is in use by another process; wait, or stop it")
    except OSError as error:
        fail(f"{error}; what was written before is whole")

def make_parser(doc, **options):
    """A parser with the script's docstring for help, whose errors are one sentence."""
    parser = argparse.ArgumentParser(description="\n\n".join(doc.split("\n\n")[:3]), allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.error = fail
    return parser

def add_flags(parser, settings):
    """A flag for each field of a dataclass, in groups, with its comment as help."""
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+"}}
    source = inspect.getsource(settings)
    for title, name, text in re.findall(r"(?m)^ {4}(?:# (.*)|(\w+): .*? {2}# (.*))", source):
        if title:
            group = parser.add_argument_group(title)
            continue
        f = settings.__dataclass_fields__[name]
        choices = get_args(f.type)  # of a Literal
        kind = kinds.get(f.type, {"choices": choices} if choices else {"type": f.type})
        default = "" if f.default in ("", (), None) else f" (default: {f.default})"
        group.add_argument(flag_of(name), default=f.default, help=text + default, **kind)

def flag_of(name) -> str:
    return "--" + name.replace("_", "-")

def check_numbers(settings, least):
    """Refuse numbers that would do nothing, or something else than they say."""
    for name, value in settings.items():
        lowest = least.get(name, 1 if type(value) is int else -1e9)
        highest = math.inf if name == "grad_clip" else 1e9  # inf: do not clip
        if type(value) in (int, float) and not lowest <= value <= highest:
            fail(f"{flag_of(name)} {value}: use a number from {lowest:g} to {highest:g}")

def words_of(argv) -> list:
    """Words of a command line: --group-size for --group_size, the home for ~/, no label as a flag."""
    line = "".join(f"\0{word}" for word in (sys.argv[1:] if argv is None else argv))
    line = line.replace("\0--answer\0", "\0--answer=")  # it may begin with a minus
    line = re.sub("\0--[a-z_-]+", lambda flag: flag[0].replace("_", "-"), line)
    path = re.compile("(?s)(--(?!answer=)[a-z-]+=|^)(~.*)")
    return [path.sub(lambda m: m[1] + os.path.expanduser(m[2]), word) for word in line.split("\0")[1:]]

def parse_args(argv=None) -> Config:
    """The command line; what it lacks is the preset's or, with --resume, the saved run's."""
    parser = make_parser(__doc__, usage="%(prog)s [flags]", epilog="[P]: paper; [C]: its code")
    add_flags(parser, Config)
    words = words_of(argv)
    parser.set_defaults(**PRESETS[parser.parse_args(words).preset])
    given = parser.parse_args(words)
    examples = "+".join(Path(name).stem for name in given.example)
    folder = given.output_dir or f"runs/{examples}-{Path(os.path.abspath(given.model)).name}"
    if given.resume:
        if not Path(folder, "config.json").exists():
            fail(f"--resume: {folder} holds no config.json; give the run's --output-dir")
        saved = read_json(Path(folder, "config.json"), *KEPT)
        for f in fields(Config):  # numbers as words, for argparse to check
            value = saved.get(f.name, f.default)
            parser.set_defaults(**{f.name: str(value) if f.type in (int, float) else value})
            if value not in (get_args(f.type) or [value]):  # argparse checks no default's choices
                choices = ", ".join(get_args(f.type))
                fail(f"{folder}/config.json: {f.name} {value!r} is none of {choices}")
        given = parser.parse_args(words)
        for name in KEPT:
            if (value := getattr(given, name)) != saved[name]:
                fail(f"{flag_of(name)} {value}: a resumed run keeps {saved[name]}")
    config = Config(**{**vars(given), "output_dir": folder})
    check_numbers(asdict(config), LEAST)
    if bool(config.eval_every) != bool(config.eval) and not (config.resume and config.eval):
        fail(f"--eval-every {config.eval_every} --eval {' '.join(config.eval)}: give both or none")
    return config

def progress_bar(*args, **options):
    """Shown by the first process; miniters=0: it moves also while nothing ends."""
    return tqdm(*args, **options, leave=False, miniters=0, disable=not is_first_process() or None)

def describe_prompt(tokenizer, prompt, stop_ids) -> str:
    ends = ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in stop_ids)
    return f"{textwrap.indent(tokenizer.decode(prompt), '    | ')}\na response ends at {ends}"

STEP_LINE = """\
step {step}/{steps}  reward {reward:.3f}  dead {dead_groups:.2f}  len {response_length:.0f}
trunc {truncated_frac:.2f}  entropy {entropy:.3f}  kl {kl:.4f}  loss {loss:+.4f}
grad {grad_norm:.2f}  ratio {ratio:.3f}  gap {sampler_gap:.4f}  {tokens_per_second:,.0f} tok/s
sample {sample_seconds:.1f}s  update {update_seconds:.1f}s  {memory}eta {eta}""".replace("\n", "  ")

def print_step(row, steps, rollout):
    """One line a step and, after steps 1, 11, 21, ..., a rollout."""
    memory = f"{row['memory_gb']:.1f}GB  " if row["memory_gb"] else ""  # on CUDA
    eta = tqdm.format_interval(row["eta_seconds"])
    print(STEP_LINE.format(**row, steps=steps, memory=memory, eta=eta))
    if row["dead_groups"] == 1 and row["pg_loss"] == 0:
        print("  all groups are dead: only KL, entropy, weight decay and momentum act")
    if row["step"] % 10 == 1:
        text = re.sub("(?s)(.{400}).{100,}(.{400})", r"\1\n[...]\n\2", rollout["text"])
        print("a rollout to {example}: reward {reward:.0f}, advantage {advantage:+.2f}, "
              "{tokens} tokens".format(**rollout), textwrap.indent(text, "    | "), sep="\n")

# -- B. Files: examples, logs, checkpoints -------------------------------------
def read_json(path, *keys):
    """A JSON file; with keys it must be an object that has them."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without a BOM
        if keys and not (isinstance(value, dict) and value.keys() >= {*keys}):
            raise ValueError(f"it has no {', '.join(keys)}")
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path}: cannot be read as the JSON that is wanted here ({error})")
    return value

def read_jsonl(path) -> dict:
    """{line number: row}, without blank lines."""
    rows, place = {}, path
    try:
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            place = f"{path}, line {number}"
            if text := line.decode("utf-8-sig").strip():
                rows[number] = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{place}: cannot be read as JSON in UTF-8 ({error})")
    return rows

def read_log(path) -> list:
    """The rows of a .jsonl file that may still be growing, or not be there yet."""
    rows = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else ():
        with contextlib.suppress(ValueError, RecursionError):  # blank, or cut short
            rows.append(json.loads(line.decode("utf-8-sig", errors="replace")))
    return [row for row in rows if isinstance(row, dict)]

def load_examples(names, answer="") -> list:
    """Names in examples.json and .json/.jsonl files -> [{"name", "problem", "answer"}]."""
    known, examples = read_json(Path(__file__).resolve().with_name("examples.json")), {}
    for source in names:
        if source.endswith(".jsonl"):
            rows = read_jsonl(source)
        elif source in known:
            rows = {1: known[source]}
        elif source.endswith(".json"):  # an example, or a list of them
            rows = read_json(source)
            rows = dict(enumerate(rows if isinstance(rows, list) else [rows], 1))
        else:
            fail(f"--example {source}: give a .jsonl file, or one of {', '.join(known)}")
        for number, row in rows.items():
            row = row if isinstance(row, dict) else {}
            problem, label = row.get("problem"), answer or row.get("answer")
            # a list, true, or NaN, which is not equal to itself, could never be right
            known_type = type(problem) is str and type(label) in (str, int, float)
            if not (known_type and problem and label == label):
                fail(f'--example {source}, row {number}: it needs a "problem" and an "answer"')
            name = str(row.get("name", Path(source).stem + f"-{number}" * (len(rows) > 1)))
            if name in examples:
                fail(f"--example {source}: {name} is there twice; rename one")
            examples[name] = {"name": name, "problem": problem, "answer": str(label)}
    answers = [example["answer"].strip() for example in examples.values()]
    if not any(answers) or answer and len(answers) > 1:
        fail(f"--example {' '.join(names)}: there must be one with an answer, and with --answer just one")
    return list(examples.values())

@contextlib.contextmanager
def atomically(path):
    """Yield path.tmp to write to, then rename it: path is whole, even if we are killed."""
    temporary = Path(f"{path}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:  # a full disk raises many kinds
        raise OSError(f"{path}: cannot be written; perhaps the disk is full ({error})") from error

def write_json(path, value):
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")  # ASCII, whatever is in it

def append_rows(path, rows, mode="a"):
    with open(path, mode, encoding="utf-8", errors="backslashreplace") as file:  # half an emoji
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

def keep_rows(path, wanted=lambda row: True) -> list:
    """Drop a cut line and unwanted rows, which are made again -> the rows left."""
    rows = list(filter(wanted, read_log(path)))
    with atomically(path) as temporary:
        append_rows(temporary, rows, mode="w")
    return rows

def save_model(folder, model, tokenizer):
    with atomically(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

def refuse_to_overwrite(config):
    """No run may be lost to another one that is begun in its folder."""
    ours = ("config.json", "metrics.jsonl", "samples.jsonl", "latest", "step-*")
    left = [path for name in ours for path in Path(config.output_dir).glob(name)]
    if left and not config.resume:
        fail(f"{left[0]} is of another run: --resume that, or name another --output-dir")

def start_or_resume(run):
    """Lock the folder, load a checkpoint, drop the log of steps made again."""
    config, prompt = run.config, run.examples[0]["prompt"]
    if run.rank == 0:  # two writers would mix their rows
        run.lock = FileLock(run.dir / "lock", timeout=0).acquire()  # makes the folder
        refuse_to_overwrite(config)  # again: one may have begun while we loaded the model
    path = run.dir / "latest" / "state.pt"
    if path.exists() or any(run.dir.glob("step-*")):  # a step's comes after its checkpoint
        try:
            # mapped, several processes share one copy; but Windows cannot replace a mapped file
            state = torch.load(path, "cpu", weights_only=True, mmap=run.processes > 1)
            run.resumed_at = state.pop("step")
            if state.keys() != run.parts.keys():
                raise ValueError(f"it holds {', '.join(state)}")
            for name, part in run.parts.items():
                part.load_state_dict(state[name])
        except Exception as error:  # a damaged file raises many kinds
            fail(f"--resume: {path} cannot be loaded ({error!r}); use --model with a step's folder")
    if run.resumed_at > config.steps:
        fail(f"--steps {config.steps}: the run is at step {run.resumed_at} already")
    group = run.optimizer.param_groups[0]
    group.update(lr=config.learning_rate, weight_decay=config.weight_decay)  # as given, not as saved
    for copies in (group["params"], run.sampler.parameters()):  # only the policy's are saved
        copy_weights(run.policy.parameters(), copies)
    if run.rank == 0:
        path = run.dir / "config.json"
        kept = [[example["prompt"], example["answer"]] for example in run.examples]
        crc32 = zlib.crc32(json.dumps(kept).encode())
        if config.resume and read_json(path).get("examples_crc32", crc32) != crc32:
            fail(f"--example {' '.join(config.example)}: prompt or answer is not what it was")
        write_json(path, {
            **asdict(config), **run.facts, "device": str(run.policy.device),
            "processes": run.processes, "stop_ids": run.stop_ids, "examples_crc32": crc32,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "prompt": run.tokenizer.decode(prompt)})
        for name in ("samples.jsonl", "metrics.jsonl"):
            rows = keep_rows(run.dir / name, lambda row: row.get("step") in range(run.resumed_at + 1))
        run.tested = {row["step"] for row in rows if "eval" in row}  # of metrics.jsonl
        print(f"all settings are in {path}; the prompt is\n",
              describe_prompt(run.tokenizer, prompt, run.stop_ids),
              "\nWatch reward, not loss: README.md says why, and what is printed", sep="\n")
    run.started = time.time()

def after_step(run, done, stopping):
    """What is due after a step: a checkpoint to resume at, a model folder, a test."""
    config, folder = run.config, run.dir / f"step-{done:06d}"
    last = done == config.steps
    due = done > 0 and (done % config.save_every == 0 or last)
    if done > run.resumed_at and (due or stopping):
        (run.dir / "latest").mkdir(exist_ok=True)
        with atomically(run.dir / "latest" / "state.pt") as temporary:
            states = {name: part.state_dict() for name, part in run.parts.items()}
            torch.save({"step": done, **states}, temporary)
    if due and not folder.exists():  # in this order: a step with a folder is never made again
        save_model(folder, run.sampler, run.tokenizer)  # on CUDA bf16: half the disk
    if stopping:
        print(f"stopped, and saved step {done}; go on with\n    "
              + shlex.join(["python", sys.argv[0], "--output-dir", str(run.dir), "--resume"]))
    elif config.eval_every and done not in run.tested and (done % config.eval_every == 0 or last):
        from evaluate import quick_scores
        scores = quick_scores(run.sampler, run.tokenizer, run.benchmarks, config)
        print(f"eval {done}/{config.steps}", *(f" {name} {x:.3f}" for name, x in scores.items()))
        append_rows(run.dir / "metrics.jsonl", [{"step": done, "eval": scores}])
    if last:
        preset = " --preset tiny" if config.preset == "tiny" else ""
        print(f"done: {folder} is a Hugging Face model folder; measure it with\n"
              f"    python evaluate.py{preset} --model {shlex.quote(str(folder))}")

def describe_rollouts(run, batch, advantages) -> list:
    return [{"example": example["name"], "reward": reward, "advantage": round(float(advantage), 4),
             "correct": is_correct(text, example["answer"]), "boxed": has_box(text),
             "tokens": len(response), "truncated": response[-1] not in run.stop_ids, "text": text}
            for example, reward, advantage, text, response
            in zip(batch.examples, batch.rewards, advantages, batch.texts, batch.responses)]

def summarize(rollouts, group_size) -> dict:
    """A step's rollouts in numbers: the first part of its row in metrics.jsonl."""
    def mean(key, name=None):
        return float(np.mean([row[key] for row in rollouts if name in (None, row["example"])]))
    names = sorted({row["example"] for row in rollouts})
    groups = np.reshape([row["reward"] for row in rollouts], (-1, group_size))  # (N/G, G)
    return {"reward": mean("reward"), "accuracy": mean("correct"), "boxed_frac": mean("boxed"),
            "response_length": mean("tokens"), "truncated_frac": mean("truncated"),
            "dead_groups": float((groups.max(1) == groups.min(1)).mean()),
            "examples": {name: mean("correct", name) for name in names}}

# -- C. Models, and several processes ------------------------------------------
def load_model(name, dtype=torch.float32):
    """Model and tokenizer of a Hugging Face id or folder, on the GPU if there is one."""
    make_tiny_base(name)
    if dist.is_initialized():
        dist.barrier()  # until the first has built it
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    except Exception as error:  # a folder can be broken in a dozen ways
        fail(f"--model {name}: cannot be loaded, as a folder or from the hub ({error})")
    missing = sorted(report["missing_keys"]) + ["a tokenizer"] * (not tokenizer("1").input_ids)
    if missing:  # transformers would go on with random weights, or read nothing
        fail(f"--model {name}: its files lack {missing[0]}")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer

def make_tiny_base(name):
    if name == TINY_BASE and not Path(name).exists() and is_first_process():
        from labs import tiny
        tiny.build_base(name)  # no download: built at its first use

def check_prompts(model, prompts, limits):
    """Refuse a model that does not see a whole rollout, or lacks tokens of its tokenizer."""
    name, config = model.config._name_or_path, model.config.get_text_config()
    length = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
    slides = "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"])
    for limit in ("max_position_embeddings", *["sliding_window"] * slides):
        seen = getattr(config, limit, None)
        if seen and seen < length:
            fail(f"--max-response-tokens: --model {name} sees {seen} of a rollout's {length} tokens")
    if max(map(max, prompts), default=0) >= model.get_input_embeddings().num_embeddings:
        fail(f"--model {name}: its tokenizer has more tokens than it has embeddings")

@torch.no_grad()
def check_head(model, prompt):
    """Refuse a model whose logits are not just its head's: section 5 would score another."""
    name, ids = model.config._name_or_path, torch.tensor([prompt], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    of_head, logits = model.get_output_embeddings()(hidden), model(input_ids=ids).logits
    if not logits.isfinite().all():
        fail(f"--model {name}: its logits are not finite; are its weights damaged?")
    if not torch.allclose(of_head, logits, rtol=1e-3, atol=1e-3):
        fail(f"--model {name}: it caps or scales its logits, unlike section 5")

def uses_bf16(device, config) -> bool:
    return config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"

def frozen_copy(model, bf16):
    """A copy not to be trained. Its buffers stay fp32: in bf16, far positions would be blurred."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for param in twin.parameters() if bf16 else ():
        param.data = param.data.bfloat16()
    return twin

def prepare_training(policy, config) -> tuple:
    """A policy's reference (None without KL), sampler and optimizer."""
    weights = policy.parameters()
    # fp32: under autocast, as the policy is, its KL to an equal policy is exactly 0
    ref_policy = frozen_copy(policy, bf16=False) if config.kl_coef else None
    sampler = frozen_copy(policy, bf16=True) if uses_bf16(policy.device, config) else policy
    if config.offload_optimizer:
        weights = [param.detach().to("cpu", copy=True) for param in weights]
    optimizer = torch.optim.AdamW(weights, config.learning_rate, weight_decay=config.weight_decay)
    for model in {policy, ref_policy, sampler} - {None} if config.compile else ():
        compile_layers(model)  # after the copies
    if config.activation_checkpointing:
        recompute_layers(policy)
    return ref_policy, sampler, optimizer

def compile_layers(model):
    """torch.compile each decoder layer, not the model: one is compiled, and all use it."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # a layer's number is no constant
    torch._dynamo.config.recompile_limit = 32  # beyond it a layer runs as it is
    torch.fx.experimental._config.use_duck_shape = False  # two equal lengths are so by chance
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=compile_aloud)

def compile_aloud(graph, inputs):
    """torch.compile's backend, but it reports, and what does not compile runs as it is."""
    started = time.time()
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except torch._dynamo.exc.RestartAnalysis:  # no error: it begins again
        raise
    except Exception as error:
        print(f"a layer cannot be compiled, and runs as it is ({str(error).strip().splitlines()[0]})")
        return graph.forward
    finally:
        print(f"compiling a layer took {time.time() - started:.0f} s")

def layers_of(model):
    found = getattr(model.base_model, "layers", None)
    return found or fail("--compile, --activation-checkpointing: layers of this model are not found")

def recompute_layers(model):
    """For backward keep only each layer's input; transformers' switch needs train mode."""
    for layer in layers_of(model):
        # nothing here is random, and a CUDA graph must not ask for the random state
        layer.forward = functools.partial(recompute_in_backward, layer.forward,
                                          use_reentrant=False, preserve_rng_state=False)

def optimizer_step(policy, optimizer):
    """AdamW on fp32 weights: the policy's or, with --offload-optimizer, copies on the host."""
    masters = optimizer.param_groups[0]["params"]
    for param, master in zip(policy.parameters(), masters):
        if master is not param:
            master.grad, param.grad = param.grad.to(master.device), None
    optimizer.step()
    optimizer.zero_grad()
    copy_weights(masters, policy.parameters())

@torch.no_grad()
def copy_weights(sources, targets):
    for source, target in zip(sources, targets):
        target.copy_(source)  # to any device and precision; onto itself, nothing

def is_first_process() -> bool:
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"

def start_processes() -> tuple:
    """(number of this process, how many there are): by torchrun one a GPU, else (0, 1)."""
    if not dist.is_torchelastic_launched():  # a shell may have left a RANK behind
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=datetime.timedelta(days=1))  # the others wait while 0 tests
    atexit.register(dist.destroy_process_group)  # or its threads may abort when Python ends
    if not is_first_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # not stderr, where its errors go
    return dist.get_rank(), dist.get_world_size()

def sum_over_processes(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)  # in place: gradients, for one, so that all make the same step
    return tensor

def gather_groups(rollouts, group_size) -> list:
    """All processes' rollouts in the order of the groups, which were dealt out in turn."""
    if not dist.is_initialized():
        return rollouts
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rollouts)
    return np.reshape(parts, (len(parts), -1, group_size)).swapaxes(0, 1).flatten().tolist()

# -- D. A decode step at the speed of a GPU ------------------------------------
def step_by_graph(cache, n, filled):
    """cache.step(n, filled) as a CUDA graph, which launches all its kernels in one go.

    One by one, Python launches the 800 kernels more slowly than a GPU runs them. A graph repeats
    them on the same memory, in fixed shapes: all keys, and all slots of the cache, a half, a quarter
    or an eighth of them; those from n on are computed for nothing.
    """
    size = min(size for part in (1, 2, 4, 8) if (size := -(-cache.slots // part)) >= n)
    if size in cache.graphs:
        return cache.graphs[size]()[:, :n]
    first, reads_ragged = not cache.graphs, can_read_ragged(cache.model)
    if first:  # to check it
        cache.step(n, filled)
        expected = cache.logits.softmax(-1)
    if reads_ragged:
        AttentionInterface.register("ragged", ragged_attention)
        cache.model.set_attn_implementation("ragged")

    def step():
        ragged = {"keys_used": cache.newest[1, :size].int() + 1} if reads_ragged else {}
        return cache.step(size, cache.length, **ragged)
    drawn = step()  # what libraries set up at first must not be captured
    cache.graphs[size] = step
    if cache.model.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = step()
        cache.graphs[size] = lambda: graph.replay() or drawn  # replay() returns None
        cache.graphs[size]()
    if first and (cache.logits[:n].softmax(-1) - expected).abs().sum(-1).mean() > 0.5:
        fail("the CUDA graph does not compute what the model does; go on with --no-cuda-graph")
    return drawn[:, :n]

# what torch.nn.attention.varlen calls, which takes seqused_k itself only from torch 2.12 on
flash_attention = torch.ops.aten._flash_attention_forward

def ragged_attention(module, query, key, value, attention_mask, keys_used=None, **kwargs):
    """sdpa, but a decode step on CUDA reads only each row's first keys_used (n,) keys."""
    if keys_used is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # with a mask, each row would read as many as the longest: most of the memory traffic
    n, _, length, _ = key.shape
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # (n * length, ...)
    rows = torch.arange(n + 1, device=query.device, dtype=torch.int32)
    output, *_ = flash_attention(
        query.squeeze(2), key, value, rows, length * rows, 1, length, 0.0, False,
        return_debug_mask=False, scale=kwargs.get("scaling"), seqused_k=keys_used)
    return output[:, None], None  # (n, 1, heads, head size)

def can_read_ragged(model) -> bool:
    """Flash attention needs half precision, and a GPU of the Ampere generation or later."""
    half = model.device.type == "cuda" and model.dtype.itemsize == 2
    return half and torch.cuda.get_device_capability() >= (8, 0)

# -- E. When are two answers the same? -----------------------------------------
FUNCTIONS = {name: getattr(cmath, name) for name in "sin cos tan sinh cosh tanh exp".split()} | {
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "log": cmath.log10,
    "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x)}
LETTER = (r"(?:[A-Za-z]|\\(?:var)?(?:alpha|beta|[Gg]amma|[Dd]elta|epsilon|zeta|eta|[Tt]heta|kappa|[Ll]ambda|"
          r"mu|nu|xi|pi|rho|[Ss]igma|tau|[Pp]hi|chi|[Pp]si|[Oo]mega|hbar|ell|d?dot)\b ?)")
GROUP = r"{((?:[^{}]|{[^{}]*})*)}"  # braces and what is in them
# {spelling: what says the same}; what parts elements is one character
SYNONYMS = {word: spelling for spelling, words in {
    "-": "− –", "*": "· × cdot times ast", "<=": "≤ le leq leqslant", ">=": "≥ ge geq geqslant",
    "≠": "≠ ne neq", "∪": "∪ cup", "±": "± pm", "¶": "\\", "|": "vert lvert rvert", "\\pi ": "π",
    "\\mu ": "µ μ", "\\AA ": "Å", "\\infty ": "∞", "\\degree ": "°", "^{2}": "²", "^{3}": "³",
    "\\frac {1}{2}": "½", "\\frac {1}{4}": "¼", "\\frac ": "dfrac tfrac cfrac", "\\binom ": "dbinom tbinom",
    "\\text ": "mbox unit mathrm mathit operatorname textbf textit textrm"}.items() for word in words.split()}
# One spelling for what can be spelled in several ways. Each row relies on those above.
SPELLINGS = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in [
    # no full stop; a dollar sign is a unit, or it delimits mathematics; bold letters are letters
    (r"(?<!\.)\.( *}?\$?) *$", r"\1"), (r"^ *([-−–]?) *\\?\$ *([0-9][^A-Za-z$]*)$", r"\1\2\\text{dollar}"),
    (rf"\\(?:mathbf|boldsymbol|bm) *{GROUP}", r" \1"),
    # thousands as in 1{,}234 and 1,\!234; what is not seen is a space; bare names become commands
    (r"(?<=[0-9])(?:\{,}|, *\\!|\\,) *(?=[0-9]{3}(?![0-9]))", ""),
    (r"\\?\$|~|\s+|\\(?:left|right)\.|(?<!\\)\\(?:[,;:!> ()\[\]]|$|"
     r"(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad)(?![A-Za-z]))", " "),
    (rf"(?:\bnp\.)?(?<![A-Za-z\\])(pi|and|or|{'|'.join(FUNCTIONS)})(?![A-Za-z])", r"\\\1 "),
    # no space beside a sign, but one behind every command, so that each is read to its end
    ("√ ?([0-9]+)", r"\\sqrt{\1}"), ("!=", "≠"), (r"^ +| +(?= |$)| *([^\w ,]) *", r"\1"),
    (r"\\(\\|[A-Za-z]+) ?|[^\0-\x7f]", lambda m: SYNONYMS.get(m[1] or m[0], m[0].strip() + " ")),
    # the braces that fractions, roots, powers and fonts need; upright numbers, i, e, indices are plain
    (r"\\(frac|sqrt|d?dot|text) (\w|\\pi ) ?", r"\\\1 {\2}"), (r"(\\frac {[^{}]*})(\w|\\pi ) ?", r"\1{\2}"),
    (r"\^{?\\prime }?", "'"), (r"(?<=_)(\w)|(?<=\^)(-?[0-9.]+|[A-Za-z])", r"{\1\2}"),
    (r"\\text {([ie]|[^A-Za-z_{}]+|,?\\(?:and|or) )}|(?<=_{)\\text {([^{}]*)}(?=})", r"\1\2"),
    (r"^\\text {([^{}]*[^A-Za-z(){} ][^{}]*)}$", r"\1"),
    # thousands as in 1,234: alone or in a fraction, for (1,234) and 2,4 are lists
    (r"(?:^(?:\\?\w[^,]*=)?[^0-9,(\[{]*|/|\\frac {|(?<=[0-9]}{))[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])"
     r"(?=[^,]*$|})", lambda m: m[0].replace(",", "")),
    # "and", "or" and ";" part lists; (n)2 is a product; x \in [1,2] is a name; the smaller side first
    (r" ?(?:;|,? ?\\(?:and|or) |,) ?", ","), (r"(?<=\))(?=[0-9])", "*"), (r"\\in (?=\\?[(\[{])", "="),
    (r"\\not =", "≠"), (r"^([^,<>]*)>(=?)([^,<>]*)$", r"\3<\2\1"), ("<=", "≤"), (r"¶\[[^],]*]", "¶"),
    (r"\^{?\\circ ?}?|\\degree ?", r"\\text {degree}"), (r"\\?%", r"\\text {percent}"),
    (r"[(\[]?\\begin {(?:[pb]?matrix|array)}(?:{[clr| ]*})?(.*?)¶?\\end {\w+}[)\]]?", r"{\1}")]]
# What may stand in front of a value: x=, f(3)=, V_{max}=, AB=, (x,y)=, \text{Area}=
NAME = (rf"(?:\({LETTER}+(?:,{LETTER}+)+\)|(?:(?:\\angle )?{LETTER} ?|_{{[^{{}}±≠]*}}|'|\\text {{"
        r"(?![^{}]*(?i:not\b|never|at most|at least|than\b|approx|minus|negative|illion))[A-Za-z ]+})++"
        r"(?:\([^()=±≠]*\))?)=(?!(?<=[A-Z]{2}=)[A-Z]{2})")

def equivalent(given, gold, rel_tol=0, any_order=True) -> bool:
    """Are two answers the same up to spelling, value and order of lists? Never raises or takes long."""
    if given == gold or max(len(given), len(gold)) > 400 or re.search(r"[({\[]{6}", given):
        return given == gold
    for pattern, replacement in SPELLINGS:
        given, gold = pattern.sub(replacement, given), pattern.sub(replacement, gold)
    with contextlib.suppress(RecursionError, OverflowError):  # 2^{2000} is too large for a float
        return same_answer(given, gold, (rel_tol, any_order))
    return False

@functools.lru_cache(4096)  # the elements of lists meet often
def same_answer(given, gold, rules) -> bool:
    """Have two answers in one spelling the same text, elements or value? rules: rel_tol, any_order."""
    (value, unit), (gold_value, gold_unit) = split_unit(given), split_unit(gold)
    # evelyn is \text{Evelyn} and c is \text{(C)}, but the letters m and M are two
    fold = str.lower if "\\text" in gold or len(gold) > 3 or gold.lower() in ("yes", "no") else str
    words = [fold(re.sub(r"\\text {([^{}]*)}", r"\1", text).strip(" (){}")) for text in (given, gold)]
    same = words[0] == words[1] and re.fullmatch("[A-Za-z][A-Za-z ]*", words[0])
    if same or (value, unit) == (gold_value, gold_unit):
        return given != ""
    (kind, parts), (gold_kind, gold_parts) = split_answer(given), split_answer(gold)
    if kind != gold_kind:
        # AB=5 is 5, and so is x=3+2=5, but it is not y=5; 4=5 is not 4, and MR=SRMC is not MR
        named, other = (given, gold) if kind == "=" else (gold, given)
        name = re.match(NAME, named)
        return bool(name) and all(same_answer(side, other, rules) for side in named[name.end():].split("="))
    if kind:
        return len(parts) == len(gold_parts) and (same_elements(kind, parts, gold_parts, rules)
                                                  or kind == "=" and proportional(parts, gold_parts, rules))
    # letters are random, small and large: what agrees for both is taken for equal
    return (not unit or not gold_unit or unit == gold_unit) and all(
        same_value(value_of(value, point), value_of(gold_value, point), rules) for point in (1, 3))

def same_elements(kind, given, gold, rules) -> bool:
    """Lists, sets and unions in any order, as are the sides of = and ≠; all else in its own."""
    free = kind in "=≠" or rules[1] and kind in ",∪"
    names = [{part.split("=")[0] for part in parts if "=" in part} for parts in (given, gold)]
    if not free or not all(names) and len(names[0] | names[1]) > 1:  # x=5, y=6 is not 6, 5
        return all(same_answer(*pair, rules) for pair in zip(given, gold))
    return all(len({sum(same_answer(part, other, rules) for other in among)
                    for among in (given, gold)}) == 1 for part in given)  # as often here as there

def proportional(given, gold, rules) -> bool:
    """Is an equation a multiple of another? Then so are the differences of their sides, everywhere."""
    x, y = ([value_of("({})-({})".format(*sides), point) for point in (1, 2, 3)] for sides in (given, gold))
    return len(given) == 2 and 0 not in (x[0], y[0]) and x[0] != x[1] and all(
        same_value(x[0] * y[point], y[0] * x[point], rules) for point in (1, 2))

def split_answer(text):
    r"""(kind, elements) of a matrix, tuple, interval, list, union or relation; ("", [text]) of a value."""
    match = re.fullmatch(r"\\?([(\[{])(.*?)\\?([)\]}])", text)
    if match and (parts := split_top(match[2], ",")):  # none in (a)/(b): its bracket closes early
        brackets = match[1] + match[3]
        if brackets == "{}" or brackets == "()" and len(parts) == 1:
            return split_answer(match[2])  # \{1,2\} is the list 1,2 and (C) is C
        return brackets, parts  # but (1,2) and [1,2] are no lists
    for separator in "¶&,∪≠≤<=":  # ¶ and & part a matrix
        parts = split_top(text, separator) if separator in text else [text]
        if separator == "," and (len(parts) > 1 or "=" not in text):
            parts = [part.replace("±", sign) for part in parts
                     for sign in ("+-" if part.count("±") == 1 else "±")]
        if len(parts) > 1:
            return separator, parts
    return "", [text]

def split_top(text, separator) -> list:
    """Split at separators outside all brackets; [] if brackets do not match or a part is empty."""
    depths = np.cumsum([(sign in "([{") - (sign in ")]}") for sign in text + " "])
    signs = ["\n" if sign == separator and depth == 0 else sign for sign, depth in zip(text, depths)]
    parts = "".join(signs).split("\n")
    return parts if min(depths) == depths[-1] == 0 and all(parts) else []

# A unit is made of these, or it is what is counted; "million" and "below zero" are none.
UNIT = r"(?:[munkcMG]|\\mu +)?(?:m|g|s|J|eV|W|Hz|V|A|N|Pa|L|mol|K|C|F|T|cal|pc)|/|\^{-?[0-9]}|h|\\AA|AU|rad"
WORDS = {word: unit or word for word, _, unit in (pair.partition(":") for pair in r"""meter:m metre:m
kilometer:km centimeter:cm gram:g second:s sec:s \sec:s minute:min hour:h year:yr inch:in inche:in
foot:ft feet:ft mile:mi pound:lb liter:L joule:J newton:N volt:V radian:rad per:/ in ft mi lb min yr
mph erg atm square cubic degree percent dollar cent unit apple box boxe child children coin day digit
distinct edge game gallon integer letter month move number ordered pair path people point real region
root row side solution step student team term triangle triple value vertice way week zero""".split())}
TAIL = rf"(?<=[0-9)}}\]i])(?: ?(?:(?:\*|\\mu )?\\text {GROUP}|\\AA |[A-Za-z]++|/)(?:\^{{-?[0-9]}})?){{1,9}}+$"

def split_unit(text) -> tuple:
    r"""(value without spaces but in \pi r and 4 5, unit): "m / s ^{2}" of 9.8 meters/s^2, None of 5."""
    match, unit = re.search(TAIL, text), None
    if match:
        words = [word if re.fullmatch(UNIT, word) else WORDS.get(word.lower().removesuffix("s")) for word in
                 re.findall(r"(?:\\mu +)?\\?[A-Za-z]+|\^{.+?}|[^ *{}]", match[0].replace("\\text {", " "))]
        letters = re.search("[A-Za-z]", re.sub(r"\\[a-z]+|[0-9]e(?=[-+0-9])", "", text[:match.start()]))
        # bare ones may be letters of a product: 6m, 2 k m, x^2 ms
        sure = "\\" in match[0] or not letters and re.search(r"[A-Za-z]{2}|m/s", match[0])
        if sure and all(words) and words[:1] != ["^{2}"]:
            text, unit = text[:match.start()], re.sub(r"square (\S+)", r"\1 ^{2}", " ".join(words))
    return re.sub(r"(\\[A-Za-z]+ |[0-9] (?=[0-9]))| ", r"\1", text).removeprefix("+"), unit

def same_value(x, y, rules) -> bool:
    """Fractions exactly, others to the eleventh digit; no long decimal is a root or has a pi."""
    denominators = [value.denominator for value in (x, y) if isinstance(value, Fraction)]
    if not rules[0] and (len(denominators) == 2 or max(denominators, default=1) >= 10**4):
        return x == y
    return cmath.isfinite(x) and cmath.isclose(x, y, rel_tol=rules[0] or 1e-11)

# A token is a number, a letter with its index, a command, or a sign
TOKEN = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?|"
                   r"(?:\\d?dot {[^{}]*}|\\[A-Za-z]+ ?|[A-Za-z])(?:_{[^{}]*}|')*|\S")
# {sign: how closely it binds, what it does}; between letters none is needed
SIGNS = {"+": (1, add), "-": (1, sub), "*": (2, mul), "/": (2, truediv), "": (3, mul), "^": (4, pow)}
CLOSING = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}

@functools.lru_cache(4096)
def value_of(text, point):
    """An expression's value: exact where it is rational, NaN where it is none or has two readings."""
    text = re.sub(r"^(-?)([0-9]+)(\\frac {[0-9]+}{[0-9]+}| [0-9]+/[0-9]+)$", r"\1(\2+\3)", text)
    odd = re.search(r"^[^\W\d]{3}$|(?<![\w\\{])([A-Za-z]{4}|[A-Z]{3})|\d\\frac {\d|{d[^-+]*}{d|d\w?/d", text)
    tokens = [] if odd else [str(point), *TOKEN.findall(text)[::-1]]  # from the end; the point below
    with contextlib.suppress(ArithmeticError, LookupError, TypeError, ValueError):
        value = parse(tokens)
        return value if len(tokens) == 1 else math.nan
    return math.nan

def parse(tokens, level=0):
    """The value of the next tokens, as far as their signs bind more closely than `level`."""
    value = atom_of(tokens)
    if tokens[-1] == "!" != tokens[-2]:  # n! is what no other n! is; n!! is nothing
        value = unknown(tokens.pop(), value)
    while True:
        token = tokens[-1]
        sign = "" if re.match(LETTER, token) else "*" if re.match(r"[(\[\\](?!r[fc])", token) else token
        binds, operation = SIGNS.get(sign, (0, None))
        if binds <= level:
            return value
        if sign == token:
            tokens.pop()
        # 1/2x is (1/2)x
        value = calculate(operation, value, parse(tokens, 3 if sign in "/^" else binds))

def atom_of(tokens):
    """A number, what is in brackets, a fraction, root or function's value, or a letter: a random number."""
    token = tokens.pop().strip()
    name, _, index = token.replace(" ", "").removeprefix("\\").partition("_")
    if token == "-":
        return calculate(sub, 0, parse(tokens, 2))
    if re.match("[0-9.]", token):
        return Fraction(token)
    if token in CLOSING:
        value = parse(tokens)
        if tokens.pop().strip() != CLOSING[token]:
            raise ValueError("brackets that do not match")
        return unknown(token, value) if token[0] == "\\" else value
    if name == "frac":
        return calculate(truediv, atom_of(tokens), atom_of(tokens))
    if name == "sqrt":
        degree = atom_of(tokens) if tokens[-1] == "[" else 2
        return calculate(pow, atom_of(tokens), Fraction(1) / degree)
    if name in FUNCTIONS and (name == "log" or not index):  # \sin^2 2x(x+1) is (\sin(2x))^2 (x+1)
        power = atom_of(tokens) if tokens[-1] == "^" and tokens.pop() else 1
        value = FUNCTIONS[name](atom_of(tokens) if tokens[-1] in CLOSING else parse(tokens, 2))
        value /= cmath.log10(value_of(index[1:-1], tokens[0])) if index else 1
        return calculate(pow, value, power if power > 0 else math.nan)
    if tokens[-1] in ("(", "[") and (name[0].isupper() or token[0] in "fgh" or tokens[-3] in (")", "]")):
        return unknown(token, atom_of(tokens))  # f(2x) is not 2f(x), but x(x+1) is a product
    if not re.match(LETTER, token):
        raise ValueError(f"{token} has no value")
    return {"\\pi": math.pi, "e": math.e, "i": 1j}.get(token) or unknown(token + tokens[0]) * int(tokens[0])

def unknown(name, *values):
    """A random fraction from 1 to 3, the same for the same name and values."""
    seed = [v if isinstance(v, Fraction | int) else f"{v.real:.9g} {abs(v + 9j):.9g}" for v in values]
    return Fraction(random.Random(f"{name} {seed}").randrange(10**6, 3 * 10**6), 10**6 + 3)

def calculate(operation, x, y):
    bits = [(v.numerator * v.denominator).bit_length() if isinstance(v, Fraction) else 0 for v in (x, y)]
    if (bits[0] * abs(y) if operation is pow else sum(bits)) > 10_000:
        raise OverflowError("a tower of exponents would fill the memory")
    return operation(x, y)

if __name__ == "__main__":
    as_a_command(main)
