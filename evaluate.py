"""Evaluate a model on the paper's six benchmarks, on the tiny world's six, or on problems of your own.

    python evaluate.py --model Qwen/Qwen2.5-Math-1.5B                        # the six of the paper's Table 8
    python evaluate.py --model runs/pi1-Qwen2.5-Math-1.5B/step-001540        # after one-shot training
    python evaluate.py --preset tiny                                         # the tiny world's six, on a laptop
    python evaluate.py --model DIR --benchmarks my.jsonl --limit 20          # rows of {"problem", "answer"}

The protocol is the paper's: greedy for MATH500, Minerva and OlympiadBench; for the small AIME and AMC sets the mean
over 8 samples at temperature 0.6 (avg@8, which the released code calls pass@8); 3,072 new tokens; the system message of
Qwen2.5-Math where the chat template has a system role; the plain mean of the six as the average. Sampling and checking
are the trainer's own. The checker is the trainer's strict one, where the paper's evaluation also takes the last number
of a response without a box.

How to read the table: avg@k is the share of right answers, over problems and k samples of each; the figure behind +- is
its standard error over problems (two models closer than about three of them are not told apart); pass@k is the share of
problems that at least one of k samples solves.
"""
import argparse
import json
import math
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from labs import tiny
from one_shot_rlvr import (EVAL_SYSTEM, TINY_BASE, append_rows, encode_prompt, extract_boxed, fail, find_stop_ids,
                           generate, indented, is_correct, load_model, read_rows, write_json)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Benchmarks
# ----------------------------------------------------------------------------------------------------------------------

class Benchmark(NamedTuple):
    """Where a benchmark lies on the hub, and how the paper samples it: k responses a problem at a temperature."""
    source: str
    split: str
    k: int = 1
    temperature: float = 0.0


BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test"),
    "aime24": Benchmark("math-ai/aime24", "test", 8, 0.6),
    "amc23": Benchmark("math-ai/amc23", "test", 8, 0.6),
    "minerva_math": Benchmark("math-ai/minervamath", "test"),
    "olympiadbench": Benchmark("math-ai/olympiadbench", "test"),
    "aime25": Benchmark("math-ai/aime25", "test", 8, 0.6),
}


def problem_and_answer(row) -> dict:
    """One row of any of the six, from the hub or the paper's files, as {"problem", "answer", ...}.

    The gold answer is `answer`; where there is none, the first of OlympiadBench's `final_answer`, or the box that ends
    the solution (Minerva). What is asked is `question` where there is one, after its context if it has one.
    """
    context = f"{row['context']}\n" if row.get("context") else ""
    answer = row["answer"] if "answer" in row else row["final_answer"][0] if "final_answer" in row \
        else extract_boxed(row["solution"])
    extra = {key: row[key] for key in ("subject", "level") if key in row}
    return {"problem": context + (row.get("question") or row["problem"]), "answer": str(answer), **extra}


def load_benchmark(name, data_dir=None) -> list:
    """Rows {"problem", "answer", ...}: of DIR/NAME.jsonl, of a .jsonl file, of the tiny world, or from the hub."""
    path = Path(data_dir, f"{name}.jsonl") if data_dir and not name.endswith(".jsonl") else Path(name)
    if path.suffix == ".jsonl":
        rows = read_rows(path)
    elif name in tiny.BENCHMARKS:
        rows = tiny.load_benchmark(name)
    elif name in BENCHMARKS:
        from datasets import load_dataset
        source = BENCHMARKS[name]
        try:
            rows = list(load_dataset(source.source, split=source.split))
        except Exception as error:          # the hub's client raises a dozen kinds when the network is away
            fail(f"{name}: {source.source} could not be loaded ({type(error).__name__}); with --data-dir DIR, "
                 f"DIR/{name}.jsonl is read instead")
    else:
        fail(f"{name}: no such benchmark; there are {', '.join([*BENCHMARKS, *tiny.BENCHMARKS])}, or a .jsonl file")
    benchmark = []
    for number, row in enumerate(rows, 1):
        try:
            benchmark.append(problem_and_answer(row))
        except (KeyError, TypeError, IndexError) as error:
            fail(f"{name}, row {number}: no problem and answer ({error!r} is missing)")
    return benchmark or fail(f"{name}: no problems in it")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Sample and check
# ----------------------------------------------------------------------------------------------------------------------

def pass_at_k(n, right, k) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the `right` ones (Chen et al., 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def standard_error(scores) -> float:
    """Standard error of the mean over problems; None for a single one."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def evaluate(model, tokenizer, benchmarks, *, k=None, temperature=None, max_response_tokens=3072, slots=None, seed=0,
             responses_path=None) -> dict:
    """Sample and check {name: rows} -> {"benchmarks": {name: measures}, "average": mean of avg@k over benchmarks}.

    k and temperature None: the benchmark's own, as the paper has them; a set of one's own is sampled greedily.
    responses_path: a .jsonl file to which every response is appended.
    """
    stop_ids = find_stop_ids(tokenizer, model.generation_config)
    results = {}
    for name, rows in benchmarks.items():
        n_samples, T = samples_and_temperature(name, k, temperature)
        prompts = [encode_prompt(tokenizer, row["problem"], EVAL_SYSTEM) for row in rows for _ in range(n_samples)]
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        responses = generate(model, prompts, max_response_tokens=max_response_tokens, temperature=T, stop_ids=stop_ids,
                             slots=slots, generator=generator)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        right = np.array([is_correct(text, rows[i // n_samples]["answer"]) for i, text in enumerate(texts)])
        right = right.reshape(len(rows), n_samples)
        results[name] = {
            "n": len(rows), "k": n_samples, "temperature": T,
            "avg_at_k": float(right.mean()), "stderr": standard_error(right.mean(1)),
            "pass_at_k": float(np.mean([pass_at_k(n_samples, int(c), n_samples) for c in right.sum(1)])),
            "boxed": float(np.mean([extract_boxed(text) is not None for text in texts])),
            "truncated": float(np.mean([response[-1] not in stop_ids for response in responses])),
            "mean_length": float(np.mean([len(response) for response in responses])),
            "self_reflection": float(np.mean([bool(REFLECTION.search(text)) for text in texts])),
        }
        if responses_path:
            append_rows(responses_path, [
                {"benchmark": name, "problem": i // n_samples, "sample": i % n_samples, "text": text,
                 "extracted": extract_boxed(text), "answer": rows[i // n_samples]["answer"],
                 "correct": bool(right.flat[i]), "tokens": len(responses[i])} for i, text in enumerate(texts)])
    return {"benchmarks": results, "average": float(np.mean([row["avg_at_k"] for row in results.values()]))}


REFLECTION = re.compile(r"rethink|recheck|recalculate", re.IGNORECASE)         # the paper's three words, Sec. 3.2.4


def samples_and_temperature(name, k=None, temperature=None) -> tuple:
    """k and temperature of a benchmark: those given, else the paper's or the tiny world's, else one greedy response."""
    own = (BENCHMARKS[name].k, BENCHMARKS[name].temperature) if name in BENCHMARKS else \
        tiny.PROTOCOL if name in tiny.BENCHMARKS else (1, 0.0)
    temperature = own[1] if temperature is None else temperature
    return k or (own[0] if temperature else 1), temperature


# ----------------------------------------------------------------------------------------------------------------------
# 3. The table
# ----------------------------------------------------------------------------------------------------------------------

def print_table(result) -> None:
    print(f"\n{'benchmark':<16}{'n':>5}{'k':>4}{'T':>6}{'avg@k':>8}{'+-':>6}{'pass@k':>8}{'boxed':>7}{'trunc':>7}"
          f"{'tokens':>8}")
    for name, row in result["benchmarks"].items():
        print(f"{name[-16:]:<16}{row['n']:>5}{row['k']:>4}{row['temperature']:>6.1f}{100 * row['avg_at_k']:>8.1f}"
              f"{100 * (row['stderr'] or 0):>6.1f}{100 * row['pass_at_k']:>8.1f}{100 * row['boxed']:>7.0f}"
              f"{100 * row['truncated']:>7.0f}{row['mean_length']:>8.0f}")
    print(f"{'average':<16}{'':>15}{100 * result['average']:>8.1f}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--preset", choices=["paper", "tiny"], default="paper", help="default model and benchmarks")
    parser.add_argument("--model", help="Hugging Face id or model folder (default: Qwen/Qwen2.5-Math-1.5B)")
    parser.add_argument("--benchmarks", nargs="+", help="names, or .jsonl files (default: the six)")
    parser.add_argument("--data-dir", help="read DIR/NAME.jsonl instead of the hub")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    parser.add_argument("--k", type=int, help="samples a problem (default: the paper's, 1 or 8)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the paper's, 0 or 0.6)")
    parser.add_argument("--max-response-tokens", type=int, help="longest response (default: 3072)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--slots", type=int, default=256, help="responses sampled at the same time (default: 256)")
    parser.add_argument("--output", help="the result as JSON here, and every response in a .jsonl beside it "
                                         "(default: eval.json in the model folder, else runs/eval-MODEL.json)")
    args = parser.parse_args(argv)
    for name in ("limit", "k", "max_response_tokens", "slots"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: use 1 or more")
    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        fail(f"--temperature {args.temperature}: use 0 (greedy) or more")
    on_tiny = args.preset == "tiny"
    model_name = args.model or (TINY_BASE if on_tiny else "Qwen/Qwen2.5-Math-1.5B")
    names = args.benchmarks or list(tiny.BENCHMARKS if on_tiny else BENCHMARKS)
    for name in names:
        k, temperature = samples_and_temperature(name, args.k, args.temperature)
        if k > 1 and temperature == 0:
            fail(f"--k {k} for {name}: greedy, all its samples would be the same; add --temperature 0.6")
    output = Path(args.output or (Path(model_name, "eval.json") if Path(model_name).is_dir() or on_tiny
                                  else f"runs/eval-{Path(model_name).name}.json"))
    settings = dict(k=args.k, temperature=args.temperature, seed=args.seed, limit=args.limit, data_dir=args.data_dir,
                    max_response_tokens=args.max_response_tokens or (tiny.MAX_RESPONSE_TOKENS if on_tiny else 3072))
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
        if result["settings"] != settings or list(result["benchmarks"]) != names or result["model"] != model_name:
            fail(f"{output} holds an evaluation with other settings; name another --output")
        print(f"{output} holds this evaluation already")
        return print_table(result)
    benchmarks = {name: load_benchmark(name, args.data_dir)[:args.limit] for name in names}
    model, tokenizer = load_model(model_name, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    prompt = tokenizer.decode(encode_prompt(tokenizer, benchmarks[names[0]][0]["problem"], EVAL_SYSTEM))
    stop_ids = find_stop_ids(tokenizer, model.generation_config)
    print(f"first prompt:\n{indented(prompt)}\na response ends at {[tokenizer.decode(i) for i in stop_ids]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    responses_path = output.with_suffix(".jsonl")
    responses_path.unlink(missing_ok=True)          # left by an evaluation that did not come to its end
    try:
        result = evaluate(model, tokenizer, benchmarks, k=args.k, temperature=args.temperature, slots=args.slots,
                          max_response_tokens=settings["max_response_tokens"], seed=args.seed,
                          responses_path=responses_path)
    except torch.OutOfMemoryError:
        sys.exit(f"error: out of GPU memory; sampling needs less with --slots below {args.slots}")
    write_json(output, {"model": model_name, "settings": settings, **result})
    print_table(result)
    print(f"\nwritten to {output}; every response is in {responses_path}")


if __name__ == "__main__":
    main()
