r"""One-shot RLVR: reinforcement learning with a verifiable reward on ONE training example.

A language model learns to reason about mathematics from a single problem, because its answer can be
checked (Wang et al., arXiv 2504.20571). One file, for one GPU or a laptop, read from top to bottom.

    python one_shot_rlvr.py --example pi1 --model Qwen/Qwen2.5-Math-1.5B   # the paper's run, 80 GB
    python one_shot_rlvr.py --preset tiny                                  # the same on a laptop
    python one_shot_rlvr.py --preset tiny --kl-coef 0 --entropy-coef 0     # an ablation

The algorithm is GRPO. One step of training:
    1. Example      the one problem becomes one prompt, repeated as 128 groups of 8
    2. Rollouts     sample a response to each of the 1,024 prompts, at temperature 0.6
    3. Reward       1 if the last \boxed{...} of the response equals the answer, else 0
    4. Advantages   in each group of 8: (reward - mean) / std
    5. Loss         clipped policy gradient + 0.001 KL to the initial model - 0.001 entropy
    6. Update       one AdamW step; then again from 1, some 2,000 times
Sections 1 to 6 are these steps; section 7 ends with main(), the loop over them, and the tutorial.
Behind it stand A the command line, B files, C models and processes, D a GPU's decode step, E when two
answers are the same. [P] is from the paper, [C] from its code; README.md lists our differences.

Shapes: N rollouts a step (a prompt with a sampled response each), G a group, n at a time in the
sampler; B rows of a micro-batch, padded to L tokens, T of them response, M response tokens in all
rows; V vocabulary, H hidden size.
"""
import argparse
import ast
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
from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Literal, get_args

# before torch: its threads spin while they wait, for seconds a step beside a busy program
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

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


# -- 0. Settings: one flat dataclass, from which section A builds the command line -------

@dataclass
class Config:
    """Every setting and its flag; --help shows the comments. Config() is the paper's run on pi1."""
    # the run
    preset: Literal["paper", "24gb", "tiny"] = "paper"  # starting values; flags that are given win
    model: str = "Qwen/Qwen2.5-Math-1.5B"   # Hugging Face id or model folder to train
    output_dir: str = ""                    # folder of the run; empty means runs/EXAMPLE-MODEL
    resume: bool = False                    # go on with the run in --output-dir, with its own settings
    steps: int = 2000                       # training steps [P: B.4]
    seed: int = 0                           # seed of everything random
    save_every: int = 20                    # save a model folder and a checkpoint every so many steps [C]
    eval: tuple = ()                        # benchmarks of evaluate.py, or .jsonl files, to test on
    eval_every: int = 0                     # test every so many steps and at the end; 0 means never
    # 1. example
    example: tuple = ("pi1",)               # names in examples.json, or files of {problem, answer}
    answer: str = ""                        # label in place of the example's own [P: Table 5, rows 11-13]
    max_prompt_tokens: int = 1024           # longer prompts are left out [C]
    # 2. rollouts
    prompts_per_step: int = 128             # groups a step [C]
    group_size: int = 8                     # rollouts a group, whose mean is the baseline [C]
    max_response_tokens: int = 3072         # longest response [C]
    temperature: float = 0.6                # of sampling, and of every log-probability [C]
    slots: int = 320                        # rollouts that run at the same time; bounds memory
    cuda_graph: bool = True                 # launch a decode step's kernels in one go; nothing on a CPU
    # 3. to 5. reward, advantages, loss
    reward: Literal["answer", "format", "none"] = "answer"  # what earns 1: right answer, any box, nothing
    scale_rewards: bool = True              # divide advantages by the group's standard deviation
    pg_coef: float = 1.0                    # weight of the policy gradient [P: Table 5]
    clip_eps: float = 0.2                   # the ratio is clipped to 1 +- this [C]
    kl_coef: float = 0.001                  # weight of the KL; 0 loads no reference [P: Table 5]
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"      # the released code's low_var_kl is k3
    entropy_coef: float = 0.001             # weight of the entropy bonus; the paper writes -0.001 [P]
    loss_agg: Literal["token", "sequence"] = "token"    # mean over all tokens, or of each sequence first
    # 6. update
    updates_per_batch: int = 1              # optimizer steps on each batch of rollouts [C: 1, P: 8]
    learning_rate: float = 1e-6             # of AdamW, constant [C]
    weight_decay: float = 0.01              # of AdamW [C]
    grad_clip: float = 1.0                  # largest norm of the gradient [C]
    token_budget: int = 6144                # tokens of a micro-batch; bounds memory, changes no result
    activation_checkpointing: bool = False  # compute activations again in backward: less memory
    offload_optimizer: bool = False         # keep AdamW's 8 bytes a parameter in host memory
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of matrix products; auto: bf16 on CUDA
    compile: bool = False                   # fuse the small kernels of each layer: faster on a GPU

TINY_BASE = "runs/tiny-base"  # built by labs/tiny.py where it is first asked for
PRESETS = {
    "paper": {},
    "24gb": dict(prompts_per_step=32, max_response_tokens=2048, slots=64, kl_coef=0.0, token_budget=3072,
                 activation_checkpointing=True, offload_optimizer=True),
    "tiny": dict(model=TINY_BASE, example=("tiny-add",), steps=60, prompts_per_step=16,
                 max_response_tokens=64, slots=128, learning_rate=1e-4),
}


# -- 1. Example: from a problem to the tokens of a prompt --------------------------------

TRAIN_SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
EVAL_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
PROMPT_DATE = datetime.datetime(2024, 7, 26)  # some templates write today's: the prompt would drift
STRFTIME_NOW = "{% macro strftime_now(format) %}{{ format" + "".join(
    f".replace('%{letter}', '{PROMPT_DATE:%{letter}}')" for letter in "dmyYbBaAHMS") + " }}{% endmacro %}"

def render_chat(tokenizer, turns, **options) -> str:
    """Turns {"role", "content"} as text, by the model's chat template."""
    template = STRFTIME_NOW + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False,
                                         date_string=f"{PROMPT_DATE:%d %b %Y}", **options)

def encode_prompt(tokenizer, problem, system=None) -> list:
    """Token ids of a problem, as a user's message in the chat template; where there is none, as text.

    `system` is used if the template has that role; else its own system message holds.
    """
    text, user = problem, [{"role": "user", "content": problem}]
    try:
        if tokenizer.chat_template:
            text = render_chat(tokenizer, user, add_generation_prompt=True)
            with contextlib.suppress(Exception):  # some refuse a system message, others drop it
                turns = [{"role": "system", "content": system or ""}, *user]
                with_system = render_chat(tokenizer, turns, add_generation_prompt=True)
                text = with_system if system and system in with_system else text
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
    except Exception as error:  # a broken template, or half an emoji for a text
        fail(f"--model {tokenizer.name_or_path}: no prompt can be made of {problem[:40]!r} ({error})")
    if problem.strip() not in text:
        fail(f"--model {tokenizer.name_or_path}: its chat template leaves the problem out")
    if not tokenizer.chat_template and ids[-1:] == [tokenizer.eos_token_id]:
        ids.pop()  # after the end of text nothing is left to say
    return ids

def find_stop_ids(tokenizer, generation_config) -> list:
    """Every token that ends a response: EOS of tokenizer and configuration, and the end of a turn."""
    # a base model's configuration often names only the end of text, so a turn is rendered
    turn = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "[ANSWER]"}]
    ending = ""
    with contextlib.suppress(Exception):  # no template, or one that knows no assistant
        ending = render_chat(tokenizer, turn).partition("[ANSWER]")[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(ending, add_special_tokens=False).input_ids
    stop_ids = {*[i for i in ids if i in special][:1]}  # a later one may open the next turn
    for eos in (tokenizer.eos_token_id, generation_config.eos_token_id):
        stop_ids.update(eos if isinstance(eos, list) else [eos])
    return sorted(stop_ids - {None})

def examples_of_step(step, num_examples, prompts_per_step, seed) -> list:
    """Which example each group of step 1, 2, ... has: several take turns, in shuffled epochs."""
    places = range((step - 1) * prompts_per_step, step * prompts_per_step)
    # drawn from (seed, epoch), so that a resumed run draws the same
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_examples)
              for epoch in {place // num_examples for place in places}}
    return [int(orders[place // num_examples][place % num_examples]) for place in places]


# -- 2. Rollouts: sample responses, one token at a time, in a fixed number of slots ------

class KVCache:
    """Keys and values of the rollouts that run at the same time: each in a slot, at its own position.

    transformers' own caches keep one position for all. Its attention layers call update() alone: we
    pass a ready mask and position ids, so the model asks its cache for nothing else.
    """

    def __init__(self, model, slots, length, cuda_graph=False):
        self.model, self.slots, self.length, self.cuda_graph = model, slots, length, cuda_graph
        self.prompts, self.graphs = {}, {}  # {slot: the prompt that stands in it}; for section D
        self.stores = []  # keys and values: (layers, slots, length, heads, head size)
        # newest token of each slot, its position, temperature, noise: in place, for CUDA graphs
        self.newest = torch.zeros(4, slots, dtype=torch.float64, device=model.device)

    def update(self, keys, values, layer, *args, **kwargs):
        """Store keys and values (n, heads, q, head size) of q new tokens -> those of all so far."""
        if not self.stores:
            layers = self.model.config.get_text_config().num_hidden_layers
            # zeros, not empty: a masked NaN still poisons the sum over values, as 0 * NaN is NaN
            self.stores = [x.new_zeros(layers, self.slots, self.length, x.shape[1], x.shape[3])
                           for x in (keys, values)]
        # not store[layer][...]: into a view, torch.compile would copy the layer's whole store, twice a step
        place = torch.full_like(self.slot_index, layer), self.slot_index, self.fed
        for store, new in zip(self.stores, (keys, values)):
            store[place] = new.transpose(1, 2)
        return tuple(store[layer][self.fed_slots, :self.filled].transpose(1, 2) for store in self.stores)

    def feed(self, slots, tokens, positions, filled, **kwargs):
        """Feed tokens (n, q) at positions (n, q) < filled to some slots -> last logits (n, V)."""
        # for update(), which the model's layers call from inside the forward pass
        self.fed_slots, self.fed, self.filled = slots, positions, filled
        self.slot_index = torch.arange(slots.start, slots.stop, device=positions.device)[:, None]
        # a token sees the keys of its own slot, up to its own position: (n, 1, q, filled)
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
        """Copy a slot's first `length` keys and values to another; what is behind them is never read."""
        for store in self.stores:
            store[:, target, :length] = store[:, source, :length]
        self.prompts[target] = self.prompts[source]

    def next_tokens(self, tokens, positions, temperatures, noise):
        """Feed the newest tokens of the first n slots -> the next ones, their log-probabilities.

        Lists of n: a GPU is waited for at each upload and download, so there is one of each.
        """
        n = len(tokens)
        self.newest[:, :n] = torch.tensor([tokens, positions, temperatures, noise], dtype=torch.float64)
        step = step_by_graph if self.cuda_graph else KVCache.step  # section D
        tokens, logprobs = step(self, n, 1 + max(positions)).tolist()
        if not all(map(math.isfinite, logprobs)):
            sys.exit("error: the logits are not finite: the model has diverged, or its weights are damaged; "
                     "what was saved is whole; try a lower --learning-rate")
        return [int(token) for token in tokens], logprobs

    def step(self, n, filled, **kwargs):
        """What of next_tokens() runs on the device -> tokens and log-probabilities (2, n)."""
        tokens, positions, temperatures, noise = self.newest[:, :n]
        self.logits = self.feed(slice(0, n), tokens.long()[:, None], positions.long()[:, None], filled,
                                **kwargs)  # (n, V)
        return torch.stack([x.double() for x in sample_tokens(self.logits, temperatures, noise)])

def sample_tokens(logits, temperatures, noise):
    """Draw a token a row from softmax(logits / temperature) -> tokens, log-probabilities (n,).

    logits (n, V), temperatures (n,), 0 for greedy, noise (n,) in [0, 1). The token is the one in which
    the cumulative distribution passes the noise: unlike torch.multinomial, a draw then does not depend
    on the rows beside it. First its block of 128 is found: a running sum over V is slow on a GPU.
    """
    probs = (logits / temperatures.float().clamp(min=1e-6)[:, None]).softmax(-1)  # (n, V), float32
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % 128)).unflatten(1, (-1, 128))
    sums = blocks.sum(-1, dtype=torch.float64)  # (n, V/128)
    block, left = where_sum_passes(sums, noise * sums.sum(-1))
    place, _ = where_sum_passes(blocks[torch.arange(len(block), device=block.device), block], left)
    tokens = torch.where(temperatures > 0, 128 * block + place, logits.argmax(-1))
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN led into the padding
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()

def where_sum_passes(weights, target):
    """Where the running sum of weights (n, k) passes target (n,) -> index, what was left of it."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)  # (n, k)
    # neither rounding nor NaN may lead past the end, nor, at exactly 0, to a first weight of 0
    target = torch.minimum(target.clamp(min=0), cumulative[:, -1] * (1 - 1e-15))[:, None]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)
    left = target - (cumulative.gather(1, index) - weights.gather(1, index))
    return index.squeeze(1), left.squeeze(1)

def generate(model, prompts, *, max_response_tokens, temperature, stop_ids, slots=None, generator=None,
             noise=None, cuda_graph=False, return_logprobs=False):
    """Sample a response to each prompt; both are lists of token ids, the stop token is included.

    At most `slots` run at a time, by default all. Each has a row of noise (N, T) of its own, drawn
    from `generator` if not given: `slots` changes the speed, but for rounding not the responses.
    return_logprobs: (responses, their log-probabilities, a tensor (T,) for each).
    """
    N, device = len(prompts), generator.device if generator else None
    if noise is None:  # as doubles: a token of probability 1e-9 must be possible
        noise = torch.rand(N, max_response_tokens, dtype=torch.float64, generator=generator, device=device)
    ended = sorted(generate_each(model, prompts, N * [max_response_tokens], N * [temperature], noise,
                                 stop_ids, slots, cuda_graph))
    responses = [response for _, response, _ in ended]
    return (responses, [torch.tensor(logprobs) for *_, logprobs in ended]) if return_logprobs else responses

@torch.no_grad()
def generate_each(model, prompts, limits, temperatures, noise, stop_ids, slots=None, cuda_graph=False):
    """Sample prompt i up to limits[i] tokens at temperatures[i], its t-th token by noise[i, t].

    Yields (i, token ids, their log-probabilities) when one ends. The next prompt takes its slot, or
    at last the rollout of the last slot: nobody waits for the longest response.
    """
    if not all(prompts):
        raise ValueError("an empty prompt: there is no token to predict from")
    model.eval()  # nothing calls train() again: no dropout, here or in the update
    # in the order given, but equal prompts together, because they are prefilled once
    waiting = deque(sorted(range(len(prompts)), key=lambda i: prompts.index(prompts[i])))
    responses, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    slots = min(slots or len(prompts), len(prompts))
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
    cache = KVCache(model, slots, longest, cuda_graph)
    progress = progress_bar(total=len(prompts), desc="rollouts")
    running, free = {}, range(slots)  # {slot: rollout} of slots 0, 1, ...
    while waiting or running:
        for slot in free:
            if waiting:
                running[slot] = waiting.popleft()
                cache.prefill(slot, prompts[running[slot]])
            elif slot < max(running, default=0):
                last = max(running)
                i = running[slot] = running.pop(last)
                cache.copy(last, slot, len(prompts[i]) + len(responses[i]) - 1)
        rollouts = [running[slot] for slot in range(len(running))]
        lengths = [len(responses[i]) for i in rollouts]
        tokens, new_logprobs = cache.next_tokens(
            tokens=[responses[i][-1] if responses[i] else prompts[i][-1] for i in rollouts],
            positions=[len(prompts[i]) - 1 + t for i, t in zip(rollouts, lengths)],
            temperatures=[temperatures[i] for i in rollouts],
            noise=noise[rollouts, lengths].tolist())
        free = []
        for slot, i in enumerate(rollouts):
            responses[i].append(tokens[slot])
            logprobs[i].append(new_logprobs[slot])
            if tokens[slot] in stop_ids or len(responses[i]) == limits[i]:
                free.append(slot)
                yield running.pop(slot), responses[i], logprobs[i]
        progress.set_postfix_str(f"{sum(map(len, responses)):,} tokens, {len(running)} run", refresh=False)
        progress.update(len(free))
    progress.close()
    del cache
    torch.cuda.empty_cache()  # or AdamW's state, made later, would split its memory, and it fits no more


# -- 3. Reward: is the last boxed answer the right one? ----------------------------------

BOX = re.compile(r"\\(?:boxed|fbox)(?: *\{| +(\w)(?![\w^/]|[.,]\d))", re.ASCII)  # \boxed 7, too
BRACE = re.compile(r"\\[{}\\]|[{}]")  # \{ is printed, no group

def extract_boxed(text):
    r"""Content of the last complete \boxed{...}, or None. None is over 10,000 characters: linear time."""
    end = len(text)
    for opening in reversed(list(BOX.finditer(text))):
        if opening[1]:
            return opening[1]
        depth, start = 1, opening.end()
        for brace in BRACE.finditer(text, start, min(end, start + 10_000)):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return text[start:brace.start()]
        end = opening.start()  # it never closes, so an earlier one that is open here never does
    return None

def is_correct(response, answer) -> bool:
    r"""The verifiable reward's judgement: is the last complete \boxed{} the answer? Never raises.

    It reads the response alone: the prompt holds an empty \boxed{}. Numbers and expressions are compared
    by value (rounding is not agreement), equations by their solutions, up to a factor; bare lists, sets
    and unions in any order, tuples, intervals and matrices in theirs. A unit may be missing on either
    side, but two must be the same; 12\% is 12 and not 0.12. Section E has it all.
    """
    box, answer = extract_boxed(str(response)), str(answer)
    gold = extract_boxed(answer) or answer  # some sets write their answers with the box
    return bool(box and box.strip() and gold.strip()) and equivalent(box.strip(), gold.strip())

def has_box(response) -> bool:
    r"""Is there a complete \boxed{} with something in it?"""
    return bool((extract_boxed(response) or "").strip())

def reward_of(response, answer, kind="answer") -> float:
    """1 if the answer is right, or (format) if there is one, or (none) never."""
    return float({"answer": is_correct(response, answer), "format": has_box(response), "none": False}[kind])


# -- 4. Advantages: how much better than the other rollouts of its group? ----------------

def group_advantages(rewards, group_size, scale=True):
    """Rewards (N,) -> advantages (N,): (r - mean) / (std + 1e-6) in each group of G neighbours.

    Paper, Eq. 6; ddof 1 and 1e-6 are the released code's. A group whose rewards are all equal has
    nothing to say: exactly 0. scale=False: no division. ValueError if G does not divide N.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (N/G, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    # the mean of equal rewards such as 0.1 is rounded: divided by 1e-6, that would pass for a signal
    dead = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(dead, 0.0).view(-1)


# -- 5. Loss: log-probabilities, then clipped policy gradient + KL - entropy -------------

def hidden_states(model, prompts, responses):
    """Last hidden state before each response token (M, H), these tokens (M,), their mask (B, T).

    Rows are prompt + response, padded on the right: a causal model never looks there. The mask goes
    by length, not by id: where EOS == PAD an id mask would take stopping out of the loss.
    """
    starts = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    lengths = torch.tensor([len(response) for response in responses])  # (B,)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    b, t = mask.nonzero(as_tuple=True)  # (M,), on the host: a GPU would have to be waited for
    ids = pad_sequence([torch.tensor(p + r) for p, r in zip(prompts, responses)], batch_first=True)  # (B, L)
    b, place, ids, mask = (x.to(model.device) for x in (b, starts[b] + t, ids, mask))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, H)
    return hidden[b, place - 1], ids[b, place], mask  # the token before predicts the next one

def token_logprobs(model, prompts, responses, temperature, chunk=512):
    """Log-probability and entropy (nats) of each response token -> logprobs, entropy, mask (B, T).

    Of softmax(logits / temperature), as they were sampled [C]. Logits are made for `chunk` tokens at
    a time, and again in backward: those of 3,072 tokens take 1.9 GB.
    """
    head = model.get_output_embeddings()
    hidden, targets, mask = hidden_states(model, prompts, responses)

    def score(hidden, targets):
        all_logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # (chunk, V)
        logprobs = all_logprobs.gather(1, targets[:, None]).squeeze(1)
        return logprobs, -(all_logprobs.exp() * all_logprobs).sum(1)

    chunks = [recompute_in_backward(score, *pair, use_reentrant=False, preserve_rng_state=False)
              for pair in zip(hidden.split(chunk), targets.split(chunk))]
    logprobs, entropy = (torch.cat(values) for values in zip(*chunks))  # (M,)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy), mask

def kl_estimate(logprobs, ref_logprobs, kind="k3"):
    """Elementwise estimate of KL(policy || reference) from the policy's samples (Schulman, 2020).

    The loss differentiates the estimate, not the sampling: k1's expected gradient is then zero, k2's
    that of KL(policy || reference), k3's that of KL(reference || policy). k3 is cut at 10 [C], its
    exponent first, at 20: exp of a large d is inf, and inf times the cut's gradient, 0, is NaN.
    """
    d = ref_logprobs - logprobs
    return {"k1": -d, "k2": d.square() / 2, "k3": (d.clamp(max=20).exp() - d - 1).clamp(max=10)}[kind]

def grpo_loss(logprobs, old_logprobs, ref_logprobs, entropy, advantages, mask, num_tokens, config):
    """GRPO's loss of a micro-batch (paper, Eq. 3 to 8) -> (scalar, stats): the mean over tokens of

        pg_coef * -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)  +  kl_coef KL  -  entropy_coef entropy

    Tensors are (B, T); advantages A may be (B,), one for all tokens of a rollout. num_tokens counts
    the response tokens of the whole update: micro-batches return shares of one mean.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]  # (B, T) or (B, 1)
    # in the first update 1, with the gradient of logprobs: REINFORCE. Its exponent is cut as that of k3
    ratio = (logprobs - old_logprobs).clamp(max=20).exp()
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    pg = -torch.min(ratio * A, clipped * A)
    kl = kl_estimate(logprobs, ref_logprobs, config.kl_estimator)
    per_token = config.pg_coef * pg + config.kl_coef * kl - config.entropy_coef * entropy
    mask = mask.to(per_token.dtype)
    weight = mask / num_tokens
    if config.loss_agg == "sequence":  # of all processes
        num_rollouts = config.prompts_per_step * config.group_size // config.updates_per_batch
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / num_rollouts
    loss = (per_token * weight).sum()
    means = dict(pg_loss=pg, kl=kl, entropy=entropy, ratio=ratio, clip_frac=clipped * A < ratio * A)
    # stats stay tensors: for a number, the GPU would have to be waited for before the backward pass
    stats = {name: (x.detach() * mask).sum() / num_tokens for name, x in means.items()}
    return loss, {"loss": loss.detach(), **stats}


# -- 6. Update: the gradients of all micro-batches, then one optimizer step --------------

@dataclass
class Batch:
    """The rollouts of a step: lists of N, of which G neighbours are a group."""
    examples: list              # {"name", "problem", "answer", "prompt"}
    prompts: list               # token ids
    responses: list             # token ids, the stop token included where there is one
    texts: list                 # the responses as text
    rewards: list               # numbers
    sampler_logprobs: list      # tensors (T,): log-probabilities as the sampler had them
    seconds: float              # that steps 1 to 3 took

def micro_batches(batch, rollouts, token_budget) -> list:
    """Some rollouts of a batch, packed so that rows times longest row stay within the budget."""
    length, packs = {i: len(batch.prompts[i]) + len(batch.responses[i]) for i in rollouts}, []
    # from the longest on: little is padding, and memory runs out at once or never
    for i in sorted(rollouts, key=length.get, reverse=True):
        if not packs or (len(packs[-1]) + 1) * length[packs[-1][0]] > token_budget:
            packs.append([])
        packs[-1].append(i)
    return packs

def score_rows(model, batch, rows, config):
    """token_logprobs of some rollouts; in bf16 only products: at rate 1e-6 bf16 weights never move."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bf16(model.device, config)):
        return token_logprobs(model, [batch.prompts[i] for i in rows], [batch.responses[i] for i in rows],
                              config.temperature)

def padded(tensors, rows, device):
    """Some of a list of tensors (T,) -> (B, T)."""
    return pad_sequence([tensors[i] for i in rows], batch_first=True).to(device)

def update_policy(policy, ref_policy, optimizer, batch, rollouts, advantages, old_logprobs, config) -> dict:
    """One optimizer step on some rollouts of a batch -> stats.

    advantages: a number for each rollout, or for each of its tokens, (T,). old_logprobs: (T,) for each,
    or none where the policy has not moved since it sampled. sampler_gap: mean distance of the
    sampler's log-probabilities from ours. Exits before the step if loss or gradient is not finite.
    """
    device, stats = policy.device, defaultdict(float)
    # GRPO: every token of a rollout has the rollout's advantage
    token_advantages = {i: advantages[i].expand(len(batch.responses[i])) for i in rollouts}
    # before the loop: neither packing nor the number of processes may change the gradient
    num_tokens = sum(len(batch.responses[i]) for i in rollouts)
    num_tokens = int(sum_over_processes(torch.tensor(num_tokens, device=device)))
    for rows in progress_bar(micro_batches(batch, rollouts, config.token_budget), "update"):
        with torch.no_grad():  # before the policy, whose activations stay in memory
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
        sys.exit(f"error: loss {stats['loss']}, gradient norm {stats['grad_norm']}: no weight was changed; "
                 "try a lower --learning-rate or --kl-coef, or --precision fp32, and --resume")
    optimizer_step(policy, optimizer)  # AdamW; section C, for --offload-optimizer
    return stats

def train_on(policy, ref_policy, optimizer, batch, advantages, config) -> dict:
    """All updates on a batch -> the mean of their stats. [C] makes one, [P] eight, of 16 groups each."""
    N, updates, old_logprobs = len(batch.prompts), config.updates_per_batch, {}
    # from the second update on, the policy is not the one that sampled
    for rows in micro_batches(batch, range(N), config.token_budget) if updates > 1 else ():
        with torch.no_grad():
            logprobs, _, mask = score_rows(policy, batch, rows, config)
        old_logprobs |= {i: values[kept] for i, values, kept in zip(rows, logprobs, mask)}
    stats = defaultdict(float)
    for rollouts in torch.arange(N).chunk(updates):
        for name, value in update_policy(policy, ref_policy, optimizer, batch, rollouts.tolist(),
                                         advantages, old_logprobs, config).items():
            stats[name] += value
    return {name: value / updates for name, value in stats.items()}


# -- 7. The run --------------------------------------------------------------------------

@dataclass
class Run:
    """What a run consists of, from its first step to its last."""
    config: Config
    dir: Path
    rank: int                   # number of this process, 0 where there is one
    processes: int              # how many there are
    examples: list              # {"name", "problem", "answer", "prompt"}: the prompt is token ids
    benchmarks: dict            # {name: problems}, to test on while training
    tokenizer: object
    stop_ids: list              # the tokens that end a response
    policy: object              # the model that is trained
    ref_policy: object          # the model as it was at first, or None
    sampler: object             # the model that samples: the policy or, on CUDA, its bf16 copy
    optimizer: object
    parts: dict                 # {name: what a checkpoint keeps the state of}
    facts: dict                 # what config.json says beside the settings
    resumed_at: int = 0         # the last step of an earlier call
    started: float = 0.0        # when this call began its first step
    tested: tuple = ()          # the steps after which an evaluation was made
    lock: object = None         # that keeps other processes out of the folder

def set_up(config) -> Run:
    """Load and check everything that a run needs; nothing is written yet."""
    folder, benchmarks = Path(config.output_dir), {}
    refuse_to_overwrite(config)
    examples = load_examples(config.example, config.answer)
    rank, processes = start_processes()
    if config.eval_every and rank == 0:
        from evaluate import load_benchmarks  # here, because evaluate.py imports from this file
        benchmarks = load_benchmarks(config.eval)
    if config.prompts_per_step % (config.updates_per_batch * processes):
        fail(f"--prompts-per-step {config.prompts_per_step}: {processes} processes and --updates-per-batch "
             f"{config.updates_per_batch} do not share it evenly")
    policy, tokenizer = load_model(config.model)
    for example in examples:
        example["prompt"] = encode_prompt(tokenizer, example["problem"] + TRAIN_SUFFIX)
    stop_ids = find_stop_ids(tokenizer, policy.generation_config)
    if not stop_ids:
        fail(f"--model {config.model}: nothing in it names a token that ends a response")
    short = [example for example in examples if len(example["prompt"]) <= config.max_prompt_tokens]
    if len(short) < len(examples):
        print(f"{len(short)} of {len(examples)} prompts have at most {config.max_prompt_tokens} tokens")
    if not short:
        fail(f"--max-prompt-tokens {config.max_prompt_tokens}: no prompt is that short")
    prompts = [example["prompt"] for example in short]
    check_prompts(policy, prompts, len(prompts) * [config.max_response_tokens])
    check_head(policy, prompts[0])
    ref_policy, sampler, optimizer = prepare_training(policy, config)
    return Run(config, folder, rank, processes, short, benchmarks, tokenizer, stop_ids, policy,
               ref_policy, sampler, optimizer, {"policy": policy, "optimizer": optimizer}, {})

def steps_to_make(run):
    """Yield the steps that are left; between two: save, evaluate, and stop if Ctrl-C was pressed."""
    pressed = []

    def on_ctrl_c(*_):  # a half-made step would be worse than a wait
        print("\nstopping when this step is done; Ctrl-C again stops at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.append(True)

    start_or_resume(run)  # section B
    handler = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        for done in range(run.resumed_at, run.config.steps + 1):
            stopping = sum_over_processes(torch.tensor(len(pressed), device=run.policy.device)) > 0
            after_step(run, done, stopping)  # section B
            if stopping:
                sys.exit(130)
            if done < run.config.steps:
                yield done + 1
    finally:
        signal.signal(signal.SIGINT, handler)

def sample_rollouts(run, step) -> Batch:
    """Steps 1 to 3 of the algorithm, for this process's share of the groups."""
    config, G, started = run.config, run.config.group_size, time.time()
    # dealt out one by one: then each of several updates has the same groups on any number of them
    share = slice(run.rank, None, run.processes)
    # 1. Example
    groups = examples_of_step(step, len(run.examples), config.prompts_per_step, config.seed)[share]
    examples = [run.examples[i] for i in groups for _ in range(G)]
    prompts = [example["prompt"] for example in examples]
    # 2. Rollouts; the noise depends on (seed, step) alone, so that a resumed run samples the same
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + step)  # distinct for each pair
    noise = torch.rand(config.prompts_per_step, G, config.max_response_tokens, dtype=torch.float64,
                       generator=generator)[share].flatten(0, 1)
    responses, sampler_logprobs = generate(
        run.sampler, prompts, max_response_tokens=config.max_response_tokens, temperature=config.temperature,
        stop_ids=run.stop_ids, slots=config.slots, noise=noise, return_logprobs=True,
        cuda_graph=config.cuda_graph and run.policy.device.type == "cuda")
    # 3. Reward
    texts = run.tokenizer.batch_decode(responses, skip_special_tokens=True)
    rewards = [reward_of(text, example["answer"], config.reward) for text, example in zip(texts, examples)]
    return Batch(examples, prompts, responses, texts, rewards, sampler_logprobs, time.time() - started)

def log_step(run, step, batch, advantages, stats, update_seconds) -> None:
    """A line on the screen, now and then a rollout, and rows of metrics.jsonl and samples.jsonl."""
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
    shown = [rollouts[i] for i in sorted({0, int(np.argmax(rewards)), int(np.argmin(rewards))})]
    print_step(row, run.config.steps, shown[step // 10 % len(shown)])  # the first and another reward in turn
    append_rows(run.dir / "metrics.jsonl", [row])
    append_rows(run.dir / "samples.jsonl", [{"step": step, **rollout} for rollout in shown])

def main(argv=None) -> None:
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


# -- A. The command line, and what a person sees -----------------------------------------

LEAST = {"group_size": 2, "eval_every": 0, "seed": 0, "weight_decay": 0,  # a group of 1 has no spread
         **dict.fromkeys(("temperature", "learning_rate", "grad_clip", "clip_eps"), 1e-30)}
KEPT = ("preset", "model", "example", "answer", "max_prompt_tokens", "seed")  # by a resumed run

def fail(sentence):
    """Bad input ends the program with one sentence and exit code 2; a traceback would bury it."""
    if is_first_process():
        print("error:", " ".join(sentence.split()), file=sys.stderr)
    sys.exit(2)

def as_a_command(main) -> None:
    """Run the main() of a script; what goes wrong around it ends it with a sentence, too."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a console that lacks a letter shows another
        stream.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; what was saved is whole: the same command goes on, in training with --resume")
        sys.exit(130)
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit("error: out of memory; what was saved is whole. Sampling takes less with fewer --slots, "
                 "an update with a lower --token-budget, --activation-checkpointing, --offload-optimizer")
    except Timeout as error:
        fail(f"{error.lock_file} is in use by another process; wait until it has ended, or stop it")
    except OSError as error:
        fail(f"{error}; what was written before is whole")

def make_parser(doc, **options):
    """A parser whose --help begins as the script's docstring does, and whose errors are one sentence."""
    parser = argparse.ArgumentParser(description="\n\n".join(doc.split("\n\n")[:3]), allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.error = fail
    return parser

def add_flags(parser, settings) -> None:
    """A flag for each field of a dataclass, in groups, with the comments that stand beside them."""
    for line in inspect.getsource(settings).splitlines():
        if title := re.fullmatch(r" {4}# (.*)", line):
            group = parser.add_argument_group(title[1])
        elif match := re.match(r" {4}(\w+): .*? {2}# (.*)", line):
            f = settings.__dataclass_fields__[match[1]]
            kind = {"type": f.type} if isinstance(f.type, type) else {"choices": get_args(f.type)}
            if f.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            if f.type is tuple:
                kind = {"nargs": "+"}
            default = "" if f.default in ("", (), None) else f" (default: {f.default})"
            group.add_argument(flag_of(f.name), default=f.default, help=match[2] + default, **kind)

def flag_of(name) -> str:
    return "--" + name.replace("_", "-")

def check_numbers(settings, least) -> None:
    """Refuse numbers under which nothing would be done, or not what they say."""
    for name, value in settings.items():
        lowest = least.get(name, 1 if type(value) is int else -1e9)
        highest = math.inf if name == "grad_clip" else 1e9  # inf: do not clip
        if type(value) in (int, float) and not lowest <= value <= highest:
            fail(f"{flag_of(name)} {value}: use a number from {lowest:g} to {highest:g}")

def words_of(argv) -> list:
    """The words of a command line: --group_size for --group-size, ~ for the home, and no flag for a label."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if words and words[-1] == "--answer":  # it may begin with a minus
            words[-1] += f"={word}"
        else:
            words.append(flag.replace("_", "-") + equals + os.path.expanduser(value))
    return words

def parse_args(argv=None) -> Config:
    """The command line as a Config. What is not given is the preset's or, with --resume, the saved run's."""
    parser = make_parser(__doc__, usage="%(prog)s [flags]", epilog="[P]: the paper; [C]: its released code.")
    add_flags(parser, Config)
    parser.set_defaults(**PRESETS[parser.parse_args(words_of(argv)).preset])
    given = parser.parse_args(words_of(argv))
    examples = "+".join(Path(name).stem for name in given.example)
    folder = given.output_dir or f"runs/{examples}-{Path(os.path.abspath(given.model)).name}"
    if given.resume:
        if not Path(folder, "config.json").exists():
            fail(f"--resume: {folder} holds no config.json, so no run; is another one its --output-dir?")
        saved = read_json(Path(folder, "config.json"), *KEPT)
        for f in fields(Config):  # as words, which argparse checks as those of the command line
            value = saved.get(f.name, f.default)
            parser.set_defaults(**{f.name: str(value) if f.type in (int, float) else value})
            if value not in (get_args(f.type) or [value]):
                fail(f"{folder}/config.json: {f.name} {value!r} is none of {', '.join(get_args(f.type))}")
        given = parser.parse_args(words_of(argv))
        for name in KEPT:
            if getattr(given, name) != saved[name]:
                fail(f"{flag_of(name)} {getattr(given, name)}: a resumed run keeps {saved[name]}")
    config = Config(**{**vars(given), "output_dir": folder})
    check_numbers(asdict(config), LEAST)
    if bool(config.eval_every) != bool(config.eval) and not (config.resume and config.eval):
        fail(f"--eval-every {config.eval_every} and --eval {' '.join(config.eval)}: give both or none")
    return config

def progress_bar(*args, **options):
    """Of several processes the first shows it; miniters=0: a sign of life also while nothing ends."""
    return tqdm(*args, **options, leave=False, miniters=0, disable=not is_first_process() or None)

def describe_prompt(tokenizer, prompt, stop_ids) -> str:
    ends = ", ".join(f"{i} {tokenizer.decode([i])!r}" for i in stop_ids)
    return f"{textwrap.indent(tokenizer.decode(prompt), '    | ')}\na response ends at {ends}"

STEP_LINE = (
    "reward {reward:.3f}  dead {dead_groups:.2f}  len {response_length:.0f}  trunc {truncated_frac:.2f}  "
    "entropy {entropy:.3f}  kl {kl:.4f}  loss {loss:+.4f}  grad {grad_norm:.2f}  ratio {ratio:.3f}  "
    "gap {sampler_gap:.4f}  {tokens_per_second:,.0f} tok/s  sample {sample_seconds:.1f}s  "
    "update {update_seconds:.1f}s  ")

def print_step(row, steps, rollout) -> None:
    """One line a step and, after steps 1, 11, 21, ..., a rollout."""
    hours, minutes = divmod(int(row["eta_seconds"] / 60), 60)
    memory = f"{row['memory_gb']:.1f}GB  " if row["memory_gb"] else ""  # on CUDA
    print(f"step {row['step']}/{steps}  {STEP_LINE.format(**row)}{memory}eta {hours}h{minutes:02d}m",
          flush=True)
    if row["dead_groups"] == 1 and row["pg_loss"] == 0:
        print("  all groups are dead: only KL, entropy, weight decay and AdamW's momentum act in this step")
    if row["step"] % 10 == 1:
        text = rollout["text"]
        text = text if len(text) < 900 else f"{text[:400]}\n[...]\n{text[-400:]}"
        print(f"a rollout to {rollout['example']}: reward {rollout['reward']:.0f}, advantage "
              f"{rollout['advantage']:+.2f}, {rollout['tokens']} tokens\n{textwrap.indent(text, '    | ')}")


# -- B. Files: examples, logs, checkpoints -----------------------------------------------

def read_json(path, *keys):
    """A JSON file; with keys it must be an object that has them."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # some editors begin with a mark
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path}: cannot be read as JSON ({error})")
    if keys and not (isinstance(value, dict) and value.keys() >= {*keys}):
        fail(f"{path}: it has no {', '.join(keys)}, so it is another kind of file than is wanted here")
    return value

def read_jsonl(path, growing=False) -> dict:
    """{line number: row}, without blank lines; of a file that is, or was, growing also without cut ones."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace" if growing else "strict")
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read as text in UTF-8 ({error})")
    rows = {}
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also cuts at U+2028
        try:
            if line.strip():
                rows[number] = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not growing:
                fail(f"{path}, line {number}: not JSON ({error})")
    return rows

def read_log(path) -> list:
    """The rows of a .jsonl file that a program is, or was, writing; [] where there is none yet."""
    rows = read_jsonl(path, growing=True).values() if Path(path).exists() else []
    return [row for row in rows if isinstance(row, dict)]

def load_examples(names, answer="") -> list:
    """Names in examples.json and .json/.jsonl files -> [{"name", "problem", "answer"}, ...].

    A row without a name goes by its file's and, of several, its number. `answer` replaces the label.
    """
    known, examples = read_json(Path(__file__).resolve().with_name("examples.json")), {}
    for source in names:
        if source in known:
            rows = {1: {"name": source, **known[source]}}
        elif source.endswith(".jsonl"):
            rows = read_jsonl(source)
        elif source.endswith(".json"):  # one example, or an array of them
            rows = read_json(source)
            rows = dict(enumerate(rows if isinstance(rows, list) else [rows], 1))
        else:
            fail(f"--example {source}: give a .jsonl file, or one of {', '.join(known)}")
        for number, row in rows.items():
            row = row if isinstance(row, dict) else {}
            problem, label = row.get("problem"), answer or row.get("answer")
            # no list, no true, and no NaN, which is not equal to itself: none could ever be right
            if not (problem and type(problem) is str and type(label) in (str, int, float) and label == label):
                fail(f'--example {source}, row {number}: it needs a "problem" and an "answer"')
            name = str(row.get("name", Path(source).stem + f"-{number}" * (len(rows) > 1)))
            if name in examples:
                fail(f"--example {' '.join(names)}: {name} is there twice; give each a name of its own")
            examples[name] = {"name": name, "problem": problem, "answer": str(label)}
    if not any(example["answer"].strip() for example in examples.values()) or answer and len(examples) > 1:
        fail(f"--example {' '.join(names)}: there must be one with an answer, and with --answer just one")
    return list(examples.values())

@contextlib.contextmanager
def atomically(path):
    """Write to path.tmp, then rename it: under its own name a file or folder is whole, whenever killed."""
    temporary = Path(f"{path}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        raise OSError(f"{path}: cannot be written, perhaps because the disk is full ({error})") from error

def write_json(path, value) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8",
                             errors="backslashreplace")

def append_rows(path, rows, mode="a") -> None:
    with open(path, mode, encoding="utf-8", errors="backslashreplace") as file:  # half an emoji, say
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

def keep_rows(path, wanted=lambda row: True) -> list:
    """Drop the rows that are not wanted, which are made again, and a line cut short -> the rows left."""
    rows = list(filter(wanted, read_log(path)))
    with atomically(path) as temporary:
        append_rows(temporary, rows, mode="w")
    return rows

def save_model(folder, model, tokenizer) -> None:
    """An ordinary Hugging Face folder, under its final name only when it is whole."""
    with atomically(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

def load_checkpoint(run) -> int:
    """The step of the checkpoint, from which each part takes its state; 0 if there is none yet."""
    path = run.dir / "latest" / "state.pt"
    if not path.exists() and not any(run.dir.glob("step-*")):  # a step's folder comes after its checkpoint
        return 0
    try:
        # mapped: eight processes would hold eight copies; but Windows cannot replace a file that stays mapped
        mapped = run.policy.device.type == "cuda" and not run.config.offload_optimizer
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        step = state.pop("step")
        if state.keys() != run.parts.keys():
            raise ValueError(f"it holds {', '.join(state)}")
        for name, part in run.parts.items():
            part.load_state_dict(state[name])
    except Exception as error:  # torch has many names for a damaged file
        fail(f"--resume: {path} cannot be loaded ({error!r}); go on from the last step's folder by --model")
    return step

def refuse_to_overwrite(config) -> None:
    """Nothing of a run may be lost because another one is begun in its folder."""
    left = [path for name in ("config.json", "metrics.jsonl", "samples.jsonl", "latest", "step-*")
            for path in Path(config.output_dir).glob(name)]
    if left and not config.resume:
        fail(f"{left[0]} is of another run: go on with that one by --resume, or name another --output-dir")

def start_or_resume(run) -> None:
    """Lock the folder, load the checkpoint if there is one, drop the log of steps that are made again."""
    config, policy = run.config, run.policy
    run.dir.mkdir(parents=True, exist_ok=True)
    if run.rank == 0:  # two writers in one folder would mix their rows
        run.lock = FileLock(run.dir / "lock", timeout=0).acquire()
        refuse_to_overwrite(config)  # again: another may have begun one while this one loaded its model
    done = run.resumed_at = load_checkpoint(run) if config.resume else 0
    if done > config.steps:
        fail(f"--steps {config.steps}: the run is at step {done} already")
    # flags given with --resume hold, and not what the checkpoint's optimizer had
    group = run.optimizer.param_groups[0]
    group.update(lr=config.learning_rate, weight_decay=config.weight_decay)
    for copies in (group["params"], run.sampler.parameters()):  # a checkpoint has the policy's weights alone
        copy_weights(policy.parameters(), copies)
    if run.rank == 0:
        kept = json.dumps([[example["prompt"], example["answer"]] for example in run.examples])
        settings = {**asdict(config), **run.facts, "device": str(policy.device), "processes": run.processes,
                    "examples_crc32": zlib.crc32(kept.encode()),
                    "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
                    "stop_ids": run.stop_ids, "prompt": run.tokenizer.decode(run.examples[0]["prompt"])}
        saved = read_json(run.dir / "config.json") if config.resume else settings
        if saved.get("examples_crc32", settings["examples_crc32"]) != settings["examples_crc32"]:
            fail(f"--resume: prompt or answer of --example {' '.join(config.example)} is not what it was")
        write_json(run.dir / "config.json", settings)
        samples, metrics = (keep_rows(run.dir / name, lambda row: row.get("step") in range(done + 1))
                            for name in ("samples.jsonl", "metrics.jsonl"))
        run.tested = {row["step"] for row in metrics if "eval" in row}
        print(f"all settings are in {run.dir / 'config.json'}; the prompt is\n")
        print(describe_prompt(run.tokenizer, run.examples[0]["prompt"], run.stop_ids))
        print("\nWatch reward, not loss: README.md says why, and what the words of a step's line mean")
    run.started = time.time()

def after_step(run, done, stopping) -> None:
    """What is due when a step is done: a checkpoint, a model folder, a test. Process 0 does it."""
    if run.rank:
        return
    config, folder = run.config, run.dir / f"step-{done:06d}"
    last = done == config.steps
    due = done > 0 and (done % config.save_every == 0 or last)
    if done > run.resumed_at and (due or stopping):
        (run.dir / "latest").mkdir(exist_ok=True)
        with atomically(run.dir / "latest" / "state.pt") as temporary:  # all that --resume needs
            states = {name: part.state_dict() for name, part in run.parts.items()}
            torch.save({"step": done, **states}, temporary)
    if due and not folder.exists():  # in this order: a step with a folder is never made again
        save_model(folder, run.sampler, run.tokenizer)  # on CUDA bf16: half the disk
    if stopping:
        print(f"stopped after step {done}, which is saved; go on with\n"
              f"    {shlex.join(['python', sys.argv[0], '--output-dir', str(run.dir), '--resume'])}")
    elif config.eval_every and done not in run.tested and (done % config.eval_every == 0 or last):
        from evaluate import measure_all, sample_and_check, scores_of
        rows, _ = sample_and_check(run.sampler, run.tokenizer, run.benchmarks, slots=config.slots,
                                   seed=config.seed, cuda_graph=config.cuda_graph,
                                   max_response_tokens=config.max_response_tokens)
        scores = scores_of(measure_all(rows, run.benchmarks))
        print(f"eval {done}/{config.steps}", *(f" {name} {x:.3f}" for name, x in scores.items()), flush=True)
        append_rows(run.dir / "metrics.jsonl", [{"step": done, "eval": scores}])
    if last:
        preset = ["--preset", "tiny"] * (config.preset == "tiny")
        print(f"done: {folder} is a Hugging Face model folder; measure it with\n"
              f"    {shlex.join(['python', 'evaluate.py', *preset, '--model', str(folder)])}")

def describe_rollouts(run, batch, advantages) -> list:
    """One row a rollout: what the log of a step is made of."""
    return [{"example": example["name"], "reward": reward, "advantage": round(float(advantage), 4),
             "correct": is_correct(text, example["answer"]), "boxed": has_box(text),
             "tokens": len(response), "truncated": response[-1] not in run.stop_ids, "text": text}
            for example, reward, advantage, text, response
            in zip(batch.examples, batch.rewards, advantages, batch.texts, batch.responses)]

def summarize(rollouts, group_size) -> dict:
    """What the rollouts of a step were like: the first part of its row in metrics.jsonl."""
    column = {key: np.array([row[key] for row in rollouts]) for key in rollouts[0]}
    means = {"reward": "reward", "accuracy": "correct", "boxed_frac": "boxed", "response_length": "tokens",
             "truncated_frac": "truncated"}
    groups = column["reward"].reshape(-1, group_size)  # (N/G, G)
    return {**{name: float(column[key].mean()) for name, key in means.items()},
            "dead_groups": float((groups.max(1) == groups.min(1)).mean()),
            "examples": {str(name): float(column["correct"][column["example"] == name].mean())
                         for name in np.unique(column["example"])}}


# -- C. Models, and several processes ----------------------------------------------------

def load_model(name, dtype=torch.float32):
    """Model and tokenizer of a Hugging Face id or folder, on the GPU if there is one."""
    make_tiny_base(name)
    if dist.is_initialized():
        dist.barrier()  # the others wait for the first, which builds it
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa",
                                                             output_loading_info=True)
    except Exception as error:  # a folder can be broken in a dozen ways, each with its own exception
        fail(f"--model {name}: cannot be loaded, neither as a folder nor from the hub ({error})")
    if report["missing_keys"]:
        fail(f"--model {name}: its files lack {min(report['missing_keys'])}; the weights would be random")
    if not tokenizer("1").input_ids:
        fail(f"--model {name}: its tokenizer reads nothing; are the tokenizer's files there?")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer

def make_tiny_base(name) -> None:
    """The tiny world's base model is no download: it is built where it is first asked for."""
    if name == TINY_BASE and not Path(name).exists() and is_first_process():
        from labs import tiny
        tiny.build_base(name)

def check_prompts(model, prompts, limits) -> None:
    """Refuse a model that does not see a whole rollout, or whose tokenizer has tokens that it has not."""
    name, config = model.config._name_or_path, model.config.get_text_config()
    length = max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0)
    layers = getattr(config, "layer_types", ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if "sliding_attention" in layers else None
    for seen in (window, getattr(config, "max_position_embeddings", None)):
        if seen and seen < length:
            fail(f"--max-response-tokens: prompt and response can have {length} tokens, of which --model "
                 f"{name} sees {seen}")
    if max(map(max, prompts), default=0) >= model.get_input_embeddings().num_embeddings:
        fail(f"--model {name}: its tokenizer has more tokens than the model has embeddings")

def check_head(model, prompt) -> None:
    """Refuse a model that does more to its logits than its head does: section 5 would score another one."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden)
        if not logits.isfinite().all():
            fail(f"--model {model.config._name_or_path}: its logits are not finite; are its weights damaged?")
        if not torch.allclose(logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3):
            fail(f"--model {model.config._name_or_path}: it caps or scales its logits, unlike section 5")

def uses_bf16(device, config) -> bool:
    return config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"

def frozen_copy(model, bf16):
    """A copy that is not trained. Its buffers stay: bf16 rotary frequencies would blur far positions."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for param in twin.parameters() if bf16 else ():
        param.data = param.data.bfloat16()
    return twin

def prepare_training(policy, config) -> tuple:
    """What training needs beside the policy: the reference (None without KL), the sampler, the optimizer."""
    bf16, weights = uses_bf16(policy.device, config), list(policy.parameters())
    # in fp32: scored under autocast, as the policy is, its KL to an equal policy is exactly 0
    ref_policy = frozen_copy(policy, bf16=False) if config.kl_coef else None
    sampler = frozen_copy(policy, bf16) if bf16 else policy
    if config.offload_optimizer:
        weights = [param.detach().to("cpu", copy=True) for param in weights]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    # after the copies, which would share its layers
    for model in {policy, ref_policy, sampler} - {None} if config.compile else ():
        compile_layers(model)
    if config.activation_checkpointing:
        recompute_layers(policy)
    return ref_policy, sampler, optimizer

def compile_layers(model) -> None:
    """torch.compile around each decoder layer, not around the model: one is compiled, and all use it."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else the number of a layer is a constant
    torch._dynamo.config.recompile_limit = 32  # then it runs as it is
    torch.fx.experimental._config.use_duck_shape = False  # two lengths are equal by chance alone
    for layer in layers_of(model):
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=compile_aloud)

def compile_aloud(graph, inputs):
    """torch.compile's own backend, but one that says so, and runs what it cannot compile as it is."""
    started = time.time()
    try:
        compiled = torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except torch._dynamo.exc.RestartAnalysis:  # no error: torch.compile begins again
        raise
    except Exception as error:
        print(f"a layer cannot be compiled, and runs without ({str(error).strip().splitlines()[0]})")
        return graph.forward
    print(f"compiled a layer in {time.time() - started:.0f} s", flush=True)
    return compiled

def layers_of(model):
    found = getattr(model.base_model, "layers", None)
    return found or fail("--compile, --activation-checkpointing: the layers of this model are not found")

def recompute_layers(model) -> None:
    """Keep only the input of each layer for backward. transformers' own switch works in train mode alone."""
    for layer in layers_of(model):
        # no random state is kept: nothing here is random, and a CUDA graph must not ask for it
        layer.forward = functools.partial(recompute_in_backward, layer.forward, use_reentrant=False,
                                          preserve_rng_state=False)

def optimizer_step(policy, optimizer) -> None:
    """AdamW on fp32 weights: the policy's own or, with --offload-optimizer, copies in host memory."""
    masters = optimizer.param_groups[0]["params"]
    for param, master in zip(policy.parameters(), masters):
        if master is not param:
            master.grad, param.grad = param.grad.to(master.device), None
    optimizer.step()
    optimizer.zero_grad()
    copy_weights(masters, policy.parameters())

@torch.no_grad()
def copy_weights(sources, targets) -> None:
    """Copy parameter by parameter, across devices and precisions."""
    for source, target in zip(sources, targets):
        if source is not target:
            target.copy_(source)

def is_first_process() -> bool:
    return not dist.is_torchelastic_launched() or os.environ["RANK"] == "0"

def start_processes() -> tuple:
    """(number of this process, how many there are): under torchrun, which starts one a GPU, else (0, 1).

    Each samples and scores its share of the groups; gradients are summed, so all make the same step.
    """
    if not dist.is_torchelastic_launched():  # a shell or a cluster may have left a RANK behind
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a day: the others wait while process 0 evaluates or saves
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo",
                            timeout=datetime.timedelta(days=1))
    atexit.register(dist.destroy_process_group)  # or its threads abort now and then when Python ends
    if not is_first_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # not stderr, where its errors go
    return dist.get_rank(), dist.get_world_size()

def sum_over_processes(tensor):
    """In place; alone, nothing to do."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def gather_groups(rollouts, group_size) -> list:
    """All processes' rollouts in the order of the groups, which were dealt out one by one."""
    if not dist.is_initialized():
        return rollouts
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rollouts)
    turns = range(0, len(rollouts), group_size)
    return [rollout for turn in turns for part in parts for rollout in part[turn:turn + group_size]]


# -- D. A decode step at the speed of a GPU ----------------------------------------------

def step_by_graph(cache, n, filled):
    """cache.step(n, filled) as a CUDA graph, which launches all its kernels in one go.

    One by one, Python takes longer to launch the 800 kernels of a decode step than the GPU to run them. A
    graph repeats them on the same memory, and in fixed shapes: all keys, and all slots of the cache, half, a
    quarter or an eighth of them; those from n on are computed for nothing.
    """
    size = min(size for part in (1, 2, 4, 8) if (size := -(-cache.slots // part)) >= n)
    if size in cache.graphs:
        return cache.graphs[size]()[:, :n]
    expected, reads_ragged = None, can_read_ragged(cache.model)
    if not cache.graphs:  # the first is checked against the step without
        cache.step(n, filled)
        expected = cache.logits.softmax(-1)
    if reads_ragged:
        AttentionInterface.register("ragged", ragged_attention)
        cache.model.set_attn_implementation("ragged")

    def step():
        ragged = {"keys_used": cache.newest[1, :size].int() + 1} if reads_ragged else {}
        return cache.step(size, cache.length, **ragged)
    drawn = step()  # what libraries set up at their first call must not be captured
    cache.graphs[size] = step
    if cache.model.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = step()
        cache.graphs[size] = lambda: graph.replay() or drawn  # replay() returns None
        cache.graphs[size]()
    if expected is not None and (cache.logits[:n].softmax(-1) - expected).abs().sum(-1).mean() > 0.5:
        fail("the CUDA graph does not compute what the model computes; go on with --no-cuda-graph")
    return drawn[:, :n]

# what torch.nn.attention.varlen calls, which itself takes seqused_k only from torch 2.12 on
flash_attention = torch.ops.aten._flash_attention_forward

def ragged_attention(module, query, key, value, attention_mask, scaling=None, keys_used=None, **kwargs):
    """transformers' sdpa, but a decode step on CUDA reads only the first keys_used (n,) keys of each row.

    With a mask, every row would read as many keys as the longest has: most of a step's memory traffic.
    """
    if keys_used is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n, length = key.shape[0], key.shape[2]
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))  # (n * length, heads, head size)
    each_row = torch.arange(n + 1, device=query.device, dtype=torch.int32)
    output, *_ = flash_attention(query.squeeze(2), key, value, each_row, length * each_row, 1, length, 0.0,
                                 False, return_debug_mask=False, scale=scaling, seqused_k=keys_used)
    return output[:, None], None  # (n, 1, heads, head size)

def can_read_ragged(model) -> bool:
    """Flash attention takes half precision, on a CUDA card of the Ampere generation or later."""
    half = model.device.type == "cuda" and model.dtype.itemsize == 2
    return half and torch.cuda.get_device_capability() >= (8, 0)


# -- E. When are two answers the same? --------------------------------------------------

FUNCTIONS = {
    **{name: getattr(cmath, name) for name in "sin cos tan sinh cosh tanh exp".split()},
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "log": cmath.log10,
    "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x)}
F = rf"(?:{'|'.join(FUNCTIONS)})(?![A-Za-z])"
# One spelling for what can be spelled in several ways, unicode first. Each row relies on those above.
SPELLINGS = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in [
    ("[−–]", "-"), ("[·×]", "*"), ("π", r"\\pi "), ("∪", r"\\cup "), ("∞", r"\\infty "),
    ("≤", "<="), ("≥", ">="), ("≠", "!="), ("°", r"\\degree "), ("Å", r"\\AA "), ("[µμ]", r"\\mu "),
    ("²", "^2"), ("³", "^3"), ("½", r"\\frac12"), ("¼", r"\\frac14"), ("√ ?([0-9]+)", r"\\sqrt{\1}"),
    # a full stop, a dollar sign, which is a unit, math delimiters, and what only changes the look
    (r"(?<!\.)\.( *\}?\$?) *$", r"\1"), (r"^ *(-?) *\\?\$ *([0-9][^A-Za-z$]*)$", r"\1\2\\text{dollar}"),
    (r"\\?\$|(?<!\\)\\[()\[\]]", ""), (r"\\[lr]?vert(?![A-Za-z])", "|"), (r"\^ ?\{? ?\\prime ?\}?", "'"),
    (r"\\(?:left|right)\.|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
    # every upright font is \text, but an upright number, i or e is what it is; bold is nothing
    (r"\\(?:mathbf|boldsymbol|bm) *\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1"), (r"\bnp\.", ""),
    (r"\\\\ ?\[[0-9.]+ ?[a-z]{2}\]", r"\\\\"),
    (r"\\(?:unit|mbox|mathrm|mathit|text[a-z]{2}|operatorname)(?![A-Za-z]) *|\\text +(?=\{)", r"\\text"),
    (r"\\text(?=[A-Za-z0-9])(.)", r"\\text{\1}"), (r"\\text\{ *([ie]|[-+0-9./]+) *\}", r"\1"),
    (r"_ ?\{ ?\\text ?\{([^{}]*)\} ?\}", r"_{\1}"), (r"\\mu ?\\text\{", r"\\text{\\mu "),
    (r"^ *\\text\{([^{}]*[^A-Za-z(){} ][^{}]*)\} *$", r"\1"), (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
    # thousands: 1{,}234 and 1,\!234; 1,234 alone or in a fraction, for (1,234) and 2,4 are lists
    (r"(?<=[0-9])(?:\{,\}|, *\\!|\\,) *(?=[0-9]{3}(?![0-9]))", ""),
    (r"(?:^(?:[^,]*=)?[^0-9,(\[{]*|/ *|\\frac\{|(?<=[0-9]\}\{))[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])"
     r"(?=(?:\\,|[^,])*$|\})", lambda match: match[0].replace(",", "")),
    # spaces; "and", "or" and ";" part a list as commas do: "4 or 5" is two answers and never 4
    (r"(?<!\\)\\(?:[,;:!> ]|$)|\\q?quad(?![A-Za-z])|~|\s+", " "), (" +", " "),
    (r"(?:, ?)?(?:\\text\{ *,? *(?:and|or) *\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|;)", ","),
    # comparisons, the smaller side first; functions and pi by their names
    (r"<=|\\leq?(?:slant)?(?![A-Za-z])", r"\\le "), (r">=|\\geq?(?:slant)?(?![A-Za-z])", r"\\ge "),
    (r"^([^,<>]*)>([^,<>]*)$", r"\2<\1"), (r"^([^,]*)\\ge ([^,]*)$", r"\2\\le \1"),
    (r"!=|\\not ?=|\\neq?(?![A-Za-z])", r"\\ne "), (rf"(?<![A-Za-z\\])(pi(?![A-Za-z])|{F})", r"\\\1 "),
    # degrees and percent are units at the end; degrees are dropped elsewhere
    (r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z])) ?|\\degree ?", r"\\text{degree}"),
    (r" ?\\?%", r"\\text{percent}"), (r"\\text\{degree\}(?! ?(?:[0-9]|$|[,)]))", ""),
    # fractions, roots, accents and powers with the braces they need: \dfrac12, \sqrt2, x^{2}; stars for \cdot
    (r"\\[dtc](frac|binom)", r"\\\1"), (r"([_^]) ?\{ ?(\w|(?<=\^\{)-\d) ?\}(?!\d)", r"\1\2"),
    (r"\\(frac|sqrt|d?dot|hat|bar|vec) ?([A-Za-z0-9]|\\pi(?![A-Za-z]))", r"\\\1{\2}"),
    (r"(\\frac ?\{[^{}]*\}) ?([A-Za-z0-9]|\\pi(?![A-Za-z]))", r"\1{\2}"),
    (r"[(\[]? ?\\begin{(?:[pb]?matrix|array)} ?(?:{[clr| ]*})?(.*?)(?:\\\\)? ?\\end{\w+} ?[)\]]?", r"{\1}"),
]]
# What may stand in front of a value: x=, f(3)=, V_{max}=, AB=, (x,y)=, \text{Area}=, x\in; not \ne
NAME = re.compile(
    r"(?:\(\\?[A-Za-z]+ ?(?:, ?\\?[A-Za-z]+ ?)+\)|(?:_[A-Za-z0-9]|_\{[^{}]*\}|'|[A-Za-z] ?|"
    r"\\text\{(?![^{}]*(?i:\bnot\b|never|at most|at least|than\b|!))[^{}]*\}|"
    r"\\(?!(?:in|ne|l?not|neg|approx|n?sim|cong|equiv|propto|[lg][et]q*|ll|gg)(?![A-Za-z])|text)[A-Za-z]++ ?)"
    r"++(?:\([^()=]*\))?) ?(?:(?<![A-Z]{2})(?<![A-Z]{2} )=|=(?! ?[A-Z]{2,}$)|\\in(?![A-Za-z])) ?")

def equivalent(given, gold, rel_tol=0, any_order=True) -> bool:
    """Are two answers the same, up to spelling, value and the order of lists? Never raises or takes long."""
    if given == gold or max(len(given), len(gold)) > 400 or re.search(r"[({\[]{6}", given):  # golds: to 210
        return given == gold
    for pattern, replacement in SPELLINGS:
        given, gold = pattern.sub(replacement, given), pattern.sub(replacement, gold)
    try:
        return same_answer(given.strip(), gold.strip(), rel_tol, any_order)
    except (RecursionError, OverflowError):  # 2^{2000} is too large to be compared with a root
        return False

@functools.lru_cache(4096)  # the elements of lists meet again and again
def same_answer(given, gold, rel_tol, any_order) -> bool:
    """Are two answers in one spelling the same text, elements, equation or value?"""
    (value, unit), (gold_value, gold_unit) = split_unit(given), split_unit(gold)
    if value == gold_value and unit == gold_unit or same_word(given, gold):
        return given != ""
    named = [bool(NAME.match(text)) and len(split_top(text, ",")) == 1 for text in (given, gold)]
    if named[0] != named[1] and not ("=" in given and "=" in gold):
        # x=5 is 5, and so is x=3+2=5, but it is not y=5, and 4=5 is not 4
        with_name, other = (given, gold) if named[0] else (gold, given)
        return all(same_answer(part.strip(), other, rel_tol, any_order)
                   for part in NAME.sub("", with_name, 1).split("="))
    (kind, parts), (gold_kind, gold_parts) = split_answer(given), split_answer(gold)
    if kind != gold_kind or len(parts) != len(gold_parts):
        return False
    if kind:
        return (same_elements(kind, parts, gold_parts, rel_tol, any_order)
                or kind == "=" and proportional(parts, gold_parts, rel_tol))
    # letters are random numbers: two expressions are taken for equal if they agree at two points
    return (not unit or not gold_unit or unit == gold_unit) and all(
        same_value(value_of(value, point), value_of(gold_value, point), rel_tol) for point in (0, 1))

def same_word(given, gold) -> bool:
    r"""evelyn is \text{Evelyn} and c is \text{(C)}, but the letters m and M are two."""
    fold = str.lower if "\\text" in gold or len(gold) > 3 or gold.lower() in ("yes", "no") else str
    words = [fold(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" (){}")) for text in (given, gold)]
    return words[0] == words[1] and bool(re.fullmatch("[A-Za-z][A-Za-z ]*", words[0]))

def same_elements(kind, given, gold, rel_tol, any_order) -> bool:
    r"""Lists, sets and unions in any order, as are the sides of = and \ne; everything else in its own."""
    free = any_order if kind in (",", "\\cup") else kind in ("=", "\\ne")
    names = [{m[0].replace(" ", "") for part in parts if (m := NAME.match(part))} for parts in (given, gold)]
    if not free or not all(names) and len(names[0] | names[1]) > 1:  # x=5, y=6 is not 6, 5
        return all(same_answer(*pair, rel_tol, any_order) for pair in zip(given, gold))
    given, gold = (list((Counter(a) - Counter(b)).elements()) for a, b in ((given, gold), (gold, given)))
    return all(len({sum(same_answer(part, other, rel_tol, any_order) for other in among)
                    for among in (given, gold)}) == 1 for part in given)  # as often here as there

def proportional(sides, gold_sides, rel_tol) -> bool:
    """Is an equation another one times a number? Then so are the differences of their sides, everywhere."""
    differences = ["-".join(f"({side})" for side in both) for both in (sides, gold_sides)]
    ratios = [value_of("({})/({})".format(*differences), point) for point in (0, 1, 2)]
    return len(sides) == 2 and ratios[0] != 0 and all(same_value(x, ratios[0], rel_tol) for x in ratios)

def split_answer(text):
    r"""(kind, elements) of a matrix, tuple, interval, list, union or relation; ("", [text]) of a value."""
    match = re.fullmatch(r"(\(|\[|\\?\{)(.*?)(\)|\]|\\?\})", text)
    if match and (parts := split_top(match[2], ",")):  # none in (a)/(b): its bracket closes early
        brackets = match[1][-1] + match[3][-1]
        if brackets == "{}" or brackets == "()" and len(parts) == 1:
            return split_answer(match[2].strip())  # \{1,2\} is the list 1,2 and (C) is C
        return brackets, parts  # but (1,2) and [1,2] are no lists
    for separator in ("\\\\", "&", ",", "\\cup", "\\ne", "\\le", "<", "="):  # \\ and & part a matrix
        parts = separator in text and split_top(text, separator) or [text]
        if separator == ",":  # \pm makes two elements
            parts = [part.replace("\\pm", sign) for part in parts
                     for sign in ("+-" if part.count("\\pm") == 1 else ["\\pm"])]
        if len(parts) > 1:
            return separator, parts
    return "", [text]

def split_top(text, separator) -> list:
    """Split at separators outside all brackets; [] if brackets do not match or an element is empty."""
    pieces = re.split(r"(\\\\|\\(?:cup|ne|le)(?![A-Za-z])|[&,<=()\[\]{}])", text)
    depths = np.cumsum([(piece in list("([{")) - (piece in list(")]}")) for piece in pieces])
    pieces = ["\n" if piece == separator and depth == 0 else piece for piece, depth in zip(pieces, depths)]
    parts = [part.strip() for part in "".join(pieces).split("\n")]
    return parts if min(depths) == depths[-1] == 0 and all(parts) else []

# A unit is made of these, or it is what is counted; "million" and "below zero" are none.
UNIT = re.compile(r"(?:[munpfckdMGT]|\\mu)?(?:m|g|s|J|eV|W|Hz|V|A|N|Pa|L|mol|K|C|F|T|cal|pc|rad|bar)|/|"
                  r"mph|in|ft|yd|mi|lb|oz|h|min|yr|AU|ly|erg|dyn|atm|rpm|dB|\\AA|\^-?[0-9]|square|cubic")
PREFIX = {"kilo": "k", "centi": "c", "milli": "m", "micro": "\\mu", "nano": "n", "mega": "M", "": ""}
WORDS = {word: unit or word for word, _, unit in (pair.partition(":") for pair in """meter:m metre:m gram:g
second:s sec:s minute:min hour:h hr:h year:yr inch:in foot:ft feet:ft yard:yd mile:mi pound:lb ounce:oz
liter:L joule:J watt:W volt:V newton:N pascal:Pa hertz:Hz kelvin:K mole:mol radian:rad amp:A ampere:A
coulomb:C calorie:cal per:/ min yr lb erg parsec:pc degree percent dollar cent unit day week month apple ball
book box boy car card child children choice coin digit distinct edge face game gallon girl integer item letter
men move number ordered outcome pair path people person piece player point problem real region root row side
solution step student team term ticket triangle triple value vertice vote way women word zero""".split())}
LONG_UNIT = re.compile(f"({'|'.join(PREFIX)})({'|'.join(WORDS)})(?:e?s)?")
TAIL = re.compile(r"(?<=[0-9)}\]|i])(?! ?\^)(?: ?(?:\\text\{[^{}]*\}|\\AA(?![A-Za-z])|[A-Za-z]++|/|"
                  r"\*(?= ?\\text)|\^ ?(?:\{-?[0-9]\}|-?[0-9])))++$")

def split_unit(text) -> tuple:
    r"""(value without spaces, but in \pi r and 4 5; unit): of 9.8 meters/s^2 "m / s ^2", of a bare 5 None."""
    match, unit = TAIL.search(text), None
    if match:
        tail = re.sub(r"\\text\{|[{}*]|\\(?=sec )", " ", match[0])
        words = re.findall(r"\\mu ?[A-Za-z]+|\\?[A-Za-z]+|\^ *-?[0-9]|\S", tail)
        words = [unit_of(word.replace(" ", "")) for word in words]
        letters = re.search("[A-Za-z]", re.sub(r"\\[a-z]+|[0-9]e(?=[-+0-9])", "", text[:match.start()]))
        # bare ones may be letters of a product: 6m, 2 k m, x^2 ms
        sure = "\\" in match[0] or not letters and re.search(r"[A-Za-z]{2}|m ?/ ?s", tail)
        if sure and all(words):
            text, unit = text[:match.start()], re.sub(r"square (\S+)", r"\1 ^2", " ".join(words))
    return re.sub(r"(\\[A-Za-z]+ (?=[A-Za-z])|[0-9] (?=[0-9]))| ", r"\1", text).removeprefix("+"), unit

def unit_of(word):
    """One spelling of a unit, or of what is counted; None for any other word."""
    match = LONG_UNIT.fullmatch(word.lower())
    return word if UNIT.fullmatch(word) else match and PREFIX[match[1]] + WORDS[match[2]]

def same_value(x, y, rel_tol) -> bool:
    """Fractions to the last digit, others to the eleventh; no long decimal is a root or has a pi."""
    exact = [value for value in (x, y) if isinstance(value, Fraction)]
    if len(exact) == 2 and not rel_tol:
        return x == y
    short = rel_tol or all(value.denominator < 10**4 for value in exact)
    return bool(short) and cmath.isfinite(x) and cmath.isclose(x, y, rel_tol=rel_tol or 1e-11)

# LaTeX as Python, from the innermost braces outwards; letters and functions may have an index, x_(1)
INDEX = r"(?:_(?:[A-Za-z0-9]|\([^()]*\))|')*"
SIMPLE = rf"(?:(?:[0-9.]+|(?:\\(?!{F})[A-Za-z]+ ?|[A-Za-z]){INDEX})(?:\^(?:-?\w|\([^()]*\)))?)"
TO_PYTHON = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in [
    (r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"((\1)/(\2))"), (r"\\sqrt ?\{([^{}]*)\}", r"((\1)^(1/2))"),
    (r"\\sqrt ?\[([0-9]+)\] ?\{([^{}]*)\}", r"((\2)^(1/\1))"),
    (r"\\(d?dot|hat|bar|vec) ?\{([^{}]*)\}", r"\\\1_(\2)"),
    (rf"([_^(]|^|(?<=[-+*/ ])|\\{F}|\\log_\(\d+\)|\d) ?\{{([^{{}}]*)\}}", r"\1(\2)"),
    (r"\\l(floor|ceil)(?![A-Za-z])((?:(?!\\l(?:floor|ceil)).)*?)\\r\1", r"\\\1(\2)"),
    (rf"(\\{F}) ?\^ ?(\([0-9]+\)|[0-9]) ?((?:{SIMPLE} ?)+|\([^()]*\))", r"(\1(\3))^\2"),
    (rf"(\\{F}{INDEX}) ?((?:{SIMPLE} ?)+)", r"\1(\2)"),
    (r"([0-9]+|[A-Za-z]|\([^()]*\)) ?!(?!!)", r"\\factorial(\1)"),
]]
TOKEN = re.compile(r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)|"
                   rf"(?P<sign>[-+*/^,)])|(?P<open>\()|(?P<letter>(?:\\[A-Za-z]+|[A-Za-z]){INDEX})", re.ASCII)
OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: pow}
LETTERS = """alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau
phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell dot ddot hat bar vec""".split()

@functools.lru_cache(4096)
def value_of(text, point):
    r"""The value of an expression: exact where it is rational, NaN where it is none or has two readings.

    Only numbers, letters, operators and FUNCTIONS are computed; Python parses them, and executes nothing.
    """
    text = re.sub(r"^(-?)([0-9]+) ?(\\frac ?\{[0-9]+\} ?\{[0-9]+\}|(?<= )[0-9]+/[0-9]+)$", r"\1(\2+\3)", text)
    if re.search(r"^[^\W\d]{3}$|(?<![\w\\{^])([A-Za-z]{4}|[A-Z]{3})|\d ?\\frac ?{\d|d ?\w+} ?{d|d\w/d", text):
        return math.nan
    before, source, values, operand = None, "", {}, False
    while text != before:
        before = text
        for pattern, replacement in TO_PYTHON:
            text = pattern.sub(replacement, text)
    text = text.replace("[", "(").replace("]", ")").strip()
    try:
        while text:
            token = TOKEN.match(text)
            kind, word, text = token.lastgroup, token[0], text[token.end():].lstrip()
            source += "*" * bool(operand and re.search(r"(open|letter|[^)]\)number)$", source + kind))  # (a)2
            if kind in ("number", "letter"):
                name, word = word, f" v{len(values)}"
                values[word[1:]] = Fraction(name) if kind == "number" else meaning_of(name, text, point)
            source += word.replace("^", "**")
            operand = word == ")" or kind in ("number", "letter") and not callable(values[word[1:]])
        return value_of_tree(ast.parse(source.strip(), mode="eval").body, values)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, SyntaxError, TypeError, ValueError):
        return math.nan

def meaning_of(word, rest, point):
    """What a letter is, or what a function computes: f(2x) is not 2f(x), but x(x+1) is a product."""
    name, _, index = word.removeprefix("\\").partition("_")
    if name == "log" and index:
        return lambda x: cmath.log10(x) / cmath.log10(value_of(index.strip("()"), point))
    if name in FUNCTIONS and not index:
        return FUNCTIONS[name]
    is_function = name[0].isupper() or word[0] in "fgh" or rest[2:3] == ")"
    if name in ("floor", "ceil", "factorial") or rest.startswith("(") and is_function:
        return functools.partial(unknown, word)
    if word[0] == "\\" and name not in LETTERS:
        raise ValueError(f"{word} is nothing to compute with")
    return {"pi": math.pi, "e": math.e, "i": 1j}.get(name) or unknown(word, point)

def unknown(name, *values):
    """A random fraction, the same for the same name and values."""
    seed = [v if isinstance(v, Fraction | int) else f"{v.real:.9g} {abs(v):.9g}" for v in values]
    return Fraction(random.Random(f"{name} {seed}").randrange(10**6, 10**7), 10**6 + 3)

def value_of_tree(node, values):
    if isinstance(node, ast.Name):
        return values[node.id] + 0  # a function alone is no number
    if isinstance(node, ast.UnaryOp):
        return value_of_tree(node.operand, values) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.Call):
        return values[node.func.id](*(value_of_tree(argument, values) for argument in node.args))
    x, y = (value_of_tree(side, values) for side in (node.left, node.right))
    bits = [(v.numerator * v.denominator).bit_length() if isinstance(v, Fraction) else 0 for v in (x, y)]
    if (bits[0] * abs(y) if isinstance(node.op, ast.Pow) else sum(bits)) > 10_000:
        raise OverflowError("a tower of exponents, which would fill the memory")
    return OPERATORS[type(node.op)](x, y)

if __name__ == "__main__":
    as_a_command(main)
