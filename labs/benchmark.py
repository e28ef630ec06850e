"""How fast is a step, against other libraries and against the machine itself?

    python labs/benchmark.py                                    # a small model; four minutes on a laptop
    python labs/benchmark.py --compile                          # also ours with compiled layers, in turns
    python labs/benchmark.py --against "continuous batching"    # with that alone; "nothing": ours alone
    python labs/benchmark.py --rollouts 1024 --max-response-tokens 3072 --against generate TRL   # one GPU
    python labs/benchmark.py --plan             # nothing is run: memory and least time on other GPUs

Everything runs in this one process and in turns (A B C A B C), on the same prompt and the same response
lengths; the table has medians over the turns, and next to each speed its ratio to ours. Weights are random
(--shape) or a real model's (--model); the lengths are forced, drawn so that their mean is a third of the
longest, as in real rollouts.

Compared are, as far as this machine has them: generate of transformers, on the padded batch; its continuous
batching, for whose sake a GPU has fewer and shorter rollouts, or it would not come to its end; a whole step
of TRL's GRPOTrainer, sampling and update. Two floors say what the machine allows, whatever the code:
    rollouts   every decode step reads all weights and the keys and values so far, at the measured speed of
               a copy, and every token costs its matrix products, at the measured speed of one: the longer
               of the two times
    update     forward and backward of the policy and forward of the reference, at the measured speed of
               matrix products
"""
import copy
import dataclasses
import importlib.util
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl  # before torch, as in evaluate.py

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, StoppingCriteriaList

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
    rollouts: int = None        # by default 32; on CUDA 1024, or 256 beside continuous batching
    max_response_tokens: int = None     # the longest; by default 192, on CUDA 3072, or 1024 beside it
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

def random_tokenizer():
    """The tiny world's; its end of text also pads, which is how TRL then knows where a row has ended."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

def draw_lengths(n, longest):
    """Lengths (n,) of responses: many short, few long, the mean about a third of the longest."""
    lengths = np.random.default_rng(0).exponential(1, n).clip(0.02, 3)
    return torch.tensor(lengths / lengths.max() * longest).round().clamp(min=1).long()

def machine() -> str:
    if CUDA:
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
        name = f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"

def clock() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()

def machine_speed(device, dtype) -> tuple:
    """(bytes a second of a large copy, operations a second of a large matrix product)."""
    a = torch.ones(2**29 if CUDA else 2**26, device=device)
    b, m = torch.empty_like(a), torch.randn(*2 * (8192 if CUDA else 1536,), device=device, dtype=dtype)

    def median_time(function):
        times = []
        for _ in range(6):
            start = clock()
            function()
            times.append(clock() - start)
        return np.median(times[1:])
    return 2 * a.nbytes / median_time(lambda: b.copy_(a)), 2 * len(m)**3 / median_time(lambda: m @ m)


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
    forward = 2 * body * (prompts + tokens) + 2 * head * tokens \
        + (keys + prompts * prompt_length // 2) * key_operations
    return {"rollouts": max(read / bandwidth, computed / rate),
            "update": forward * (3 + bool(config.kl_coef)) / rate}

def activations(c) -> int:
    """Bytes a token and layer that a Qwen2 layer's backward keeps under bf16 autocast (a test counts)."""
    kv = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    return 30 * c.hidden_size + 8 * c.intermediate_size + 4 * kv + 4 * c.num_attention_heads + 8

def memory(policy, config) -> tuple:
    """GB on the GPU while sampling and while updating, for bf16 autocast with fp32 weights."""
    body, _, key_values = sizes(policy)
    c, parameters = policy.config, policy.num_parameters()
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

def print_plan(lengths) -> None:
    """Will it fit, and how long does it take at the least? With the flags that each GPU needs."""
    print(f"A step of {len(lengths):,} rollouts of {lengths.float().mean():.0f} tokens in the mean and "
          f"{lengths.max():,} at most; worked out, not measured\n\n"
          "| model | GPU | GB sampling | GB updating | least seconds sampling | updating | flags |\n"
          "|---|---|---|---|---|---|---|")
    for shape in ("0.5b", "1.5b", "7b"):
        with torch.device("meta"):
            policy = random_model(shape)
        for name, (size, bandwidth, rate) in GPUS.items():
            flags, cells = {}, ["does not fit", *5 * [""]]
            for more in THRIFT:
                flags |= more
                config = rl.Config(**flags)
                if max(memory(policy, config)) < 0.94 * size:  # the rest is the driver's, and fragments
                    times = floors(policy, 2, 160, lengths.clamp(max=config.max_response_tokens), config,
                                   bandwidth, rate)
                    words = [f"`{rl.flag_of(key)}{'' if value is True else f' {value:g}'}`"
                             for key, value in flags.items()]
                    cells = [*(f"{x:.0f}" for x in (*memory(policy, config), *times.values())), " ".join(words)]
                    break
            print(f"| {' | '.join([shape.upper(), name, *cells])} |")


# -- 3. What is compared: each is a function lengths -> {part: seconds} ------------------

class AtLength(StoppingCriteria):
    """End row i of transformers' generate after lengths[i] tokens."""

    def __init__(self, prompt_length, lengths):
        self.prompt_length, self.lengths = prompt_length, lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_length >= self.lengths.to(input_ids.device)

def with_compiled_layers(models) -> list:
    """Twins of policy, reference and sampler, with compiled layers; the weights they share with them."""
    twins = {model: copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
             for model in {*models} - {None}}
    for twin in twins.values():
        rl.compile_layers(twin)
    return [twins.get(model) for model in models]

def ours(policy, ref_policy, sampler, optimizer, prompt, config):
    """Sampling and update of one_shot_rlvr.py, as its main() calls them."""
    def turn(lengths):
        N, limits, rollouts, start = len(lengths), lengths.tolist(), {}, clock()
        noise = rl.draw_noise(N, config.max_response_tokens)
        for i, *rollout in rl.generate_each(sampler, N * [prompt], limits, N * [config.temperature], noise,
                                            [], config.slots, config.cuda_graph):
            rollouts[i] = rollout
        sampled = clock()
        responses, logprobs = zip(*(rollouts[i] for i in range(N)))
        batch = rl.Batch(examples=[], prompts=N * [prompt], responses=responses, texts=[], rewards=[],
                         sampler_logprobs=[torch.tensor(row) for row in logprobs], seconds=sampled - start)
        advantages = rl.group_advantages(torch.rand(N), config.group_size)
        rl.train_on(policy, ref_policy, optimizer, batch, advantages, config)
        rl.copy_weights(policy.parameters(), sampler.parameters())
        return {"rollouts": sampled - start, "update": clock() - sampled}
    return turn

def transformers_generate(model, prompt, config):
    """generate on the batch of all rollouts, padded to the longest."""
    def turn(lengths):
        model.set_attn_implementation("sdpa")
        ids, start = torch.tensor([prompt], device=model.device), clock()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=config.temperature, top_k=0,
            top_p=1.0, num_return_sequences=len(lengths), max_new_tokens=int(lengths.max()),
            eos_token_id=None, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([AtLength(len(prompt), lengths)]))
        return {"rollouts": clock() - start}
    return turn

def continuous_batching(model, prompt, config, patience=600):
    """transformers' continuous batching, each rollout a request of its own length."""
    options = {"generation_config": transformers.GenerationConfig(
        do_sample=True, temperature=config.temperature, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0,
        max_new_tokens=config.max_response_tokens)}
    if not CUDA and hasattr(transformers, "ContinuousBatchingConfig"):
        # room for all rollouts; by default it takes most of the machine's memory
        each = -(-(len(prompt) + config.max_response_tokens) // 256)
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
            num_blocks=each * config.prompts_per_step * config.group_size + 8)

    def turn(lengths):
        model.set_attn_implementation("sdpa")
        with model.continuous_batching_context_manager(**options) as manager:
            start = clock()  # its preparations are not counted
            for length in lengths.tolist():
                manager.add_request(prompt, max_new_tokens=length)
            for _ in lengths:
                if manager.get_result(timeout=max(1, start + patience - clock())) is None:
                    raise RuntimeError(f"it has not come to its end after {clock() - start:.0f} s")
            return {"rollouts": clock() - start}
    return turn

def trl_step(folder, output_dir, problem, N, config):
    """A whole step of TRL's GRPOTrainer: sampling is its calls of generate, update is all the rest."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    parts, longest = {}, config.max_response_tokens
    most = max(1, config.token_budget // longest)
    rows = max(size for size in range(1, N + 1) if N % size == 0 and size <= most)

    class Step(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            parts.update(start=clock(), rollouts=0.0)

        def on_step_end(self, *args, **kwargs):
            parts["update"] = clock() - parts["start"] - parts["rollouts"]

    trainer = GRPOTrainer(
        model=folder, reward_funcs=lambda completions, **_: np.random.rand(len(completions)).tolist(),
        callbacks=[Step()], train_dataset=Dataset.from_list(N * [{"prompt": problem}]), args=GRPOConfig(
            output_dir=output_dir, max_steps=1, per_device_train_batch_size=rows,
            gradient_accumulation_steps=N // rows, num_generations=config.group_size,
            max_completion_length=longest, temperature=config.temperature, top_k=0, beta=config.kl_coef,
            learning_rate=config.learning_rate, bf16=CUDA, use_cpu=not CUDA, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=config.activation_checkpointing))
    trainer.remove_callback(transformers.PrinterCallback)
    generate = trainer.model.generate

    def forced(*args, **kwargs):
        start, at_length = clock(), AtLength(kwargs["input_ids"].shape[1], parts["lengths"])
        output = generate(*args, **kwargs, stopping_criteria=StoppingCriteriaList([at_length]))
        parts["rollouts"] += clock() - start
        return output

    trainer.model.generate = forced

    def turn(lengths):
        parts["lengths"] = lengths
        trainer.train()
        return {part: parts[part] for part in ("rollouts", "update")}
    return turn


# -- 4. The run --------------------------------------------------------------------------

def run_in_turns(turns, number, lengths) -> dict:
    """{name: [{part: seconds}, ...]}: all once uncounted, on short responses, then `number` times."""
    results, tokens = {name: [] for name in turns}, int(lengths.sum())
    for counted in range(number + 1):
        for name in tqdm(list(results), f"turn {counted} of {number}", leave=False, disable=None):
            torch.cuda.reset_peak_memory_stats()
            try:
                result = turns[name](lengths if counted else lengths.clamp(max=16))
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
                print(f"turn {counted}, {name}: {', '.join(words)}", flush=True)
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
    if unknown := {*args.against} - {*OTHERS, "nothing"}:
        rl.fail(f"--against {min(unknown)}: there are {', '.join(OTHERS)}, and nothing")
    rl.check_numbers(vars(args), {})
    few = "continuous batching" in args.against  # 1,024 of 3,072 tokens would take it an hour
    rollouts, longest = (32, 192) if not CUDA else (256, 1024) if few else (1024, 3072)
    args.rollouts, args.max_response_tokens = args.rollouts or rollouts, args.max_response_tokens or longest
    if args.rollouts % 8:
        rl.fail(f"--rollouts {args.rollouts}: use a multiple of 8, the size of a group")
    return args

def rows_of_ours(policy, prompt, config, with_compiled) -> tuple:
    """({name: turn}, sampler): ours and, if wanted, a row with compiled layers, on the same weights."""
    ref_policy, sampler, optimizer = rl.prepare_training(
        policy, dataclasses.replace(config, activation_checkpointing=False))
    rows = {"ours": [policy, ref_policy, sampler]}
    if with_compiled:
        rows["ours, compiled layers"] = with_compiled_layers(rows["ours"])
    for models in rows.values() if config.activation_checkpointing else ():
        rl.recompute_layers(models[0])
    return {name: ours(*models, optimizer, prompt, config) for name, models in rows.items()}, sampler

def main(argv=None) -> None:
    args = parse_args(argv)
    if args.plan:
        return print_plan(draw_lengths(1024, 3072))
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    config = rl.Config(prompts_per_step=args.rollouts // 8, max_response_tokens=args.max_response_tokens,
                       slots=args.slots, token_budget=args.token_budget, cuda_graph=args.cuda_graph and CUDA,
                       activation_checkpointing=args.activation_checkpointing)
    lengths = draw_lengths(args.rollouts, args.max_response_tokens)
    problem = rl.load_examples(["pi1"])[0]["problem"] + rl.TRAIN_SUFFIX
    trl = "TRL" in args.against and importlib.util.find_spec("trl")
    if "TRL" in args.against and not trl:
        print("TRL is left out; to have it: pip install trl")
    if args.compile and not (CUDA or shutil.which(os.environ.get("CXX", "g++"))):
        args.compile = print("compiled layers are left out: there is no C++ compiler")

    with tempfile.TemporaryDirectory() as temporary:
        if args.model:
            policy, tokenizer = rl.load_model(args.model)
        else:
            with torch.device("cuda" if CUDA else "cpu"):
                policy, tokenizer = random_model(args.shape), random_tokenizer()
        prompt, name = rl.encode_prompt(tokenizer, problem), Path(args.model or args.shape).name
        if trl:
            rl.save_model(Path(temporary, name), policy, tokenizer)
        turns, sampler = rows_of_ours(policy, prompt, config, args.compile)
        dtype = torch.bfloat16 if rl.uses_bf16(policy.device, config) else torch.float32
        bandwidth, rate = machine_speed(policy.device, dtype)
        print(f"{machine()}; {dtype}\n"
              f"copy {bandwidth / 1e9:,.0f} GB/s, matrix product {rate / 1e12:.2f} TFLOP/s\n"
              f"{name}, {policy.num_parameters() / 1e6:,.1f} million parameters; {len(lengths)} rollouts in groups "
              f"of 8, mean {lengths.float().mean():.0f} and at most {lengths.max()} tokens after a prompt of "
              f"{len(prompt)}, {min(config.slots, len(lengths))} at a time", flush=True)
        if "generate" in args.against:
            turns["generate"] = transformers_generate(sampler, prompt, config)
        if "continuous batching" in args.against:
            turns["continuous batching"] = continuous_batching(sampler, prompt, config)
        if trl:
            turns["TRL"] = trl_step(f"{temporary}/{name}", temporary, problem, len(lengths), config)
        floor = floors(policy, sampler.dtype.itemsize, len(prompt), lengths, config, bandwidth, rate)
        print_table(run_in_turns(turns, args.turns, lengths), floor, int(lengths.sum()))
    print(f"\nmedians of {args.turns} turn(s)")

if __name__ == "__main__":
    rl.as_a_command(main)
