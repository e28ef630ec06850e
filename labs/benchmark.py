"""How fast is a step, against other libraries and against the machine itself?

    python labs/benchmark.py                                    # a small model; some minutes on a laptop
    python labs/benchmark.py --compile                          # also ours with compiled layers, in turns
    python labs/benchmark.py --against "continuous batching"    # with that alone; nothing: ours alone
    python labs/benchmark.py --rollouts 1024 --max-response-tokens 3072 --against generate TRL   # one GPU
    python labs/benchmark.py --plan             # nothing is run: memory and least time on other GPUs

All run in this one process and in turns (A B C A B C), on the same prompt and the same response lengths,
drawn so that their mean is a third of the longest, as in real rollouts; the table has medians over the turns.
What can be compared, as far as it is there: generate of transformers, on the padded batch; its continuous
batching, beside which a GPU has fewer and shorter rollouts, or it would not come to its end; a whole step of
TRL's GRPOTrainer. Two floors say what the machine allows, whatever the code:
    rollouts   the longer of two times: every decode step reads all weights and the keys and values so far,
               at the measured speed of a copy; every token costs its matrix products, at that of one
    update     the matrix products of forward and backward of the policy, and forward of the reference
"""
import copy
import importlib.util
import logging
import operator
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl  # before torch, as in evaluate.py

import numpy as np
import torch
import transformers
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteriaList

from labs import tiny

CUDA = torch.cuda.is_available()
OTHERS = ("generate", "continuous batching", "TRL")
#                  hidden, feed-forward, layers, heads, key-value heads, vocabulary
SHAPES = {"tiny": (64, 192, 3, 4, 2, 512), "small": (256, 1024, 6, 4, 2, 8192),
          "0.5b": (896, 4864, 24, 14, 2, 151936), "1.5b": (1536, 8960, 28, 12, 2, 151936),
          "7b": (3584, 18944, 28, 28, 4, 152064)}

@dataclass
class Flags:
    """Everything that can be said on the command line; --help shows the comments."""
    # what is run
    shape: Literal["tiny", "small", "0.5b", "1.5b", "7b"] = "1.5b" if CUDA else "small"  # of random weights
    model: str = ""             # real weights in place of random ones: a Hugging Face folder
    rollouts: int = None        # default: 32; on CUDA 1024, or 256 with continuous batching
    max_response_tokens: int = None     # of the longest; default: 192; on CUDA 3072, or 1024 likewise
    turns: int = 3              # turns that count, after one that does not
    against: tuple = OTHERS     # what to compare with, as far as it is there; nothing: ours alone
    plan: bool = False          # print what would fit on other GPUs, and how fast at best
    # settings of ours
    compile: bool = CUDA        # a second row of ours, with compiled layers
    slots: int = rl.Config.slots                # responses sampled at the same time
    token_budget: int = rl.Config.token_budget  # tokens of a micro-batch
    activation_checkpointing: bool = False      # compute activations again in backward
    cuda_graph: bool = True     # launch a decode step's kernels in one go; nothing on a CPU


# -- 1. Models, lengths and the machine --------------------------------------------------

def random_model(shape):
    """A Qwen2 of a size of Qwen2.5's, with random weights; all but the 7B tie the head to the embedding."""
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=shape != "7b")).eval()

def draw_lengths(n, longest):
    """Lengths (n,) of responses: many short, few long, the mean about a third of the longest."""
    lengths = np.random.default_rng(0).exponential(1, n).clip(0.02, 3)
    return torch.tensor(lengths / lengths.max() * longest).round().clamp(min=1).long()

def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    name = torch.cuda.get_device_name() if CUDA else f"{names[0]}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"

def clock() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()

def machine_speed(device, dtype) -> tuple:
    """(bytes a second of a large copy, operations a second of a large matrix product)."""
    a = torch.ones(2**29 if CUDA else 2**26, device=device)
    m = torch.randn(*2 * (8192 if CUDA else 1536,), device=device, dtype=dtype)

    def seconds(code):
        timer = Timer(code, globals={"a": a, "b": torch.empty_like(a), "m": m},
                      num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.3).median
    return 2 * a.nbytes / seconds("b.copy_(a)"), 2 * len(m)**3 / seconds("m @ m")


# -- 2. What the machine allows: least time, and memory ----------------------------------

def sizes(policy) -> tuple:
    """(parameters of the layers, of the head, numbers of keys and values that a token adds)."""
    c = policy.config
    head = c.vocab_size * c.hidden_size
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    body = policy.num_parameters() - head * (1 if c.tie_word_embeddings else 2)
    return body, head, 2 * c.num_hidden_layers * c.num_key_value_heads * head_size

def floors(policy, itemsize, prompt_length, lengths, config, bandwidth, rate) -> dict:
    """Least seconds of rollouts and update: see the top of the file. itemsize: the sampler's bytes."""
    c, lengths, tokens = policy.config, lengths.tolist(), int(lengths.sum())
    body, head, key_values = sizes(policy)
    # the t-th token of a response looks at prompt + t keys; bytes of a key and value, operations for a key
    keys = sum(n * prompt_length + n * (n + 1) // 2 for n in lengths)
    key_operations = 2 * key_values * c.num_attention_heads // c.num_key_value_heads
    steps = max(-(-tokens // min(config.slots, len(lengths))), max(lengths))
    read = itemsize * (steps * (body + head) + keys * key_values)
    computed = 2 * (body + head) * tokens + keys * key_operations
    prompts = len(lengths) * prompt_length
    forward = 2 * body * (prompts + tokens) + 2 * head * tokens
    forward += (keys + prompts * prompt_length // 2) * key_operations
    return {"rollouts": max(read / bandwidth, computed / rate),
            "update": forward * (3 + bool(config.kl_coef)) / rate}

def activations(c) -> int:
    """Bytes a token and layer that a Qwen2 layer's backward keeps under bf16 autocast (a test counts)."""
    kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    return 30 * c.hidden_size + 8 * c.intermediate_size + 4 * kv + 4 * c.num_attention_heads + 8

def memory(policy, config) -> tuple:
    """GB on the GPU while sampling and while updating, for bf16 autocast with fp32 weights."""
    (body, _, key_values), c, parameters = sizes(policy), policy.config, policy.num_parameters()
    # fp32 weights, the sampler in bf16, AdamW's two; the reference is in fp32
    always = parameters * ((6 if config.offload_optimizer else 14) + (4 if config.kl_coef else 0))
    length = config.max_prompt_tokens + config.max_response_tokens
    slots = min(config.slots, config.prompts_per_step * config.group_size)
    # the cache; logits in bf16 and fp32, and their softmax
    sampling = slots * (2 * length * key_values + 10 * c.vocab_size)
    tokens, layer = max(config.token_budget, length), activations(c)
    kept = layer * c.num_hidden_layers
    if config.activation_checkpointing:
        kept = 4 * c.hidden_size * c.num_hidden_layers + layer
    # gradients, the weights in bf16, activations, three times the logits of a chunk
    updating = 4 * parameters + 2 * body + tokens * kept + 3 * 4 * 512 * c.vocab_size
    return (always + sampling) / 1e9, (always + updating) / 1e9

#        GB, memory in bytes a second, dense bf16 operations a second: the makers' figures
GPUS = {"24 GB (RTX 4090)": (24, 1.01e12, 1.65e14), "48 GB (L40S)": (48, 0.86e12, 3.62e14),
        "80 GB (A100)": (80, 2.04e12, 3.12e14), "80 GB (H100)": (80, 3.35e12, 9.89e14),
        "141 GB (H200)": (141, 4.8e12, 9.89e14)}
# what to try, one after the other and together, until it fits
THRIFT = [{}, {"activation_checkpointing": True}, {"slots": 128}, {"slots": 64}, {"offload_optimizer": True},
          {"kl_coef": 0.0}, {"slots": 32, "max_response_tokens": 2048, "token_budget": 3072}]

def plan_for(policy, lengths, size, bandwidth, rate) -> list:
    """Cells of the plan's table: memory, least times, and the flags under which it fits."""
    for flags in accumulate(THRIFT, operator.or_):
        config = rl.Config(**flags)
        if max(memory(policy, config)) < 0.94 * size:  # the rest is the driver's, and fragments
            lengths = lengths.clamp(max=config.max_response_tokens)
            least = floors(policy, 2, 160, lengths, config, bandwidth, rate)
            words = [f"`{rl.flag_of(key)}{'' if value is True else f' {value:g}'}`"
                     for key, value in flags.items()]
            return [*(f"{x:.0f}" for x in (*memory(policy, config), *least.values())), " ".join(words)]
    return ["does not fit", "", "", "", ""]

def print_plan(lengths) -> None:
    print(f"A step of {len(lengths):,} rollouts of {lengths.float().mean():.0f} tokens in the mean and "
          f"{lengths.max():,} at most; worked out, not measured\n\n"
          "| model | GPU | GB sampling | GB updating | least seconds sampling | updating | flags |\n"
          "|---|---|---|---|---|---|---|")
    for shape in ("0.5b", "1.5b", "7b"):
        with torch.device("meta"):
            policy = random_model(shape)
        for name, gpu in GPUS.items():
            print("|", " | ".join([shape.upper(), name, *plan_for(policy, lengths, *gpu)]), "|")


# -- 3. What is compared: one turn of each, on responses of these lengths ----------------

def ours(policy, ref_policy, sampler, optimizer, prompt, config, lengths) -> dict:
    """Sampling and update of one_shot_rlvr.py, as its main() calls them."""
    N, start = len(lengths), clock()
    noise = torch.rand(N, config.max_response_tokens, dtype=torch.float64)
    _, responses, logprobs = zip(*sorted(rl.generate_each(
        sampler, N * [prompt], lengths.tolist(), N * [config.temperature], noise, [], config.slots,
        config.cuda_graph)))
    sampled = clock()
    logprobs = [torch.tensor(row) for row in logprobs]
    batch = rl.Batch([], N * [prompt], responses, [], [], logprobs, sampled - start)
    advantages = rl.group_advantages(torch.rand(N), config.group_size)
    rl.train_on(policy, ref_policy, optimizer, batch, advantages, config)
    rl.copy_weights(policy.parameters(), sampler.parameters())
    return {"rollouts": sampled - start, "update": clock() - sampled}

def turns_of_ours(policy, prompt, config, with_compiled) -> tuple:
    """({name: turn}, sampler): ours and, on the same weights, so in the same memory, with compiled layers."""
    *models, optimizer = policy, *rl.prepare_training(policy, replace(config, activation_checkpointing=False))
    rows = {"ours": models}  # policy, reference, sampler
    if with_compiled:
        twins = {model: copy.deepcopy(model, {id(w): w for w in model.parameters()}) for model in models}
        rows["ours, compiled layers"] = [twins[model] for model in models]
        for twin in twins.values():
            rl.compile_layers(twin)
    for trained, *_ in rows.values() if config.activation_checkpointing else ():
        rl.recompute_layers(trained)  # after compiling, as prepare_training does
    return {name: partial(ours, *row, optimizer, prompt, config) for name, row in rows.items()}, models[2]

def at_length(prompt_length, lengths):
    """End row i of transformers' generate after lengths[i] tokens."""
    ends = prompt_length + lengths
    return StoppingCriteriaList([lambda ids, scores, **_: ids.shape[1] >= ends.to(ids.device)])

def transformers_generate(model, prompt, config, lengths) -> dict:
    """generate on the batch of all rollouts, padded to the longest."""
    model.set_attn_implementation("sdpa")
    ids, start = torch.tensor([prompt], device=model.device), clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=config.temperature,
                   top_k=0, top_p=1.0, num_return_sequences=len(lengths), max_new_tokens=int(lengths.max()),
                   eos_token_id=None, pad_token_id=0, stopping_criteria=at_length(len(prompt), lengths))
    return {"rollouts": clock() - start}

def continuous_batching(model, prompt, config, lengths, patience=600) -> dict:
    """transformers' continuous batching, each rollout a request of its own length."""
    model.set_attn_implementation("sdpa")
    options = {"generation_config": transformers.GenerationConfig(
        do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0,
        max_new_tokens=config.max_response_tokens)}
    if not CUDA and hasattr(transformers, "ContinuousBatchingConfig"):
        # room for all rollouts; by default it takes most of the machine's memory
        blocks = len(lengths) * -(-(len(prompt) + config.max_response_tokens) // 256) + 8
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(num_blocks=blocks)
    with model.continuous_batching_context_manager(**options) as manager:
        start = clock()  # its preparations are not counted
        for length in lengths.tolist():
            manager.add_request(prompt, max_new_tokens=length)
        for _ in lengths:
            if manager.get_result(timeout=max(1, start + patience - clock())) is None:
                raise RuntimeError(f"it did not come to its end in {clock() - start:.0f} s")
        return {"rollouts": clock() - start}

def trl_step(folder, problem, config):
    """A whole step of TRL's GRPOTrainer: sampling is its calls of generate, update is all the rest."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    parts, N = {}, config.prompts_per_step * config.group_size
    most = max(1, config.token_budget // config.max_response_tokens)
    rows = max(size for size in range(1, N + 1) if N % size == 0 and size <= most)
    step = transformers.TrainerCallback()
    step.on_step_begin = lambda *_, **__: parts.update(start=clock(), rollouts=0.0)
    step.on_step_end = lambda *_, **__: parts.update(update=clock() - parts["start"] - parts["rollouts"])
    trainer = GRPOTrainer(
        model=folder, reward_funcs=lambda completions, **_: np.random.rand(len(completions)).tolist(),
        callbacks=[step], train_dataset=Dataset.from_list(N * [{"prompt": problem}]), args=GRPOConfig(
            output_dir=f"{folder}-trl", max_steps=1, per_device_train_batch_size=rows,
            gradient_accumulation_steps=N // rows, num_generations=config.group_size, top_k=0, report_to=[],
            max_completion_length=config.max_response_tokens, temperature=config.temperature,
            beta=config.kl_coef, learning_rate=config.learning_rate, bf16=CUDA, use_cpu=not CUDA,
            gradient_checkpointing=config.activation_checkpointing, model_init_kwargs={"dtype": "float32"},
            save_strategy="no", logging_strategy="no", disable_tqdm=True))
    trainer.remove_callback(transformers.PrinterCallback)
    generate = trainer.model.generate

    def forced(*args, **kwargs):
        start, ends = clock(), at_length(kwargs["input_ids"].shape[1], parts["lengths"])
        output = generate(*args, **kwargs, stopping_criteria=ends)
        parts["rollouts"] += clock() - start
        return output

    def turn(lengths):
        parts["lengths"] = lengths
        trainer.train()
        return {part: parts[part] for part in ("rollouts", "update")}

    trainer.model.generate = forced
    return turn


# -- 4. The run --------------------------------------------------------------------------

def run_in_turns(turns, number, lengths) -> dict:
    """{name: [{part: seconds}, ...]}: once uncounted, at an eighth of the lengths, then `number` times."""
    results, tokens, short = {name: [] for name in turns}, int(lengths.sum()), -(-lengths // 8)
    for counted in range(number + 1):
        for name in tqdm(list(results), f"turn {counted} of {number}", leave=False, disable=None):
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            try:
                result = turns[name](lengths if counted else short)
            except Exception as error:  # another library's, without which the table can do
                if name == "ours":
                    raise
                print(f"{name} is left out: {type(error).__name__}: {error}")
                del results[name]
                continue
            if counted:
                results[name].append(result)
                words = [f"{part} {tokens / took:,.0f} tokens/s" for part, took in result.items()]
                words += [f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"] if CUDA else []
                print(f"turn {counted}, {name}: {', '.join(words)}")
    return results

def print_table(results, floor, tokens) -> None:
    medians = {name: {part: float(np.median([turn[part] for turn in turns])) for part in turns[0]}
               for name, turns in results.items()}
    for parts in (floor, *medians.values()):
        if len(parts) == 2:
            parts["step"] = sum(parts.values())
    mine = medians["ours"]
    print(f"\n{'':<32}{'tokens/s':>10}{'ours is':>16}{'near the floor':>16}")
    for part in mine:
        for name, parts in medians.items():
            if part in parts:
                ratio = "" if name == "ours" else f"{parts[part] / mine[part]:.2f} x as fast"
                print(f"{part:<10}{name:<22}{tokens / parts[part]:>10,.0f}{ratio:>16}"
                      f"{floor[part] / parts[part]:>16.0%}")

def parse_args(argv=None) -> Flags:
    parser = rl.make_parser(__doc__)
    rl.add_flags(parser, Flags)
    args = Flags(**vars(parser.parse_args(rl.words_of(argv))))
    rl.check_numbers(vars(args), {})
    if unknown := {*args.against} - {*OTHERS, "nothing"}:
        rl.fail(f"--against {min(unknown)}: there are {', '.join(OTHERS)}, and nothing")
    few = "continuous batching" in args.against  # 1,024 of 3,072 tokens would take it an hour
    rollouts, longest = (32, 192) if not CUDA else (256, 1024) if few else (1024, 3072)
    args.rollouts, args.max_response_tokens = args.rollouts or rollouts, args.max_response_tokens or longest
    if args.rollouts % 8:
        rl.fail(f"--rollouts {args.rollouts}: use a multiple of 8, the size of a group")
    if not args.plan and "TRL" in args.against and not importlib.util.find_spec("trl"):
        args.against = [name for name in args.against if name != "TRL"]
        print("TRL is left out; to have it: pip install trl")
    if args.compile and not CUDA and not shutil.which(os.environ.get("CXX", "g++")):
        args.compile = False
        print("ours, compiled layers is left out; it needs a C++ compiler")
    return args

def main(argv=None) -> None:
    args = parse_args(argv)
    if args.plan:
        return print_plan(draw_lengths(1024, 3072))
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.disable_progress_bar()
    config = rl.Config(prompts_per_step=args.rollouts // 8, max_response_tokens=args.max_response_tokens,
                       slots=args.slots, token_budget=args.token_budget, cuda_graph=args.cuda_graph and CUDA,
                       activation_checkpointing=args.activation_checkpointing)
    lengths = draw_lengths(args.rollouts, args.max_response_tokens)
    if args.model:
        policy, tokenizer = rl.load_model(args.model)
    else:
        with torch.device("cuda" if CUDA else "cpu"):
            policy, tokenizer = random_model(args.shape), tiny.make_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token  # how TRL then knows where a row has ended
    problem = rl.load_examples(["pi1"])[0]["problem"] + rl.TRAIN_SUFFIX
    prompt, name = rl.encode_prompt(tokenizer, problem), Path(args.model or args.shape).name
    with tempfile.TemporaryDirectory() as temporary:
        if "TRL" in args.against:
            rl.save_model(Path(temporary, name), policy, tokenizer)
        turns, sampler = turns_of_ours(policy, prompt, config, args.compile)
        if "generate" in args.against:
            turns["generate"] = partial(transformers_generate, sampler, prompt, config)
        if "continuous batching" in args.against:
            turns["continuous batching"] = partial(continuous_batching, sampler, prompt, config)
        if "TRL" in args.against:
            turns["TRL"] = trl_step(f"{temporary}/{name}", problem, config)
        dtype = torch.bfloat16 if rl.uses_bf16(policy.device, config) else torch.float32
        bandwidth, rate = machine_speed(policy.device, dtype)
        print(f"{machine()}; {dtype}\n"
              f"copy {bandwidth / 1e9:,.0f} GB/s, matrix product {rate / 1e12:.2f} TFLOP/s\n"
              f"{name}, {policy.num_parameters() / 1e6:,.1f} million parameters; {len(lengths)} rollouts in "
              f"groups of 8, mean {lengths.float().mean():.0f} and at most {lengths.max()} tokens after a "
              f"prompt of {len(prompt)}, {min(config.slots, len(lengths))} at a time")
        results = run_in_turns(turns, args.turns, lengths)
    floor = floors(policy, sampler.dtype.itemsize, len(prompt), lengths, config, bandwidth, rate)
    print_table(results, floor, int(lengths.sum()))
    print(f"\nmedians of {args.turns} turn(s)")

if __name__ == "__main__":
    rl.as_a_command(main)
