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
import os
import re
import time
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
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

def problem_and_answer(row) -> dict:
    """A row of any of the six -> {"problem", "answer", ...}; KeyError, TypeError, IndexError: it has none.

    The gold is `answer`, else the first `final_answer` (OlympiadBench) or the solution's last box (Minerva).
    """
    answer = row.get("answer")
    if answer is None:
        final = row.get("final_answer")
        answer = final[0] if isinstance(final, list) else final or rl.extract_boxed(row["solution"])
    problem = row.get("question") or row["problem"]
    if not problem.strip() or not isinstance(answer, str | int | float):
        raise TypeError("nothing to solve, or nothing to compare with")
    context = f"{row['context']}\n" if row.get("context") else ""
    extra = {key: str(row[key]) for key in ("subject", "level") if key in row}
    return {"problem": context + problem, "answer": str(answer), **extra}

def load_benchmark(name, data_dir=None) -> list:
    """Rows {"problem", "answer", ...}: of DIR/NAME.jsonl, of a .jsonl file, or from the hub."""
    source = BENCHMARKS[name][0] if name in BENCHMARKS else name
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
            rl.fail(f"{name}: {source} could not be loaded ({type(error).__name__}); without the hub name a "
                    f"file, DIR/{name}.jsonl")
    benchmark = []
    for number, row in rows.items():
        try:
            benchmark.append(problem_and_answer(row))
        except (AttributeError, KeyError, TypeError, IndexError):
            rl.fail(f'{source}, line {number}: it needs "problem" and "answer"')
    # a whole solution, or a list as Python writes it: some sets have these for an answer
    odd = [row["answer"] for row in benchmark
           if not row["answer"].strip() or re.search(r"####|^\[['\"]|.{401}", row["answer"], re.DOTALL)]
    if odd:
        print(f"{name}: {len(odd)} of {len(benchmark)} answers can hardly be met, such as {odd[0][:40]!r}; "
              "write nothing but the final answer into the file")
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
    may be cut short; values may differ by a relative 1e-4, and numbers by a factor of 100 (percent).
    """
    _, box, after = response.rpartition("\\boxed")
    phrase = next((p for p in ("he answer is", "final answer is") if p in response), None)
    if box:
        given = rl.extract_boxed(box + after) or after.lstrip(" {").split("$")[0]
    elif phrase:
        given = response.rpartition(phrase)[2].strip(" :\n").rstrip(".")
    else:
        given = (re.findall(r"-?[0-9]*\.?[0-9]+", response.replace(",", "")) or [""])[-1]
    gold = rl.extract_boxed(answer) or answer
    try:
        number, gold_number = (float(text.replace(",", "").strip(" $%\\")) for text in (given, gold))
        return any(math.isclose(number, gold_number * scale, rel_tol=1e-4) for scale in (1, 100, 0.01))
    except ValueError:
        return bool(given.strip()) and rl.equivalent(given.strip(), gold.strip(), 1e-4, any_order=False)

def tasks_left(tokenizer, benchmarks, done, context, k, temperature, max_response_tokens, seed):
    """Yield (row, prompt, limit in tokens, temperature, noise) of each response that has no row in `done`."""
    made = {(row["benchmark"], row["number"], row["sample"]) for row in done}
    for name in reversed(benchmarks):  # MATH500's short responses last: they fill slots that come free
        samples, its_temperature = protocol(name, k, temperature)
        for number, problem in enumerate(benchmarks[name]):
            prompt = rl.encode_prompt(tokenizer, problem["problem"], rl.EVAL_SYSTEM)
            limit = min(max_response_tokens, context - len(prompt))
            for sample in range(samples):
                if (name, number, sample) not in made:
                    row = {"benchmark": name, "number": number, "sample": sample,
                           "temperature": its_temperature, **problem}
                    # of its own: neither --slots nor a stop on the way changes a response
                    draw = np.random.default_rng([seed, zlib.crc32(name.encode()), number, sample])
                    yield row, prompt, limit, its_temperature, draw.random(max_response_tokens)

def sample_and_check(model, tokenizer, benchmarks, *, k=None, temperature=None, max_response_tokens=3072,
                     slots=None, seed=0, cuda_graph=True, responses_path=None) -> tuple:
    """Sample and check all responses that responses_path does not hold -> all rows, tokens a second.

    benchmarks: {name: problems}. k and temperature None: the benchmark's own. A problem too long for the
    model's context is not sampled: it counts as wrong, and is marked too_long.
    """
    stop_ids = rl.find_stop_ids(tokenizer, model.generation_config)
    rows = rl.keep_rows(responses_path) if responses_path else []
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    tasks = list(tasks_left(tokenizer, benchmarks, rows, context, k, temperature, max_response_tokens, seed))
    too_long = [(row, []) for row, _, limit, *_ in tasks if limit < 1]
    tasks = [task for task in tasks if task[2] > 0]
    waiting, prompts, limits, temperatures, noise = zip(*tasks) if tasks else 5 * ([],)
    rl.check_prompts(model, prompts, limits)
    sampled, started = 0, time.perf_counter()
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

REFLECTION = re.compile(r"rethink|recheck|recalculate", re.IGNORECASE)  # the paper's words, Sec. 3.2.4

def pass_at_k(n, right, k) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one (Chen et al., 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)

def standard_error(scores) -> float:
    """Standard error of the mean over problems; None for a single one."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None

def parts_of(rows, name, key="benchmark") -> dict:
    """Rows of a benchmark -> {its name: its rows}, or by a key {subject: its rows}; {} without that key."""
    parts = defaultdict(list)
    for row in rows:
        if row["benchmark"] == name and key in row:
            parts[row[key]].append(row)
    return dict(sorted(parts.items()))

def problem_of(row) -> tuple:
    return row["benchmark"], row["number"], row["problem"]

def by_problem(rows, verdict="correct") -> dict:
    """Checked responses -> {problem: [whether each sample is right]}."""
    samples = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["number"], row["sample"])):
        samples[problem_of(row)].append(row[verdict])
    return samples

def accuracy(rows, verdict) -> dict:
    """avg@k, its standard error, and pass@k for all k samples and for fewer."""
    right = list(by_problem(rows, verdict).values())
    k, means = len(right[0]), [np.mean(samples) for samples in right]
    pass_at = {size: float(np.mean([pass_at_k(k, sum(samples), size) for samples in right]))
               for size in (*(1, 2, 4, 8, 16, 32, 64), k) if size <= k}
    return {"avg_at_k": float(np.mean(means)), "stderr": standard_error(means), "pass_at_k": pass_at[k],
            "pass_at": pass_at}

def measure(rows) -> dict:
    """Checked responses to the problems of one benchmark, or of one subject of it -> its measures."""
    n, texts = len(by_problem(rows)), [row["text"] for row in rows]
    shares = {"boxed": map(rl.has_box, texts), "truncated": (row["truncated"] for row in rows),
              "mean_length": (row["tokens"] for row in rows), "code": ("```python" in text for text in texts),
              # the released evaluation would run the code of these, and let the model go on
              "would_run": ("boxed" not in text and text.rstrip().endswith("```") for text in texts),
              "self_reflection": (bool(REFLECTION.search(text)) for text in texts)}
    return {"n": n, "k": len(rows) // n, "temperature": rows[0]["temperature"], **accuracy(rows, "correct"),
            "lenient": accuracy(rows, "correct_lenient"),
            "too_long": sum(row["too_long"] for row in rows if row["sample"] == 0),
            **{name: float(np.mean(list(values))) for name, values in shares.items()}}

def measure_all(rows, names) -> dict:
    """Checked responses -> {"benchmarks": {name: measures}, "average": mean of avg@k, ...}."""
    benchmarks = {name: measure(parts_of(rows, name)[name]) for name in names}
    for name, key in itertools.product(names, ("subject", "level")):
        parts = {value: measure(part) for value, part in parts_of(rows, name, key).items()}
        benchmarks[name] |= {f"by_{key}": parts} if parts else {}
    return {"benchmarks": benchmarks,
            "average": float(np.mean([m["avg_at_k"] for m in benchmarks.values()])),
            "average_lenient": float(np.mean([m["lenient"]["avg_at_k"] for m in benchmarks.values()]))}

def scores_of(result, lenient=False) -> dict:
    """What measure_all gives, in short -> {"average": mean of avg@k, benchmark: its avg@k, ...}."""
    return {"average": result["average_lenient" if lenient else "average"],
            **{key: (m["lenient"] if lenient else m)["avg_at_k"] for key, m in result["benchmarks"].items()}}


# -- 4. Tables ---------------------------------------------------------------------------

def print_table(result, by=None, lenient=False) -> None:
    print(f"\n{'lenient' if lenient else 'benchmark':<24}{'n':>5}{'k':>4}{'T':>6}{'avg@k':>8}{'+-':>6}"
          f"{'pass@k':>8}{'boxed':>7}{'trunc':>7}{'code':>6}{'tokens':>8}{'reflect':>9}")
    errors = []
    for benchmark, measures in result["benchmarks"].items():
        for name, m in {benchmark: measures, **measures.get(f"by_{by}", {})}.items():
            of_verdict = m["lenient"] if lenient else m
            error = of_verdict["stderr"] or 0
            errors += [error] if m is measures else []
            print(f"{name[:23] if m is measures else '  ' + name:<24}{m['n']:>5}{m['k']:>4}"
                  f"{m['temperature']:>6.1f}{100 * of_verdict['avg_at_k']:>8.1f}{100 * error:>6.1f}"
                  f"{100 * of_verdict['pass_at_k']:>8.1f}{100 * m['boxed']:>7.0f}"
                  f"{100 * m['truncated']:>7.0f}{100 * m['code']:>6.0f}{m['mean_length']:>8.0f}"
                  f"{100 * m['self_reflection']:>9.1f}")
    average = result["average_lenient" if lenient else "average"]
    print(f"{'average':<24}{'':>15}{100 * average:>8.1f}{100 * math.hypot(*errors) / len(errors):>6.1f}")
    for name, measures in result["benchmarks"].items():
        if measures["too_long"]:
            print(f"{name}: {measures['too_long']} problems fill the model's context and count as wrong")

def load_evaluation(path) -> tuple:
    """A finished evaluation -> (its JSON, its checked responses)."""
    result = rl.read_json(path, "model", "settings", "benchmarks", "average")
    if result["average"] is None or not path.endswith(".json"):
        rl.fail(f"{path}: not the .json of a finished evaluation")
    return result, list(rl.read_jsonl(f"{path}l").values())

def difference(rows_a, rows_b, verdict) -> dict:
    """B against A on the problems that both answered; stderr is that of the differences, by problem."""
    a, b = by_problem(rows_a, verdict), by_problem(rows_b, verdict)
    both = [problem for problem in a if problem in b]
    a, b = (np.array([np.mean(side[problem]) for problem in both]) for side in (a, b))
    won, lost = ([problem for problem, so in zip(both, which) if so] for which in (b > a, b < a))
    return both and {"n": len(both), "a": a.mean(), "b": b.mean(), "won": won, "lost": lost,
                     "stderr": standard_error(b - a) or 0.0}  # nothing, if they have none in common

def conclusion(d) -> str:
    if len(d["won"]) + len(d["lost"]) < 6:  # five fall to one side by chance in 6% of cases, as coins do
        return "too few problems differ"
    better = "B is better" if d["b"] > d["a"] else "A is better"
    return better if abs(d["b"] - d["a"]) > 2 * d["stderr"] else "within noise"

def compare(path_a, path_b, by, verdict) -> None:
    """Print two evaluations side by side, by benchmark and subject: is a difference more than noise?"""
    (result_a, rows_a), (result_b, rows_b) = load_evaluation(path_a), load_evaluation(path_b)
    print(f"A  {result_a['model']}  ({path_a})\nB  {result_b['model']}  ({path_b})")
    for key, value in result_a["settings"].items():
        if result_b["settings"].get(key) != value:
            print(f"not alike: {key} is {value} in A, {result_b['settings'].get(key)} in B")
    lines = []  # (name, difference) of each benchmark and, indented, of each subject
    for name, key in itertools.product(result_a["benchmarks"], ("benchmark", by)):
        a, b = (parts_of(rows, name, key) for rows in (rows_a, rows_b))
        indent = "  " * (key == by)
        lines += [(f"{indent}{part}", difference(a[part], b.get(part, []), verdict)) for part in a]
    lines = [(name, d) for name, d in lines if d]  # of problems that both answered
    whole = [d for name, d in lines if not name.startswith("  ")]
    if not whole:
        rl.fail(f"{path_a} and {path_b} have no problem in common")
    average = {**{key: np.mean([d[key] for d in whole]) for key in ("a", "b")},
               **{key: sum((d[key] for d in whole), []) for key in ("won", "lost")},
               "n": sum(d["n"] for d in whole),
               "stderr": math.hypot(*(d["stderr"] for d in whole)) / len(whole)}
    print(f"\n{'benchmark':<24}{'n':>5}{'A':>8}{'B':>8}{'B - A':>8}{'+-':>6}{'won':>6}{'lost':>6}")
    for name, d in [*lines, ("average", average)]:
        print(f"{name[:23]:<24}{d['n']:>5}{100 * d['a']:>8.1f}{100 * d['b']:>8.1f}"
              f"{100 * (d['b'] - d['a']):>+8.1f}{100 * d['stderr']:>6.1f}{len(d['won']):>6}"
              f"{len(d['lost']):>6}  {conclusion(d)}")
    print("\nwon, lost: problems that B solves more, or less, often than A. +-: standard error of B - A,\n"
          "paired by problem. Better: by more than two of these; chance alone is in one line of twenty.\n")
    # how much of it is format? of what was won, how much was boxed, and came to its end, before
    for word, (side, rows) in itertools.product(("won", "lost"), (("A", rows_a), ("B", rows_b))):
        if rows := [row for row in rows if problem_of(row) in average[word]]:
            boxed = np.mean([rl.has_box(row["text"]) for row in rows])
            ended = np.mean([not row["truncated"] for row in rows])
            print(f"{word}, responses of {side}: {boxed:.0%} boxed, {ended:.0%} came to their end")


# -- 5. Files ----------------------------------------------------------------------------

def crc_of_weights(model_name) -> int:
    """Of the last 16 MB of each file of weights in a model's folder: to notice others under its name."""
    crc = 0
    for path in sorted([*Path(model_name).glob("*.safetensors"), *Path(model_name).glob("*.bin")]):
        with open(path, "rb") as file:
            file.seek(-min(2**24, path.stat().st_size), os.SEEK_END)
            crc = zlib.crc32(file.read(), crc)
    return crc

def evaluate_to_file(model_name, output, benchmarks, settings, args) -> dict:
    """An evaluation with its files: OUTPUT.json, which is there from the start, and OUTPUT.jsonl.

    One that was stopped goes on, but only with the same model, weights and settings.
    """
    rl.make_tiny_base(model_name)
    header = {"model": model_name, "weights_crc32": crc_of_weights(model_name), "settings": settings}
    if output.exists():
        result = rl.read_json(output, *header, "benchmarks", "average")
        before, now = ({**row, **row["settings"], "settings": ""} for row in (result, header))
        for key in now:
            if before.get(key) != now[key]:
                rl.fail(f"{output} holds an evaluation with {key} {before.get(key)}, not {now[key]}; name "
                        "another --output")
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
        print(f"first prompt:\n{rl.describe_prompt(tokenizer, first, stop_ids)}", flush=True)
    rl.write_json(output, {**header, "benchmarks": {}, "average": None})
    options = {key: settings[key] for key in ("k", "temperature", "max_response_tokens", "seed")}
    rows, speed = sample_and_check(model, tokenizer, benchmarks, **options, slots=args.slots,
                                   cuda_graph=args.cuda_graph, responses_path=output.with_suffix(".jsonl"))
    result = {**header, **measure_all(rows, benchmarks), "tokens_per_second": speed}
    rl.write_json(output, result)
    return result

def curve(run, base, output, evaluate_step, lenient) -> None:
    """Evaluate the base model and each saved step of a run -> a row a step: reward beside test accuracy."""
    if output.exists() and not all("average" in row for row in rl.read_jsonl(output).values()):
        rl.fail(f"--output {output}: it holds something else than a curve; name another")
    output.parent.mkdir(parents=True, exist_ok=True)
    rewards = {row["step"]: row["reward"] for row in rl.read_log(run / "metrics.jsonl") if "reward" in row}
    name = "eval.json" if output == run / "curve.jsonl" else f"{output.stem}.json"
    models, rows = {0: (base, run / f"base-{name}")}, []
    for folder in sorted(run.glob("step-" + 6 * "[0-9]")):
        models[int(folder.name[5:])] = str(folder), folder / name
    for step, (model_name, step_output) in models.items():
        result = evaluate_step(model_name, step_output)
        # of the step's own rollouts, the last before its weights; the first are the base model's own
        rows.append({"step": step, "reward": rewards.get(max(step, 1)), **scores_of(result, lenient)})
        with rl.atomically(output) as temporary:
            rl.append_rows(temporary, rows, mode="w")
        print(f"step {step}/{max(models)}", *(f" {key} {value:.3f}" for key, value in rows[-1].items()
                                              if key != "step" and value is not None), flush=True)
    print(f"\nwritten to {output}")

@dataclass
class Flags:
    """Everything that can be said on the command line; --help shows the comments."""
    # what: a model, all steps of a run, or two evaluations
    model: str = ""                     # Hugging Face id or model folder; by default the preset's
    run: Path = None                    # a run of one_shot_rlvr.py: base model and all steps, a curve
    compare: tuple = ()                 # A.json B.json: print two evaluations side by side
    preset: Literal["paper", "tiny"] = None     # model and benchmarks; by default those of --run, or paper
    output: Path = None                 # the .json of the result, a .jsonl of all responses beside it
    # benchmarks and samples
    benchmarks: tuple = ()              # names, or .jsonl files; by default the preset's six
    data_dir: str = ""                  # read DIR/NAME.jsonl instead of the hub
    limit: int = None                   # only the first so many problems of each benchmark
    k: int = None                       # samples a problem; by default the benchmark's
    temperature: float = None           # 0 is greedy; by default the benchmark's
    max_response_tokens: int = None     # longest response; by default the preset's
    seed: int = 0                       # seed of the samples
    # speed, and what is shown
    slots: int = rl.Config.slots        # responses that run at the same time
    cuda_graph: bool = True             # launch a decode step's kernels in one go; nothing on a CPU
    compile: bool = False               # fuse the small kernels of each layer: faster on a GPU
    by: Literal["subject", "level"] = None      # show MATH500 by subject (paper, Table 3) or by level
    lenient: bool = False               # show the verdicts of the paper's laxer evaluation

def parse_args(argv=None) -> Flags:
    """The command line; everything in it is checked before a model or a benchmark is loaded."""
    parser = rl.make_parser(__doc__)
    rl.add_flags(parser, Flags)
    args = Flags(**vars(parser.parse_args(rl.words_of(argv))))
    rl.check_numbers(asdict(args), {"seed": 0, "temperature": 0})
    if bool(args.model) + bool(args.run) + bool(args.compare) > 1 or len(args.compare) not in (0, 2):
        rl.fail("use one of --model, --run, and --compare with two files")
    saved = rl.read_json(args.run / "config.json", "preset", "model") if args.run else {}
    tiny = (args.preset or saved.get("preset")) == "tiny"
    default = rl.Config(**rl.PRESETS["tiny" if tiny else "paper"])
    args.model = args.model or saved.get("model") or default.model
    args.max_response_tokens = args.max_response_tokens or default.max_response_tokens
    args.benchmarks = args.benchmarks or list(TINY if tiny else PAPER)
    is_folder = Path(args.model).is_dir() or args.model == rl.TINY_BASE
    if not args.output:
        file = Path(args.model, "eval.json") if is_folder else Path(f"runs/eval-{Path(args.model).name}.json")
        args.output = args.run / "curve.jsonl" if args.run else file
    if args.model.count("/") > 1 and not is_folder:
        rl.fail(f"--model {args.model}: there is no such folder")  # an id on the hub has one slash at most
    if args.output.suffix != (".jsonl" if args.run else ".json"):
        rl.fail(f"--output {args.output}: its name must end in {'.jsonl' if args.run else '.json'}")
    for name in args.benchmarks:
        k, temperature = protocol(Path(name).stem, args.k, args.temperature)
        if k > 1 and temperature == 0:
            rl.fail(f"--k {k} for {name}: greedy, all its samples would be the same; add --temperature 0.6")
        if Path(name).resolve() == args.output.with_suffix(".jsonl").resolve():
            rl.fail(f"--output {args.output}: the responses would go into {name}; name another")
    return args

def main(argv=None) -> None:
    args = parse_args(argv)
    if args.compare:
        return compare(*args.compare, args.by or "subject", "correct_lenient" if args.lenient else "correct")
    benchmarks = load_benchmarks(args.benchmarks, args.data_dir, args.limit)
    settings = {"benchmarks": list(benchmarks), "limit": args.limit, "k": args.k, "seed": args.seed,
                "temperature": args.temperature, "max_response_tokens": args.max_response_tokens,
                "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
                "problems_crc32": zlib.crc32(json.dumps(benchmarks).encode())}

    def run_one(model_name, output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(output.with_suffix(".lock"), timeout=0):  # two writers would mix their responses
            return evaluate_to_file(model_name, output, benchmarks, settings, args)
    if args.run:
        return curve(args.run, args.model, args.output, run_one, args.lenient)
    result = run_one(args.model, args.output)
    print_table(result, args.by, args.lenient)
    print(f"\n{result['tokens_per_second']:,.0f} tokens a second; written to {args.output} and .jsonl")

if __name__ == "__main__":
    rl.as_a_command(main)
