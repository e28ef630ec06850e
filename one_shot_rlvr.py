r"""One-shot RLVR: reinforcement learning with a verifiable reward on ONE training example, for a model that learns
to reason about mathematics (Wang et al., arXiv 2504.20571). One file, one GPU or a laptop, read top to bottom.

    python one_shot_rlvr.py --example pi1 --model Qwen/Qwen2.5-Math-1.5B      # the paper's run, on one 80 GB GPU
    python one_shot_rlvr.py --preset tiny                                     # the same code, minutes on two CPU cores
    python one_shot_rlvr.py --preset tiny --kl-coef 0 --entropy-coef 0        # an ablation is a coefficient

The algorithm is GRPO. One step:
    1. Example      the one problem becomes one prompt, repeated as 128 groups of 8
    2. Rollouts     sample a response to each of the 1,024 prompts, at temperature 0.6; prompt + response is a rollout
    3. Reward       1 if the last \boxed{...} of the response equals the answer, else 0
    4. Advantages   in each group of 8: (reward - mean) / std
    5. Loss         clipped policy gradient + 0.001 KL to the initial model - 0.001 entropy, mean over response tokens
    6. Update       one AdamW step; then again from 1, some 2,000 times
The sections are numbered like these steps, and main() at the end of section 9 is these steps in a loop: look at it
first, and leave the two appendices, on the speed of a GPU and on comparing answers, for last.

Where this differs from the paper's text [P] and from its released code [C] (skip this on a first reading):
    1. One update a batch, as in [C]; [P] says eight (--updates-per-batch 8). With one, ratio is 1: nothing is clipped.
    2. The ratio is of single tokens, as in [C], and the mean over all tokens of the update (--loss-agg sequence: over
       each sequence first). [P] writes one ratio a sequence; [C] averages micro-batches, and depends on their packing.
    3. Every log-probability is of logits / temperature, as in [C]; [P] writes plain logits.
    4. Old log-probabilities are the trainer's own, as in [C], not the sampler's, which on CUDA is a bf16 copy; how far
       the two are apart is logged (sampler_gap).
    5. The learning rate is constant from the first step; in [C] the very first step has rate 0.
    6. The reward reads the response alone; [C] reads prompt + response, and the prompt holds an empty \boxed{}.
    7. The checker compares by exact value (8/6 is 4/3, 3*8 is 24) and lets a unit follow (12.8 mph); [C] refuses these.
    8. A response ends at any end token of the model, its chat template's included; in [C] at EOS alone.
    9. k3's exponent is bounded (kl_estimate says why); its value is cut at 10 as in [C]. [P] cuts nothing.

Shapes: N rollouts a step, G rollouts a group; B rows of a micro-batch, padded to L tokens, up to T of them response;
M response tokens in those rows; n rows and q new tokens in a forward pass of the sampler; V vocabulary, H hidden size.
"""
import argparse
import ast
import cmath
import contextlib
import copy
import datetime
import functools
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import textwrap
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

try:
    import fcntl
    import resource
except ImportError:             # Windows: there two writers are not kept apart, and peak memory is not shown
    fcntl = resource = None

HERE = Path(__file__).resolve().parent


# ----------------------------------------------------------------------------------------------------------------------
# 0. Settings: one flat dataclass, from which the command line is built
# ----------------------------------------------------------------------------------------------------------------------

def setting(default, group, help, choices=None):
    """A field of Config (a factory, because a dataclass takes no list as default) and what --help says of it."""
    return field(default_factory=lambda: default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class Config:
    """Every setting. Config() is the paper's run on pi1; [C] marks a value of the released code, [P] of the paper."""
    preset: str = setting("paper", "run", "starting values, which the other flags override", ["paper", "24gb", "tiny"])
    model: str = setting("Qwen/Qwen2.5-Math-1.5B", "run", "Hugging Face id or model folder to train")
    output_dir: str = setting("", "run", "folder of the run; empty means runs/EXAMPLE-MODEL")
    resume: bool = setting(False, "run", "go on with the run in --output-dir, with its own settings")
    steps: int = setting(2000, "run", "training steps [P: B.4, 2000 for the 1.5B model]")
    seed: int = setting(0, "run", "seed of everything random")
    save_every: int = setting(20, "run", "save a model folder and a checkpoint every so many steps [C]")
    eval: list = setting([], "run", "benchmarks of evaluate.py, or .jsonl files, to measure while training")
    eval_every: int = setting(0, "run", "evaluate every so many steps; 0 means never")

    example: list = setting(["pi1"], "example", "names of examples.json, or a .json/.jsonl file of {problem, answer}")
    answer: str = setting("", "example", "label to use in place of the example's own [P: Table 5, rows 11-13]")
    max_prompt_tokens: int = setting(1024, "example", "longer prompts are left out [C]")

    prompts_per_step: int = setting(128, "rollouts", "groups a step [C]")
    group_size: int = setting(8, "rollouts", "rollouts a group, whose mean is the baseline [C]")
    max_response_tokens: int = setting(3072, "rollouts", "longest response [C]")
    temperature: float = setting(0.6, "rollouts", "temperature of sampling and of every log-probability [C]")
    slots: int = setting(320, "rollouts", "responses sampled at the same time; bounds the memory of the cache")
    cuda_graph: bool = setting(True, "rollouts", "launch a decode step's kernels in one go; nothing on a CPU")

    reward: str = setting("answer", "loss", "what earns 1: the right answer, any boxed one [P: C.2.3], nothing",
                          ["answer", "format", "none"])
    scale_rewards: bool = setting(True, "loss", "divide advantages by the group's standard deviation")
    pg_coef: float = setting(1.0, "loss", "weight of the policy gradient [P: Table 5]")
    clip_eps: float = setting(0.2, "loss", "the ratio is clipped to 1 +- this [C]")
    kl_coef: float = setting(0.001, "loss", "weight of the KL to the initial model; 0 loads no reference [P: Table 5]")
    kl_estimator: str = setting("k3", "loss", "estimator of the KL; the released code's low_var_kl is k3",
                                ["k1", "k2", "k3"])
    entropy_coef: float = setting(0.001, "loss", "weight of the entropy bonus; the paper writes -0.001 [P: Table 5]")
    loss_agg: str = setting("token", "loss", "mean over all tokens, or over those of each sequence first",
                            ["token", "sequence"])

    updates_per_batch: int = setting(1, "update", "optimizer steps on each batch of rollouts [C: 1, P: 8]")
    learning_rate: float = setting(1e-6, "update", "of AdamW, constant [C]")
    weight_decay: float = setting(0.01, "update", "of AdamW [C]")
    grad_clip: float = setting(1.0, "update", "largest norm of the gradient [C]")
    token_budget: int = setting(6144, "update", "tokens of a micro-batch; bounds memory, changes no result")
    activation_checkpointing: bool = setting(False, "update", "compute activations again in backward: less memory, "
                                             "one more forward pass")
    offload_optimizer: bool = setting(False, "update", "keep AdamW's 8 bytes a parameter in host memory")
    precision: str = setting("auto", "update", "of matrix products; auto is bf16 on CUDA, fp32 on a CPU",
                             ["auto", "bf16", "fp32"])


TINY_BASE = "runs/tiny-base"
PRESETS = {
    "paper": {},
    "24gb": dict(prompts_per_step=32, max_response_tokens=2048, slots=64, kl_coef=0.0, token_budget=3072,
                 activation_checkpointing=True, offload_optimizer=True),
    "tiny": dict(model=TINY_BASE, example=["tiny-add"], steps=60, save_every=20, prompts_per_step=16,
                 max_response_tokens=64, slots=128, learning_rate=1e-4),
}


def fail(sentence):
    """Bad input ends the program with one sentence and exit code 2; a traceback would bury it."""
    if os.environ.get("RANK", "0") == "0":                # once, not once a process
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def make_parser(doc, **options):
    """A parser whose --help begins as the script's docstring does, and whose errors are one sentence."""
    parser = argparse.ArgumentParser(description="\n\n".join(doc.split("\n\n")[:2]), allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.error = fail
    return parser


def first_line(error) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def as_a_command(main) -> None:
    """Run the main() of a script: Ctrl-C, a full disk and a file that cannot be written end it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)
    except OSError as error:
        fail(f"{error}; what was written before is whole")


def parse_args(argv=None) -> Config:
    """The command line as a Config: the preset, or with --resume the saved run's settings; flags given win."""
    argv = sys.argv[1:] if argv is None else argv
    # --group_size is as good as --group-size
    argv = [re.sub(r"^--\w[\w-]*", lambda flag: flag[0].replace("_", "-"), arg) for arg in argv]
    parser = make_parser(__doc__, usage="%(prog)s [flags]", epilog="[P]: the paper; [C]: its released code.")
    group = None
    for f in fields(Config):
        if group is None or group.title != f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        default, kind = f.default_factory(), {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if f.type is list:
            default, kind = " ".join(default), {"nargs": "+"}
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind,
                           help=f"{f.metadata['help']} (default: {'none' if default == '' else default})")
    given = vars(parser.parse_args(argv))
    config = Config(**{**PRESETS[given.get("preset", "paper")], **given})
    config.output_dir = config.output_dir or \
        f"runs/{'+'.join(Path(name).stem for name in config.example)}-{Path(config.model).name}"
    if config.resume:
        try:
            saved = json.loads(Path(config.output_dir, "config.json").read_text(encoding="utf-8"))
            saved = {f.name: saved.get(f.name, f.default_factory()) for f in fields(Config)}
            if given.get("preset", saved["preset"]) != saved["preset"]:
                fail(f"--preset {given['preset']}: a resumed run keeps its settings; give only the flags that change")
            config = Config(**{**saved, **given, "output_dir": config.output_dir})
        except (OSError, ValueError, AttributeError):
            fail(f"--resume: {config.output_dir} holds no run; start one without --resume, or name its --output-dir")
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse settings under which nothing would be trained, or not what they say."""
    lowest = {"group_size": 2, "eval_every": 0, "seed": 0}              # a group of one has no spread to learn from
    for f in fields(config):
        value, flag = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if f.type is int and not lowest.get(f.name, 1) <= value <= 10**9:
            fail(f"{flag} {value}: use {lowest.get(f.name, 1)} or more, and at most 10^9")
        if f.name in ("temperature", "learning_rate", "grad_clip", "clip_eps") and not value > 0:
            fail(f"{flag} {value}: use a number above 0")
        if f.type is float and not abs(value) <= 1e9 and f.name != "grad_clip":             # inf: do not clip
            fail(f"{flag} {value}: use a number below 10^9")
    if config.weight_decay < 0:
        fail(f"--weight-decay {config.weight_decay}: use 0 or more")
    if bool(config.eval_every) != bool(config.eval):
        fail(f"--eval-every {config.eval_every} and --eval {' '.join(config.eval) or '(none)'} need each other")


# ----------------------------------------------------------------------------------------------------------------------
# 1. Example: from a name to the prompt's tokens
# ----------------------------------------------------------------------------------------------------------------------

TRAIN_SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."
TEMPLATE_DATE = "26 Jul 2024"           # Llama-3.2's template writes a date, by default today's: a prompt that drifts
EVAL_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


def read_text(path, errors="strict") -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig", errors=errors)        # some editors begin a file with a mark
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read ({error})")


def parse_json(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fail(f"{place}: not JSON ({error})")


def read_json(path, *keys):
    """A JSON file; with keys it must be an object that has them."""
    value = parse_json(read_text(path), path)
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            fail(f"{path}: it has no {key!r}, so it is another kind of file than is wanted here")
    return value


def read_jsonl(path) -> dict:
    """{line number: row}, without blank lines."""
    # split("\n"), because splitlines would also cut a response at U+2028
    return {number: parse_json(line, f"{path}, line {number}")
            for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()}


def read_log(path) -> list:
    """The rows of a .jsonl file that a program is, or was, writing; a last line that is cut short is left out."""
    rows = []
    # replace: a kill or a full disk can cut a line within a letter
    for line in read_text(path, errors="replace").split("\n") if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def load_examples(names, answer="") -> list:
    """Names of examples.json and .json/.jsonl files -> [{"name", "problem", "answer"}]; `answer` replaces the label.

    A row of a file without a name goes by that of the file and, if it has several, its number.
    """
    named, examples = read_json(HERE / "examples.json"), []
    for name in names:
        if name in named:
            rows = {name: named[name]}
        elif name.endswith(".jsonl"):
            rows = read_jsonl(name)
        elif name.endswith(".json"):
            rows = read_json(name)
        else:
            fail(f"--example {name}: no such example; there are {', '.join(named)}, or give a .json/.jsonl file")
        if not isinstance(rows, dict):
            rows = dict(enumerate(rows, 1)) if isinstance(rows, list) else {}
        elif "problem" in rows:
            rows = {1: rows}                                                    # a file with a single example
        for key, row in rows.items():
            if not (isinstance(row, dict) and isinstance(row.get("problem"), str) and row["problem"]
                    and isinstance(row.get("answer"), str | int | float)):
                fail(f'--example {name}, row {key}: it needs "problem", a text, and "answer", a text or a number')
            own = name if name in named else Path(name).stem + f"-{key}" * (len(rows) > 1)
            examples.append({"name": str(row.get("name", own)), "problem": row["problem"],
                             "answer": answer or str(row["answer"])})
    counts = Counter(example["name"] for example in examples)
    if twice := [name for name, count in counts.items() if count > 1]:
        fail(f"--example {' '.join(names)}: {twice[0]} is there twice; give the examples names of their own")
    if not examples or answer and len(examples) > 1:
        fail(f"--example {' '.join(names)}: {len(examples)} examples, but one is needed, and just one with --answer")
    return examples


def encode_prompt(tokenizer, problem, system=None) -> list:
    """Token ids of the problem as a user's message in the model's chat template, or as plain text where it has none.

    `system` is used where the template has such a role; else the template's own default system message holds.
    """
    if not tokenizer.chat_template:
        return tokenizer(problem).input_ids
    user = [{"role": "user", "content": problem}]
    options = dict(tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE)
    text = tokenizer.apply_chat_template(user, **options)
    if system:
        with contextlib.suppress(TemplateError):          # some templates refuse a system message, others drop it
            with_system = tokenizer.apply_chat_template([{"role": "system", "content": system}, *user], **options)
            text = with_system if system in with_system else text
    return tokenizer(text, add_special_tokens=False).input_ids


def find_stop_ids(tokenizer, generation_config) -> list:
    """Every token that ends a response: EOS of tokenizer and generation config, and the end of an assistant's turn.

    The last is read off a rendered turn, because the configuration of a base model often names only the end of text.
    """
    stop_ids = set()
    for eos in (tokenizer.eos_token_id, generation_config.eos_token_id):
        stop_ids.update(eos if isinstance(eos, list) else [eos])
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "ANSWER"}]
        ending = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("ANSWER")[2]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        # the first special token ends the turn; a later one may open the next
        stop_ids.update([i for i in tokenizer(ending, add_special_tokens=False).input_ids if i in special][:1])
    return sorted(stop_ids - {None})


def examples_of_step(step, num_examples, prompts_per_step, seed) -> list:
    """Index of the example of each group of step 1, 2, ...: always 0 where there is one example.

    Several take turns in shuffled epochs, one after the other, without replacement: fewer examples than groups share a
    step evenly. A pure function of the step, so that a resumed run draws the same.
    """
    def example_at(position):
        epoch, place = divmod(position, num_examples)
        return int(np.random.default_rng([seed, epoch]).permutation(num_examples)[place])
    return [example_at(position) for position in range((step - 1) * prompts_per_step, step * prompts_per_step)]


# ----------------------------------------------------------------------------------------------------------------------
# 2. Rollouts: sample responses, one token at a time, in a fixed number of slots
# ----------------------------------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of the rows that are sampled at the same time, the newest token of each, and where it stands.

    transformers' own caches keep one position for all rows. Attention layers call only update(): since we pass a ready
    4-D mask and position ids, the model asks its cache for nothing else.
    """

    def __init__(self, model, num_rows, length, cuda_graph):
        self.model, self.num_rows, self.length, self.layers = model, num_rows, length, []
        zeros = torch.zeros(num_rows, 1, dtype=torch.long, device=model.device)
        self.tokens, self.positions = zeros, zeros.clone()
        self.cuda_graph, self.graphs = cuda_graph, {}

    def feed(self, rows, tokens, positions, filled, **kwargs):
        """Feed tokens (n, q), which stand at positions (n, q) < filled, to a slice of rows -> logits after the last."""
        # for update(), which the model's layers call from inside the forward pass below
        self.rows, self.fed, self.filled = rows, positions, filled
        self.row_index = torch.arange(rows.start, rows.stop, device=positions.device)[:, None]                  # (n, 1)
        mask = torch.arange(filled, device=positions.device) <= positions[:, None, :, None]         # (n, 1, q, filled)
        return self.model(input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=self,
                          use_cache=True, logits_to_keep=1, **kwargs).logits[:, -1]                             # (n, V)

    def update(self, keys, values, layer, *args, **kwargs):
        """Store keys and values (n, heads, q, head size) of the new tokens; return those of all tokens so far."""
        if layer == len(self.layers):
            # zeros, not empty: a masked NaN still poisons the sum over values, because 0 * NaN is NaN
            shape = self.num_rows, self.length, keys.shape[1], keys.shape[3]
            self.layers.append((keys.new_zeros(shape), values.new_zeros(shape)))
        for store, new in zip(self.layers[layer], (keys, values)):
            store[self.row_index, self.fed] = new.transpose(1, 2)
        return tuple(store[self.rows, :self.filled].transpose(1, 2) for store in self.layers[layer])

    def copy(self, source, target, length):
        """Copy the first `length` keys and values of one row to another; what stands behind them is never read."""
        for stores in self.layers:
            for store in stores:
                store[target, :length] = store[source, :length]

    def decode(self, n, filled):
        """Feed the newest tokens of the first n rows, all at positions < filled -> logits (n, V)."""
        plain = functools.partial(self.feed, slice(0, n), self.tokens[:n], self.positions[:n], filled)
        return decode_by_graph(self, n, plain) if self.cuda_graph else plain()


def first_past(weights, target):
    """Where the running sum of weights (n, k) passes target (n,): index (n,), and what was left of the target there."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)                                                        # (n, k)
    # rounding must lead neither past the end nor, at exactly 0, to a first weight of 0
    target = torch.minimum(target.clamp(min=0), cumulative[:, -1] * (1 - 1e-15))[:, None]
    index = torch.searchsorted(cumulative, target, right=True)
    left = target - (cumulative.gather(1, index) - weights.gather(1, index))
    return index.squeeze(1), left.squeeze(1)


def sample_tokens(logits, temperatures, noise):
    """Draw one token a row from softmax(logits / temperature): logits (n, V), noise (n,) uniform in [0, 1).

    Returns tokens (n,) and their log-probabilities (n,). The token is the one in which the cumulative distribution
    passes the noise: unlike torch.multinomial, a draw then does not depend on the rows beside it. First the block of
    128 tokens is found, then the token in it, because a running sum over all of V takes a GPU as long as ten layers.
    temperatures: (n,); a row of temperature 0 takes the largest logit.
    """
    probs = (logits / temperatures.float().clamp(min=1e-6)[:, None]).softmax(-1)                       # (n, V), float32
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % 128)).unflatten(1, (-1, 128))        # (n, V/128, 128)
    sums = blocks.sum(-1, dtype=torch.float64)                                                             # (n, V/128)
    block, left = first_past(sums, noise * sums.sum(-1))
    place, _ = first_past(blocks[torch.arange(len(block), device=block.device), block], left)
    tokens = torch.where(temperatures > 0, 128 * block + place, logits.argmax(-1))
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def draw_noise(N, T, generator=None):
    """(N, T) numbers uniform in [0, 1), in double precision: a token of probability 1e-9 should come up that often."""
    return torch.rand(N, T, dtype=torch.float64, generator=generator, device=generator.device if generator else "cpu")


def generate(model, prompts, *, max_response_tokens, temperature, stop_ids, slots=None, generator=None,
             noise=None, cuda_graph=False, return_logprobs=False):
    """Sample one response to each prompt (lists of token ids, in that order; the stop token is included).

    At most `slots` rows are sampled at a time, all of them by default. temperature 0 is greedy. Each rollout has a row
    of noise of its own, drawn from `generator` before the first token, so `slots` changes the speed and not the
    responses (but for rounding in the model's matrix products). noise: (N, T) in place of a generator's, as draw_noise
    makes it. return_logprobs: (responses, the log-probabilities of their tokens as the sampler had them, a tensor (T,)
    for each). cuda_graph: see capture.
    """
    N = len(prompts)
    if noise is None:
        noise = draw_noise(N, max_response_tokens, generator)
    responses, logprobs, sampled = [None] * N, [None] * N, 0
    # miniters=0: a sign of life also while no response ends
    with tqdm(total=N, desc="rollouts", leave=False, disable=None, miniters=0) as progress:
        for running, ended in generate_each(model, prompts, N * [max_response_tokens], N * [temperature], noise,
                                            stop_ids, slots, cuda_graph):
            for i, response, its_logprobs in ended:
                responses[i], logprobs[i] = response, its_logprobs
            sampled += running
            progress.set_postfix_str(f"{sampled:,} tokens, {running} rows running", refresh=False)
            progress.update(len(ended))
    return (responses, logprobs) if return_logprobs else responses


@torch.no_grad()
def generate_each(model, prompts, limits, temperatures, noise, stop_ids, slots=None, cuda_graph=False):
    """Sample prompt i up to limits[i] tokens at temperatures[i], its t-th token by noise[i, t]; yield as they end.

    After each step, in which every running row got one token, it yields how many rows these were and the responses that
    ended, [(i, token ids, their log-probabilities), ...]. When a row ends, the next prompt takes its place, or if none
    is left, the last row: the work follows the tokens that are sampled, and nobody waits for the longest response.
    Prompts start in the order given, but equal ones together, because they are prefilled once: a place that held the
    prompt before needs nothing, any other copies it.
    """
    if not all(prompts):
        raise ValueError("an empty prompt: there is no token to predict from")
    model.eval()            # nothing ever calls train() again: no dropout, neither here nor in the update
    device, first = model.device, {}
    for i, prompt in enumerate(prompts):
        first.setdefault(tuple(prompt), i)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: first[tuple(prompts[i])]))
    cache = KVCache(model, min(slots or len(prompts), len(prompts)),
                    max((len(prompt) + limit for prompt, limit in zip(prompts, limits)), default=0), cuda_graph)
    # by rollout, and on the device, which is asked one question a step: which rows have ended?
    noise, stop_ids = noise.to(device), torch.tensor(sorted(stop_ids), device=device)
    last_of_prompt, limits, temperatures = (torch.tensor(values, device=device) for values in (
        [len(prompt) - 1 for prompt in prompts], limits, temperatures))                                           # (N,)
    sampled = torch.zeros(noise.shape, dtype=torch.long, device=device)                                         # (N, T)
    logprobs = torch.zeros(noise.shape, device=device)
    rollout_in_row = torch.zeros(cache.num_rows, dtype=torch.long, device=device)
    running = {}            # the same on the host: {row: rollout}, of rows 0, 1, ...
    begun = {}              # the step at which a row's rollout began
    held = {}               # the prompt whose keys and values stand in each row, also after its rollout has ended
    step, free = 0, range(cache.num_rows)

    def position(row):
        """Where the row's newest token stands: cache.positions, without asking the device."""
        return len(prompts[running[row]]) - 1 + step - begun[row]

    def start(row, i):
        """Put all of the prompt but its last token, which is fed next, into the row's cache."""
        prompt = prompts[i]
        source = row if held.get(row) == prompt else next((r for r, p in held.items() if p == prompt), None)
        if source is None and len(prompt) > 1:
            cache.feed(slice(row, row + 1), torch.tensor([prompt[:-1]], device=device),
                       torch.arange(len(prompt) - 1, device=device)[None], len(prompt) - 1)
        elif source is not None and source != row:
            cache.copy(source, row, len(prompt) - 1)
        rollout_in_row[row], cache.tokens[row], cache.positions[row] = i, prompt[-1], len(prompt) - 1
        running[row], begun[row], held[row] = i, step, prompt

    def move(source, target):
        """Go on with a row's rollout in another row."""
        cache.copy(source, target, position(source))
        for state in (rollout_in_row, cache.tokens, cache.positions):
            state[target] = state[source]
        running[target], begun[target], held[target] = running.pop(source), begun[source], held[source]

    while waiting or running:
        for row in free[:len(waiting)]:
            start(row, waiting.popleft())
        for gap in reversed([row for row in free if row not in running]):
            if gap < max(running, default=0):
                move(max(running), gap)
        n = len(running)
        logits = cache.decode(n, 1 + max(map(position, range(n))))                                              # (n, V)
        ids = rollout_in_row[:n]
        t = cache.positions[:n, 0] - last_of_prompt[ids]            # the new token is the rollout's t-th, from 0
        new, logprobs[ids, t] = sample_tokens(logits, temperatures[ids], noise[ids, t])
        sampled[ids, t] = cache.tokens[:n, 0] = new
        cache.positions[:n] += 1
        ended = torch.isin(new, stop_ids) | (t + 1 == limits[ids])
        step, free = step + 1, ended.nonzero().flatten().tolist()
        finished = [(running.pop(row), step - begun[row]) for row in free]
        yield n, [(i, sampled[i, :length].tolist(), logprobs[i, :length].cpu()) for i, length in finished]


# ----------------------------------------------------------------------------------------------------------------------
# 3. Reward: is the last boxed answer the right one?
# ----------------------------------------------------------------------------------------------------------------------

BOX, BRACE = re.compile(r"\\boxed *\{"), re.compile(r"\\[{}\\]|[{}]")              # \{ and \} are printed, no groups


def extract_boxed(text):
    r"""Content of the last complete \boxed{...} of a text, or None. Linear time; no answer has 10,000 characters."""
    place = end = len(text)
    while (place := text.rfind("\\boxed", 0, place)) >= 0:
        opening = BOX.match(text, place)
        if not opening:
            continue
        depth, start = 1, opening.end()
        for brace in BRACE.finditer(text, start, min(end, start + 10_000)):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return text[start:brace.start()]
        end = place                 # this box never closes, so an earlier one that is open here never closes either
    return None


def is_correct(response, answer) -> bool:
    r"""The judgement behind the reward: is the last complete \boxed{} of the response the answer? Never raises."""
    box, answer = extract_boxed(str(response)), str(answer)
    gold = extract_boxed(answer) or answer                      # some sets write their answers with the box
    return bool(box and box.strip() and gold.strip()) and equivalent(box.strip(), gold.strip())


def has_box(response) -> bool:
    r"""Is there a complete \boxed{} with something in it?"""
    return bool((extract_boxed(response) or "").strip())


def reward_of(response, answer, kind="answer") -> float:
    """The reward of a response: 1 if its answer is right, or (format) if it has one, or (none) never."""
    return float({"answer": is_correct(response, answer), "format": has_box(response), "none": False}[kind])


# ----------------------------------------------------------------------------------------------------------------------
# 4. Advantages: how much better than the other rollouts of its group?
# ----------------------------------------------------------------------------------------------------------------------

def group_advantages(rewards, group_size, scale=True):
    """Rewards (N,) -> advantages (N,): (r - mean) / (std + 1e-6) in each group of G neighbours, std with ddof 1.

    A group in which all rewards are equal has nothing to say: its advantages are exactly 0. `scale=False` leaves the
    division out. Paper Eq. 6, with the released code's ddof and 1e-6. Raises ValueError if G does not divide N.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards do not make groups of {group_size}")
    groups = rewards.view(-1, group_size)                                                                     # (N/G, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-6)
    # the mean of equal rewards such as 0.1 is rounded, and the rounding, divided by 1e-6, would pass for a signal
    dead = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(dead, 0.0).view(-1)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Loss: log-probabilities, then clipped policy gradient + KL - entropy
# ----------------------------------------------------------------------------------------------------------------------

def hidden_states(model, prompts, responses):
    """The last hidden state before each response token (M, H), these tokens (M,), and their places in a mask (B, T).

    Rows are prompt + response, padded on the right with any token: a causal model never looks there. The mask goes by
    length, not by token id, because where EOS == PAD an id mask would take the model's stopping out of the loss.
    """
    starts = torch.tensor([len(prompt) for prompt in prompts])                                                    # (B,)
    lengths = torch.tensor([len(response) for response in responses])                                             # (B,)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                                                  # (B, T)
    b, t = mask.nonzero(as_tuple=True)                          # (M,), on the host: a GPU would have to be waited for
    ids = pad_sequence([torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses)],
                       batch_first=True)                                                                        # (B, L)
    b, place, ids, mask = (x.to(model.device) for x in (b, starts[b] + t, ids, mask))
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state                              # (B, L, H)
    return hidden[b, place - 1], ids[b, place], mask                           # the token before predicts the next one


def token_logprobs(model, prompts, responses, temperature, chunk=512):
    """Log-probability and entropy of every response token -> logprobs, entropy, mask, each (B, T) and 0 after the end.

    Logits are made for `chunk` tokens at a time and made again in backward: fp32 logits of 3,072 tokens are 1.9 GB.
    """
    head = model.get_output_embeddings()
    hidden, targets, mask = hidden_states(model, prompts, responses)

    def score(hidden, targets):
        all_logprobs = (head(hidden).float() / temperature).log_softmax(-1)                                 # (chunk, V)
        return all_logprobs.gather(1, targets[:, None]).squeeze(1), -(all_logprobs.exp() * all_logprobs).sum(1)

    chunks = [recompute_in_backward(score, *pair, use_reentrant=False, preserve_rng_state=False)
              for pair in zip(hidden.split(chunk), targets.split(chunk))]
    logprobs, entropy = (torch.cat(values) for values in zip(*chunks))                                            # (M,)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy), mask


def kl_estimate(logprobs, ref_logprobs, kind="k3"):
    """Elementwise estimate of KL(policy || reference) from samples of the policy (Schulman, 2020).

    As a term of the loss only the estimate is differentiated, not the sampling. The expected gradient of k1 is then
    zero (it never looks at the reference), k2's is that of KL(policy || reference), k3's of KL(reference || policy).
    k3 is cut at 10, as in the released code. Its exponent is cut first, at 20: exp of a large d is inf, the gradient of
    the cut is 0 there, and 0 times inf is NaN.
    """
    d = ref_logprobs - logprobs
    return {"k1": -d, "k2": d.square() / 2, "k3": (d.clamp(max=20).exp() - d - 1).clamp(max=10)}[kind]


def grpo_loss(logprobs, old_logprobs, ref_logprobs, entropy, advantages, mask, num_tokens, config):
    """GRPO's loss of a micro-batch -> (scalar, stats). For each response token, with ratio = exp(logprob - old one):

        pg_coef * -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)  +  kl_coef KL  -  entropy_coef entropy

    averaged over tokens (paper Eq. 3 to 8; differences 2, 3 and 9 at the top of the file). All tensors are (B, T);
    advantages A may be (B,), one for all tokens of a rollout. num_tokens counts the response tokens of the whole
    update, not of this micro-batch: each call returns its share of the mean, and the shares of all add up to it.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]                                   # (B, T) or (B, 1)
    # where the old policy is the policy, the ratio is 1, but its gradient is that of logprobs: REINFORCE
    ratio = (logprobs - old_logprobs).exp()                                                                     # (B, T)
    clipped = ratio.clamp(1 - config.clip_eps, 1 + config.clip_eps)
    pg = -torch.min(ratio * A, clipped * A)
    kl = kl_estimate(logprobs, ref_logprobs, config.kl_estimator)
    per_token = config.pg_coef * pg + config.kl_coef * kl - config.entropy_coef * entropy
    mask = mask.to(per_token.dtype)
    weight = mask / num_tokens
    if config.loss_agg == "sequence":
        num_rollouts = config.prompts_per_step * config.group_size // config.updates_per_batch
        weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / num_rollouts
    loss = (per_token * weight).sum()
    means = {"pg_loss": pg, "kl": kl, "entropy": entropy, "ratio": ratio, "clip_frac": clipped * A < ratio * A}
    # stats stay tensors: a number would have to be waited for before the GPU is given the backward pass
    return loss, {"loss": loss.detach(), **{name: (x.detach() * mask).sum() / num_tokens for name, x in means.items()}}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Update: gradients of all micro-batches, then one optimizer step
# ----------------------------------------------------------------------------------------------------------------------

def micro_batches(prompts, responses, token_budget) -> list:
    """Row numbers, packed so that rows times longest row stays within the budget; a longer row goes alone.

    Sorted by length, so that little is padding, from the longest, so that memory runs out at once or never.
    """
    length = [len(p) + len(r) for p, r in zip(prompts, responses)]
    batches = []
    for i in sorted(range(len(length)), key=length.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) + 1) * length[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def score_rows(model, prompts, responses, rows, config):
    """token_logprobs of some rows, with bf16 products but fp32 weights: at rate 1e-6 a bf16 weight would never move."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bf16(model.device, config)):
        return token_logprobs(model, [prompts[i] for i in rows], [responses[i] for i in rows], config.temperature)


def update_policy(policy, ref_policy, optimizer, prompts, responses, sampler_logprobs, advantages, old_logprobs,
                  config) -> dict:
    """One optimizer step -> stats. old_logprobs: a (T,) tensor a rollout, or None: the policy has not moved since.

    advantages: a number for each rollout, or for each of its tokens, (T,). With several processes each has its own
    rollouts, and the step is that of all of them together. sampler_gap in the stats: the mean distance of the sampler's
    log-probabilities from the trainer's. Exits, before the weights change, if the loss or the gradient is not finite.
    """
    device = policy.device
    padded = lambda values, rows: pad_sequence([values[i] for i in rows], batch_first=True).to(device)          # (B, T)
    # GRPO: every token of a rollout has the rollout's advantage
    advantages = [A.expand(len(response)) for A, response in zip(advantages, responses)]
    # before the loop: neither packing nor the number of processes must change the gradient
    num_tokens = int(sum_over_processes(torch.tensor(sum(map(len, responses)), device=device)))
    stats = Counter()                               # whose update() adds
    for rows in tqdm(micro_batches(prompts, responses, config.token_budget), "update", leave=False, disable=None):
        with torch.no_grad():                       # before the policy's pass, whose activations stay in memory
            ref_logprobs = score_rows(ref_policy, prompts, responses, rows, config)[0] if ref_policy else None
        logprobs, entropy, mask = score_rows(policy, prompts, responses, rows, config)
        if ref_logprobs is None:
            ref_logprobs = logprobs.detach()        # without a reference the KL reads 0
        old = logprobs.detach() if old_logprobs is None else padded(old_logprobs, rows)
        stats["sampler_gap"] += ((old - padded(sampler_logprobs, rows)).abs() * mask).sum() / num_tokens
        loss, parts = grpo_loss(logprobs, old, ref_logprobs, entropy, padded(advantages, rows), mask, num_tokens,
                                config)
        loss.backward()
        stats.update(parts)
    for param in policy.parameters():
        sum_over_processes(param.grad)
    stats = dict(zip(stats, sum_over_processes(torch.stack(list(stats.values())).double()).tolist()))
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip).item()
    if not math.isfinite(grad_norm + stats["loss"]):
        sys.exit(f"error: loss {stats['loss']}, gradient norm {grad_norm}: this update was not made, and the last "
                 "checkpoint is whole; try a lower --learning-rate or --kl-coef, or --precision fp32")
    optimizer_step(policy, optimizer)
    return {**stats, "grad_norm": grad_norm}


def train_on(policy, ref_policy, optimizer, prompts, responses, sampler_logprobs, advantages, config) -> dict:
    """All updates on one batch of rollouts -> the mean of their stats. [P] makes 8, of 16 groups each; [C] 1 of all."""
    old_logprobs = [None] * len(prompts)
    if config.updates_per_batch > 1:                # from the second update on, the policy is not what it was
        for rows in micro_batches(prompts, responses, config.token_budget):
            with torch.no_grad():
                logprobs, _, mask = score_rows(policy, prompts, responses, rows, config)
            for i, values, kept in zip(rows, logprobs, mask):
                old_logprobs[i] = values[kept]
    stats, size = Counter(), len(prompts) // config.updates_per_batch
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        old = old_logprobs[part] if config.updates_per_batch > 1 else None
        stats.update(update_policy(policy, ref_policy, optimizer, prompts[part], responses[part],
                                   sampler_logprobs[part], advantages[part], old, config))
    return {name: value / config.updates_per_batch for name, value in stats.items()}


def optimizer_step(policy, optimizer) -> None:
    """AdamW on the fp32 weights: the policy's own, or with --offload-optimizer copies of them in host memory."""
    masters = optimizer.param_groups[0]["params"]
    for param, master in zip(policy.parameters(), masters):
        if master is not param:
            master.grad, param.grad = param.grad.to(master.device), None
    optimizer.step()
    optimizer.zero_grad()
    copy_weights(masters, policy.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# 7. Several processes: each with its share of the groups, and one update
# ----------------------------------------------------------------------------------------------------------------------

def start_processes() -> tuple:
    """(number of this process, how many there are): under torchrun, which starts one for each GPU, else (0, 1).

    Each samples and scores its share of the groups. Gradients are summed, so all of them make the same step; only
    process 0 speaks and writes.
    """
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the others wait while process 0 evaluates or saves
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(days=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
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


# ----------------------------------------------------------------------------------------------------------------------
# 8. Models and files: what a long run needs
# ----------------------------------------------------------------------------------------------------------------------

def make_tiny_base(name) -> None:
    """The tiny world's base model is no download: it is built where it is first asked for."""
    if name == TINY_BASE and not Path(name).exists():
        from labs import tiny
        tiny.build_base(name)


def load_model(name, dtype=torch.float32):
    """Model and tokenizer of a Hugging Face id or folder, on the GPU if there is one; the tiny base is built first."""
    if os.environ.get("RANK", "0") == "0":
        make_tiny_base(name)
    if dist.is_initialized():
        dist.barrier()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa",
                                                             output_loading_info=True)
    except Exception as error:              # a folder can be broken in a dozen ways, each with an exception of its own
        fail(f"--model {name}: cannot be loaded, neither as a folder nor from the hub ({first_line(error)})")
    if report["missing_keys"]:
        fail(f"--model {name}: its files lack {min(report['missing_keys'])}; the weights would be random")
    if not tokenizer("1").input_ids:
        fail(f"--model {name}: its tokenizer reads nothing; are the tokenizer's files there?")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def uses_bf16(device, config) -> bool:
    return config.precision == "bf16" or config.precision == "auto" and device.type == "cuda"


def frozen_copy(model, bf16, like_autocast=False):
    """A copy that is not trained, in bf16 if wanted; the buffers stay, as bf16 rotary frequencies blur far positions.

    like_autocast: bf16 only for the matrices that autocast would cast. A reference of this kind, scored under autocast,
    has the very log-probabilities of an equal policy; an all-bf16 one starts at a KL above 0 that is rounding alone.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    for module in twin.modules():
        autocasts = isinstance(module, torch.nn.Linear) and module is not twin.get_output_embeddings()
        if bf16 and (autocasts or not like_autocast):
            for param in module.parameters(recurse=False):
                param.data = param.data.bfloat16()
    return twin


def check_window(model, length) -> None:
    """Refuse a model whose layers see only a window of `length` tokens: the sampler's mask shows them all."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window and window < length and "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"]):
        fail(f"--model {model.config._name_or_path}: its layers see only the last {window} of {length} tokens, which "
             "this sampler cannot do")


def check_head(model, prompt) -> None:
    """Refuse a model that does more to its logits than the head does: token_logprobs would score another model."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.allclose(model.get_output_embeddings()(hidden), model(input_ids=ids).logits, rtol=1e-3, atol=1e-3):
            fail(f"--model {model.config._name_or_path}: it caps or scales its logits, which this script does not know")


def recompute_layers(model) -> None:
    """Keep only the input of each layer for backward and compute the rest again: memory for one more forward pass.

    transformers' own switch works in train mode alone, and switches the sampler's cache off.
    """
    for layer in model.base_model.layers:
        # no random state is kept: nothing here is random, and a CUDA graph must not ask for it
        layer.forward = functools.partial(recompute_in_backward, layer.forward, use_reentrant=False,
                                          preserve_rng_state=False)


def copy_weights(sources, targets) -> None:
    """Copy parameter by parameter, across devices and precisions."""
    with torch.no_grad():
        for source, target in zip(sources, targets):
            if source is not target:
                target.copy_(source)


def claim(path):
    """Open a file that nobody else can claim until it is closed: two writers in one folder would mix their rows."""
    file = open(path, "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path} is in use by another process; wait until it has ended, or stop it")
    except OSError:
        pass                    # this file system has no locks
    return file


@contextlib.contextmanager
def atomically(path):
    """Write to path.tmp, then rename it: under its own name a file or folder is whole, whenever a kill comes."""
    temporary, old = Path(f"{path}.tmp"), Path(f"{path}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    yield temporary
    if temporary.is_dir() and Path(path).exists():
        os.replace(path, old)                   # a folder cannot be replaced in one go
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def peak_memory_gb(device) -> float:
    """Peak memory so far, of the GPU or, without one, of this process, in 10^9 bytes; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024                                  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9 if resource else math.nan


def make_folder(path, flag) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{flag} {path}: cannot be made ({error.strerror})")


def write_json(path, value) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def append_rows(path, rows, mode="a") -> None:
    with open(path, mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def keep_rows(path, wanted=lambda row: True) -> list:
    """Drop the rows that are not wanted, which are made again, and a line cut short -> the rows left."""
    rows = list(filter(wanted, read_log(path)))
    with atomically(path) as temporary:
        append_rows(temporary, rows, mode="w")
    return rows


@contextlib.contextmanager
def as_os_error(path):
    """torch and safetensors have errors of their own for a full disk."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path}: cannot be written, perhaps because the disk is full ({first_line(error)})") from error


def save_model(folder, model, tokenizer) -> None:
    """An ordinary Hugging Face folder, under its final name only when it is whole."""
    with atomically(folder) as temporary, as_os_error(folder):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def save_checkpoint(run_dir, step, **parts) -> None:
    """All that --resume needs: the state of each part, policy and optimizer; what is random depends on (seed, step)."""
    (run_dir / "latest").mkdir(exist_ok=True)
    path = run_dir / "latest" / "state.pt"
    with atomically(path) as temporary, as_os_error(path):
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, temporary)


def load_checkpoint(run_dir, **parts) -> int:
    """The step of the checkpoint, from which each part takes its state; 0 if there is none yet."""
    path = run_dir / "latest" / "state.pt"
    if not path.exists():
        if any(run_dir.glob("step-*")):         # a step's folder comes after its checkpoint
            fail(f"--resume: {path} is gone, and without it the run would begin again and overwrite its steps")
        return 0
    try:
        # mmap: eight processes would otherwise hold eight copies in host memory
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = state.pop("step")
        if state.keys() != parts.keys():
            raise ValueError(f"it holds {', '.join(state)}, and not {', '.join(parts)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except Exception as error:                  # torch has many names for a damaged file
        fail(f"--resume: {path} cannot be loaded ({first_line(error)}); if it is damaged, train on from the last "
             "step's folder by --model, in another --output-dir")
    return step


def prepare(policy, config) -> tuple:
    """What training needs beside the policy: the reference (None without KL), the model that samples, the optimizer."""
    bf16 = uses_bf16(policy.device, config)
    ref_policy = frozen_copy(policy, bf16, like_autocast=True) if config.kl_coef else None
    sampler = frozen_copy(policy, bf16) if bf16 else policy
    weights = list(policy.parameters())
    if config.offload_optimizer:
        weights = [param.detach().to("cpu", copy=True) for param in weights]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    if config.activation_checkpointing:
        recompute_layers(policy)                # after the copies, which would share its layers
    return ref_policy, sampler, optimizer


@contextlib.contextmanager
def interrupts_held():
    """Hold Ctrl-C back until the block ends: a half-made update or log row is worse than a wait."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(print("\nstopping when this step is done")))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------------------------
# 9. The run
# ----------------------------------------------------------------------------------------------------------------------

LEGEND = """\
Watch reward and (with --eval) test accuracy, not the loss. With one update a batch the ratio is 1 by design: the policy
that is updated is the one that sampled. The value of the loss then says only whether right responses are longer (below
0) or shorter (above 0) than wrong ones of their group; its gradient is that of -A log p.
dead: share of groups whose rewards are all equal, no signal; trunc: share of responses cut at --max-response-tokens.
gap: mean distance of the sampler's log-probabilities from the trainer's, near 0 or the two are not the same model."""


def indented(text) -> str:
    return textwrap.indent(text, "    | ", lambda line: True)


def describe_prompt(tokenizer, prompt, stop_ids) -> str:
    return (f"{indented(tokenizer.decode(prompt))}\n"
            f"a response ends at {', '.join(f'{i} {tokenizer.decode([i])!r}' for i in stop_ids)}")


def introduce(config, examples, tokenizer, stop_ids, device) -> None:
    """What a person should see before the first step: settings, prompt, stop tokens, the size of a step."""
    for name, value in asdict(config).items():
        print(f"{name:>24}  {value}")
    first, rollouts = examples[0], config.prompts_per_step * config.group_size
    print(f"\nprompt of {first['name']} ({len(first['prompt'])} tokens; its answer is {first['answer']!r}):\n"
          f"{describe_prompt(tokenizer, first['prompt'], stop_ids)}\n"
          f"one step: {config.prompts_per_step} groups of {config.group_size} = {rollouts:,} rollouts of up to "
          f"{config.max_response_tokens:,} tokens, {min(config.slots, rollouts)} at a time, then "
          f"{config.updates_per_batch} update(s); {len(examples)} example(s); on {device}\n\n{LEGEND}\n")


def summarize(step, rollouts, group_size) -> dict:
    """What the rollouts of a step were like: the first part of its row in metrics.jsonl."""
    mean = lambda key, rows=rollouts: float(np.mean([row[key] for row in rows]))
    rewards = np.array([row["reward"] for row in rollouts]).reshape(-1, group_size)                           # (N/G, G)
    names = sorted({row["example"] for row in rollouts})
    return {"step": step, "reward": mean("reward"), "accuracy": mean("correct"),
            "dead_groups": float((rewards.max(1) == rewards.min(1)).mean()), "boxed_frac": mean("boxed"),
            "response_length": mean("tokens"), "truncated_frac": mean("truncated"),
            "examples": {name: mean("correct", [row for row in rollouts if row["example"] == name]) for name in names}}


def print_step(row, config) -> None:
    """One line a step."""
    hours, minutes = divmod(int(row["eta_seconds"] / 60), 60)
    print(f"step {row['step']}/{config.steps}  reward {row['reward']:.3f}  dead {row['dead_groups']:.2f}  "
          f"len {row['response_length']:.0f}  trunc {row['truncated_frac']:.2f}  entropy {row['entropy']:.3f}  "
          f"kl {row['kl']:.4f}  loss {row['loss']:+.4f}  grad {row['grad_norm']:.2f}  ratio {row['ratio']:.3f}  "
          f"gap {row['sampler_gap']:.4f}  {row['tokens_per_second']:,.0f} tok/s  sample {row['sample_seconds']:.1f}s  "
          f"update {row['update_seconds']:.1f}s  {row['memory_gb']:.1f}GB  eta {hours}h{minutes:02d}m", flush=True)
    if row["dead_groups"] == 1 and row["pg_loss"] == 0:
        print("  all groups are dead: only KL, entropy, weight decay and AdamW's momentum act in this step")


def print_sample(sample) -> None:
    text = sample["text"] if len(sample["text"]) < 900 else f"{sample['text'][:400]}\n[...]\n{sample['text'][-400:]}"
    print(f"a rollout to {sample['example']}: reward {sample['reward']:.0f}, advantage {sample['advantage']:+.2f}, "
          f"{sample['tokens']} tokens\n{indented(text)}", flush=True)


def with_prompts(examples, config, tokenizer) -> list:
    """The examples with their prompts' tokens; too long ones are left out with a message."""
    for example in examples:
        example["prompt"] = encode_prompt(tokenizer, example["problem"] + TRAIN_SUFFIX)
    fitting = [example for example in examples if len(example["prompt"]) <= config.max_prompt_tokens]
    if not fitting:
        fail(f"--max-prompt-tokens {config.max_prompt_tokens}: none of {len(examples)} prompts is that short")
    if len(fitting) < len(examples):
        print(f"{len(examples) - len(fitting)} of {len(examples)} examples exceed --max-prompt-tokens and are left out")
    if unlabelled := sum(not example["answer"].strip() for example in fitting):
        print(f"{unlabelled} of {len(fitting)} examples have an empty answer: no response to them is ever right")
    return fitting


def evaluate_if_due(config, step, sampler, tokenizer, benchmarks, run_dir) -> None:
    """If an evaluation is due after this step, append {"step", "eval": {benchmark: accuracy, ..., "average"}}."""
    if not config.eval_every or step % config.eval_every:
        return
    from evaluate import evaluate                # here, because evaluate.py imports from this file
    result = evaluate(sampler, tokenizer, benchmarks, slots=config.slots, seed=config.seed,
                      cuda_graph=config.cuda_graph, max_response_tokens=config.max_response_tokens)
    scores = {name: row["avg_at_k"] for name, row in result["benchmarks"].items()} | {"average": result["average"]}
    print(f"eval {step}/{config.steps}  " + "  ".join(f"{name} {x:.3f}" for name, x in scores.items()), flush=True)
    append_rows(run_dir / "metrics.jsonl", [{"step": step, "eval": scores}])


def noise_of_step(config, step, rank, num_processes):
    """This process's share of the noise (N, T) behind the rollouts of a step.

    Drawn from (seed, step), so that a resumed run draws the same; for all groups, and then dealt out, so that the
    number of processes changes no response.
    """
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + step)               # distinct for each pair
    noise = draw_noise(config.prompts_per_step * config.group_size, config.max_response_tokens, generator)
    return noise.unflatten(0, (-1, config.group_size))[rank::num_processes].flatten(0, 1)


def describe_rollouts(chosen, rewards, advantages, responses, texts, stop_ids) -> list:
    """One row a rollout: what the log of a step is made of."""
    return [{"example": example["name"], "reward": reward, "advantage": round(advantage, 4),
             "correct": is_correct(text, example["answer"]), "boxed": has_box(text), "tokens": len(response),
             "truncated": response[-1] not in stop_ids, "text": text}
            for example, reward, advantage, response, text
            in zip(chosen, rewards, advantages.tolist(), responses, texts)]


def set_up_files(run_dir, config, done, **facts) -> list:
    """Write config.json, drop the rows of steps that will be made again -> the rows of metrics.jsonl that stay."""
    until_checkpoint = lambda row: row.get("step", math.inf) <= done
    keep_rows(run_dir / "samples.jsonl", until_checkpoint)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    write_json(run_dir / "config.json", {**asdict(config), **facts, "versions": versions})
    return keep_rows(run_dir / "metrics.jsonl", until_checkpoint)


def report(run_dir, config, row, rollouts) -> None:
    """A step's line, now and then one of its rollouts, and its rows in the files."""
    print_step(row, config)
    rewards = [rollout["reward"] for rollout in rollouts]
    shown = [rollouts[i] for i in sorted({0, int(np.argmax(rewards)), int(np.argmin(rewards))})]    # first, best, worst
    if row["step"] % 10 == 1:
        print_sample(shown[row["step"] // 10 % len(shown)])
    append_rows(run_dir / "metrics.jsonl", [row])
    append_rows(run_dir / "samples.jsonl", [{"step": row["step"], **rollout} for rollout in shown])


def main(argv=None) -> None:
    config = parse_args(argv)
    run_dir = Path(config.output_dir)
    if (run_dir / "config.json").exists() and not config.resume:
        fail(f"{run_dir} already holds a run: go on with it by --resume, or name another --output-dir")
    examples, benchmarks = load_examples(config.example, config.answer), {}
    if config.eval_every:
        from evaluate import load_benchmarks
        benchmarks = load_benchmarks(config.eval)
    rank, num_processes = start_processes()
    if config.prompts_per_step % (config.updates_per_batch * num_processes):
        fail(f"--prompts-per-step {config.prompts_per_step}: {num_processes} processes and --updates-per-batch "
             f"{config.updates_per_batch} do not share it evenly")
    policy, tokenizer = load_model(config.model)
    device = policy.device
    examples = with_prompts(examples, config, tokenizer)
    stop_ids = find_stop_ids(tokenizer, policy.generation_config)
    if not stop_ids:
        fail(f"--model {config.model}: neither tokenizer nor configuration names a token that ends a response")
    check_window(policy, config.max_prompt_tokens + config.max_response_tokens)
    check_head(policy, examples[0]["prompt"])
    ref_policy, sampler, optimizer = prepare(policy, config)

    make_folder(run_dir, "--output-dir")
    lock = claim(run_dir / "lock") if rank == 0 else None
    done = load_checkpoint(run_dir, policy=policy, optimizer=optimizer) if config.resume else 0
    if done > config.steps:
        fail(f"--steps {config.steps}: the run is at step {done} already")
    # flags given with --resume hold, and not what the checkpoint's optimizer had
    optimizer.param_groups[0].update(lr=config.learning_rate, weight_decay=config.weight_decay)
    # the checkpoint is the policy's; AdamW's copies and the sampler follow
    copy_weights(policy.parameters(), optimizer.param_groups[0]["params"])
    copy_weights(policy.parameters(), sampler.parameters())
    to_be_saved = lambda step: step % config.save_every == 0 or step == config.steps
    step_folder = lambda step: run_dir / f"step-{step:06d}"
    phase, started, resumed_at = "evaluating", time.time(), done
    if rank == 0:
        if done and to_be_saved(done) and not step_folder(done).exists():
            save_model(step_folder(done), sampler, tokenizer)        # the run was killed just before
        logged = set_up_files(run_dir, config, done, prompt=tokenizer.decode(examples[0]["prompt"]), stop_ids=stop_ids,
                              device=str(device), processes=num_processes)
        introduce(config, examples, tokenizer, stop_ids, f"{num_processes} x {device}")
    try:
        if rank == 0 and not any(row["step"] == done and "eval" in row for row in logged):
            evaluate_if_due(config, done, sampler, tokenizer, benchmarks, run_dir)
        for step in range(done + 1, config.steps + 1):
            # 1. Example
            groups = examples_of_step(step, len(examples), config.prompts_per_step, config.seed)
            groups = groups[rank::num_processes]                                            # this process's share
            chosen = [examples[i] for i in groups for _ in range(config.group_size)]                     # N examples
            prompts = [example["prompt"] for example in chosen]
            # 2. Rollouts
            phase, sampling_from = "sampling", time.time()
            responses, sampler_logprobs = generate(
                sampler, prompts, max_response_tokens=config.max_response_tokens, temperature=config.temperature,
                stop_ids=stop_ids, slots=config.slots, noise=noise_of_step(config, step, rank, num_processes),
                return_logprobs=True, cuda_graph=config.cuda_graph and device.type == "cuda")
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            # 3. Reward
            rewards = [reward_of(text, example["answer"], config.reward) for text, example in zip(texts, chosen)]
            # 4. Advantages
            advantages = group_advantages(rewards, config.group_size, config.scale_rewards)                       # (N,)
            # 5. Loss and 6. Update
            phase, updating_from = "updating", time.time()
            with interrupts_held():
                stats = train_on(policy, ref_policy, optimizer, prompts, responses, sampler_logprobs, advantages,
                                 config)
                copy_weights(policy.parameters(), sampler.parameters())
                now, done, phase = time.time(), step, "saving"
                rollouts = gather_groups(
                    describe_rollouts(chosen, rewards, advantages, responses, texts, stop_ids), config.group_size)
                if rank == 0:
                    speed = sum(rollout["tokens"] for rollout in rollouts) / (updating_from - sampling_from)
                    report(run_dir, config, {
                        **summarize(step, rollouts, config.group_size), **stats, "tokens_per_second": speed,
                        "sample_seconds": updating_from - sampling_from, "update_seconds": now - updating_from,
                        "eta_seconds": (now - started) / (step - resumed_at) * (config.steps - step),
                        "memory_gb": peak_memory_gb(device)}, rollouts)
                    if to_be_saved(step):
                        # in this order: a step whose folder is there is never made again
                        save_checkpoint(run_dir, step, policy=policy, optimizer=optimizer)
                        save_model(step_folder(step), sampler, tokenizer)       # on CUDA bf16: half the disk
            phase = "evaluating"
            if rank == 0:
                evaluate_if_due(config, step, sampler, tokenizer, benchmarks, run_dir)
    except KeyboardInterrupt:
        if rank == 0:
            save_checkpoint(run_dir, done, policy=policy, optimizer=optimizer)
        print(f"\nstopped after step {done}, which is saved; go on with\n"
              f"    python {sys.argv[0]} --output-dir {run_dir} --resume")
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit(f"error: out of GPU memory while {phase}, after step {done}; the last checkpoint is whole. Sampling "
                 "needs less with a lower --slots, updating with a lower --token-budget, --activation-checkpointing "
                 "or --offload-optimizer; then --resume")
    finally:
        if rank == 0:
            lock.close()
    final = step_folder(config.steps)
    preset = " --preset tiny" * (config.preset == "tiny")
    print(f"done: {final} is a Hugging Face model folder; measure it with\n"
          f"    python evaluate.py{preset} --model {final}")


# ----------------------------------------------------------------------------------------------------------------------
# Appendix to section 2: a decode step at the speed of a GPU
# ----------------------------------------------------------------------------------------------------------------------

@functools.cache
def side_stream():
    """One for all captures: the workspaces that matrix products take for each stream are never given back."""
    return torch.cuda.Stream()


def capture(step, device):
    """A function that does what step() does, on CUDA as a graph: all its kernels in one launch.

    One by one, Python takes longer to launch the 800 kernels of a decode step than the GPU to run them. A graph repeats
    them on the same memory: step() must read what changes from tensors that stay in place.
    """
    if device.type != "cuda":
        return step
    stream = side_stream()                          # what libraries set up at their first call must not be captured
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = step()

    def replay():
        graph.replay()
        return output
    return replay


def decode_by_graph(cache, n, plain):
    """Logits (n, V) of a decode step, from a graph; plain() computes them without, and is what a graph is checked by.

    A graph has fixed shapes: all keys, and all rows of the cache, half, a quarter or an eighth of them; those from n on
    are computed for nothing.
    """
    size = min(size for part in (1, 2, 4, 8) if (size := -(-cache.num_rows // part)) >= n)
    if size in cache.graphs:
        return cache.graphs[size]()[:n]
    reads_ragged = can_read_ragged(cache.model)
    if reads_ragged:
        AttentionInterface.register("ragged", ragged_attention)
        cache.model.set_attn_implementation("ragged")

    def step():
        ragged = {"keys_used": cache.positions[:size, 0].int() + 1} if reads_ragged else {}
        return cache.feed(slice(0, size), cache.tokens[:size], cache.positions[:size], cache.length, **ragged)
    expected = None if cache.graphs else plain()            # plain first: it also makes the cache's tensors
    cache.graphs[size] = capture(step, cache.model.device)
    logits = cache.graphs[size]()[:n]
    if expected is not None and (logits.softmax(-1) - expected.softmax(-1)).abs().sum(-1).mean() > 0.5:
        fail("the CUDA graph of a decode step does not compute what the model computes; go on with --no-cuda-graph")
    return logits


# what torch.nn.attention.varlen calls, which itself takes seqused_k only from torch 2.12 on
flash_attention = torch.ops.aten._flash_attention_forward


def ragged_attention(module, query, key, value, attention_mask, scaling=None, keys_used=None, **kwargs):
    """transformers' sdpa, but a decode step on CUDA reads only the first keys_used (n,) keys of each row.

    With a mask, every row would read as many keys as the longest has, which is most of the memory traffic of a step.
    """
    if keys_used is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n, length = key.shape[0], key.shape[2]
    key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))      # (n * length, heads, head size), no copy
    each_row = torch.arange(n + 1, device=query.device, dtype=torch.int32)
    output, *_ = flash_attention(query.squeeze(2), key, value, each_row, length * each_row, 1, length, 0.0, False,
                                 return_debug_mask=False, scale=scaling, seqused_k=keys_used)
    return output[:, None], None                                                             # (n, 1, heads, head size)


def can_read_ragged(model) -> bool:
    """Flash attention takes half precision, on a CUDA card of the Ampere generation or later."""
    return model.device.type == "cuda" and model.dtype.itemsize == 2 and torch.cuda.get_device_capability() >= (8, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Appendix to section 3: when are two answers the same?
# ----------------------------------------------------------------------------------------------------------------------

def equivalent(given, gold, rel_tol=0) -> bool:
    """Are two answers the same, up to spelling and value? Both are normalised, then compared; never raises.

    rel_tol: how far apart two values may be, relative to the larger; the reward allows nothing.
    """
    if given == gold:
        return True
    # the longest answer of the benchmarks has 210 characters; a limit keeps hostile ones from costing time
    if max(len(given), len(gold)) > 800 or re.search(r"[({\[]{6}", given):
        return False
    given, gold = given.translate(SYMBOLS), gold.translate(SYMBOLS)
    for pattern, replacement in NORMALIZATIONS:
        given, gold = pattern.sub(replacement, given), pattern.sub(replacement, gold)
    try:
        return same_answer(given.strip(), gold.strip(), rel_tol)
    except UNREADABLE:
        return False


# Words that make a \text{...} part of the answer and no unit: "4 \text{ or 5}" is not 4, "5 \text{ million}" is not 5.
NOT_A_UNIT = (r"or|and|if|to|not|nor|but|no|is|are|than|mod\w*|base|pi|plus|minus|times|over|squared|cubed|half|halves|"
              r"thirds?|(?:four|fif|six|seven|eigh|nin|ten|twelf|\w+(?:teen|tie)|hundred|thousand)ths?|dozen|tens?|"
              r"hundreds?|thousands?|[mbtr]+illions?|bn|mil|lakh|point \w+|doubled|tripled|less|least|divided|"
              r"factorial|choose|negative|infinity")
UNIT = (r"(?:square |cubic )?(?:mph|[ckm]m|kg|f(?:ee|oo)?t|inch(?:es)?|\w*met(?:er|re)s?|units?|miles?(?: per hour)?|"
        r"degrees?|dollars?|cents?|percent|hours?|minutes?|seconds?|days?|years?)")
SYMBOLS = str.maketrans({"−": "-", "–": "-", "·": "*", "×": r"\times ", "π": r"\pi ", "√": r"\sqrt",
                         "∪": r"\cup ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "°": r"\degree ",
                         "~": " "})
# One spelling for what LaTeX can spell in several ways. The order matters: each row relies on the rows above it.
NORMALIZATIONS = [(re.compile(pattern, re.ASCII), replacement) for pattern, replacement in [
    # dollars and math delimiters; \left and the other commands that only change the look
    (r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?", ""),
    # every upright font is \text, but an upright i or e is still the number, and \text{(C)} is the choice C
    (r"\\(?:unit|mbox|mathrm|mathbf|mathit|text[a-z]{2}|operatorname|boldsymbol)(?![A-Za-z]) *|\\text +(?=\{)",
     r"\\text"),
    (r"\\text\{ *([ie]) *\}|^ *\\text\{ *\(? *([A-Z]) *\)? *\}[ .]*$", r"\1\2"),
    # thousands: 1{,}234 and 1,\!234 anywhere, 1,234 only as the whole answer, because (1,234) and 2,4 are lists
    (r"(?<=[0-9])(?:\{,\}|, *\\!|\\,) *(?=[0-9]{3}(?![0-9]))", ""),
    (r"^[^0-9,(\[{]*[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])(?=[^,]*$)", lambda match: match[0].replace(",", "")),
    # spaces; "and", "or" and ";" part a list as commas do, so that "4 or 5" is two answers and never 4
    (r"(?<!\\)\\[,;:!> ]|\\q?quad(?![A-Za-z])|\s+", " "), (" +", " "),
    (r"\\text\{ *,? *(?:and|or) *\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|;", ","), (r", ?,", ","),
    (r"\\([lg])eq?(?:slant)?(?![A-Za-z])", r"\\\1e "),
    # percent and degrees are dropped, units are marked: 12\% is 12 and 4 cm is 4, but 4 cm is not 4 km
    (r" ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z])) ?|\\degree ?", r"\\degree "),
    (r"(?:\\?%|\\degree)(?! ?[0-9]) ?", ""),
    (rf"(?<=[0-9)}}]) ?({UNIT})(?![A-Za-z])", r"\\text{\1}"),
    (rf"(?<=[0-9)}}i]) ?\\text\{{(?![^{{}}]*\b(?:k|(?i:{NOT_A_UNIT}))\b) *([A-Za-z][A-Za-z ./]*)\}}"
     r"(?: ?\^ ?\{?-?[0-9]\}?)?(?= ?(?:$|[,)\]\\&.]))", r"\\unit{\1}"),
    # fractions, roots, accents and powers with exactly the braces they need: \dfrac12, \sqrt2, x^{2}
    (r"\\[dtc]frac", r"\\frac"), (r"\\(frac|sqrt|d?dot|hat|bar|vec) ?([A-Za-z0-9])", r"\\\1{\2}"),
    (r"(\\frac ?\{[^{}]*\}) ?([A-Za-z0-9])", r"\1{\2}"), (r"([_^]) ?\{ ?([A-Za-z0-9]) ?\}(?![0-9])", r"\1\2"),
    (r"\\(begin|end)\{[pb]matrix\}", r"\\\1{matrix}"),
    # other spaces, but for one that ends a command (\pi r) or parts two numbers (4 5 is not 45); a full stop
    (r"(\\[A-Za-z]+ (?=[A-Za-z])|[0-9] (?=[0-9]))| ", r"\1"), (r"(?<!\.)\.$", ""),
]]
# What may stand in front of a value: x=, f(x)=, V_{max}=, (x,y)=, \text{Area}=, x\in; but \not= is no name
NAME = re.compile(r"^(?!\\l?n(?:eg?|ot)(?![A-Za-z])|\\text\{[^{}]*(?i:not))"
                  r"(?:\([A-Za-z](?:,[A-Za-z])+\)|(?:\\text\{[^{}]*\}|\\[A-Za-z]+ ?|[A-Za-z])"
                  r"(?:_[A-Za-z0-9]|_\{[^{}]*\})?(?:\([A-Za-z](?:,[A-Za-z])*\))?)(?:=|\\in(?![A-Za-z]))")


def plain(text):
    r"""Text without \text{} and \unit{} and in lower case, but for commands: \Delta is not \delta."""
    text = re.sub(r"\\(?:text|unit)\{([^{}]*)\}", r"\1", text).removeprefix("+")
    return re.sub(r"(\\[A-Za-z]+)|([A-Z])", lambda match: match[1] or match[2].lower(), text)


def split_top(text, separator):
    """Split at the separators that stand outside all brackets; [] where brackets do not match."""
    parts, depth = [""], 0
    for piece in re.split(r"(\\cup|[,()\[\]{}])", text):
        depth += (piece in list("([{")) - (piece in list(")]}"))
        if depth < 0:
            return []
        if piece == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts if depth == 0 else []


def split_list(text):
    r"""(kind, elements) of a matrix, tuple, interval, union or list; kind "" and one element for a single value."""
    if match := re.fullmatch(r"\\begin\{matrix\}(.*?)(?:\\\\)?\\end\{matrix\}", text):
        rows = [row.split("&") for row in match[1].split("\\\\")]
        return f"matrix {[len(row) for row in rows]}", sum(rows, [])
    match = re.fullmatch(r"(\(|\[|\\?\{)(.*?)(\)|\]|\\?\})", text)
    if match and (parts := split_top(match[2], ",")):       # none in (a)/(b), whose first bracket closes before its end
        if match[1].endswith("{") or (match[1], match[3], len(parts)) == ("(", ")", 1):
            return split_list(match[2])         # \{1,2\} is the list 1,2 and (C) is C, but (1,2) and [1,2] are no lists
        return match[1] + match[3], parts
    if len(parts := split_top(text, "\\cup")) > 1:
        return "union", parts
    parts = split_top(text, ",") or [text]
    parts = [part.replace("\\pm", sign) for part in parts for sign in "+-"[:1 + part.count("\\pm")]]
    return ("list" if len(parts) > 1 else ""), parts


def sqrt(x):
    """Exact for the square of a fraction, else a float."""
    if isinstance(x, Fraction) and x >= 0:
        root = Fraction(math.isqrt(x.numerator), math.isqrt(x.denominator))
        return root if root * root == x else cmath.sqrt(x)
    return cmath.sqrt(x)


FUNCTIONS = {"sqrt": sqrt, "ln": cmath.log, **{f: getattr(cmath, f) for f in "sin cos tan sinh cosh tanh exp".split()}}
TOKEN = re.compile(r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]{1,3}(?![0-9]))?)|(?P<sign>[-+/^()])|"
                   rf"(?P<times>\\cdot ?|\\times ?|\*)|(?P<function>\\?(?:{'|'.join(FUNCTIONS)})(?![A-Za-z]))|"
                   # a letter with its index, or applied to a number: I(0) is no product, which would be 0
                   r"(?P<letter>(?:\\[A-Za-z]+|[A-Za-z])(?:\([0-9]+\)|_[A-Za-z0-9]|_\([A-Za-z0-9]+\))? ?)")


# What a text that is no expression can make Python's parser and arithmetic raise: such a text is not the answer.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError,
              ValueError)


def value_of(text, point):
    """The value of an expression: an exact Fraction where it is rational, else complex; letters are random fractions.

    point chooses the fractions: two expressions are taken for equal if they agree at two points.

    The LaTeX becomes a Python expression over the names v0, v1, ...; Python's parser makes a tree of it, which is
    walked here. Nothing is executed. Raises one of UNREADABLE for what is no expression.
    """
    # a mixed number, 1\frac45 or 1 4/5, is a sum and no product
    text = re.sub(r"^(-?)([0-9]+)(?: ?(?=\\)| )(\\frac\{[0-9]+\}\{[0-9]+\}|[0-9]+/[0-9]+)$", r"\1(\2+\3)", text)
    if re.search(r"^[A-Za-z]{3,}$|[0-9] ?\\frac\{[0-9]+\}\{[0-9]+\}", text):
        raise ValueError("a word is no product of its letters (east, seat), and 2\\frac12x may be x or 5x/2")
    while "{" in text:                                                          # from the innermost braces outwards
        outer = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        outer = re.sub(r"\\sqrt\[([0-9]+)\]\{([^{}]*)\}", r"((\2)^(1/\1))", outer)
        outer = re.sub(r"(\\sqrt|[_^])\{([^{}]*)\}", r"\1(\2)", outer)
        if outer == text:
            raise ValueError("braces that are no argument")
        text = outer
    source, values, end, before = "", {}, 0, ""
    for token in TOKEN.finditer(text):
        kind, word = token.lastgroup, token[0].strip().lstrip("\\")
        operand_before = before in ("number", "letter") or source.endswith(")")
        if token.start() != end or kind == "number" and operand_before or before == "function" and word != "(":
            raise ValueError("no expression, or one with two readings, like x1 and sin 2t")
        if kind in ("number", "letter", "function") or word == "(":
            source += "*" * operand_before                                                          # 2x, (a)(b)
        if kind in ("number", "letter"):
            letter = Fraction(random.Random(f"{word} {point}").randrange(10**6, 10**7), 10**6 + 3)
            constants = {"pi": math.pi, "e": math.e, "i": 1j}
            values[f"v{end}"] = Fraction(word) if kind == "number" else constants.get(word, letter)
            word = f"v{end}"
        source += "*" if kind == "times" else word.replace("^", "**")
        end, before = token.end(), kind
    if end != len(text):
        raise ValueError("no expression")

    def value(node):
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.Call):
            return FUNCTIONS[node.func.id](value(node.args[0]))
        x, y, op = value(node.left), value(node.right), type(node.op)
        if op is ast.Pow and isinstance(x, Fraction) and abs(y) * (x.numerator * x.denominator).bit_length() > 9999:
            raise OverflowError("a tower of exponents, which would fill the memory")
        if op is ast.Pow and not (isinstance(y, Fraction) and y.denominator == 1):
            return complex(x)**complex(y)
        result = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
                  ast.Pow: operator.pow}[op](x, y)
        if isinstance(result, Fraction) and (result.numerator * result.denominator).bit_length() > 20_000:
            raise OverflowError("too many digits")
        return result
    return value(ast.parse(source, mode="eval").body)


def same_answer(given, gold, rel_tol):
    """Are two normalised answers the same text, or the same elements in the same order, or the same value?"""
    if plain(given) == plain(gold):
        return given != ""
    if bool(NAME.match(given)) != bool(NAME.match(gold)) and not ("=" in given and "=" in gold):
        given, gold = NAME.sub("", given), NAME.sub("", gold)                   # x=5 is 5, but it is not y=5
    (kind, given_parts), (gold_kind, gold_parts) = split_list(given), split_list(gold)
    if kind != gold_kind or len(given_parts) != len(gold_parts):
        return False
    if kind:
        return all(same_answer(*pair, rel_tol) for pair in zip(given_parts, gold_parts))
    if given.count("=") == gold.count("=") == 1:
        return all(same_answer(*pair, rel_tol) for pair in zip(given.split("="), gold.split("=")))
    (given, *unit), (gold, *gold_unit) = (re.split(r"\\unit\{([^{}]*)\}$", text)[:2]
                                          for text in given_parts + gold_parts)
    if unit and gold_unit and unit[0][0] != gold_unit[0][0]:         # cm is centimeters, but neither km nor meters
        return False
    if plain(given) == plain(gold):
        return given != ""
    return all(same_value(value_of(given, point), value_of(gold, point), rel_tol) for point in (0, 1))


def same_value(x, y, rel_tol):
    """Fractions to the last digit, irrational numbers to the eleventh; no fraction is a root or a multiple of pi."""
    if rel_tol:
        return cmath.isclose(x, y, rel_tol=rel_tol)
    if isinstance(x, Fraction) or isinstance(y, Fraction):
        return type(x) == type(y) and x == y
    return cmath.isfinite(x) and cmath.isclose(x, y, rel_tol=1e-11)


if __name__ == "__main__":
    as_a_command(main)
