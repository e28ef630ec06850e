"""Tests of one_shot_rlvr.py and evaluate.py: no network, no GPU, no weights but those made here.

Each equation and mechanism is held against the slowest, most obvious version of itself. A docstring says
which bug of a public implementation, or which accident of a user, the test would have caught.

    pytest
"""
import cmath
import copy
import gc
import hashlib
import io
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported, which waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what is started here, too

import one_shot_rlvr as rl  # before torch, as in the scripts
import evaluate

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from labs import tiny  # for its tokenizer

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # in models this small a second thread only waits
HERE = Path(__file__).resolve().parent
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 3], [9], [4, 5, 6, 7, 8], [1, 2, 3], [10, 11, 12, 13]]
RESPONSES = [[5, 6, 7, 8], [9], [10, 11, 12, 3], [13, 14, 15, 16, 17, 18, 3], [3, 3], [20, 21], [22]]

def random_model(seed=0, vocab_size=50, **kwargs):
    """A two-layer Qwen2 with random weights, large enough that its next token is far from uniform."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True,
        **kwargs)).eval()

@pytest.fixture(scope="session")
def model():
    return random_model()

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder with the tiny world's tokenizer and random weights: enough to run every command on."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.make_tokenizer()
    model = random_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

@pytest.fixture
def tokenizer():
    return tiny.make_tokenizer()

@pytest.fixture
def refused(capsys):
    """Call a function that must end with exit code 2 and one sentence, which is returned."""
    def call(function, *args, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args, **kwargs)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]
    return call

@pytest.fixture
def easy_reward(monkeypatch):
    """A reward that a random model gets about half of the time, so that there is a gradient."""
    monkeypatch.setattr(rl, "reward_of", lambda text, answer, kind: float(len(text) % 2))

def run_flags(folder, output_dir, *more):
    return ["--model", str(folder), "--example", "pi2", "--output-dir", str(output_dir),
            "--prompts-per-step", "2", "--group-size", "4", "--max-response-tokens", "12",
            "--learning-rate", "1e-2", "--steps", "4", "--save-every", "2", *map(str, more)]

def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]

def same_weights(folder_a, folder_b):
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder_a, folder_b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

def comparable(run):
    """The logs of a run without what was measured by a clock."""
    timing = {"tokens_per_second", "sample_seconds", "update_seconds", "memory_gb", "eta_seconds"}
    rows = [{k: v for k, v in row.items() if k not in timing} for row in read_jsonl(run / "metrics.jsonl")]
    return rows, read_jsonl(run / "samples.jsonl")

def batch_of(prompts=PROMPTS, responses=RESPONSES, sampler_logprobs=None):
    N = len(prompts)
    return rl.Batch(N * [{"name": "x", "answer": "4"}], prompts, responses, N * [""], N * [0.0],
                    sampler_logprobs or N * [torch.zeros(1)], seconds=1.0)


# -- 1. Example --------------------------------------------------------------------------

def test_paper_examples_are_exact():
    """A training prompt is data: one lost space and it is another experiment."""
    examples = json.loads((HERE / "examples.json").read_text())
    paper = {name: e for name, e in examples.items() if name.startswith("pi")}
    assert list(paper) == [f"pi{i}" for i in [*range(1, 18), 605, 606, 1201, 1207, 1208, 1209]]
    text = "\n".join(f"{name} {e['problem']} {e['answer']}" for name, e in paper.items())
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "8563f0f05ae3646e9c01b08af7bec915b7438d3dda18f20e2e92b1e962d8696b")

def test_examples_share_a_step_evenly_and_epochs_do_not_repeat():
    assert Counter(rl.examples_of_step(3, 2, 128, seed=0)) == {0: 64, 1: 64}
    assert sorted(Counter(rl.examples_of_step(1, 3, 128, seed=0)).values()) == [42, 43, 43]
    stream = [i for step in range(1, 11) for i in rl.examples_of_step(step, 20, 8, seed=1)]  # 80 = 4 epochs
    epochs = [stream[e:e + 20] for e in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])

def test_load_examples_from_files(tmp_path):
    rows = [{"problem": "1+1?", "answer": 2}, {"problem": "2+2?", "answer": "4", "name": "four"}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "set.json").write_text(json.dumps(rows))
    (tmp_path / "one.json").write_text(json.dumps(rows[0]))
    (tmp_path / "marked.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8-sig")  # as some editors write
    loaded = rl.load_examples([str(tmp_path / "set.jsonl")])
    assert loaded == rl.load_examples([str(tmp_path / "set.json")])
    assert loaded == [{"name": "set-1", "problem": "1+1?", "answer": "2"},
                      {"name": "four", "problem": "2+2?", "answer": "4"}]
    assert rl.load_examples([str(tmp_path / "one.json"), "pi1"])[0]["name"] == "one"
    assert [e["answer"] for e in rl.load_examples(["pi1"], answer="4")] == ["4"]
    assert rl.load_examples([str(tmp_path / "marked.jsonl")])[0]["problem"] == "1+1?"

@pytest.mark.parametrize("name, content, words", [
    ("none.json", None, "none.json"), ("pi99", None, "--example pi99"),
    ("broken.jsonl", b'{"problem": "1+1?", "answer": 2}\n{"problem": \n', "broken.jsonl, line 2"),
    ("wide.jsonl", '{"problem": "1+1?", "answer": 2}'.encode("utf-16"), "wide.jsonl"),
    ("empty.jsonl", b"", "--example"), ("deep.json", b"[" * 100_000, "deep.json"),
    ("set.parquet", b"PAR1", "give a .jsonl file, or one of"),
    *[("bad.jsonl", json.dumps(row).encode(), "row 1: it needs") for row in (
        {"problem": "1+1?"}, {"problem": "1+1?", "answer": None}, {"problem": "1+1?", "answer": [2]},
        {"problem": "1+1?", "answer": True}, {"problem": "1+1?", "answer": math.nan},
        {"problem": 2, "answer": 2}, {"problem": "", "answer": 2}, 5)],
    ("blank.jsonl", b'{"problem": "1+1?", "answer": " "}', "there must be one with an answer")])
def test_examples_that_are_refused(name, content, words, tmp_path, refused):
    """Trained on an answer that can never be right, all groups are dead and nothing says so."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    sentence = refused(rl.load_examples, [str(tmp_path / name) if "." in name else name])
    assert words in sentence and len(sentence) < 600

def test_an_example_is_named_once(refused):
    assert "pi1 is there twice" in refused(rl.load_examples, ["pi1", "pi2", "pi1"])

TURNS = ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}"
          "<|im_start|>system\nDEFAULT<|im_end|>\n{% endif %}" + TURNS)
NO_SYSTEM = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
             "{% endif %}" + TURNS)
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}" + TURNS
PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"

@pytest.mark.parametrize("template, with_system, without", [
    (CHATML, "<|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT,
     "<|im_start|>system\nDEFAULT<|im_end|>\n" + PROMPT),
    (NO_SYSTEM, PROMPT, PROMPT), (DROPS_SYSTEM, PROMPT, PROMPT), (None, "2+2?", "2+2?")])
def test_encode_prompt(template, with_system, without, tokenizer):
    tokenizer.chat_template = template
    assert tokenizer.decode(rl.encode_prompt(tokenizer, "2+2?")) == without
    assert tokenizer.decode(rl.encode_prompt(tokenizer, "2+2?", system="Be brief.")) == with_system

@pytest.mark.parametrize("date, written", [
    ("{{ strftime_now('%d %B %Y') }}", "26 July 2024"), ("{{ strftime_now('%B %d, %Y') }}", "July 26, 2024"),
    ('{{ strftime_now("%Y-%m-%d") }}', "2024-07-26"), ("{{ date_string }}", "26 Jul 2024"),
    ("{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
     "{{ date_string }}", "26 Jul 2024")])
def test_the_prompt_does_not_change_with_the_calendar(date, written, tokenizer):
    """SmolLM3, gpt-oss, Mistral and Granite write today's date: base and trained model would differ by it."""
    tokenizer.chat_template = date + NO_SYSTEM
    assert tokenizer.decode(rl.encode_prompt(tokenizer, "2+2?")) == written + PROMPT

@pytest.mark.parametrize("template, words", [
    ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
     "leaves the problem out"),
    ("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}", "system first"),
    ("{% for m in messages %}{{ m.content }", "no prompt can be made"),
    ({"tool_use": CHATML}, "no prompt can be made")])
def test_chat_templates_that_are_refused(template, words, tokenizer, refused):
    tokenizer.chat_template = template
    assert words in refused(rl.encode_prompt, tokenizer, "What is 2+2?")

def test_half_an_emoji_is_refused(tokenizer, refused):
    assert "no prompt can be made" in refused(rl.encode_prompt, tokenizer, "\ud83d 1+1?")

def test_a_prompt_does_not_end_with_the_end(tokenizer):
    """Without a chat template some tokenizers append EOS: nothing is left to be said after it."""
    from tokenizers.processors import TemplateProcessing
    tokenizer.chat_template, before = None, rl.encode_prompt(tokenizer, "2+2?")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)])
    assert tokenizer("2+2?").input_ids[-1] == tokenizer.eos_token_id
    assert rl.encode_prompt(tokenizer, "2+2?") == tokenizer("2+2?").input_ids[:-1] != before[:-1]

def test_stop_ids_are_the_union_of_three_sources(tokenizer):
    """A base model's configuration names <|endoftext|> alone; its template ends a turn with <|im_end|>."""
    end_of_text, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|endoftext|>"
    both = sorted({end_of_text, im_end})
    assert rl.find_stop_ids(tokenizer, GenerationConfig(eos_token_id=end_of_text)) == both
    tokenizer.chat_template = None
    assert rl.find_stop_ids(tokenizer, GenerationConfig(eos_token_id=[7, 9])) == sorted({7, 9, end_of_text})
    tokenizer.chat_template = DROPS_SYSTEM.replace("<|im_end|>", "<|endoftext|>")
    assert rl.find_stop_ids(tokenizer, GenerationConfig()) == [end_of_text]
    opens_next = CHATML.replace("<|im_end|>\n{% endfor %}", "<|im_end|><|im_start|>\n{% endfor %}")
    changes_it = CHATML.replace("m.content", "m.content | lower")
    refuses_it = "{{ messages[1].none.none }}" + CHATML
    for template, ids in ((opens_next, both), (changes_it, [end_of_text]), (refuses_it, [end_of_text])):
        tokenizer.chat_template = template
        assert rl.find_stop_ids(tokenizer, GenerationConfig()) == ids


# -- 2. Rollouts -------------------------------------------------------------------------

def slow_generate(model, prompts, max_response_tokens, temperature, stop_ids, noise):
    """No cache, no batch: the whole sequence again for every token; noise picks from the softmax."""
    responses = []
    for prompt, row in zip(prompts, noise):
        response = []
        while len(response) < max_response_tokens and not (response and response[-1] in stop_ids):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, -1].double()
            cumulative = (logits / (temperature or 1)).softmax(-1).cumsum(-1)
            drawn = int((cumulative <= row[len(response)]).sum()) if temperature else int(logits.argmax())
            response.append(drawn)
        responses.append(response)
    return responses

def ragged_loop(query, key, value, cu_q, cu_k, max_q, max_k, dropout, is_causal, *, return_debug_mask, scale,
                seqused_k):
    """torch's flash attention, which only CUDA has: row b attends to its first seqused_k[b] keys."""
    assert max_q == 1 and dropout == 0 and not is_causal and int(seqused_k.max()) <= max_k
    assert cu_q.tolist() == list(range(len(query) + 1))
    output = torch.empty_like(query)
    for b, used in enumerate(seqused_k):
        k, v = (x[cu_k[b]:cu_k[b] + used].repeat_interleave(query.shape[1] // key.shape[1], 1)
                for x in (key, value))
        weights = (scale * (query[b] * k).sum(-1)).softmax(0)  # (keys, heads)
        output[b] = (weights[..., None] * v).sum(0)
    return output, None, None

@pytest.mark.parametrize("path", ["plain", "graph", "ragged"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.3])
def test_generate_equals_the_slow_loop(temperature, path, monkeypatch):
    """Also: mixed prompt lengths, a prompt of one token, and stop tokens that end rows at different times.

    graph: with the fixed shapes of a CUDA graph, where rows that have ended are computed too; ragged: with
    CUDA's kernel.
    """
    model, stop_ids, calls = random_model(), [3, 17, 40, 41, 42], []
    noise = torch.rand(len(PROMPTS), 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = slow_generate(model, PROMPTS, 20, temperature, stop_ids, noise)
    monkeypatch.setattr(rl, "can_read_ragged", lambda model: path == "ragged")
    monkeypatch.setattr(rl, "flash_attention",
                        lambda *args, **kwargs: calls.append(0) or ragged_loop(*args, **kwargs))
    for slots in (1, 2, 3, None):
        responses = rl.generate(model, PROMPTS, max_response_tokens=20, temperature=temperature, slots=slots,
                                stop_ids=stop_ids, generator=torch.Generator().manual_seed(5),
                                cuda_graph=path != "plain")
        assert responses == expected and bool(calls) == (path == "ragged")
    if temperature:
        assert len({len(r) for r in responses}) > 2  # or this test has not seen rows end at different times

def test_a_graph_that_computes_something_else_is_found_out(monkeypatch, refused):
    monkeypatch.setattr(rl, "can_read_ragged", lambda model: True)
    monkeypatch.setattr(rl, "flash_attention", lambda query, *args, **kwargs: (query, None))
    assert "--no-cuda-graph" in refused(rl.generate, random_model(), PROMPTS, max_response_tokens=20,
                                        temperature=1.0, stop_ids=[3], cuda_graph=True)

def test_greedy_equals_transformers(model):
    ours = rl.generate(model, PROMPTS, max_response_tokens=24, temperature=0, stop_ids=[3, 17])
    for prompt, response in zip(PROMPTS, ours):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=24, eos_token_id=[3, 17], pad_token_id=0)
        assert response == theirs[0, len(prompt):].tolist()

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_cuda_samples_what_the_cpu_samples(cuda_graph):
    """Greedy tokens in float32 are the CPU's; in bf16, with flash attention, nearly the trainer's."""
    options = dict(max_response_tokens=24, stop_ids=[3, 17])
    on_cpu = rl.generate(random_model(), PROMPTS, temperature=0, **options)
    model = random_model().cuda()
    assert on_cpu == rl.generate(model, PROMPTS, temperature=0, cuda_graph=cuda_graph, **options)
    sampler = rl.frozen_copy(model, bf16=True)
    responses, sampled = rl.generate(sampler, PROMPTS, temperature=0.6, cuda_graph=cuda_graph,
                                     return_logprobs=True, **options)
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, responses, 0.6)
    assert (torch.cat(sampled).cuda() - logprobs[mask]).abs().mean() < 0.1

def test_sampling_follows_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -2.0, 3.0, -1e9]]).expand(200_000, -1)
    noise = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.6, 1.0):
        tokens, _ = rl.sample_tokens(logits, torch.full((200_000,), temperature), noise)
        share = tokens.bincount(minlength=5) / 200_000
        assert torch.allclose(share, (logits[0] / temperature).softmax(-1), atol=4e-3)
        assert share[4] == 0
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert rl.sample_tokens(logits[:2], torch.ones(2), edges)[0].tolist() == [0, 3]  # none of probability 0
    close = torch.tensor([[0.0, 1.0, 1.0 + 2**-23]]).expand(2, -1)
    assert rl.sample_tokens(close, torch.zeros(2), edges)[0].tolist() == [2, 2]  # greedy, whatever the noise

@pytest.mark.parametrize("target, index", [(-1e-17, 1), (0.0, 1), (0.25, 1), (0.5, 2), (1.0, 2)])
def test_rounding_leads_to_no_weight_of_0_and_not_past_the_end(target, index):
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    found, left = rl.where_sum_passes(weights, torch.tensor([target], dtype=torch.float64))
    assert found.item() == index and left.item() == pytest.approx(target - 0.5 * (index - 1))

def test_noise_is_new_in_each_step_and_the_same_when_made_again(folder, tmp_path, monkeypatch):
    seen, real = [], rl.generate
    monkeypatch.setattr(rl, "generate",
                        lambda *args, **kwargs: seen.append(kwargs["noise"]) or real(*args, **kwargs))
    for run, seed in (("a", 0), ("b", 1), ("c", 0)):
        rl.main(run_flags(folder, tmp_path / run, "--seed", seed))
    assert len({float(noise[0, 0]) for noise in seen}) == 8 and seen[0].shape == (8, 12)
    assert all(torch.equal(x, y) for x, y in zip(seen[:4], seen[8:]))

def test_work_follows_the_sampled_tokens(model, monkeypatch):
    """One prefill for equal prompts, and not one row-step more than tokens: nobody waits for the longest."""
    prefilled, row_steps, forward = [], [], model.forward

    def counting(**kwargs):
        n, t = kwargs["input_ids"].shape
        prefilled.append(t) if t > 1 else row_steps.append(n)
        return forward(**kwargs)
    monkeypatch.setattr(model, "forward", counting)
    prompts = 12 * [PROMPTS[1]] + 5 * [PROMPTS[0]] + 3 * [PROMPTS[1]]
    responses = rl.generate(model, prompts, max_response_tokens=30, temperature=1.0, stop_ids=list(range(6)),
                            slots=4, generator=torch.Generator().manual_seed(0))
    assert sorted(prefilled) == [len(PROMPTS[0]) - 1, len(PROMPTS[1]) - 1]
    assert sum(row_steps) == sum(map(len, responses)) and max(row_steps) == 4
    assert len(row_steps) < 30 * 20 / 4  # batches of 4 that wait for their longest would take more

def test_generate_refuses_an_empty_prompt(model):
    with pytest.raises(ValueError, match="empty prompt"):
        rl.generate(model, [[1], []], max_response_tokens=2, temperature=1.0, stop_ids=[0])
    assert rl.generate(model.train(), [], max_response_tokens=2, temperature=1.0, stop_ids=[0]) == []
    assert not model.training  # no dropout

@pytest.mark.parametrize("cuda_graph", [False, True])
def test_logits_that_are_not_finite_end_sampling(cuda_graph):
    """On CUDA, drawing from them would be an assertion of the device."""
    model = random_model()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(SystemExit, match="not finite"):
        rl.generate(model, PROMPTS, max_response_tokens=4, temperature=1.0, stop_ids=[3],
                    cuda_graph=cuda_graph)


# -- 3. Reward ---------------------------------------------------------------------------

# {kind: rows (gold, right answers, wrong answers)}, answers parted by " | "
def answer_pairs():
    """(kind, gold, box, verdict) of all that labs/answers.txt holds."""
    pairs, kind, gold = [], "", ""
    for line in (HERE / "labs" / "answers.txt").read_text(encoding="utf-8").splitlines():
        word, _, text = line.partition(" ")
        kind, gold = text if word == "#" else kind, text.lstrip() if word == "gold" else gold
        if word in ("right", "wrong"):
            pairs += [(kind, gold, box, word == "right") for box in text[1:].split(" | ")]
    return pairs

LONG = ["(" * 20 + "4" + ")" * 20, "{" * 400 + "}" * 400, "(" * 300 + "4" + ")" * 300,
        "3^{9999}" * 90, "(2/3)^{999}" * 60,
    r"\sqrt" * 190 + "4", "-" * 500 + "5",
    "\uff14", "\u0664", "4\u00b2", "1" * 100_000, r"\frac{" * 20_000 + "}" * 20_000,
    "{" * 100_000 + "}" * 100_000,
    r"\text{a}" * 20_000, "4," * 50_000, " " * 100_000, "(" * 100_000, "4" + "!" * 99, "|" * 300,
    r"\text{" * 60, "a_" * 190,
    "_{1}" * 99, r"\lfloor " * 50 + "4", "1,234" * 70, r"\sin " * 80 + "4", "((((4))))^" * 39,
    "9^" * 199 + "9", "-" * 391 + "4"]
SLOW = [(r"\log_{1e99999999} 7", "3.0"), (r"1" + r"\pm 2" * 40, "1,-2"), (r"\pm+-" * 30, r"3\pm2\sqrt2"),
        (",".join(f"{i}.0" for i in range(60, 10, -1)), ",".join(map(str, range(10, 60))))]
HUGE = [("2^{2000}", r"\sqrt2"), (r"\sqrt2", "2^{2000}"), (r"\sin 2^{2000}", "4"), ("f(2^{2000})", "f(2)")]

@pytest.mark.parametrize("kind, gold, box, verdict", answer_pairs())
def test_answers(kind, gold, box, verdict):
    start = time.perf_counter()
    assert rl.is_correct(rf"Thus the answer is $\boxed{{{box}}}$.", gold) is verdict
    assert time.perf_counter() - start < 0.5  # it takes a few ms; a quadratic scan, seconds

@pytest.mark.parametrize("box, gold", [*((box, "4") for box in LONG), *SLOW, *HUGE],
                         ids=lambda text: text[:30].encode("unicode_escape").decode())
def test_long_answer_is_wrong_and_quick(box, gold):
    test_answers("", gold, box, False)

@pytest.mark.parametrize("answer", [*dict.fromkeys(gold for _, gold, *_ in answer_pairs())] + [
    "2516_8", r"$(-\infty, 0) \cup\{1\}$.", r"864 \mbox{ inches}^2", r"\div", r"$221,$8$", r"$8 \%$",
    r"\binom{n}{2}",
    r"\omega_{n}^{2} e^{-\zeta \omega_{n} t} \cos \left(\omega_{n} \sqrt{1-\zeta^{2}} t\right)"])
def test_an_answer_equals_itself(answer):
    assert rl.is_correct(rf"\boxed{{{answer}}}", answer)
    assert rl.is_correct(rf"\boxed{{ {answer} }}", rf"\boxed{{{answer}}}")

@pytest.mark.parametrize("text, content", [
    (r"\boxed{5}", "5"), (r"first \boxed{5}, then \boxed{6}", "6"), (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    ("no box", None), ("", None), (r"so $\boxed 5$.", "5"), (r"\fbox{5}", "5"), (r"\boxed {5}", "5"),
    (r"\boxed 7.5", None), (r"\boxed 72", None), (r"\boxed 7/2", None), (r"\boxed x^2", None),
    (r"\boxed", None), (r"\boxedx", None), (r"\boxed \frac12", None),
    (r"\boxed{5", None), (r"\boxed{5} and \boxed{6", "5"), (r"\boxed{5} and \boxed 6", "6"),
    (r"\boxed{}", ""), (r"\boxed{5}}}", "5"), (r"\boxed{\boxed{12.8}}", "12.8"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{a\boxed{b", None), (r"\boxed{1 \boxed{2}", "2"),
    (r"\boxed{[1, 2)\}}", r"[1, 2)\}")])
def test_extract_boxed(text, content):
    assert rl.extract_boxed(text) == content

@pytest.mark.parametrize("piece", ["{", "}", "\\", r"\boxed{", r"\boxed{4}", r"\boxed", "{}", r"\{"])
def test_extract_boxed_is_linear(piece):
    start = time.perf_counter()
    rl.extract_boxed(r"\boxed{" + piece * (20_000 if "boxed" in piece else 100_000))
    assert time.perf_counter() - start < 1  # a quadratic scan takes minutes

def test_odd_arguments_are_wrong_but_do_not_raise():
    assert not any(rl.is_correct(*pair) for pair in [
        (None, "4"), ("", "4"), (r"\boxed{4}", None), (r"\boxed{4}", ""), (r"\boxed{4}", "  "),
        (r"\boxed{}", ""), (r"\boxed{ }", "4"), (b"4", 4), (4, 4), ([], {}), (r"\boxed{4}", r"\boxed{}"),
        (r"\boxed{nan}", float("inf"))])
    assert rl.is_correct(r"\boxed{4}", 4) and rl.is_correct(r"\boxed{4}", 4.0)

def test_never_raises_on_random_latex():
    rng = random.Random(0)
    pieces = r"""\frac { } ( ) [ ] \sqrt ^ _ 1 2 4 . , e i x \pi \text{ \text{cm} \, \left \right = \pm
        \cup \\ & % \%
        \begin{pmatrix} \end{pmatrix} $ \$ ! \sin \log _{ ^{ - + / * \{ \} or and cm \circ \boxed{ \in 9999
        e99 I(0)
        """.split() + [" ", "\n", "\\", "\x00", "\ud800", "\u00e9", "\uff14"]
    for _ in range(3000):
        box = "".join(rng.choices(pieces, k=rng.randint(1, 30)))
        assert isinstance(rl.is_correct(rf"\boxed{{{box}}}", rng.choice(["4", "x^2+1", "(1,2)", box])), bool)

# {operator: its LaTeX, its value}; a tree is (operator, tree, ...), a number or a letter
GRAMMAR = {"+": ("{}+{}", lambda x, y: x + y), "*": (r"({})\cdot({})", lambda x, y: x * y),
           "-": ("{}-({})", lambda x, y: x - y), "/": (r"\frac{{{}}}{{{}}}", lambda x, y: x / y),
           "^": ("({})^{{2}}", lambda x: x**2), "root": (r"\sqrt{{{}}}", cmath.sqrt),
           "sin": (r"\sin({})", cmath.sin), "ln": (r"\ln({})", cmath.log), "cos": (r"\cos({})", cmath.cos),
           "floor": (r"\lfloor {} \rfloor", lambda x: cmath.exp(x * x) + 7)}  # any function that is no other

def random_tree(rng, depth):
    if depth == 0 or rng.random() < 0.15:
        return rng.choice([*range(1, 10), *"abxyABX"])
    name = rng.choice([*"++**--//^", "root", "sin", "ln", "cos", "floor"])
    return name, *(random_tree(rng, depth - 1) for _ in range(2 if name in "+*-/" else 1))

def latex_of(tree):
    return GRAMMAR[tree[0]][0].format(*map(latex_of, tree[1:])) if isinstance(tree, tuple) else str(tree)

def value_at(tree, point):
    """The oracle: no parser, just the tree; a letter is a number that the point makes of it."""
    if isinstance(tree, tuple):
        return GRAMMAR[tree[0]][1](*(value_at(part, point) for part in tree[1:]))
    return tree if isinstance(tree, int) else complex(random.Random(f"{tree} {point}").uniform(0.5, 3))

def rewritten(tree, rng):
    """Another spelling of the same value."""
    if not isinstance(tree, tuple):
        return rng.choice([tree, ("-", ("+", tree, 3), 3), ("*", 1, tree)])
    name, *parts = tree
    parts = [rewritten(part, rng) if rng.random() < 0.4 else part for part in parts]
    if name in "+*" and rng.random() < 0.7:
        parts = parts[::-1]
    return (name, *parts) if name != "-" or rng.random() < 0.5 else ("+", ("*", -1, parts[1]), parts[0])

def mutated(tree, rng):
    """One thing is another: a letter's case, a number, an operator, or two parts that change places."""
    if not isinstance(tree, tuple):
        return tree + 1 if isinstance(tree, int) else rng.choice([tree.swapcase(), "n", 2])
    name, *parts = tree
    if rng.random() < 0.6:
        place = rng.randrange(len(parts))
        return name, *parts[:place], mutated(parts[place], rng), *parts[place + 1:]
    if len(parts) == 2:
        return rng.choice([(name, *parts[::-1]), (rng.choice("+*-/"), *parts)])
    return rng.choice([(rng.choice(["^", "root", "sin", "ln", "floor"]), *parts), ("*", 2, tree), parts[0]])

def test_a_rewriting_is_right_and_a_mutation_is_wrong():
    """2,000 random expressions: the obvious value of the tree says whether two of them are equal."""
    rng, made = random.Random(0), Counter()
    while made["rewritten"] + made["mutated"] < 2000:
        tree = random_tree(rng, rng.randint(1, 3))
        change = rng.choice([rewritten, mutated])
        other = change(tree, rng)
        try:
            values = [[value_at(t, point) for point in range(4)] for t in (tree, other)]
        except (ArithmeticError, ValueError):
            continue
        if max(abs(x) for x in sum(values, [])) > 1e6:
            continue
        equal = all(cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in zip(*values))
        if change is mutated and not equal or change is rewritten and equal:
            verdict = rl.is_correct(rf"\boxed{{{latex_of(other)}}}", latex_of(tree))
            assert verdict is equal, (latex_of(tree), latex_of(other))
            made[change.__name__] += 1
    assert min(made.values()) > 500

def test_reward_kinds():
    right, wrong, none = "so \\boxed{24}.", "so \\boxed{25}.", "so 24."
    assert [rl.reward_of(text, "24") for text in (right, wrong, none)] == [1, 0, 0]
    assert [rl.reward_of(text, "24", "format") for text in (right, wrong, none, "\\boxed{ }")] == [1, 1, 0, 0]
    assert [rl.reward_of(text, "24", "none") for text in (right, wrong, none)] == [0, 0, 0]


# -- 4. Advantages -----------------------------------------------------------------------

@pytest.mark.parametrize("right, of_right, of_wrong", [
    (1, 2.475, -0.354), (2, 1.620, -0.540), (3, 1.208, -0.725), (4, 0.935, -0.935), (5, 0.725, -1.208),
    (6, 0.540, -1.620), (7, 0.354, -2.475)])
def test_advantages_of_the_released_code(right, of_right, of_wrong):
    advantages = rl.group_advantages(torch.tensor(right * [1.0] + (8 - right) * [0.0]), 8)
    assert advantages.tolist() == pytest.approx(right * [of_right] + (8 - right) * [of_wrong], abs=6e-4)

def test_advantages_by_group():
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    rewards[8:16] = 0.1  # equal, but their mean rounds to 0.10000000149
    advantages = rl.group_advantages(rewards, 8)
    slow = []
    for g in range(0, 24, 8):
        group = rewards[g:g + 8].tolist()
        mean = sum(group) / 8
        std = math.sqrt(sum((r - mean)**2 for r in group) / 7)
        slow += [0.0 if len(set(group)) == 1 else (r - mean) / (std + 1e-6) for r in group]
    assert advantages.tolist() == pytest.approx(slow, abs=1e-5) and (advantages[8:16] == 0).all()
    assert not torch.allclose(advantages, rl.group_advantages(rewards, 24))  # groups of 8 are not one of 24
    assert torch.allclose(rl.group_advantages(rewards, 24, scale=False), rewards - rewards.mean(), atol=1e-6)
    for size in (1, 7):
        with pytest.raises(ValueError):
            rl.group_advantages(rewards, size)


# -- 5. Loss -----------------------------------------------------------------------------

def loss_inputs(B=5, T=7, seed=0, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    logprobs, old, ref, entropy = (-torch.rand(B, T, generator=g, dtype=torch.float64) * 2 for _ in range(4))
    old = logprobs + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([7, 3, 1, 5, 2])[:B, None]
    advantages = torch.tensor([1.3, -0.7, 0.0, -2.0, 0.4], dtype=torch.float64)[:B]
    return logprobs.requires_grad_(), old, ref, (-entropy).requires_grad_(), advantages, mask

def slow_loss(logprobs, old, ref, entropy, advantages, mask, config):
    """The equations of the paper, token by token."""
    sequences = []
    for b in range(len(advantages)):
        tokens = []
        for t in range(int(mask[b].sum())):
            ratio, A = torch.exp(logprobs[b, t] - old[b, t]), advantages[b]
            clipped = torch.clamp(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
            pg = torch.maximum(-ratio * A, -clipped * A)
            d = ref[b, t] - logprobs[b, t]
            kl = {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - 1 - d}[config.kl_estimator]
            tokens.append(config.pg_coef * pg + config.kl_coef * kl - config.entropy_coef * entropy[b, t])
        sequences.append(tokens)
    if config.loss_agg == "token":
        flat = [x for tokens in sequences for x in tokens]
        return sum(flat) / len(flat)
    return sum(sum(tokens) / len(tokens) for tokens in sequences) / len(sequences)

@pytest.mark.parametrize("settings", [
    {}, {"pg_coef": 0.0}, {"kl_coef": 0.7, "kl_estimator": "k1"}, {"kl_coef": 0.7, "kl_estimator": "k2"},
    {"kl_coef": 0.7, "entropy_coef": 0.3}, {"clip_eps": 0.05}, {"loss_agg": "sequence"},
    {"loss_agg": "sequence", "prompts_per_step": 2, "updates_per_batch": 2}])
def test_loss_equals_the_slow_loop_with_gradients(settings):
    config = rl.Config(**{"prompts_per_step": 1, "group_size": 5, **settings})
    inputs = loss_inputs()
    expected = slow_loss(*inputs, config)
    loss, stats = rl.grpo_loss(*inputs, int(inputs[5].sum()), config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and stats["loss"] == loss.item()
    gradients = [torch.autograd.grad(x, [inputs[0], inputs[3]], allow_unused=True) for x in (loss, expected)]
    for mine, theirs in zip(*gradients):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize("advantage, ratio, gradient", [
    (1, 1.5, 0), (1, 0.5, -0.5), (1, 1.1, -1.1), (-1, 1.5, 1.5), (-1, 0.5, 0), (-1, 0.9, 0.9)])
def test_clipping_on_both_sides(advantage, ratio, gradient):
    """A < 0 keeps the larger loss: a maximum of the objective would clip there what PPO keeps."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, A = torch.zeros(1, 1), torch.tensor([float(advantage)])
    loss, stats = rl.grpo_loss(logprobs, zero, zero, zero, A, torch.ones(1, 1), 1,
                               rl.Config(kl_coef=0.0, entropy_coef=0.0))
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert stats["clip_frac"] == (gradient == 0) and stats["ratio"] == pytest.approx(ratio)

@pytest.mark.parametrize("distance, advantage, loss, gradient", [
    (200, 1, -1.2, 0), (-200, 1, 0, 0), (-200, -1, 0.8, 0), (200, -1, math.exp(20), 0),
    (19, -1, math.exp(19), math.exp(19))])
def test_a_far_ratio_is_finite(distance, advantage, loss, gradient):
    """exp(200) is inf, and inf times the gradient of the branch that is clipped, 0, is NaN."""
    logprobs = torch.tensor([[float(distance)]], dtype=torch.float64, requires_grad=True)
    zero, A = torch.zeros(1, 1), torch.tensor([float(advantage)])
    value, _ = rl.grpo_loss(logprobs, zero, logprobs.detach(), zero, A, torch.ones(1, 1), 1, rl.Config())
    value.backward()
    assert value.item() == pytest.approx(loss) and logprobs.grad.item() == pytest.approx(gradient, abs=1e-9)

def test_first_update_is_reinforce():
    """Where old log-probs are the log-probs, the ratio is 1 and the loss about 0, but its gradient is not."""
    logprobs, _, _, entropy, advantages, mask = loss_inputs()
    loss, stats = rl.grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), entropy, advantages, mask, 18,
                               rl.Config(kl_coef=0.0, entropy_coef=0.0))
    loss.backward()
    assert stats["ratio"] == pytest.approx(1) and stats["clip_frac"] == 0
    assert torch.allclose(logprobs.grad, -advantages[:, None] * mask / 18)

def test_an_advantage_for_each_token():
    inputs = list(loss_inputs())
    whole = rl.grpo_loss(*inputs, 18, rl.Config())[0]
    inputs[4] = inputs[4][:, None].expand(5, 7)
    assert torch.equal(whole, rl.grpo_loss(*inputs, 18, rl.Config())[0])

def test_padding_never_reaches_loss_stats_or_gradient():
    inputs = list(loss_inputs())
    loss, stats = rl.grpo_loss(*inputs, 18, rl.Config())
    outside = ~inputs[5]
    for i in (1, 2):
        inputs[i] = inputs[i].masked_fill(outside, 3.0)
    again, stats_again = rl.grpo_loss(*inputs, 18, rl.Config())
    assert loss.item() == again.item() and stats == stats_again
    again.backward()
    assert (inputs[0].grad[outside] == 0).all() and (inputs[0].grad[inputs[5]] != 0).any()

def test_kl_values_and_the_cut():
    logp, ref = torch.tensor([-1.0, -2.0, -1.0]), torch.tensor([-1.5, -1.0, -1.0])
    assert rl.kl_estimate(logp, ref, "k1").tolist() == pytest.approx([0.5, -1.0, 0.0])
    assert rl.kl_estimate(logp, ref, "k2").tolist() == pytest.approx([0.125, 0.5, 0.0])
    assert rl.kl_estimate(logp, ref).tolist() == pytest.approx([math.exp(-.5) - .5, math.e - 2, 0.0])
    far = torch.tensor([-200.0, -12.0, 0.0], requires_grad=True)
    kl = rl.kl_estimate(far, torch.tensor([0.0, 0.0, -200.0]))
    kl.sum().backward()
    assert kl.tolist() == [10, 10, 10] and torch.isfinite(far.grad).all()

def test_gradients_of_the_kl_estimators():
    """Expected over the policy's own samples: k1 gives nothing, k2 the reverse KL, k3 the forward KL."""
    g = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    p, q = logits.log_softmax(-1), ref.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]
    expected = {"k1": torch.zeros(6, dtype=torch.float64), "k2": gradient((p.exp() * (p - q)).sum()),
                "k3": gradient((q.exp() * (q - p)).sum())}
    for kind, theirs in expected.items():
        mine = gradient((p.detach().exp() * rl.kl_estimate(p, q, kind)).sum())
        assert torch.allclose(mine, theirs, atol=1e-12)

@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_logprobs_equal_plain_log_softmax(model, chunk):
    """Temperature, the shift by one, chunks, padding: all against one row at a time, with gradients."""
    logprobs, entropy, mask = rl.token_logprobs(model, PROMPTS, RESPONSES, 0.6, chunk)
    assert mask.sum(1).tolist() == [len(r) for r in RESPONSES]
    slow = []
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        logp, n = (logits / 0.6).log_softmax(-1), len(response)
        slow.append((logp[range(n), response], -(logp.exp() * logp).sum(-1)))
        assert torch.allclose(logprobs[b, :n], slow[b][0], atol=1e-5)
        assert torch.allclose(entropy[b, :n], slow[b][1], atol=1e-5)
        assert (logprobs[b, n:] == 0).all() and (entropy[b, n:] == 0).all()
    weight = model.model.layers[0].mlp.up_proj.weight
    mine = torch.autograd.grad((logprobs + entropy).sum(), weight)[0]
    theirs = torch.autograd.grad(sum((a + b).sum() for a, b in slow), weight)[0]
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)

def test_the_stop_token_is_scored_also_where_it_is_the_padding(model):
    """EOS == PAD == 0: a mask by token id would take stopping out of the loss (simple_GRPO, nanoGRPO)."""
    logprobs, _, mask = rl.token_logprobs(model, [[1, 2], [1, 2]], [[5, 0], [5, 6, 7, 0]], 1.0)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert logprobs[0, 1] != 0 and (logprobs[0, 2:] == 0).all()

@pytest.mark.parametrize("slots", [1, 3, None])
def test_sampled_tokens_are_scored_as_they_were_sampled(model, slots):
    """The sampler's own log-probabilities are the trainer's: then the ratio starts at 1."""
    responses, sampled = rl.generate(model, PROMPTS, max_response_tokens=9, temperature=0.6,
                                     stop_ids=[3, 17, 40, 41, 42], slots=slots,
                                     generator=torch.Generator().manual_seed(1), return_logprobs=True)
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, responses, 0.6)
    assert [len(values) for values in sampled] == [len(response) for response in responses]
    assert torch.allclose(torch.cat(sampled), logprobs[mask], atol=1e-5)


# -- 6. Update ---------------------------------------------------------------------------

def gradient_of_update(policy, config, monkeypatch, ref_policy=None):
    policy = copy.deepcopy(policy)
    if config.activation_checkpointing:
        rl.recompute_layers(policy)
    monkeypatch.setattr(rl, "optimizer_step", lambda *_: None)
    advantages = torch.tensor([1.0, -0.5, 0.3, -1.0, 0.0, 2.0, -2.0])
    stats = rl.update_policy(policy, ref_policy, None, batch_of(), range(7), advantages, None, config)
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), stats

@pytest.mark.parametrize("loss_agg", ["token", "sequence"])
def test_packing_never_changes_the_gradient(model, monkeypatch, loss_agg):
    """num_tokens is fixed before the loop: means of micro-batches (verl, nanochat, nano-aha) fail here."""
    settings = dict(grad_clip=1e9, loss_agg=loss_agg, kl_coef=0.3, entropy_coef=0.2, prompts_per_step=1,
                    group_size=7)
    ref_policy = random_model(seed=1)
    one_pack = rl.Config(token_budget=10**6, **settings)
    whole, stats = gradient_of_update(model, one_pack, monkeypatch, ref_policy)
    assert stats["kl"] > 0.01
    for change in ({"token_budget": 1}, {"token_budget": 20}, {"token_budget": 31},
                   {"activation_checkpointing": True}):
        config = rl.Config(**settings, **change)
        split, split_stats = gradient_of_update(model, config, monkeypatch, ref_policy)
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5)
        assert split_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)

def test_sampler_gap_is_a_mean_distance(model):
    """Not a mean difference, in which a sampler that is off in both directions would pass for the trainer."""
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, RESPONSES, 0.6)
    sampled = [row[kept] + 0.5 * (-1) ** torch.arange(int(kept.sum()))
               for row, kept in zip(logprobs.detach(), mask)]
    policy = copy.deepcopy(model)
    stats = rl.update_policy(policy, None, torch.optim.AdamW(policy.parameters()),
                             batch_of(sampler_logprobs=sampled), range(7), torch.zeros(7), None, rl.Config())
    assert stats["sampler_gap"] == pytest.approx(0.5, rel=1e-4)

def test_gradient_is_clipped_to_its_norm(model, monkeypatch):
    whole, stats = gradient_of_update(model, rl.Config(grad_clip=1e9, kl_coef=0.0), monkeypatch)
    assert stats["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)
    clip = stats["grad_norm"] / 3
    clipped, clipped_stats = gradient_of_update(model, rl.Config(grad_clip=clip, kl_coef=0.0), monkeypatch)
    assert torch.allclose(clipped, whole / 3, rtol=1e-4, atol=1e-8)
    assert clipped_stats["grad_norm"] == stats["grad_norm"]

def test_micro_batches_keep_the_budget_and_every_row():
    rng = random.Random(0)
    for _ in range(50):
        prompts, responses = ([[0] * rng.randint(1, 9) for _ in range(20)] for _ in range(2))
        length = [len(p) + len(r) for p, r in zip(prompts, responses)]
        rollouts, budget = rng.sample(range(20), 15), rng.randint(1, 60)
        packs = rl.micro_batches(batch_of(prompts, responses), rollouts, budget)
        assert sorted(sum(packs, [])) == sorted(rollouts)
        assert all(len(rows) == 1 or len(rows) * max(length[i] for i in rows) <= budget for rows in packs)
        # the longest first: memory runs out at once or never
        assert max(map(length.__getitem__, rollouts)) == length[packs[0][0]]

def test_several_updates_a_batch_move_the_ratio(model, monkeypatch):
    """The second update's ratio is against the policy that sampled, not against the policy itself."""
    policy, seen, real = copy.deepcopy(model), [], rl.update_policy
    config = rl.Config(updates_per_batch=2, learning_rate=1e-2, kl_coef=0.0, prompts_per_step=2, group_size=3)
    batch = batch_of(PROMPTS[:6], RESPONSES[:6])
    monkeypatch.setattr(rl, "update_policy",
                        lambda *args: seen.append((*args[4:7], real(*args))) or seen[-1][3])
    stats = rl.train_on(policy, None, torch.optim.AdamW(policy.parameters(), lr=1e-2), batch,
                        torch.tensor([1.0, -1, 0, 1, -1, 0]), config)
    logprobs, _, mask = rl.token_logprobs(model, batch.prompts, batch.responses, 0.6)
    (first, _, old, stats_1), (second, _, old_2, stats_2) = seen
    assert [*first, *second] == list(range(6)) and old_2 is old
    assert all(torch.allclose(old[i], logprobs[i][mask[i]], atol=1e-5) for i in range(6))
    assert stats_1["ratio"] == pytest.approx(1, abs=1e-5) and abs(stats_2["ratio"] - 1) > 1e-3
    assert stats["ratio"] == pytest.approx((stats_1["ratio"] + stats_2["ratio"]) / 2)

def test_a_nan_loss_stops_before_the_weights_change(model):
    policy = copy.deepcopy(model)
    before = copy.deepcopy(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    with pytest.raises(SystemExit, match="nan"):
        rl.update_policy(policy, None, optimizer, batch_of(), range(7), torch.full((7,), math.nan), None,
                         rl.Config(kl_coef=0.0))
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


# -- 7. The run --------------------------------------------------------------------------

def test_a_run_leaves_its_files_and_is_never_overwritten(folder, tmp_path, capsys, easy_reward, refused):
    run = tmp_path / "my run"  # a space, for the commands that are printed
    rl.main(run_flags(folder, run))
    out = capsys.readouterr().out
    assert "How many positive divisors" in out and "<|im_end|>" in out and "step 4/4" in out
    assert f"evaluate.py --model '{run}/step-000004'" in out
    rows, samples = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"reward", "accuracy", "dead_groups", "entropy", "kl", "loss", "clip_frac", "ratio", "grad_norm",
            "response_length", "truncated_frac", "examples", "tokens_per_second"} <= set(rows[0])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[3]["kl"] > 1e-4
    assert {s["step"] for s in samples} == {1, 2, 3, 4} and {"text", "reward", "advantage"} <= set(samples[0])
    config = json.loads((run / "config.json").read_text())
    assert config["learning_rate"] == 1e-2 and config["stop_ids"] and config["versions"]["torch"]
    assert "divisors" in config["prompt"]
    assert not same_weights(folder, run / "step-000004")
    AutoTokenizer.from_pretrained(run / "step-000002")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert "--resume" in refused(rl.main, run_flags(folder, run))
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

def test_rewards_are_left_unscaled_if_so_wanted(folder, tmp_path, easy_reward):
    rl.main(run_flags(folder, tmp_path / "run", "--no-scale-rewards"))
    advantages = {abs(row["advantage"]) for row in read_jsonl(tmp_path / "run" / "samples.jsonl")}
    assert {0} != advantages <= {0, 0.25, 0.5, 0.75}  # scaled, the best of a group of 4 has 0.866 or 1.5

def test_a_response_without_a_stop_token_is_truncated():
    batch = batch_of([[1], [1]], [[5, 6], [5, 2]])
    batch.texts, batch.rewards = ["4", "\\boxed{4}"], [0.0, 1.0]
    run = rl.Run(*16 * [None])
    run.stop_ids = [2]
    cut, whole = rl.describe_rollouts(run, batch, torch.tensor([-1.0, 1.0]))
    assert cut["truncated"] and not whole["truncated"]
    assert (cut["correct"], whole["correct"]) == (False, True) == (cut["boxed"], whole["boxed"])

def test_summary_of_a_step():
    """Against the obvious counts, with a dead group, a mixed one, and two examples."""
    rollouts = [{"example": "ab"[i // 4], "reward": reward, "correct": reward > 0.4, "boxed": i % 2 == 0,
                 "tokens": i, "truncated": i == 7} for i, reward in enumerate([1, 1, 1, 1, 0, 0.5, 0, 0])]
    row = rl.summarize(rollouts, 4)
    assert row["reward"] == 4.5 / 8 and row["accuracy"] == 5 / 8 and row["dead_groups"] == 0.5
    assert row["boxed_frac"] == 0.5 and row["response_length"] == 3.5 and row["truncated_frac"] == 1 / 8
    assert row["examples"] == {"a": 1.0, "b": 0.25}

def test_a_diverged_policy_ends_with_a_sentence_and_a_whole_checkpoint(folder, tmp_path, easy_reward):
    with pytest.raises(SystemExit, match="--learning-rate"):
        rl.main(run_flags(folder, tmp_path / "run", "--learning-rate", "1e9", "--steps", 30,
                          "--save-every", 1))
    state = torch.load(tmp_path / "run" / "latest" / "state.pt")
    assert state["step"] == read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"]


# -- A. The command line -----------------------------------------------------------------

def test_config_is_the_papers_run():
    c = rl.parse_args([])
    assert (c.model, list(c.example), c.steps, c.save_every) == ("Qwen/Qwen2.5-Math-1.5B", ["pi1"], 2000, 20)
    assert (c.prompts_per_step, c.group_size, c.temperature) == (128, 8, 0.6)
    assert (c.max_prompt_tokens, c.max_response_tokens, c.updates_per_batch) == (1024, 3072, 1)
    assert (c.learning_rate, c.weight_decay, c.grad_clip, c.clip_eps) == (1e-6, 0.01, 1.0, 0.2)
    assert (c.pg_coef, c.kl_coef, c.kl_estimator, c.entropy_coef) == (1.0, 0.001, "k3", 0.001)
    assert c.loss_agg == "token" and c.output_dir == "runs/pi1-Qwen2.5-Math-1.5B"

def test_flags_win_over_the_preset_and_underscores_are_accepted():
    config = rl.parse_args(["--preset", "tiny", "--learning_rate", "3e-4", "--group_size=4",
                            "--no-scale_rewards", "--example", "pi1", "pi13"])
    assert config.learning_rate == 3e-4 and config.group_size == 4 and not config.scale_rewards
    assert config.example == ["pi1", "pi13"] and config.model == rl.TINY_BASE and config.kl_coef == 0.001
    for preset in rl.PRESETS.values():
        assert set(preset) <= {f.name for f in rl.fields(rl.Config)}

def test_words_of_a_command_line(monkeypatch, tmp_path):
    """The paper's labels begin with a minus; a shell leaves the ~ of --flag=~/x to the program."""
    monkeypatch.setenv("HOME", "/home/me")
    for label in ("-2023/2024", r"-\frac{1}{2}", "--5"):
        assert rl.parse_args(["--answer", label]).answer == label
        assert rl.parse_args([f"--answer={label}"]).answer == label
    assert rl.parse_args(["--output-dir=~/x"]).output_dir == "/home/me/x"
    assert list(rl.parse_args(["--example", "~/x_y.json", "pi1"]).example) == ["/home/me/x_y.json", "pi1"]
    monkeypatch.chdir(tmp_path)
    assert rl.parse_args(["--model", "."]).output_dir == f"runs/pi1-{tmp_path.name}"

def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        rl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "longest response [C] (default: 3072)" in text
    assert all(rl.flag_of(f.name) in text for f in rl.fields(rl.Config))

@pytest.mark.parametrize("flags, words", [
    (["--group-size", "1"], "--group-size 1"), (["--temperature", "0"], "--temperature 0"),
    (["--temperature", "nan"], "--temperature nan"), (["--steps", "many"], "--steps"),
    (["--steps", "0"], "--steps 0"), (["--seed", "-1"], "--seed -1"),
    (["--clip-eps", "inf"], "--clip-eps inf"),
    (["--updates-per-batch", "3"], "--updates-per-batch 3"), (["--example", "pi99"], "pi99"),
    (["--reward", "maybe"], "--reward"), (["--learning-rate", "-1"], "--learning-rate -1"),
    (["--eval-every", "5"], "--eval"), (["--eval", "math500"], "--eval math500"),
    (["--example", "pi1", "pi2", "--answer", "4"], "--answer"), (["--lerning-rate", "1"], "--lerning-rate"),
    (["--model", "no/such/folder"], "no/such/folder"), (["--resume"], "--resume"),
    (["--max-prompt-tokens", "3"], "--max-prompt-tokens 3"), (["--answer", " "], "with an answer"),
    (["--max-response-tokens", "250"], "sees 256"), (["--example", "x.csv"], ".jsonl file")])
def test_bad_input_gets_one_sentence(flags, words, folder, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sentence = refused(rl.main, ["--model", str(folder), "--max-response-tokens", "12",
                                 "--output-dir", str(tmp_path / "run"), *flags])
    assert words in sentence and not (tmp_path / "run").exists()

def test_without_the_hub_a_file_is_recommended(monkeypatch, refused):
    def away(*args, **kwargs):
        raise ConnectionError("no hub")
    monkeypatch.setattr("datasets.load_dataset", away)
    assert "DIR/math500.jsonl" in refused(rl.main, ["--eval", "math500", "--eval-every", "5"])

@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437"])
def test_a_console_that_lacks_a_letter(encoding, monkeypatch):
    """Windows with > log.txt: the first sample would end the run before its row is written."""
    console = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", console)
    rl.as_a_command(lambda: print("∫ \u2713 é done"))
    console.flush()
    assert console.buffer.getvalue().decode(encoding).endswith("done\n")

@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device", "x.jsonl"), "x.jsonl"), (Timeout("runs/a/lock"), "runs/a/lock")])
def test_what_goes_wrong_around_a_run_is_one_sentence(error, words, refused):
    def main():
        raise error
    assert words in refused(rl.as_a_command, main)


# -- B. Files ----------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    [], ["--precision", "bf16", "--offload-optimizer", "--updates-per-batch", "2"]])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(folder, tmp_path, monkeypatch, more, easy_reward):
    """Killed after any file operation of steps 1 to 4: same weights, same log (nano-aha replays a batch)."""
    rl.main(run_flags(folder, tmp_path / "whole", *more))
    for number, (module, name, calls) in enumerate([
            (os, "replace", 6), (rl, "append_rows", 4), (rl, "generate", 3), (torch, "save", 1),
            (rl, "save_model", 0)]):
        run, real, count = tmp_path / f"cut{number}", getattr(module, name), itertools.count()

        def killed(*args, **kwargs):
            if next(count) == calls:
                raise KeyboardInterrupt("killed")
            return real(*args, **kwargs)
        monkeypatch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            rl.main(run_flags(folder, run, *more))
        monkeypatch.setattr(module, name, real)
        if (run / "metrics.jsonl").exists():
            (run / "metrics.jsonl").open("a").write('{"step": 3, "rew')  # cut short while writing
        rl.main(["--output-dir", str(run), "--resume"])
        assert comparable(run) == comparable(tmp_path / "whole")
        assert same_weights(run / "step-000002", tmp_path / "whole" / "step-000002")
        assert same_weights(run / "step-000004", tmp_path / "whole" / "step-000004")

def test_a_full_disk_leaves_the_checkpoint_whole(folder, tmp_path, easy_reward, monkeypatch, refused):
    run = tmp_path / "run"
    rl.main(run_flags(folder, run, "--steps", 2))
    before = (run / "latest" / "state.pt").read_bytes()

    def full(state, path):
        Path(path).write_bytes(before[:99])
        raise RuntimeError("unexpected pos 99 vs 88")
    monkeypatch.setattr(torch, "save", full)
    flags = ["--output-dir", str(run), "--resume", "--steps", "4"]
    assert "disk is full (unexpected pos" in refused(rl.as_a_command, lambda: rl.main(flags))
    assert (run / "latest" / "state.pt").read_bytes() == before

def test_a_run_is_not_begun_again_over_its_steps(folder, tmp_path, easy_reward, refused):
    run = tmp_path / "run"
    rl.main(run_flags(folder, run))

    def files():
        return {path: path.read_bytes() for path in run.rglob("*")
                if path.is_file() and path.name not in ("state.pt", "lock")}
    before, resume = files(), ["--output-dir", str(run), "--resume", "--steps", "6"]
    with FileLock(run / "lock"), pytest.raises(Timeout):
        rl.main(resume)
    gc.collect()  # a process that fails lets its lock go; here the frames of the failed call still have it
    state = (run / "latest" / "state.pt").read_bytes()
    (run / "latest" / "state.pt").write_bytes(state[:-999])
    assert "cannot be loaded" in refused(rl.main, resume)
    gc.collect()
    (run / "latest" / "state.pt").unlink()
    assert "cannot be loaded" in refused(rl.main, resume)
    gc.collect()
    config = (run / "config.json").read_text()
    (run / "config.json").unlink()
    assert "no config.json" in refused(rl.main, resume)
    assert "is of another run" in refused(rl.main, run_flags(folder, run))
    (run / "config.json").write_text(config)
    assert before == files()

@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "latest", "step-000002"])
def test_no_file_of_another_run_is_overwritten(name, folder, tmp_path, refused):
    (tmp_path / name).touch()
    assert "is of another run" in refused(rl.main, run_flags(folder, tmp_path))

def test_a_run_that_began_meanwhile_is_not_overwritten(folder, tmp_path, monkeypatch, refused):
    real = rl.load_model

    def slow(name):
        monkeypatch.setattr(rl, "load_model", real)
        rl.main(run_flags(folder, tmp_path / "run", "--steps", 1))
        return real(name)
    monkeypatch.setattr(rl, "load_model", slow)
    assert "is of another run" in refused(rl.main, run_flags(folder, tmp_path / "run", "--seed", 7))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0

def test_flags_given_with_resume(folder, tmp_path, easy_reward, refused):
    """All but KEPT are used; load_state_dict would restore the old learning rate, unlike config.json."""
    run, other = tmp_path / "run", {"preset": "24gb", "model": "x", "example": "pi1", "answer": "4",
                                    "max_prompt_tokens": "99", "seed": "5"}
    rl.main(run_flags(folder, run, "--steps", 2))
    assert other.keys() == {*rl.KEPT}
    for name, value in other.items():
        sentence = refused(rl.main, ["--output-dir", str(run), "--resume", rl.flag_of(name), value])
        assert sentence.startswith(f"error: {rl.flag_of(name)} ") and "a resumed run keeps" in sentence
    saved = json.loads((run / "config.json").read_text())
    for f in rl.fields(rl.Config):
        if f.name not in (*rl.KEPT, "output_dir", "resume", "eval", "eval_every"):
            value = [x for x in rl.get_args(f.type) if x != saved[f.name]][:1] or [str(saved[f.name])]
            flag = ["--no-" * saved[f.name] + f.name] if f.type is bool else [rl.flag_of(f.name), *value]
            flag = [flag[0] if flag[0].startswith("--") else f"--{flag[0]}", *flag[1:]]
            rl.parse_args(["--output-dir", str(run), "--resume", *flag])
    assert "is at step 2 already" in refused(rl.main, ["--output-dir", str(run), "--resume", "--steps", "1"])
    gc.collect()
    rl.main(["--output-dir", str(run), "--resume", "--steps", "3", "--learning-rate", "1e-30",
             "--weight-decay", "0"])
    assert same_weights(run / "step-000002", run / "step-000003")
    saved = json.loads((run / "config.json").read_text())
    assert saved["learning_rate"] == 1e-30 and saved["steps"] == 3

def test_a_resumed_run_keeps_its_examples(folder, tmp_path, easy_reward, refused):
    """A label, a problem or a template that was changed: the run would go on with another task, silently."""
    run, example = tmp_path / "run", tmp_path / "mine.jsonl"
    row = {"problem": "What is 1 + 1?", "answer": "2"}
    example.write_text(json.dumps(row))
    rl.main(run_flags(folder, run, "--steps", 2, "--example", example, "--eval", example, "--eval-every", 1))
    before = (run / "config.json").read_bytes()
    resume = ["--output-dir", str(run), "--resume", "--steps", "3"]
    for change in ({"answer": "3"}, {"problem": "What is 1 + 2?"}):
        example.write_text(json.dumps({**row, **change}))
        assert "is not what it was" in refused(rl.main, resume)
        gc.collect()
    assert (run / "config.json").read_bytes() == before
    example.write_text(json.dumps(row))
    rl.main([*resume, "--eval-every", "0"])  # evaluates no more
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 1, 1, 2, 2, 3]

def test_a_run_of_an_older_version_goes_on(folder, tmp_path, easy_reward, refused):
    run, example = tmp_path / "run", tmp_path / "mine.jsonl"
    row = {"problem": "What is 1 + 1?", "answer": "2"}
    example.write_text(json.dumps(row) + "\n" + json.dumps(row))
    rl.main(run_flags(folder, run, "--steps", 2, "--example", example))
    resume = ["--output-dir", str(run), "--resume", "--steps", "3"]
    example.write_text(json.dumps(row) + "\n" + json.dumps({**row, "answer": "3"}))
    assert "is not what it was" in refused(rl.main, resume)  # the second example counts, too
    gc.collect()
    config = json.loads((run / "config.json").read_text())
    del config["examples_crc32"], config["compile"]
    (run / "config.json").write_text(json.dumps(config))
    rl.main(resume)
    gc.collect()
    rl.main(resume)  # of a finished run: nothing is left to do
    config = json.loads((run / "config.json").read_text())
    assert config["examples_crc32"] and config["compile"] is False

@pytest.mark.parametrize("change, words", [
    ({"group_size": 2.5}, "--group-size: invalid int"), ({"slots": [1]}, "--slots: invalid int"),
    ({"learning_rate": None}, "--learning-rate: invalid float"), ({"reward": "zz"}, "'zz' is none of")])
def test_a_damaged_config_is_refused(folder, tmp_path, change, words, refused):
    config = {**vars(rl.parse_args(run_flags(folder, tmp_path))), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in refused(rl.main, ["--output-dir", str(tmp_path), "--resume"])

def test_a_checkpoint_does_not_stay_mapped(folder, tmp_path, easy_reward, monkeypatch):
    """Windows cannot replace a file that is mapped: the next save of a resumed run would fail."""
    rl.main(run_flags(folder, tmp_path / "run", "--steps", 2))
    real, options = torch.load, []
    monkeypatch.setattr(torch, "load",
                        lambda *args, **kwargs: options.append(kwargs) or real(*args, **kwargs))
    rl.main(["--output-dir", str(tmp_path / "run"), "--resume", "--steps", "3"])
    assert [option["mmap"] for option in options] == [False]

def test_rows_with_line_separators_survive_a_resume(tmp_path):
    rows = [{"step": 1, "text": "a\u2028b\x85c\nd and half an emoji \ud83d"}, {"step": 2, "text": ""}]
    rl.append_rows(tmp_path / "samples.jsonl", rows)
    (tmp_path / "samples.jsonl.tmp").write_text("left by a kill")
    assert rl.keep_rows(tmp_path / "samples.jsonl", lambda row: row["step"] <= 1) == rows[:1]
    assert read_jsonl(tmp_path / "samples.jsonl") == rows[:1]
    rl.write_json(tmp_path / "x.json", rows[0])
    assert rl.read_json(tmp_path / "x.json") == rows[0]

def test_evaluation_while_training(folder, tmp_path, easy_reward):
    (tmp_path / "my.jsonl").write_text('{"problem": "2+2?", "answer": "4"}\n')
    flags = run_flags(folder, tmp_path / "run", "--eval", tmp_path / "my.jsonl", "--eval-every", "2")
    rl.main(flags)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    evals = {row["step"]: row["eval"] for row in rows if "eval" in row}
    assert list(evals) == [0, 2, 4] and set(evals[0]) == {"my", "average"}
    rl.main([*flags, "--resume", "--steps", "7"])
    steps = [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7]  # and after the last step

def test_tests_can_be_asked_for_later(folder, tmp_path, easy_reward, refused):
    (tmp_path / "my.jsonl").write_text('{"problem": "2+2?", "answer": "4"}\n')
    rl.main(run_flags(folder, tmp_path / "run", "--steps", 2))
    resume = ["--output-dir", str(tmp_path / "run"), "--resume", "--eval-every", "2"]
    assert "--eval" in refused(rl.main, resume)
    rl.main([*resume, "--eval", str(tmp_path / "my.jsonl")])
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval" in row] == [2]

def test_the_commands_as_a_user_types_them(folder, tmp_path):
    """Evaluate; train, and Ctrl-C in the middle: in processes of their own, on an ascii console; resume."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore Ctrl-C

    def start(*command):
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=HERE, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii"})

    def finish(process, code=0):
        out, err = process.communicate(timeout=240)
        assert process.returncode == code and "Traceback" not in err, err
        return out
    (tmp_path / "my.jsonl").write_text('{"problem": "What is 2 + 2?", "answer": "4"}\n'
                                       '{"problem": "What is 3 + 4?", "answer": 7}\n')
    evaluation = start("evaluate.py", "--model", folder, "--benchmarks", tmp_path / "my.jsonl", "--limit", 1,
                       "--max-response-tokens", 8, "--output", tmp_path / "eval.json")
    run = tmp_path / "run"
    process = start("one_shot_rlvr.py", *run_flags(folder, run, "--steps", 100000))
    while not (run / "metrics.jsonl").exists() or len(read_jsonl(run / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert f"--output-dir {run} --resume" in finish(process, 130)
    done = torch.load(run / "latest" / "state.pt", weights_only=True)["step"]
    assert done == read_jsonl(run / "metrics.jsonl")[-1]["step"] >= 3
    rl.main(["--output-dir", str(run), "--resume", "--steps", str(done + 2)])
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == list(range(1, done + 3))
    assert "average" in finish(evaluation) and len(read_jsonl(tmp_path / "eval.jsonl")) == 1


# -- C. Models, and several processes ----------------------------------------------------

def test_bf16_copy_keeps_the_rotary_frequencies(model):
    """model.to(bfloat16) would cast that buffer too, and far positions with it."""
    twin = rl.frozen_copy(model, bf16=True)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(twin.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not any(p.requires_grad for p in twin.parameters())

def test_in_bf16_the_kl_starts_at_zero(folder, tmp_path, easy_reward):
    """An all-bf16 reference differs from a policy under autocast: a KL above 0 before anything is learned."""
    rl.main(run_flags(folder, tmp_path / "run", "--precision", "bf16", "--kl-coef", "0.1"))
    kl = [row["kl"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert kl[0] == 0 and kl[-1] > 1e-4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step-000004", dtype="auto")
    assert saved.dtype == torch.bfloat16  # what was sampled from

def test_offloaded_optimizer_makes_the_same_update(folder, tmp_path, easy_reward):
    for name, more in [("here", []), ("there", ["--offload-optimizer"])]:
        rl.main(run_flags(folder, tmp_path / name, *more))
    assert read_jsonl(tmp_path / "here" / "metrics.jsonl")[0]["dead_groups"] < 1  # or nothing was learned
    assert same_weights(tmp_path / "here" / "step-000004", tmp_path / "there" / "step-000004")

def test_heads_that_are_refused(monkeypatch, refused):
    model = random_model()
    rl.check_head(model, PROMPTS[1])
    forward = model.forward

    def capped(**kwargs):
        output = forward(**kwargs)
        output.logits = torch.tanh(output.logits)
        return output
    monkeypatch.setattr(model, "forward", capped)
    assert "caps or scales" in refused(rl.check_head, model, PROMPTS[1])
    model.model.norm.weight.data[0] = math.nan
    assert "not finite" in refused(rl.check_head, model, PROMPTS[1])

@pytest.mark.parametrize("settings, words", [
    (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sees 8"),
    (dict(max_position_embeddings=8), "sees 8"), (dict(vocab_size=9), "embeddings")])
def test_models_that_do_not_see_a_whole_rollout_are_refused(settings, words, refused):
    """Beyond its context or window a model trains on noise; beyond its embeddings it fails."""
    model = random_model(**settings)
    rl.check_prompts(model, [[1, 2, 3, 8]], [4])
    assert words in refused(rl.check_prompts, model, [[1], [1, 2, 3, 9]], [4, 5])

def test_folders_that_lack_something_are_refused(folder, tmp_path, monkeypatch, refused):
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: x for name, x in model.state_dict().items() if "1.mlp.up" not in name}
    shutil.copytree(folder, tmp_path / "model")
    model.save_pretrained(tmp_path / "model", state_dict=weights)
    assert "lack model.layers.1.mlp.up_proj.weight" in refused(rl.load_model, str(tmp_path / "model"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "it has no preset" in refused(rl.main, ["--output-dir", str(tmp_path / "run"), "--resume"])
    with monkeypatch.context() as patch:
        patch.setattr(rl, "find_stop_ids", lambda *args: [])
        assert "a token that ends" in refused(rl.main, run_flags(folder, tmp_path / "new"))
    model.model.layers = None
    assert "layers of this model are not found" in refused(rl.compile_layers, model)
    nothing = GenerationConfig(input_ids=[])
    monkeypatch.setattr(rl.AutoTokenizer, "from_pretrained", lambda name: lambda text: nothing)
    assert "reads nothing" in refused(rl.load_model, str(folder))

def test_a_rank_that_a_shell_left_behind(monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        assert rl.start_processes() == (0, 1) and rl.is_first_process()

EASY = """import os, sys, time
import one_shot_rlvr as rl
rl.reward_of = lambda text, answer, kind: float(len(text) % 2)
if os.environ.get("DIES") == os.environ["RANK"]:
    train_on, calls = rl.train_on, []
    rl.train_on = lambda *args: calls.append(0) or (os._exit(7) if len(calls) == 2 else train_on(*args))
rl.main()
"""

def torchrun(tmp_path, *flags, **env):
    """Start the script on two processes."""
    (tmp_path / "easy.py").write_text(EASY)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "easy.py"), *flags], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(HERE), **env})

def test_two_processes_make_the_same_run(folder, tmp_path, easy_reward):
    """torchrun: the groups split over processes; what one began, two end; one dies, and the other ends."""
    (tmp_path / "two.jsonl").write_text('{"problem": "What is 2 + 2?", "answer": 4}\n'
                                        '{"problem": "What is 30 - 4?", "answer": 26}\n')
    flags = ["--prompts-per-step", "4", "--updates-per-batch", "2", "--loss-agg", "sequence",
             "--kl-coef", "0.1", "--example", str(tmp_path / "two.jsonl")]
    dying = torchrun(tmp_path, *run_flags(folder, tmp_path / "dies", *flags), DIES="1")
    rl.main(run_flags(folder, tmp_path / "two", *flags, "--steps", "2"))
    process = torchrun(tmp_path, "--output-dir", str(tmp_path / "two"), "--resume", "--steps", "4")
    rl.main(run_flags(folder, tmp_path / "one", *flags))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and out.count("step 4/4") == 1, err
    _, err = dying.communicate(timeout=240)
    assert dying.returncode != 0 and "easy.py FAILED" in err and "exitcode  : 7" in err
    rl.main(["--output-dir", str(tmp_path / "dies"), "--resume"])
    for name in ("two", "dies"):
        (one, samples), (two, samples_of_two) = comparable(tmp_path / "one"), comparable(tmp_path / name)
        assert [row["step"] for row in two] == [1, 2, 3, 4] and samples == samples_of_two
        for row_one, row_two in zip(one, two):
            assert row_two.pop("examples") == row_one.pop("examples")
            assert row_two == pytest.approx(row_one, rel=1e-3, abs=1e-5)
        a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "step-000004").state_dict()
                for run in ("one", name))
        assert max((a[key] - b[key]).abs().max() for key in a) < 1e-4
    assert not same_weights(folder, tmp_path / "one" / "step-000004")

def test_groups_that_processes_cannot_share_are_refused(folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(rl, "start_processes", lambda: (0, 2))
    flags = run_flags(folder, tmp_path / "run", "--prompts-per-step", "3")
    assert "--prompts-per-step 3: 2 processes" in refused(rl.main, flags)
    assert not (tmp_path / "run").exists()


# -- D. Compiled layers ------------------------------------------------------------------

@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, which are then run as they are: to compile them takes minutes."""
    made = []
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend",
                        lambda name: lambda graph, inputs: made.append(graph) or graph.forward)
    return made

def test_compiled_layers_compute_the_same_and_are_compiled_once(graphs, capsys):
    """One layer is compiled and all use it, in all lengths: at most three graphs."""
    plain, options = random_model(), dict(max_response_tokens=20, stop_ids=[3, 17], temperature=0)
    model = copy.deepcopy(plain)
    rl.compile_layers(model)
    expected = rl.generate(plain, PROMPTS, **options)
    assert rl.generate(model, PROMPTS, **options) == expected
    assert rl.generate(model, PROMPTS, slots=3, **options) == expected
    weights = [m.model.layers[1].mlp.up_proj.weight for m in (model, plain)]

    def logprobs_and_gradient(number, prompts, responses):
        logprobs, entropy, mask = rl.token_logprobs((model, plain)[number], prompts, responses, 0.6)
        return logprobs, torch.autograd.grad((logprobs + entropy).sum(), weights[number])[0]
    logprobs_and_gradient(0, PROMPTS, RESPONSES)
    after_a_step = len(graphs)
    written = [node.args[0].op for graph in graphs for node in graph.graph.nodes
               if node.target is operator.setitem]
    assert written and {*written} == {"placeholder"}  # through a view, the whole cache would be copied
    assert 1 <= after_a_step <= 3 and capsys.readouterr().out.count("compiled a layer in") == after_a_step
    for first in (1, 2, 3):  # other numbers of rows, other lengths
        assert rl.generate(model, PROMPTS[first:], slots=2 + first, **options) == expected[first:]
        for mine, theirs in zip(*(logprobs_and_gradient(number, PROMPTS[first:], RESPONSES[first:])
                                  for number in (0, 1))):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert len(graphs) == after_a_step

def test_a_compiled_run_is_killed_and_resumed(folder, tmp_path, easy_reward, graphs):
    flags = ["--compile", "--activation-checkpointing", "--offload-optimizer", "--precision", "bf16"]
    rl.main(run_flags(folder, tmp_path / "plain", *flags[1:]))
    rl.main(run_flags(folder, tmp_path / "whole", *flags))
    assert graphs and same_weights(tmp_path / "plain" / "step-000004", tmp_path / "whole" / "step-000004")
    rl.main(run_flags(folder, tmp_path / "cut", *flags, "--steps", 2))
    rl.main(["--output-dir", str(tmp_path / "cut"), "--resume", "--steps", "4"])
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    assert same_weights(tmp_path / "cut" / "step-000004", tmp_path / "whole" / "step-000004")

def test_what_cannot_be_compiled_runs_without(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nand much more")
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    model, options = random_model(), dict(max_response_tokens=4, stop_ids=[3], temperature=0)
    expected = rl.generate(model, PROMPTS, **options)
    rl.compile_layers(model)
    assert rl.generate(model, PROMPTS, **options) == expected
    assert "runs without (No working C++ compiler found)\n" in capsys.readouterr().out

@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes: SLOW=1 pytest")
def test_compiled_by_the_real_compiler():
    plain, options = random_model(), dict(max_response_tokens=20, stop_ids=[3, 17], temperature=0)
    model = copy.deepcopy(plain)
    rl.compile_layers(model)
    assert rl.generate(model, PROMPTS, **options) == rl.generate(plain, PROMPTS, **options)
    mine, theirs = (rl.token_logprobs(m, PROMPTS, RESPONSES, 0.6) for m in (model, plain))
    weights = [m.model.layers[1].mlp.up_proj.weight for m in (model, plain)]
    gradients = [torch.autograd.grad((x[0] + x[1]).sum(), weight)[0]
                 for x, weight in zip((mine, theirs), weights)]
    assert torch.allclose(mine[0], theirs[0], atol=1e-5) and torch.allclose(*gradients, rtol=1e-5, atol=1e-5)


# -- Evaluation --------------------------------------------------------------------------

@pytest.mark.parametrize("name, row, problem, answer", [
    ("math500", {"problem": "p", "solution": "\\boxed{2}", "answer": "1", "subject": "Algebra"}, "p", "1"),
    ("aime24", {"id": 60, "problem": "p", "solution": "\\boxed{204}", "answer": "204", "question": "q"}, "q",
     "204"),
    ("aime24", {"id": 60, "problem": "p", "solution": "$\\boxed{204}$", "url": ""}, "p", "204"),
    ("aime25", {"problem": "p", "answer": "70"}, "p", "70"),
    ("amc23", {"id": 0, "problem": "old", "answer": 27.0, "question": "q"}, "q", "27.0"),
    ("minerva_math", {"problem": "p", "solution": "\\boxed{1}, so \\boxed{\\frac{1}{2}}."}, "p",
     "\\frac{1}{2}"),
    ("minerva_math", {"question": "q", "answer": "4.5e33"}, "q", "4.5e33"),
    ("olympiadbench", {"context": None, "question": "q", "final_answer": ["$3$", "4"]}, "q", "$3$"),
    ("olympiadbench", {"context": "Let x.", "question": "q", "final_answer": ["3"]}, "Let x.\nq", "3"),
    ("olympiadbench", {"question": "q", "final_answer": "34"}, "q", "34")])
def test_loaders_on_each_layout(tmp_path, monkeypatch, name, row, problem, answer):
    """Each of the paper's files and each hub set: the same rows from either."""
    (tmp_path / f"{name}.jsonl").write_text("\n" + json.dumps(row) + "\n")
    local = evaluate.load_benchmark(name, tmp_path)
    assert local == evaluate.load_benchmark(str(tmp_path / f"{name}.jsonl"))
    assert (local[0]["problem"], local[0]["answer"]) == (problem, answer)
    assert local[0].get("subject") == row.get("subject")
    seen = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: seen.append((args, kwargs)) or [row])
    assert evaluate.load_benchmark(name) == local
    assert seen == [((evaluate.BENCHMARKS[name][0],), {"split": "test"})]

@pytest.mark.parametrize("lines, words", [
    ('{"problem": "p", "answer": 1}\n\n{"problem": "p"}', "line 3"), ("[1]", "line 1"), ("", "no problems"),
    ('{"problem": "p", "answer": 1}\n{"prob', "line 2"), ('{"problem": "p", "solution": "no box"}', "line 1"),
    ('{"question": "", "answer": 1}', "line 1"), ('{"problem": " ", "answer": 1}', "line 1")])
def test_a_broken_file_is_named_by_its_line(tmp_path, lines, words, refused):
    (tmp_path / "my.jsonl").write_text(lines)
    sentence = refused(evaluate.load_benchmark, str(tmp_path / "my.jsonl"))
    assert words in sentence and "my.jsonl" in sentence

@pytest.mark.parametrize("answer", ["so 70 + 2 = 72\n#### 72", "['70']", '["a", "b"]', " ", "x" * 401])
def test_answers_that_can_never_be_met_are_warned_of(tmp_path, capsys, answer):
    rows = [{"problem": "p", "answer": label} for label in (answer, "[0,1)", 2)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(evaluate.load_benchmarks([str(tmp_path / "my.jsonl")])["my"]) == 3
    assert "my.jsonl: 1 of 3 answers" in capsys.readouterr().out
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    evaluate.load_benchmarks([str(tmp_path / "my.jsonl")])
    assert capsys.readouterr().out == ""

def test_the_papers_protocol():
    assert {name: evaluate.protocol(name) for name in evaluate.PAPER} == {
        "math500": (1, 0.0), "aime24": (8, 0.6), "amc23": (8, 0.6), "minerva_math": (1, 0.0),
        "olympiadbench": (1, 0.0), "aime25": (8, 0.6)}
    assert evaluate.protocol("my") == (1, 0.0) and evaluate.protocol("tiny_add") == (4, 0.6)
    assert evaluate.protocol("aime24", temperature=0.0) == (1, 0.0)
    assert evaluate.protocol("my", 16, 1.0) == (16, 1.0)

def test_pass_at_k_equals_brute_force():
    for n, right, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if right <= n and k <= n:
            subsets = list(itertools.combinations([i < right for i in range(n)], k))
            assert evaluate.pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))

def checked_rows(right, name="x", **more):
    """Rows as sample_and_check makes them; right: a list of samples for each problem."""
    return [{"benchmark": name, "number": number, "sample": sample, "temperature": 0.6,
             "problem": f"q{number}", "answer": "4", "text": "recheck \\boxed{4}" * ok,
             "extracted": "4" if ok else None, "correct": bool(ok), "correct_lenient": True,
             "tokens": 10 + sample, "truncated": not ok, "too_long": False,
             **{key: values[number] for key, values in more.items()}}
            for number, samples in enumerate(right) for sample, ok in enumerate(samples)]

def test_measures_by_hand():
    rows = checked_rows([[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]], level=[1, 2, 1])
    rows[2]["text"] = "\\boxed{ }"  # an empty box boxes nothing
    rows[3]["text"], rows[4]["text"] = "```python\nprint(4)\n``` ", "```python\n``` \\boxed{4}\n```"
    m = evaluate.measure(rows)
    assert (m["n"], m["k"], m["temperature"]) == (3, 4, 0.6)
    assert m["avg_at_k"] == pytest.approx((0.5 + 0.25 + 1) / 3) and m["pass_at_k"] == 1
    assert m["stderr"] == pytest.approx(np.std([0.5, 0.25, 1], ddof=1) / math.sqrt(3))
    assert m["pass_at"] == pytest.approx({1: m["avg_at_k"], 2: (5 / 6 + 1 / 2 + 1) / 3, 4: 1})
    assert m["lenient"]["avg_at_k"] == 1 and m["lenient"]["stderr"] == 0
    assert (m["boxed"], m["truncated"], m["mean_length"]) == pytest.approx((8 / 12, 5 / 12, 11.5))
    assert (m["self_reflection"], m["code"], m["would_run"]) == pytest.approx((7 / 12, 2 / 12, 1 / 12))
    result = evaluate.measure_all(rows + checked_rows([[False]], "y"), ["y", "x"])
    assert list(result["benchmarks"]) == ["y", "x"]
    assert result["average"] == pytest.approx(m["avg_at_k"] / 2)
    by_level = result["benchmarks"]["x"]["by_level"]
    assert {level: measures["avg_at_k"] for level, measures in by_level.items()} == {1: 0.75, 2: 0.25}
    assert result["benchmarks"]["y"]["stderr"] is None and "by_level" not in result["benchmarks"]["y"]

@pytest.mark.parametrize("verdicts, answer, response", [
    ("++", "4", r"It is \boxed{4}."), ("-+", "4", "So 3 + 1 gives 4."), ("--", "4", "4, not 5."),
    ("-+", "12.8", "The answer is 12.8 mph"), ("-+", "12.8", "The final answer is: $12.8$."),
    ("-+", "12.8", r"cut short: \boxed{12.8"), ("+-", "4", r"\boxed{4} or \boxed{5"),
    ("-+", r"\frac43", r"\boxed{1.33333}"), ("--", r"\frac43", r"\boxed{1.333}"),
    ("-+", "50", r"\boxed{0.5}"), ("-+", r"50\%", r"\boxed{0.5}"), ("-+", "50", r"\boxed{5000}"),
    ("--", "50", r"\boxed{500}"), ("-+", "50", r"\boxed{50.004}"), ("--", "50", r"\boxed{50.01}"),
    ("-+", r"\sqrt2", r"\boxed{1.41421}"), ("-+", r"(\frac13,2)", r"\boxed{(0.33333, 2)}"),
    ("+-", "3,5,7", r"\boxed{7,5,3}"), ("++", "3,5,7", r"\boxed{\{3,5,7\}}"), ("-+", "1234", "It is 1,234."),
    ("+-", r"(0,1)\cup(3,\infty)", r"\boxed{(3,\infty)\cup(0,1)}"), ("--", "4", ""), ("--", "4", "no number"),
    ("--", "4", r"\boxed{}"), ("-+", r"\boxed{4}", "4"), ("--", "2^{2001}", r"\boxed{2^{2000}}")])
def test_the_lenient_verdict_of_the_papers_evaluation(verdicts, answer, response):
    """The reward's verdict, then the evaluation's."""
    assert [rl.is_correct(response, answer), evaluate.is_correct_lenient(response, answer)] == [
        verdict == "+" for verdict in verdicts]

MY_PROBLEMS = [{"problem": f"What is {a} + {b}?", "answer": a + b, "level": a % 2}
               for a, b in [(2, 2), (3, 4), (11, 5), (20, 6), (1, 1)]]

@pytest.fixture
def my_flags(folder, tmp_path, monkeypatch):
    """An evaluation of a random model on five problems and on one more set, three samples each."""
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text("\n".join(map(json.dumps, MY_PROBLEMS)))
    Path("more.jsonl").write_text(json.dumps(MY_PROBLEMS[0]))  # another benchmark, another noise
    return lambda *more: ["--model", str(folder), "--benchmarks", "my.jsonl", "more.jsonl", "--k", "3",
                          "--temperature", "1", "--max-response-tokens", "16", "--output", "e.json",
                          *map(str, more)]

def responses_in(path):
    return sorted(read_jsonl(path), key=lambda row: (row["benchmark"], row["number"], row["sample"]))

def test_slots_and_interruptions_change_no_response(my_flags, monkeypatch):
    """The noise belongs to problem and sample: a multinomial over the batch would change."""
    evaluate.main(my_flags())
    whole, result = responses_in("e.jsonl"), json.loads(Path("e.json").read_text())
    assert len(whole) == 18 and len({row["text"] for row in whole}) == 18
    for slots in (1, 4):
        evaluate.main(my_flags("--slots", slots, "--output", f"slots{slots}.json"))
        assert responses_in(f"slots{slots}.jsonl") == whole
    real, sampled, calls = rl.append_rows, [], itertools.count(1)

    def killed(path, rows, mode="a"):
        if mode == "a" and next(calls) == 6:
            with open(path, "a") as file:
                file.write(json.dumps(rows[0])[:40])  # cut short while writing
            raise KeyboardInterrupt("killed")
        real(path, rows, mode)
    monkeypatch.setattr(rl, "append_rows", killed)
    with pytest.raises(KeyboardInterrupt, match="killed"):
        evaluate.main(my_flags("--output", "cut.json", "--slots", "4"))
    monkeypatch.setattr(rl, "append_rows", real)
    assert json.loads(Path("cut.json").read_text())["average"] is None
    generate_each = rl.generate_each
    monkeypatch.setattr(rl, "generate_each", lambda model, prompts, *args: sampled.append(len(prompts)) or
                        generate_each(model, prompts, *args))
    evaluate.main(my_flags("--output", "cut.json"))
    assert sampled == [18 - 5] and responses_in("cut.jsonl") == whole
    again = json.loads(Path("cut.json").read_text())
    assert {**again, "tokens_per_second": 0} == {**result, "tokens_per_second": 0}

def test_an_evaluation_is_not_overwritten_and_settings_do_not_mix(my_flags, capsys, monkeypatch, refused):
    evaluate.main(my_flags())
    before = Path("e.json").read_text(), Path("e.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(rl, "load_model", None)  # done is done: no model is loaded
        capsys.readouterr()
        evaluate.main(my_flags("--by", "level", "--lenient"))
        levels = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        assert levels == ["2", "3", "1"]  # even and odd; odd
        for more, words in [(["--k", "2"], "k 3"), (["--seed", "1"], "seed 0"), (["--limit", "1"], "limit"),
                            (["--benchmarks", "my.jsonl"], "benchmarks")]:
            sentence = refused(evaluate.main, my_flags(*more))
            assert words in sentence and "another --output" in sentence
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "crc_of_weights", lambda model_name: 0)
        assert "weights_crc32" in refused(evaluate.main, my_flags())
    assert "would go into my.jsonl" in refused(evaluate.main, my_flags("--output", "my.json"))
    Path("e.json").rename("gone.json")
    assert "e.json is gone" in refused(evaluate.main, my_flags())
    Path("gone.json").rename("e.json")
    assert before == (Path("e.json").read_text(), Path("e.jsonl").read_text())

@pytest.mark.parametrize("rows", [
    [{**row, "answer": 5} for row in MY_PROBLEMS], MY_PROBLEMS[:2], [*MY_PROBLEMS, MY_PROBLEMS[0]]])
def test_problems_that_changed_and_a_second_writer_are_refused(my_flags, monkeypatch, rows, refused):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate, "measure_all", lambda *args: 1 / 0)
        evaluate.main(my_flags())
    before = Path("e.jsonl").read_text()
    with FileLock("e.lock"), monkeypatch.context() as patch:
        patch.setattr(rl, "load_model", None)  # before anything is read: the other may write other settings
        assert "e.lock is in use" in refused(rl.as_a_command, lambda: evaluate.main(my_flags()))
    Path("my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "problems_crc32" in refused(evaluate.main, my_flags())
    assert Path("e.jsonl").read_text() == before

def test_a_problem_longer_than_the_context_is_counted(folder, tmp_path, capsys, monkeypatch):
    """The model takes 256 tokens: one problem fills them, one leaves room for a short response."""
    monkeypatch.setattr(rl, "find_stop_ids", lambda *args: [])
    rows = [{"problem": n * "cats ", "answer": 4} for n in (5, 40, 300)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate.main(["--model", str(folder), "--benchmarks", str(tmp_path / "my.jsonl"),
                   "--max-response-tokens", "200", "--output", str(tmp_path / "e.json")])
    rows = responses_in(tmp_path / "e.jsonl")
    m = json.loads((tmp_path / "e.json").read_text())["benchmarks"]["my"]
    assert m["n"] == 3 and m["too_long"] == 1
    assert "1 problems fill the model's context" in capsys.readouterr().out
    assert rows[2]["too_long"] and not rows[2]["correct"] and rows[2]["tokens"] == 0
    assert 0 < rows[1]["tokens"] < 200 == rows[0]["tokens"]

def two_evaluations(tmp_path, a, b, **more):
    """Files of two evaluations, right as a and b say -> their paths."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, rows in zip(paths, (a, b)):
        rl.append_rows(path.with_suffix(".jsonl"), rows)
        names = list(dict.fromkeys(row["benchmark"] for row in rows))
        settings = {"seed": 0, "dtype": path.stem}
        rl.write_json(path, {"model": path.stem, "settings": settings, **evaluate.measure_all(rows, names)})
    return list(map(str, paths))

def verdict(difference):
    differ = np.count_nonzero(difference)
    z = difference.mean() / (difference.std(ddof=1) / math.sqrt(len(difference)))
    return "too few problems differ" if differ < 6 else "B is better" if z > 2 else "within noise"

def test_compare_pairs_the_problems(tmp_path, capsys, refused):
    """The standard error is that of the differences: two unpaired ones would call this noise."""
    rng = random.Random(0)
    a = [[rng.random() < 0.5] for _ in range(40)]
    b = [[ok or number % 5 == 0] for number, [ok] in enumerate(a)]  # B loses nothing and wins some
    subjects = ["Algebra", "Geometry"] * 20
    small = [checked_rows(right[:3], "small") for right in (a, b)]
    other = small[1][:-1] + checked_rows([[True]], "other")
    paths = two_evaluations(tmp_path, checked_rows(a, subject=subjects) + small[0],
                            checked_rows(b, subject=subjects) + other)
    evaluate.main(["--compare", *paths])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    difference = np.array([y[0] - x[0] for x, y in zip(np.array(a, float), np.array(b, float))])
    assert lines["x"][1:] == ["40", f"{100 * np.mean(a):.1f}", f"{100 * np.mean(b):.1f}",
                              f"{100 * difference.mean():+.1f}",
                              f"{100 * difference.std(ddof=1) / math.sqrt(40):.1f}",
                              str(int(difference.sum())), "0", *verdict(difference).split()]
    errors = [part.std(ddof=1) / math.sqrt(len(part)) for part in (difference, difference[:2])]
    assert lines["average"][1] == "42" and lines["average"][5] == f"{100 * math.hypot(*errors) / 2:.1f}"
    assert "dtype is a in A, b in B" in out and "  Algebra" in out and "  Geometry" in out
    assert lines["small"][1] == "2" and "other" not in out
    assert "none.json" in refused(evaluate.main, ["--compare", paths[0], str(tmp_path / "none.json")])
def test_benchmarks_that_share_a_subject_are_compared_apart(tmp_path, capsys, refused):
    a, b = ([*checked_rows([[ok]], "x", subject=["Algebra"]),
             *checked_rows([[1]], "average", subject=["Algebra"])] for ok in (0, 1))
    path_a, path_b = two_evaluations(tmp_path, a, b)
    evaluate.main(["--compare", path_a, path_b])
    lines = [line.split()[:5] for line in capsys.readouterr().out.splitlines() if "  100.0" in line]
    assert lines == [["x", "1", "0.0", "100.0", "+100.0"], ["Algebra", "1", "0.0", "100.0", "+100.0"],
                     ["average", "1", "100.0", "100.0", "+0.0"], ["Algebra", "1", "100.0", "100.0", "+0.0"],
                     ["average", "2", "50.0", "100.0", "+50.0"]]
    rl.write_json(path_b, {**rl.read_json(path_b), "average": None})
    assert "not the .json of a finished" in refused(evaluate.main, ["--compare", path_a, path_b])
    (tmp_path / "other").mkdir()
    others = two_evaluations(tmp_path / "other", checked_rows([[1]], "y"), checked_rows([[1]], "z"))
    assert "no problem in common" in refused(evaluate.main, ["--compare", *others])
    names = [f"{tmp_path}/y.jsonl", f"{tmp_path}/other/y.jsonl"]
    assert "two benchmarks y" in refused(evaluate.load_benchmarks, names)

def test_compare_by_level_and_lenient(tmp_path, capsys):
    a, b = ([{**row, "correct_lenient": False, "level": 1}
             for row in checked_rows([[ok]] * 2, subject=["Algebra"] * 2)] for ok in (0, 1))
    paths = two_evaluations(tmp_path, a, b)
    evaluate.main(["--compare", *paths])
    out = capsys.readouterr().out
    assert "dtype is a" in out and "seed is" not in out and "  Algebra" in out and "+100.0" in out
    evaluate.main(["--compare", *paths, "--lenient", "--by", "level"])
    out = capsys.readouterr().out
    assert "+100.0" not in out and "Algebra" not in out and "\n  1  " in out

def test_how_much_of_a_difference_is_format(tmp_path, capsys):
    """Four problems are won: one had a box before, two came to their end; of two lost, one keeps its box."""
    a = checked_rows([[False]] * 4 + [[True]] * 2 + [[True]])
    b = checked_rows([[True]] * 4 + [[False]] * 2 + [[True]])
    a[0]["text"], b[4]["text"] = "\\boxed{5}", "so \\boxed{7}"
    a[1]["truncated"] = a[2]["truncated"] = False
    evaluate.main(["--compare", *two_evaluations(tmp_path, a, b)])
    assert capsys.readouterr().out.rstrip().splitlines()[-4:] == [
        "won, responses of A: 25% boxed, 50% came to their end",
        "won, responses of B: 100% boxed, 100% came to their end",
        "lost, responses of A: 100% boxed, 100% came to their end",
        "lost, responses of B: 50% boxed, 0% came to their end"]

@pytest.mark.parametrize("b, won, words", [
    (0.59, 20, "within noise"), (0.61, 20, "B is better"), (0.39, 0, "A is better"),
    (0.41, 0, "within noise"), (0.9, 5, "too few problems differ")])
def test_a_difference_counts_from_two_standard_errors_on(b, won, words):
    difference = {"a": 0.5, "b": b, "stderr": 0.05, "won": range(won), "lost": range(20 if b < 0.5 else 0)}
    assert evaluate.conclusion(difference) == words

def test_a_curve_of_a_run(folder, tmp_path, easy_reward, monkeypatch, refused):
    run = tmp_path / "run"
    rl.main(run_flags(folder, run))
    (run / "metrics.jsonl").open("a").write('{"step": 5, "rew')  # the run may be going on
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, MY_PROBLEMS)))
    flags = ["--run", str(run), "--benchmarks", str(tmp_path / "my.jsonl"), "--max-response-tokens", "8"]
    (run / "step-abcdef").mkdir()
    evaluate.main(flags)
    curve = read_jsonl(run / "curve.jsonl")
    rewards = [row["reward"] for row in rl.read_log(run / "metrics.jsonl")]
    assert [row["step"] for row in curve] == [0, 2, 4]
    assert [row["reward"] for row in curve] == [rewards[0], rewards[1], rewards[3]]
    assert set(curve[0]) == {"step", "reward", "average", "my"}
    assert json.loads((run / "step-000004" / "eval.json").read_text())["average"] == curve[2]["average"]
    loaded, load_model = [], rl.load_model
    monkeypatch.setattr(rl, "load_model",
                        lambda name, dtype: loaded.append(Path(name).name) or load_model(name, dtype))
    (run / "step-000002" / "eval.json").unlink()
    (run / "step-000002" / "eval.jsonl").unlink()
    evaluate.main(flags)
    assert loaded == ["step-000002"] and read_jsonl(run / "curve.jsonl") == curve
    for name, words in (("samples.jsonl", "something else than a curve"), ("metrics.jsonl", "not JSON")):
        before = (run / name).read_text()
        assert words in refused(evaluate.main, [*flags, "--output", str(run / name)])
        assert (run / name).read_text() == before

@pytest.mark.parametrize("flags, words", [
    (["--benchmarks", "nope"], "nope"), (["--limit", "0"], "--limit 0"), (["--k", "0"], "--k 0"),
    (["--k", "4"], "greedy"), (["--benchmarks", "x.parquet"], "or a .jsonl file"),
    (["--output", "x.txt"], ".json"), (["--seed", "-1"], "--seed -1"), (["--run", "no_run"], "no_run"),
    (["--compare", "a.json", "b.json"], "a.json"), (["--compare", "a.json"], "two files"),
    (["--temperature", "nan"], "--temperature nan"), (["--temperature", "-1"], "--temperature -1"),
    (["--model", "no/such/model", "--benchmarks", "tiny_add"], "no/such/model"),
    (["--benchmarks", "math500", "--data-dir", "no_such_dir"], "math500.jsonl")])
def test_evaluate_refuses_in_one_sentence(folder, flags, words, monkeypatch, tmp_path, refused):
    """Before anything is fetched: --output x.txt was refused only after the six sets had come."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)
    model = [] if {"--run", "--compare"} & {*flags} else ["--model", str(folder), "--benchmarks", "math500"]
    assert words in refused(evaluate.main, [*model, *flags]) and not any(tmp_path.iterdir())

def test_evaluate_needs_no_lab():
    """Copied to a GPU without labs/, the two scripts run; the tiny world alone is built by a lab."""
    assert "labs" not in re.sub(r'"""[^"]*"""', "", (HERE / "evaluate.py").read_text())
    assert re.findall("(?:from|import) labs.*",
                      (HERE / "one_shot_rlvr.py").read_text()) == ["from labs import tiny"]
