"""Evaluate a model on the paper's six benchmarks, on the tiny world's six, or on problems of your own.

    python evaluate.py --model Qwen/Qwen2.5-Math-1.5B                    # the six of the paper's Table 8
    python evaluate.py --model runs/pi1-Qwen2.5-Math-1.5B/step-001540    # after one-shot training
    python evaluate.py --run runs/pi1-Qwen2.5-Math-1.5B                  # every saved step: a curve
    python evaluate.py --compare before.json after.json                  # is the difference more than noise?
    python evaluate.py --preset tiny                                     # the tiny world's six, on a laptop
    python evaluate.py --model DIR --benchmarks my.jsonl --limit 20      # rows of {"problem", "answer"}

The protocol is the paper's: greedy for MATH500, Minerva and OlympiadBench; for the small AIME and AMC sets
the mean over 8 samples at temperature 0.6 (avg@8, which the released code calls pass@8); 3,072 new tokens;
the system message of Qwen2.5-Math where the chat template has a system role; the plain mean of the six.
avg@k is the share of right answers, over problems and k samples of each; +- its standard error over problems;
pass@k the share of problems that one of k samples solves.
"""
import itertools
import json
import math
import re
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import one_shot_rlvr as rl  # before torch: it sets what torch reads when it is imported

import numpy as np
import torch
from filelock import FileLock

# -- 1. Benchmarks -----------------------------------------------------------------------
# {name: (where it lies, on the hub or in a file; k, the responses a problem; their temperature)}
PAPER = {
    "math500": ("HuggingFaceH4/MATH-500", 1, 0.0),
    "aime24": ("math-ai/aime24", 8, 0.6),
    "amc23": ("math-ai/amc23", 8, 0.6),
    "minerva_math": ("math-ai/minervamath", 1, 0.0),
    "olympiadbench": ("math-ai/olympiadbench", 1, 0.0),
    "aime25": ("math-ai/aime25", 8, 0.6),
}
# in files beside the base model; sampled, because greedy would show its commonest style alone
TINY = {name: (f"{rl.TINY_BASE}/{name}.jsonl", 4, 0.6)
        for name in ("tiny_add", "tiny_sub", "tiny_mul", "tiny_max", "tiny_mod", "tiny_eqn")}
BENCHMARKS = PAPER | TINY

def problem_and_answer(row, where) -> dict:
    """A row of any benchmark -> {"problem", "answer", ...}."""
    row = row if isinstance(row, dict) else {}
    problem = row.get("question") or row.get("problem")
    # without an answer: OlympiadBench's first final answer, or the last box of Minerva's solution
    final = row.get("final_answer") or rl.extract_boxed(str(row.get("solution")))
    final = final[0] if isinstance(final, list) else final
    answer = final if row.get("answer") is None else row["answer"]
    if not (isinstance(problem, str) and problem.strip() and isinstance(answer, str | int | float)):
        rl.fail(f'{where}: it needs "problem" and "answer"')
    context = f"{row['context']}\n" if row.get("context") else ""
    extra = {key: str(row[key]) for key in ("subject", "level") if key in row}
    return {"problem": context + problem, "answer": str(answer), **extra}

def load_benchmark(name, data_dir=None) -> list:
    """Rows {"problem", "answer", ...}: of DIR/NAME.jsonl, of a .jsonl file, or from the hub."""
    source, *_ = BENCHMARKS.get(name, [name])
    if data_dir and not name.endswith(".jsonl"):
        source = f"{data_dir}/{name}.jsonl"
    rl.make_tiny_base(str(Path(source).parent))
    if source.endswith(".jsonl"):
        rows = rl.read_jsonl(source)
    else:
        from datasets import load_dataset  # here, because it takes a second, and files need none of it
        try:
            rows = dict(enumerate(load_dataset(source, split="test"), 1))
        except Exception as error:  # the hub's client raises a dozen kinds when it is away
            rl.fail(f"{source}: {type(error).__name__}; without the hub, give a file DIR/{name}.jsonl")
    benchmark = [problem_and_answer(row, f"{source}, line {number}") for number, row in rows.items()]
    # a whole solution, or a list as Python writes it: some sets have these for an answer
    odd = [row["answer"] for row in benchmark
           if re.search(r"(?s)^\s*$|####|^\[['\"]|.{401}", row["answer"])]
    if odd:
        print(f"{name}: {len(odd)} of {len(benchmark)} answers are not just a final answer: {odd[0][:40]!r}")
    return benchmark or rl.fail(f"{source}: no problems in it")

def load_benchmarks(names, data_dir=None, limit=None) -> dict:
    """{name: its first `limit` problems}; a .jsonl file goes by its name without folder and ending."""
    stems = [Path(name).stem for name in names]
    for name, stem in zip(names, stems):
        if name not in BENCHMARKS and not name.endswith(".jsonl"):
            rl.fail(f"{name}: no such benchmark; there are {', '.join(BENCHMARKS)}, or a .jsonl file")
        if stems.count(stem) > 1:
            rl.fail(f"{name}: there are two benchmarks {stem}; rename one of the files")
    return {stem: load_benchmark(name, data_dir)[:limit] for name, stem in zip(names, stems)}

def protocol(name, k=None, temperature=None) -> tuple:
    """k and temperature of a benchmark: those given, else its own, else one greedy response."""
    _, own_k, own_temperature = BENCHMARKS.get(name, (name, 1, 0.0))
    temperature = own_temperature if temperature is None else temperature
    return k or (own_k if temperature else 1), temperature

# -- 2. Samples --------------------------------------------------------------------------
def is_correct_lenient(response, answer) -> bool:
    r"""The judgement of the paper's evaluation, in short: laxer than the reward in three points.

    Without a box the text after "he answer is" or "final answer is" counts, else the last number; a box
    may be cut short; values may differ by a relative 1e-4, and numbers by a factor of 100 (percent). In
    one it is stricter: a list must stand in the gold's order.
    """
    _, box, after = response.rpartition("\\boxed")
    phrases = [p for p in ("he answer is", "final answer is") if p in response]
    if box:
        given = rl.extract_boxed(box + after) or after.lstrip(" {").split("$")[0]
    elif phrases:
        given = response.split(phrases[0])[-1].strip(" :\n").rstrip(".")
    else:
        given = ["", *re.findall(r"-?[0-9]*\.?[0-9]+", response.replace(",", ""))][-1]
    gold = rl.extract_boxed(answer) or answer
    try:
        number, gold_number = (float(text.replace(",", "").strip(" $%\\")) for text in (given, gold))
        return any(math.isclose(number, gold_number * scale, rel_tol=1e-4) for scale in (1, 100, 0.01))
    except ValueError:
        return bool(given.strip()) and rl.equivalent(given.strip(), gold.strip(), 1e-4, any_order=False)

def sample_and_check(model, tokenizer, benchmarks, *, max_response_tokens, seed, slots, cuda_graph, k=None,
                     temperature=None, responses_path=None) -> tuple:
    """Sample and check all responses that responses_path does not hold -> all rows, tokens a second.

    benchmarks: {name: problems}. k and temperature None: the benchmark's own. A problem too long for the
    model's context is not sampled: it counts as wrong, and is marked too_long.
    """
    stop_ids = rl.find_stop_ids(tokenizer, model.generation_config)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    rows = rl.keep_rows(responses_path) if responses_path else []
    made = {(row["benchmark"], row["number"], row["sample"]) for row in rows}
    tasks = []  # (row, prompt, limit in tokens, temperature, noise) of each response not yet made
    for name in reversed(benchmarks):  # MATH500's short responses last: they fill slots that come free
        samples, T = protocol(name, k, temperature)
        for number, problem in enumerate(benchmarks[name]):
            prompt = rl.encode_prompt(tokenizer, problem["problem"], rl.EVAL_SYSTEM)
            limit = min(max_response_tokens, context - len(prompt))
            for sample in range(samples):
                if (name, number, sample) in made:
                    continue
                row = {"benchmark": name, "number": number, "sample": sample, "temperature": T, **problem}
                # of its own: neither --slots nor a stop on the way changes a response
                draw = np.random.default_rng([seed, zlib.crc32(name.encode()), number, sample])
                tasks.append((row, prompt, limit, T, draw.random(max_response_tokens)))
    too_long = [(row, []) for row, _, limit, *_ in tasks if limit < 1]
    tasks = [task for task in tasks if task[2] > 0]
    waiting, prompts, limits, temperatures, noise = zip(*tasks) if tasks else 5 * ([],)
    rl.check_prompts(model, prompts, limits)
    sampled = 0
    started = time.perf_counter()
    ended = rl.generate_each(model, prompts, limits, temperatures, torch.tensor(np.array(noise)), stop_ids,
                             slots, cuda_graph and model.device.type == "cuda")
    for row, response in itertools.chain(too_long, ((waiting[i], response) for i, response, _ in ended)):
        text = tokenizer.decode(response, skip_special_tokens=True)
        rows.append({**row, "text": text, "extracted": rl.extract_boxed(text),
                     "correct": rl.is_correct(text, row["answer"]),
                     "correct_lenient": is_correct_lenient(text, row["answer"]), "tokens": len(response),
                     "truncated": bool(response) and response[-1] not in stop_ids, "too_long": not response})
        sampled += len(response)
        if responses_path:
            rl.append_rows(responses_path, rows[-1:])
    return rows, sampled / (time.perf_counter() - started)

# -- 3. Measures -------------------------------------------------------------------------
def pass_at_k(n, right, k) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one (Chen et al., 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)

def standard_error(scores) -> float:
    """Standard error of the mean over problems; None for a single one."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None

def mean_of(rows, key) -> float:
    return float(np.mean([row[key] for row in rows]))

def group(rows, *keys) -> dict:
    """Rows -> {(value of each key): its rows}, in order; a row without one of the keys is left out."""
    groups = {}
    for row in rows:
        if row.keys() >= {*keys}:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return dict(sorted(groups.items()))

def accuracy(samples, verdict) -> dict:
    """avg@k, its standard error, and pass@k for all k samples and for fewer."""
    right = [sum(row[verdict] for row in rows) for rows in samples]
    k = len(samples[0])
    means = [count / k for count in right]
    pass_at = {size: float(np.mean([pass_at_k(k, count, size) for count in right]))
               for size in (1, 2, 4, 8, 16, 32, 64, k) if size <= k}
    return {"avg_at_k": float(np.mean(means)), "stderr": standard_error(means), "pass_at_k": pass_at[k],
            "pass_at": pass_at}

def traits_of(row) -> dict:
    """What measure gives the mean of."""
    text = row["text"]
    return {"boxed": rl.has_box(text), "truncated": row["truncated"], "mean_length": row["tokens"],
            "code": "```python" in text,
            # the released evaluation would run the code of these, and let the model go on
            "would_run": "boxed" not in text and text.rstrip().endswith("```"),
            # the paper's words, Sec. 3.2.4
            "self_reflection": bool(re.search("(?i)rethink|recheck|recalculate", text))}

def measure(rows) -> dict:
    """Checked responses to the problems of one benchmark, or of one subject of it -> its measures."""
    samples = list(group(rows, "number").values())  # of each problem
    traits = [traits_of(row) for row in rows]
    return {"n": len(samples), "k": len(samples[0]), "temperature": rows[0]["temperature"],
            **accuracy(samples, "correct"), "lenient": accuracy(samples, "correct_lenient"),
            "too_long": sum(own[0]["too_long"] for own in samples),
            **{key: mean_of(traits, key) for key in traits[0]}}

def measure_all(rows, names) -> dict:
    """Checked responses -> {"benchmarks": {name: measures}, "average": mean of avg@k, ...}."""
    rows = [row for row in rows if row["benchmark"] in names]
    benchmarks = {name: measure([row for row in rows if row["benchmark"] == name]) for name in names}
    for key in ("subject", "level"):
        for (name, part), own in group(rows, "benchmark", key).items():
            benchmarks[name].setdefault(f"by_{key}", {})[part] = measure(own)
    return {"benchmarks": benchmarks, "average": mean_of(benchmarks.values(), "avg_at_k"),
            "average_lenient": mean_of([m["lenient"] for m in benchmarks.values()], "avg_at_k")}

def scores_of(result, lenient=False) -> dict:
    """What measure_all gives, in short -> {"average": mean of avg@k, benchmark: its avg@k, ...}."""
    return {"average": result["average_lenient" if lenient else "average"],
            **{key: (m["lenient"] if lenient else m)["avg_at_k"] for key, m in result["benchmarks"].items()}}

def quick_scores(model, tokenizer, benchmarks, config) -> dict:
    """Scores of a model in training, with the settings of the training's Config; nothing is written."""
    rows, _ = sample_and_check(model, tokenizer, benchmarks, seed=config.seed, slots=config.slots,
                               max_response_tokens=config.max_response_tokens, cuda_graph=config.cuda_graph)
    return scores_of(measure_all(rows, benchmarks))

# -- 4. Tables ---------------------------------------------------------------------------
def print_table(result, by, lenient) -> None:
    print(f"\n{'lenient' if lenient else 'benchmark':<24}    n   k     T   avg@k    +-  pass@k  boxed  trunc"
          "  code  tokens  reflect")
    for benchmark, measures in result["benchmarks"].items():
        parts = {f"  {part}": m for part, m in measures.get(f"by_{by}", {}).items()}
        for name, m in ({benchmark[:23]: measures} | parts).items():
            m = m | m["lenient"] if lenient else m
            print(f"{name:<24}{m['n']:>5}{m['k']:>4}{m['temperature']:>6.1f}{100 * m['avg_at_k']:>8.1f}"
                  f"{100 * (m['stderr'] or 0):>6.1f}{100 * m['pass_at_k']:>8.1f}{100 * m['boxed']:>7.0f}"
                  f"{100 * m['truncated']:>7.0f}{100 * m['code']:>6.0f}{m['mean_length']:>8.0f}"
                  f"{100 * m['self_reflection']:>9.1f}")
    shown = [m["lenient"] if lenient else m for m in result["benchmarks"].values()]
    error = math.hypot(*(m["stderr"] or 0 for m in shown)) / len(shown)
    print(f"{'average':<39}{100 * mean_of(shown, 'avg_at_k'):>8.1f}{100 * error:>6.1f}")
    for name, measures in result["benchmarks"].items():
        if measures["too_long"]:
            print(f"{name}: {measures['too_long']} problems fill the model's context and count as wrong")

def load_evaluation(path) -> tuple:
    """A finished evaluation -> (its JSON, {problem: the checked responses to it})."""
    result = rl.read_json(path, "model", "settings", "benchmarks", "average")
    if result["average"] is None:
        rl.fail(f"{path}: not the .json of a finished evaluation")
    rows = [row for row in rl.read_jsonl(f"{path}l").values() if isinstance(row, dict)]
    return result, group(rows, "benchmark", "number", "problem")

def difference(pairs, verdict) -> dict:
    """B against A on some problems that both answered; stderr is that of the differences, by problem."""
    a, b = (np.array([mean_of(pair[side], verdict) for pair in pairs]) for side in "AB")
    gains = b - a
    return {"n": len(pairs), "a": a.mean(), "b": b.mean(), "stderr": standard_error(gains) or 0.0,
            "won": [pair for pair, gain in zip(pairs, gains) if gain > 0],
            "lost": [pair for pair, gain in zip(pairs, gains) if gain < 0]}

def conclusion(d) -> str:
    if len(d["won"]) + len(d["lost"]) < 6:  # five fall to one side by chance in 6% of cases, as coins do
        return "too few problems differ"
    better = "B is better" if d["b"] > d["a"] else "A is better"
    return better if abs(d["b"] - d["a"]) > 2 * d["stderr"] else "within noise"

def compare(path_a, path_b, by, verdict) -> None:
    """Print two evaluations side by side, by benchmark and subject: is a difference more than noise?"""
    (result_a, a), (result_b, b) = load_evaluation(path_a), load_evaluation(path_b)
    print(f"A  {result_a['model']}  ({path_a})\nB  {result_b['model']}  ({path_b})")
    for key, value in result_a["settings"].items():
        if result_b["settings"].get(key) != value:
            print(f"not alike: {key} is {value} in A, {result_b['settings'].get(key)} in B")
    # a problem that both answered, with the samples of each
    pairs = [own[0] | {"A": own, "B": b[problem]} for problem, own in a.items() if problem in b]
    if not pairs:
        rl.fail(f"{path_a} and {path_b} have no problem in common")
    lines = []  # (name, difference) of each benchmark and, indented, of each subject
    for benchmark in result_a["benchmarks"]:
        if own := [pair for pair in pairs if pair["benchmark"] == benchmark]:
            lines.append((benchmark, difference(own, verdict)))
        for (part,), its_pairs in group(own, by).items():
            lines.append((f"  {part}", difference(its_pairs, verdict)))
    whole = [d for name, d in lines if not name.startswith("  ")]
    average = {**difference(pairs, verdict), "a": mean_of(whole, "a"), "b": mean_of(whole, "b"),
               "stderr": math.hypot(*(d["stderr"] for d in whole)) / len(whole)}
    print("\nbenchmark                   n       A       B   B - A    +-   won  lost")
    for name, d in [*lines, ("average", average)]:
        print(f"{name[:23]:<24}{d['n']:>5}{100 * d['a']:>8.1f}{100 * d['b']:>8.1f}"
              f"{100 * (d['b'] - d['a']):>+8.1f}{100 * d['stderr']:>6.1f}{len(d['won']):>6}"
              f"{len(d['lost']):>6}  {conclusion(d)}")
    print("\nwon, lost: problems that B solves more, or less, often than A. +-: standard error of B - A,\n"
          "paired by problem. Better: by more than two of these; chance alone is in one line of twenty.\n")
    # how much of it is format? of what was won, how much was boxed, and came to its end, before
    for word, side in itertools.product(("won", "lost"), "AB"):
        if rows := [row for pair in average[word] for row in pair[side]]:
            boxed = np.mean([rl.has_box(row["text"]) for row in rows])
            ended = np.mean([not row["truncated"] for row in rows])
            print(f"{word}, responses of {side}: {boxed:.0%} boxed, {ended:.0%} came to their end")

# -- 5. Files ----------------------------------------------------------------------------
def crc_of_weights(model_name) -> int:
    """CRC of the last 16 MB of each file of weights in a model's folder: it notices other weights."""
    crc = 0
    for path in sorted([*Path(model_name).glob("*.safetensors"), *Path(model_name).glob("*.bin")]):
        start = max(0, path.stat().st_size - 2**24)
        crc = zlib.crc32(np.fromfile(path, np.uint8, offset=start), crc)
    return crc

def evaluate_to_file(model_name, output, benchmarks, args) -> dict:
    """Evaluate into OUTPUT.json and OUTPUT.jsonl, or go on with the same model, weights and settings."""
    with FileLock(output.with_suffix(".lock"), timeout=0):  # two writers would mix their responses
        sampling = {key: getattr(args, key) for key in ("k", "seed", "temperature", "max_response_tokens")}
        settings = {"benchmarks": list(benchmarks), "limit": args.limit, **sampling,
                    "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
                    "problems_crc32": zlib.crc32(json.dumps(benchmarks).encode())}
        header = {"model": model_name, "weights_crc32": crc_of_weights(model_name), "settings": settings}
        if output.exists():
            result = rl.read_json(output, *header, "benchmarks", "average")
            before = result | result["settings"]
            for key, value in (header | settings).items():
                if key != "settings" and before.get(key) != value:
                    rl.fail(f"{output} has {key} {before.get(key)}, not {value}; name another --output")
            if result["average"] is not None:
                print(f"{output} holds this evaluation already")
                return result
        elif output.with_suffix(".jsonl").exists():
            rl.fail(f"{output} is gone, but its responses are there; name another --output")
        model, tokenizer = rl.load_model(model_name, getattr(torch, settings["dtype"]))
        if args.compile:
            rl.compile_layers(model)
        if model_name == args.model:  # the models of a curve share the prompt
            first = rl.encode_prompt(tokenizer, next(iter(benchmarks.values()))[0]["problem"], rl.EVAL_SYSTEM)
            stop_ids = rl.find_stop_ids(tokenizer, model.generation_config)
            print(f"first prompt:\n{rl.describe_prompt(tokenizer, first, stop_ids)}")
        rl.write_json(output, header | {"benchmarks": {}, "average": None})
        rows, rate = sample_and_check(model, tokenizer, benchmarks, **sampling, slots=args.slots,
                                      cuda_graph=args.cuda_graph, responses_path=output.with_suffix(".jsonl"))
        result = header | measure_all(rows, benchmarks) | {"tokens_per_second": rate}
        rl.write_json(output, result)
        return result

def curve(args, benchmarks) -> None:
    """Evaluate the base model and each saved step of a run -> a row a step: reward beside test accuracy."""
    if args.output.exists() and not all("average" in row for row in rl.read_jsonl(args.output).values()):
        rl.fail(f"--output {args.output}: it holds something other than a curve; name another")
    log = rl.read_log(args.run / "metrics.jsonl")
    rewards = {row["step"]: row["reward"] for row in log if "reward" in row}
    name = "eval.json" if args.output == args.run / "curve.jsonl" else f"{args.output.stem}.json"
    models = {0: (args.model, args.run / f"base-{name}")}
    for folder in sorted(args.run.glob("step-" + 6 * "[0-9]")):
        models[int(folder.name[5:])] = str(folder), folder / name
    rows = []
    for step, (model_name, output) in models.items():
        result = evaluate_to_file(model_name, output, benchmarks, args)
        # of the step's own rollouts, the last before its weights; the first are the base model's own
        rows.append({"step": step, "reward": rewards.get(max(step, 1)), **scores_of(result, args.lenient)})
        with rl.atomically(args.output) as temporary:
            rl.append_rows(temporary, rows, mode="w")
        print(f"step {step}/{max(models)}", *(f" {key} {value:.3f}" for key, value in rows[-1].items()
                                              if key != "step" and value is not None))
    print(f"\nwritten to {args.output}")

@dataclass
class Flags:
    """Everything that can be said on the command line; --help shows the comments."""
    # what: a model, all steps of a run, or two evaluations
    model: str = ""                  # Hugging Face id or model folder; by default the preset's
    run: Path = None                 # a run of one_shot_rlvr.py: base model and all steps, a curve
    compare: tuple = ()              # A.json B.json: print two evaluations side by side
    preset: Literal["paper", "tiny"] = None  # model and benchmarks; by default those of --run, or paper
    output: Path = None              # the .json of the result, a .jsonl of all responses beside it
    # benchmarks and samples
    benchmarks: tuple = ()           # names, or .jsonl files; by default the preset's six
    data_dir: str = ""               # read DIR/NAME.jsonl instead of the hub
    limit: int = None                # only the first so many problems of each benchmark
    k: int = None                    # samples a problem; by default the benchmark's
    temperature: float = None        # 0 is greedy; by default the benchmark's
    max_response_tokens: int = None  # longest response; by default the preset's
    seed: int = 0                    # seed of the samples
    # speed, and what is shown
    slots: int = rl.Config.slots     # responses that run at the same time
    cuda_graph: bool = True          # launch a decode step's kernels in one go; nothing on a CPU
    compile: bool = False            # fuse the small kernels of each layer: faster on a GPU
    by: Literal["subject", "level"] = None  # show MATH500 by subject (paper, Table 3) or by level
    lenient: bool = False            # show the verdicts of the paper's laxer evaluation

def parse_args(argv=None):
    """The command line; everything in it is checked before a model or a benchmark is loaded."""
    parser = rl.make_parser(__doc__)
    rl.add_flags(parser, Flags)
    args = parser.parse_args(rl.words_of(argv))
    rl.check_numbers(vars(args), {"seed": 0, "temperature": 0})
    if bool(args.model) + bool(args.run) + bool(args.compare) > 1 or len(args.compare) not in (0, 2):
        rl.fail("use one of --model, --run, and --compare with two files")
    chosen = rl.read_json(args.run / "config.json", "preset", "model") if args.run else vars(args)
    tiny = (args.preset or chosen["preset"]) == "tiny"
    default = rl.Config(**rl.PRESETS["tiny" if tiny else "paper"])
    args.model = chosen["model"] or default.model
    args.max_response_tokens = args.max_response_tokens or default.max_response_tokens
    args.benchmarks = args.benchmarks or list(TINY if tiny else PAPER)
    is_folder = Path(args.model).is_dir() or args.model == rl.TINY_BASE
    if args.model.count("/") > 1 and not is_folder:
        rl.fail(f"--model {args.model}: there is no such folder")  # an id on the hub has one slash at most
    own = Path(args.model, "eval.json") if is_folder else Path(f"runs/eval-{Path(args.model).name}.json")
    args.output = args.output or (args.run / "curve.jsonl" if args.run else own)
    if args.output.suffix != (".jsonl" if args.run else ".json"):
        rl.fail(f"--output {args.output}: its name must end in .json, a curve's in .jsonl")
    for name in args.benchmarks:
        k, temperature = protocol(Path(name).stem, args.k, args.temperature)
        if k > 1 and temperature == 0:
            rl.fail(f"--k {k} for {name}: greedy samples would all be the same; add --temperature 0.6")
        if Path(name).resolve() == args.output.with_suffix(".jsonl").resolve():
            rl.fail(f"--output {args.output}: the responses would go into {name}; name another")
    return args

def main(argv=None) -> None:
    args = parse_args(argv)
    if args.compare:
        return compare(*args.compare, args.by or "subject", "correct_lenient" if args.lenient else "correct")
    benchmarks = load_benchmarks(args.benchmarks, args.data_dir, args.limit)
    rl.make_tiny_base(args.model)  # before its folder is there
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.run:
        return curve(args, benchmarks)
    result = evaluate_to_file(args.model, args.output, benchmarks, args)
    print_table(result, args.by, args.lenient)
    print(f"\n{result['tokens_per_second']:,.0f} tokens a second; written to {args.output} and .jsonl")

if __name__ == "__main__":
    rl.as_a_command(main)
