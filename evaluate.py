"""Evaluate a model on the paper's six benchmarks, on the tiny world's six, or on problems of your own.

    python evaluate.py --model Qwen/Qwen2.5-Math-1.5B                        # the six of the paper's Table 8
    python evaluate.py --model runs/pi1-Qwen2.5-Math-1.5B/step-001540        # after one-shot training
    python evaluate.py --run runs/pi1-Qwen2.5-Math-1.5B                      # every saved step: a curve
    python evaluate.py --compare before.json after.json                      # is the difference more than noise?
    python evaluate.py --preset tiny                                         # the tiny world's six, on a laptop
    python evaluate.py --model DIR --benchmarks my.jsonl --limit 20          # rows of {"problem", "answer"}

The protocol is the paper's: greedy for MATH500, Minerva and OlympiadBench; for the small AIME and AMC sets the mean
over 8 samples at temperature 0.6 (avg@8, which the released code calls pass@8); 3,072 new tokens; the system message of
Qwen2.5-Math where the chat template has a system role; the plain mean of the six as the average. Sampling and checking
are the trainer's own. Base and trained model are run in one precision: in the paper it moves the base by 3.6 points.

    1. Benchmarks   load the problems, from the hub or from files
    2. Samples      k responses to each problem, checked as in training, each appended to a .jsonl as it ends
    3. Measures     avg@k, pass@k, share boxed and cut short, length, self-reflection
    4. Tables       of one evaluation, or of two side by side
    5. Files        one evaluation, which can be stopped and goes on, or a curve of all steps of a run

How to read the table: avg@k is the share of right answers, over problems and k samples of each; the figure behind +- is
its standard error over problems; pass@k is the share of problems that at least one of k samples solves. Two models
answer the same problems, so compare them by --compare, whose standard error is that of the difference.

The same seed gives the same responses, whatever the number of slots and whether or not the evaluation was interrupted:
the noise behind a response is drawn from (seed, benchmark, problem, sample), and a row of the batch never looks at
another. This holds up to rounding: a matrix product of another size may round its last bit differently (in bf16 on a
GPU it often does), and where two tokens are that close the response goes another way.
"""
import argparse
import functools
import json
import math
import operator
import os
import re
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from labs import tiny
from one_shot_rlvr import (EVAL_SYSTEM, TINY_BASE, Config, append_rows, as_a_command, atomically, check_window, claim,
                           describe_prompt, encode_prompt, equivalent, extract_boxed, fail, find_stop_ids,
                           generate_each, has_box, is_correct, keep_rows, load_model, make_folder, make_parser,
                           make_tiny_base, read_json, read_jsonl, read_log, write_json)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Benchmarks
# ----------------------------------------------------------------------------------------------------------------------

class Benchmark(NamedTuple):
    """Where a benchmark lies on the hub, and how the paper samples it: k responses a problem at a temperature."""
    source: str
    split: str
    fields: str         # of a row, for the reader: problem_and_answer finds them
    k: int = 1
    temperature: float = 0.0


BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem, answer, subject, level"),
    "aime24": Benchmark("math-ai/aime24", "test", "problem, solution", 8, 0.6),
    "amc23": Benchmark("math-ai/amc23", "test", "question, answer", 8, 0.6),
    "minerva_math": Benchmark("math-ai/minervamath", "test", "question, answer"),
    "olympiadbench": Benchmark("math-ai/olympiadbench", "test", "context, question, final_answer"),
    "aime25": Benchmark("math-ai/aime25", "test", "problem, answer", 8, 0.6),
}


def problem_and_answer(row) -> dict:
    """One row of any of the six, from the hub or the paper's files, as {"problem", "answer", ...}.

    What is asked is `question` where there is one, after its context if it has one. The gold answer is `answer`; where
    there is none, the first of OlympiadBench's `final_answer`, or the last box of the solution (Minerva, AIME24).
    Raises KeyError, TypeError or IndexError where a row has no problem or no answer.
    """
    context = f"{row['context']}\n" if row.get("context") else ""
    answer = row["answer"] if "answer" in row else row["final_answer"][0] if isinstance(row.get("final_answer"), list) \
        else extract_boxed(row["solution"])
    if not isinstance(answer, str | int | float):
        raise TypeError("no answer to compare with")
    extra = {key: str(row[key]) for key in ("subject", "level") if key in row}
    return {"problem": context + (row.get("question") or row["problem"]), "answer": str(answer), **extra}


def load_benchmark(name, data_dir=None) -> list:
    """Rows {"problem", "answer", ...}: of DIR/NAME.jsonl, of a .jsonl file, of the tiny world, or from the hub."""
    path = Path(data_dir, f"{name}.jsonl") if data_dir and not name.endswith(".jsonl") else Path(name)
    if path.suffix == ".jsonl":
        rows = read_jsonl(path)
    elif name in tiny.BENCHMARKS:
        rows = dict(enumerate(tiny.load_benchmark(name), 1))
    elif name in BENCHMARKS:
        from datasets import load_dataset       # here, because it takes a second, and a local file needs none of it
        source = BENCHMARKS[name]
        try:
            rows = dict(enumerate(load_dataset(source.source, split=source.split), 1))
        except Exception as error:              # the hub's client raises a dozen kinds when the network is away
            fail(f"{name}: {source.source} could not be loaded ({type(error).__name__}); --data-dir DIR reads files in "
                 f"its place: {', '.join(f'DIR/{other}.jsonl' for other in BENCHMARKS)}")
    else:
        fail(f"{name}: no such benchmark; there are {', '.join([*BENCHMARKS, *tiny.BENCHMARKS])}, or a .jsonl file")
    benchmark = []
    for number, row in rows.items():
        try:
            benchmark.append(problem_and_answer(row))
        except (AttributeError, KeyError, TypeError, IndexError):
            fail(f'{path if path.suffix else name}, line {number}: it needs "problem" and "answer"')
    return benchmark or fail(f"{name}: no problems in it")


def load_benchmarks(names, data_dir=None, limit=None) -> dict:
    """{name: its first `limit` problems}; a .jsonl file goes by its name without folder and ending."""
    benchmarks = {}
    for name in names:
        if Path(name).stem in benchmarks:
            fail(f"{name}: there are two benchmarks {Path(name).stem}; rename one of the files")
        benchmarks[Path(name).stem] = load_benchmark(name, data_dir)[:limit]
    return benchmarks


def protocol(name, k=None, temperature=None) -> tuple:
    """k and temperature of a benchmark: those given, else the paper's or the tiny world's, else one greedy response."""
    paper = BENCHMARKS.get(name)
    own_k, own_T = (paper.k, paper.temperature) if paper else tiny.PROTOCOL if name in tiny.BENCHMARKS else (1, 0.0)
    temperature = own_T if temperature is None else temperature
    return k or (own_k if temperature else 1), temperature


# ----------------------------------------------------------------------------------------------------------------------
# 2. Samples
# ----------------------------------------------------------------------------------------------------------------------

def is_correct_lenient(response, answer) -> bool:
    r"""The judgement of the paper's evaluation, in short: laxer than the reward, and than is_correct, in three points.

    Without a box the text after "he answer is" or "final answer is" counts, else the last number; a box may be cut
    short; values may differ by a relative 1e-4, and numbers by a factor of 100 (percent). It is not that grader to the
    letter: theirs runs a computer algebra system and strips more units, ours reads 4.5 \times 10^{33} as 4.5e33.
    """
    _, box, after = response.rpartition("\\boxed")
    phrase = next((p for p in ("he answer is", "final answer is") if p in response), None)
    if box:
        given = extract_boxed(box + after) or after.lstrip(" {").split("$")[0]
    elif phrase:
        given = response.rpartition(phrase)[2].strip(" :\n").rstrip(".")
    else:
        given = (re.findall(r"-?[0-9]*\.?[0-9]+", response.replace(",", "")) or [""])[-1]
    gold = extract_boxed(answer) or answer
    try:
        number, gold_number = (float(text.replace(",", "").strip(" $%\\")) for text in (given, gold))
        return any(math.isclose(number, gold_number * scale, rel_tol=1e-4) for scale in (1, 100, 0.01))
    except ValueError:
        return bool(given.strip()) and equivalent(given.strip(), gold.strip(), rel_tol=1e-4)


def tasks_left(model, tokenizer, benchmarks, done, k, temperature, max_response_tokens, seed):
    """Yield (row, prompt, limit in tokens, temperature, noise) of each response that has no row in `done`.

    From the last benchmark to the first: MATH500, whose responses are the shortest, then fills the slots that come
    free while the last long ones of the hard benchmarks are still running.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    made = {(row["benchmark"], row["number"], row["sample"]) for row in done}
    for name in reversed(benchmarks):
        n_samples, its_temperature = protocol(name, k, temperature)
        for number, problem in enumerate(benchmarks[name]):
            prompt = encode_prompt(tokenizer, problem["problem"], EVAL_SYSTEM)
            for sample in range(n_samples):
                if (name, number, sample) not in made:
                    row = {"benchmark": name, "number": number, "sample": sample, "temperature": its_temperature,
                           **problem}
                    draw = np.random.default_rng([seed, zlib.crc32(name.encode()), number, sample])
                    noise = draw.random(max_response_tokens) if its_temperature else np.zeros(max_response_tokens)
                    yield row, prompt, min(max_response_tokens, context - len(prompt)), its_temperature, noise


def sample_and_check(model, tokenizer, benchmarks, *, k=None, temperature=None, max_response_tokens=3072, slots=None,
                     seed=0, cuda_graph=True, responses_path=None) -> tuple:
    """Sample and check all responses to {name: problems} that responses_path does not hold -> all rows, tokens/second.

    k and temperature None: the benchmark's own, as the paper has them. All benchmarks feed one queue, so that nothing
    waits for the longest response of each. A problem too long for the model's context is not sampled: it counts as
    wrong, and is marked too_long.
    """
    stop_ids = find_stop_ids(tokenizer, model.generation_config)
    rows = keep_rows(responses_path) if responses_path else []
    tasks = list(tasks_left(model, tokenizer, benchmarks, rows, k, temperature, max_response_tokens, seed))
    check_window(model, max((len(prompt) + limit for _, prompt, limit, *_ in tasks), default=0))
    progress = tqdm(total=len(rows) + len(tasks), initial=len(rows), desc="responses", disable=None, leave=False,
                    miniters=0)

    def record(row, response):
        text = tokenizer.decode(response, skip_special_tokens=True)
        rows.append({**row, "text": text, "extracted": extract_boxed(text), "correct": is_correct(text, row["answer"]),
                     "correct_lenient": is_correct_lenient(text, row["answer"]), "tokens": len(response),
                     "truncated": bool(response) and response[-1] not in stop_ids, "too_long": not response})
        if responses_path:
            append_rows(responses_path, rows[-1:])

    for row, _, limit, *_ in tasks:
        if limit < 1:
            record(row, [])
            progress.update()
    tasks = [task for task in tasks if task[2] > 0]
    waiting, prompts, limits, temperatures, noise = zip(*tasks) if tasks else 5 * ([],)
    sampled, start = 0, time.perf_counter()
    for running, ended in generate_each(model, prompts, limits, temperatures, torch.tensor(np.array(noise)), stop_ids,
                                        slots, cuda_graph and model.device.type == "cuda"):
        for i, response, _ in ended:
            record(waiting[i], response)
        sampled += running
        right = f"{np.mean([row['correct'] for row in rows]):.1%} right, " if rows else ""
        progress.set_postfix_str(f"{right}{sampled:,} tokens, {running} rows running", refresh=False)
        progress.update(len(ended))
    progress.close()
    return rows, sampled / (time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Measures
# ----------------------------------------------------------------------------------------------------------------------

REFLECTION = re.compile(r"rethink|recheck|recalculate", re.IGNORECASE)         # the paper's three words, Sec. 3.2.4


def pass_at_k(n, right, k) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the `right` ones (Chen et al., 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def standard_error(scores) -> float:
    """Standard error of the mean over problems; None for a single one."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def group_by(rows, *keys) -> dict:
    """{the value(s) of the keys: rows}, sorted; rows without one of the keys are left out."""
    groups, value = {}, operator.itemgetter(*keys)
    for row in rows:
        if all(key in row for key in keys):
            groups.setdefault(value(row), []).append(row)
    return {value: groups[value] for value in sorted(groups, key=str)}


def by_problem(rows, verdict="correct") -> dict:
    """Checked responses -> {problem: [whether each sample is right]}; verdict: "correct" or "correct_lenient"."""
    return {problem: [row[verdict] for row in samples]
            for problem, samples in group_by(rows, "number", "problem").items()}


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
    share = lambda values: float(np.mean(list(values)))
    n = len(by_problem(rows))
    return {"n": n, "k": len(rows) // n, "temperature": rows[0]["temperature"], **accuracy(rows, "correct"),
            "lenient": accuracy(rows, "correct_lenient"),
            "boxed": share(has_box(row["text"]) for row in rows),
            "truncated": share(row["truncated"] for row in rows),
            "too_long": sum(row["too_long"] for row in rows if row["sample"] == 0),
            "mean_length": share(row["tokens"] for row in rows),
            "self_reflection": share(bool(REFLECTION.search(row["text"])) for row in rows)}


def measure_all(rows, names) -> dict:
    """Checked responses -> {"benchmarks": {name: measures}, "average": mean of avg@k over benchmarks, ...}.

    A benchmark whose problems have a subject or a level (MATH500) also has its measures by_subject and by_level.
    """
    of_name, benchmarks = group_by(rows, "benchmark"), {}
    for name in names:
        benchmarks[name] = measure(of_name[name])
        for key in ("subject", "level"):
            if groups := group_by(of_name[name], key):
                benchmarks[name][f"by_{key}"] = {str(value): measure(rows) for value, rows in groups.items()}
    return {"benchmarks": benchmarks, "average": float(np.mean([m["avg_at_k"] for m in benchmarks.values()])),
            "average_lenient": float(np.mean([m["lenient"]["avg_at_k"] for m in benchmarks.values()]))}


def evaluate(model, tokenizer, benchmarks, **options) -> dict:
    """Sample, check and measure {name: problems} in this process, without files; options: those of sample_and_check."""
    rows, _ = sample_and_check(model, tokenizer, benchmarks, **options)
    return measure_all(rows, benchmarks)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tables
# ----------------------------------------------------------------------------------------------------------------------

def print_table(result, by=None) -> None:
    print(f"\n{'benchmark':<24}{'n':>5}{'k':>4}{'T':>6}{'avg@k':>8}{'+-':>6}{'pass@k':>8}{'boxed':>7}{'trunc':>7}"
          f"{'tokens':>8}{'reflect':>9}")
    for benchmark, measures in result["benchmarks"].items():
        for name, m in {benchmark: measures, **measures.get(f"by_{by}", {})}.items():
            name = name if m is measures else f"  {name}"
            print(f"{name[:23]:<24}{m['n']:>5}{m['k']:>4}{m['temperature']:>6.1f}{100 * m['avg_at_k']:>8.1f}"
                  f"{100 * (m['stderr'] or 0):>6.1f}{100 * m['pass_at_k']:>8.1f}{100 * m['boxed']:>7.0f}"
                  f"{100 * m['truncated']:>7.0f}{m['mean_length']:>8.0f}{100 * m['self_reflection']:>9.1f}")
    error = math.hypot(*(m["stderr"] or 0 for m in result["benchmarks"].values())) / len(result["benchmarks"])
    print(f"{'average':<24}{'':>15}{100 * result['average']:>8.1f}{100 * error:>6.1f}")
    for name, measures in result["benchmarks"].items():
        if measures["too_long"]:
            print(f"{name}: {measures['too_long']} problems fill the model's context and count as wrong")


def load_evaluation(path) -> tuple:
    """A finished evaluation -> (its JSON, its checked responses)."""
    result = read_json(path, "model", "settings", "benchmarks", "average")
    if result["average"] is None or path.suffix != ".json":
        fail(f"{path}: not the .json of a finished evaluation")
    return result, list(read_jsonl(path.with_suffix(".jsonl")).values())


def difference(rows_a, rows_b, verdict="correct") -> dict:
    """B against A on the problems that both answered; stderr is paired: of the differences, problem by problem."""
    a, b = by_problem(rows_a, verdict), by_problem(rows_b, verdict)
    a, b = (np.array([np.mean(side[problem]) for problem in a if problem in b]) for side in (a, b))
    n = len(a)
    return {"n": n, "a": a.sum() / max(n, 1), "b": b.sum() / max(n, 1), "stderr": standard_error(b - a) or 0.0,
            "won": int((b > a).sum()), "lost": int((b < a).sum())}


def conclusion(d) -> str:
    if d["won"] + d["lost"] < 6:                # five problems fall to one side by chance in 6% of cases, as coins do
        return "too few problems differ"
    better = "B is better" if d["b"] > d["a"] else "A is better"
    return better if abs(d["b"] - d["a"]) > 2 * d["stderr"] else "within noise"


def compare(path_a, path_b, by="subject", verdict="correct") -> None:
    """Print two evaluations side by side, by benchmark and by subject, and whether a difference is more than noise."""
    (result_a, rows_a), (result_b, rows_b) = load_evaluation(Path(path_a)), load_evaluation(Path(path_b))
    print(f"A  {result_a['model']}  ({path_a})\nB  {result_b['model']}  ({path_b})")
    for key, value in result_a["settings"].items():
        if result_b["settings"].get(key) != value:
            print(f"not alike: {key} is {value} in A, {result_b['settings'].get(key)} in B")
    lines, whole = [], []
    of_name_a, of_name_b = group_by(rows_a, "benchmark"), group_by(rows_b, "benchmark")
    for name in result_a["benchmarks"]:
        a, b = of_name_a.get(name, []), of_name_b.get(name, [])
        if set(by_problem(a)) & set(by_problem(b)):
            whole.append(difference(a, b, verdict))
            lines.append((name, whole[-1]))
            parts = group_by(b, by)
            lines += [(f"  {part}", difference(rows, parts.get(part, []), verdict))
                      for part, rows in group_by(a, by).items()]
    if not whole:
        fail(f"{path_a} and {path_b} have no problem in common")
    average = {key: np.mean([d[key] for d in whole]) for key in ("a", "b")} | \
        {key: sum(d[key] for d in whole) for key in ("n", "won", "lost")} | \
        {"stderr": math.hypot(*(d["stderr"] for d in whole)) / len(whole)}
    print(f"\n{'benchmark':<24}{'n':>5}{'A':>8}{'B':>8}{'B - A':>8}{'+-':>6}{'won':>6}{'lost':>6}")
    for name, d in [*lines, ("average", average)]:
        if d["n"]:
            print(f"{name[:23]:<24}{d['n']:>5}{100 * d['a']:>8.1f}{100 * d['b']:>8.1f}{100 * (d['b'] - d['a']):>+8.1f}"
                  f"{100 * d['stderr']:>6.1f}{d['won']:>6}{d['lost']:>6}  {conclusion(d)}")
    print("\nwon, lost: problems that B solves more, or less, often than A. +-: standard error of B - A over the\n"
          "problems, paired, because both models answered the same ones. Better: by more than two standard errors,\n"
          "which chance alone does in one line of twenty.")


# ----------------------------------------------------------------------------------------------------------------------
# 5. Files
# ----------------------------------------------------------------------------------------------------------------------

@functools.cache                            # the models of a curve share the prompt
def say_once(text) -> None:
    print(text, flush=True)


def crc_of_weights(model_name) -> int:
    """Of the first and last 16 MB of each file of weights in a model's folder: to notice others under the same name."""
    crc, size = 0, 2**24
    for path in sorted(path for ending in ("safetensors", "bin") for path in Path(model_name).glob(f"*.{ending}")):
        with open(path, "rb") as file:
            crc = zlib.crc32(file.read(size), crc)
            file.seek(-min(size, path.stat().st_size), os.SEEK_END)
            crc = zlib.crc32(file.read(), crc)
    return crc


def refuse_other_evaluation(saved, header, output) -> None:
    """What lies at `output` is gone on with only if model, weights and settings are the same."""
    flat = lambda row: {"model": row["model"], "weights_crc32": row["weights_crc32"], **row["settings"]}
    before = flat(saved)
    for key, value in flat(header).items():
        if before.get(key) != value:
            fail(f"{output} holds an evaluation with {key} {before.get(key)}, not {value}; name another --output")


def as_lenient(result) -> dict:
    """The same with the figures of the lenient verdict in the place of the strict ones."""
    benchmarks = {}
    for name, measures in result["benchmarks"].items():
        groups = {key: {value: {**m, **m["lenient"]} for value, m in measures[key].items()}
                  for key in ("by_subject", "by_level") if key in measures}
        benchmarks[name] = {**measures, **measures["lenient"], **groups}
    return {**result, "benchmarks": benchmarks, "average": result["average_lenient"]}


def evaluate_to_file(model_name, output, benchmarks, settings, slots=None, cuda_graph=True) -> dict:
    """An evaluation with its files, OUTPUT.json and the responses in OUTPUT.jsonl; goes on with one that was stopped.

    The .json is there from the start, without results: it says with which settings the responses are sampled.
    """
    make_tiny_base(model_name)
    header = {"model": model_name, "weights_crc32": crc_of_weights(model_name), "settings": settings}
    responses_path, result = output.with_suffix(".jsonl"), {"average": None}
    if output.exists():
        result = read_json(output, *header, "benchmarks", "average")
        refuse_other_evaluation(result, header, output)
    elif responses_path.exists():
        fail(f"{responses_path} holds responses, but {output} with their settings is gone; name another --output")
    if result["average"] is not None:
        print(f"{output} holds this evaluation already")
        return result
    model, tokenizer = load_model(model_name, getattr(torch, settings["dtype"]))
    first = encode_prompt(tokenizer, next(iter(benchmarks.values()))[0]["problem"], EVAL_SYSTEM)
    say_once(f"first prompt:\n{describe_prompt(tokenizer, first, find_stop_ids(tokenizer, model.generation_config))}")
    make_folder(output.parent, "--output")
    if not output.exists():
        write_json(output, {**header, "benchmarks": {}, "average": None})
    with claim(output):
        options = {key: settings[key] for key in ("k", "temperature", "max_response_tokens", "seed")}
        rows, speed = sample_and_check(model, tokenizer, benchmarks, **options, slots=slots, cuda_graph=cuda_graph,
                                       responses_path=responses_path)
        result = {**header, **measure_all(rows, benchmarks), "tokens_per_second": speed}
        write_json(output, result)
    return result


def curve(run, output, evaluate_step) -> None:
    """Evaluate the base model and each step-* folder of a run -> one row a step: training reward beside test accuracy.

    evaluate_step(model, its .json) -> result. The reward is that of the step's own rollouts, the last ones before its
    weights; at step 0 that of the first ones, which are the base model's own.
    """
    if output.exists() and not all("average" in row for row in read_jsonl(output).values()):
        fail(f"--output {output}: it holds something else than a curve; name another")
    make_folder(output.parent, "--output")
    rewards = {row["step"]: row["reward"] for row in read_log(run / "metrics.jsonl") if "reward" in row}
    name = "eval.json" if output == run / "curve.jsonl" else f"{output.stem}.json"
    models = {int(folder.name[5:]): (str(folder), folder / name) for folder in sorted(run.glob("step-*"))
              if folder.name[5:].isdecimal()}
    models = {0: (read_json(run / "config.json", "model")["model"], run / f"base-{name}"), **models}
    rows = []
    for step, (model_name, step_output) in models.items():
        result = evaluate_step(model_name, step_output)
        rows.append({"step": step, "reward": rewards.get(max(step, 1)), "average": result["average"],
                     **{name: row["avg_at_k"] for name, row in result["benchmarks"].items()}})
        with atomically(output) as temporary:
            append_rows(temporary, rows, mode="w")
        print("  ".join([f"step {step}/{max(models)}", *(f"{key} {value:.3f}" for key, value in rows[-1].items()
                                                          if key != "step" and value is not None)]), flush=True)
    print(f"\nwritten to {output}")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help=f"Hugging Face id or model folder (default: {Config().model})")
    what.add_argument("--run", type=Path, help="a run of one_shot_rlvr.py: base model and all steps, as a curve")
    what.add_argument("--compare", nargs=2, metavar=("A.json", "B.json"), help="print two evaluations side by side")
    parser.add_argument("--preset", choices=["paper", "tiny"], help="default model and benchmarks (default: paper)")
    parser.add_argument("--benchmarks", nargs="+", help="names, or .jsonl files (default: the six)")
    parser.add_argument("--data-dir", help="read DIR/NAME.jsonl instead of the hub")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    parser.add_argument("--k", type=int, help="samples a problem (default: the paper's, 1 or 8)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the paper's, 0 or 0.6)")
    parser.add_argument("--max-response-tokens", type=int, help="longest response (default: 3072)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--slots", type=int, default=Config().slots,
                        help="responses sampled at the same time (default: %(default)s)")
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True,
                        help="launch a decode step's kernels in one go; nothing on a CPU")
    parser.add_argument("--by", choices=["subject", "level"], help="MATH500 by subject (paper, Table 3) or by level")
    parser.add_argument("--lenient", action="store_true", help="show the verdicts of the paper's laxer evaluation; the "
                                                               "files always hold both")
    parser.add_argument("--output", type=Path, help="the result as .json here, every response in a .jsonl beside it "
                        "(default: eval.json in the model folder, else runs/eval-MODEL.json); with --run the curve as "
                        ".jsonl (default: curve.jsonl in the run)")
    args = parser.parse_args(argv)
    for name, lowest in {"limit": 1, "k": 1, "max_response_tokens": 1, "slots": 1, "seed": 0}.items():
        if getattr(args, name) is not None and not lowest <= getattr(args, name) <= 10**9:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: use {lowest} or more, and at most 10^9")
    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        fail(f"--temperature {args.temperature}: use 0 (greedy) or more")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.compare:
        return compare(*args.compare, args.by or "subject", "correct_lenient" if args.lenient else "correct")

    preset = args.preset or (read_json(args.run / "config.json", "preset")["preset"] if args.run else "paper")
    names = args.benchmarks or list(tiny.BENCHMARKS if preset == "tiny" else BENCHMARKS)
    for name in names:
        k, temperature = protocol(Path(name).stem, args.k, args.temperature)
        if k > 1 and temperature == 0:
            fail(f"--k {k} for {name}: greedy, all its samples would be the same; add --temperature 0.6")
    if (args.model or "").count("/") > 1 and not Path(args.model).is_dir():
        fail(f"--model {args.model}: there is no such folder")                  # an id on the hub has one slash at most
    benchmarks = load_benchmarks(names, args.data_dir, args.limit)
    settings = dict(benchmarks=list(benchmarks), limit=args.limit, k=args.k, seed=args.seed,
                    temperature=args.temperature, max_response_tokens=args.max_response_tokens or
                    (tiny.MAX_RESPONSE_TOKENS if preset == "tiny" else Config().max_response_tokens),
                    dtype="bfloat16" if torch.cuda.is_available() else "float32",
                    problems_crc32=zlib.crc32(json.dumps(benchmarks).encode()))
    model_name = args.model or (TINY_BASE if preset == "tiny" else Config().model)
    output = args.output or (args.run / "curve.jsonl" if args.run else Path(model_name, "eval.json")
                             if Path(model_name).is_dir() or model_name == TINY_BASE
                             else Path(f"runs/eval-{Path(model_name).name}.json"))
    if output.suffix != (".jsonl" if args.run else ".json"):
        fail(f"--output {output}: its name must end in {'.jsonl' if args.run else '.json'}")
    responses_path = output.with_suffix(".jsonl")
    if any(Path(name).resolve() == responses_path.resolve() for name in names):
        fail(f"--output {output}: the responses would go into the benchmark {responses_path}; name another")

    def run_one(model_name, output):
        result = evaluate_to_file(model_name, output, benchmarks, settings, args.slots, args.cuda_graph)
        return as_lenient(result) if args.lenient else result                   # the file always holds both
    try:
        if args.run:
            return curve(args.run, output, run_one)
        result = run_one(model_name, output)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit(f"error: out of GPU memory; the same command with --slots below {args.slots} needs less and goes on "
                 "from here")
    print_table(result, args.by)
    print(f"\n{result['tokens_per_second']:,.0f} tokens a second; written to {output}, every response to "
          f"{output.with_suffix('.jsonl')}")


if __name__ == "__main__":
    as_a_command(main)
