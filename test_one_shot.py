"""Tests of one_shot_rlvr.py, evaluate.py and labs/: no network, no GPU, no weights but those made here.

Each equation and mechanism is held against the slowest, most obvious version of itself. A docstring says which bug of a
public implementation the test would have caught.

    pytest
"""
import copy
import gc
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import evaluate
import one_shot_rlvr as rl
from labs import benchmark, miniature, plot, ppo, select_example, tiny

HERE = Path(__file__).resolve().parent


def random_model(seed=0, vocab_size=50, **kwargs):
    """A two-layer Qwen2 with random weights, large enough that its next token is far from uniform."""
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=True, **kwargs)
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model():
    return random_model()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face folder with the tiny world's tokenizer and a random model: enough to run every command on."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny.make_tokenizer()
    model = random_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_flags(folder, output_dir, *more):
    return ["--model", str(folder), "--example", "pi2", "--output-dir", str(output_dir), "--prompts-per-step", "2", "--group-size", "4",
            "--max-response-tokens", "12", "--learning-rate", "1e-2", "--steps", "4", "--save-every", "2", *map(str, more)]


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def easy_reward(monkeypatch):
    """A reward that a random model gets about half of the time, so that there is a gradient."""
    monkeypatch.setattr(rl, "reward_of", lambda text, answer, kind: float(len(text) % 2))


def same_weights(folder_a, folder_b):
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder_a, folder_b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 3], [9], [4, 5, 6, 7, 8], [1, 2, 3], [10, 11, 12, 13]]


# ----------------------------------------------------------------------------------------------------------------------
# 1. Example and prompt
# ----------------------------------------------------------------------------------------------------------------------

def test_paper_examples_are_exact():
    """A training prompt is data: one lost space and it is another experiment."""
    examples = json.loads((HERE / "examples.json").read_text())
    paper = {name: e for name, e in examples.items() if name.startswith("pi")}
    assert list(paper) == [f"pi{i}" for i in [*range(1, 18), 605, 606, 1201, 1207, 1208, 1209]]
    text = "\n".join(f"{name} {e['problem']} {e['answer']}" for name, e in paper.items())
    assert hashlib.sha256(text.encode()).hexdigest() == PAPER_EXAMPLES_SHA256


PAPER_EXAMPLES_SHA256 = "8563f0f05ae3646e9c01b08af7bec915b7438d3dda18f20e2e92b1e962d8696b"


def test_examples_share_a_step_evenly_and_epochs_do_not_repeat():
    from collections import Counter
    assert Counter(rl.examples_of_step(3, 2, 128, seed=0)) == {0: 64, 1: 64}
    assert sorted(Counter(rl.examples_of_step(1, 3, 128, seed=0)).values()) == [42, 43, 43]
    stream = [i for step in range(1, 11) for i in rl.examples_of_step(step, 20, 8, seed=1)]          # 80 draws = 4 epochs
    epochs = [stream[e:e + 20] for e in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_load_examples_from_files(tmp_path, capsys):
    rows = [{"problem": "1+1?", "answer": 2}, {"problem": "2+2?", "answer": "4", "name": "four"}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "set.json").write_text(json.dumps(rows))
    loaded = rl.load_examples([str(tmp_path / "set.jsonl")])
    assert loaded == rl.load_examples([str(tmp_path / "set.json")])
    assert loaded == [{"name": "set-1", "problem": "1+1?", "answer": "2"}, {"name": "four", "problem": "2+2?", "answer": "4"}]
    (tmp_path / "one.json").write_text(json.dumps(rows[0]))
    assert rl.load_examples([str(tmp_path / "one.json"), "pi1"])[0]["name"] == "one"
    assert [e["answer"] for e in rl.load_examples(["pi1"], answer="4")] == ["4"]
    (tmp_path / "broken.jsonl").write_text('{"problem": "1+1?", "answer": 2}\n{"problem": \n')
    for names, words in [(["pi99"], ["pi99", "pi1", "pi1209"]), ([str(tmp_path / "broken.jsonl")], ["broken.jsonl", "line 2"]),
                         ([str(tmp_path / "none.json")], ["none.json"]), (["pi1", "pi2", "pi1"], ["pi1 is there twice"])]:
        with pytest.raises(SystemExit) as stop:
            rl.load_examples(names)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words)
    (tmp_path / "marked.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8-sig")              # as some editors write
    assert rl.load_examples([str(tmp_path / "marked.jsonl")])[0]["problem"] == "1+1?"
    for row in ({"problem": "1+1?"}, {"problem": "1+1?", "answer": None}, {"problem": "1+1?", "answer": [2]}, {"problem": 2, "answer": 2}, 5):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row))
        with pytest.raises(SystemExit):
            rl.load_examples([str(tmp_path / "bad.jsonl")])
        assert "bad.jsonl, row 1" in capsys.readouterr().err


CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nDEFAULT<|im_end|>\n{% endif %}"
          "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_SYSTEM = ("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
             "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DROPS_SYSTEM = ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize("template, with_system, without", [
    (CHATML, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
     "<|im_start|>system\nDEFAULT<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
    (NO_SYSTEM, *2 * ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",)),
    (DROPS_SYSTEM, *2 * ("<|im_start|>user\n2+2?<|endoftext|><|im_start|>assistant\n",)),
    (None, "2+2?", "2+2?")])
def test_encode_prompt(template, with_system, without):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    assert tokenizer.decode(rl.encode_prompt(tokenizer, "2+2?")) == without
    assert tokenizer.decode(rl.encode_prompt(tokenizer, "2+2?", system="Be brief.")) == with_system


def test_stop_ids_are_the_union_of_three_sources():
    """A base model's configuration names <|endoftext|> alone; its chat template ends a turn with <|im_end|>."""
    tokenizer = tiny.make_tokenizer()
    end_of_text, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|endoftext|>"
    assert rl.find_stop_ids(tokenizer, GenerationConfig(eos_token_id=end_of_text)) == sorted({end_of_text, im_end})
    tokenizer.chat_template = None
    assert rl.find_stop_ids(tokenizer, GenerationConfig(eos_token_id=[7, 9])) == sorted({7, 9, end_of_text})
    tokenizer.chat_template = DROPS_SYSTEM
    assert rl.find_stop_ids(tokenizer, GenerationConfig()) == [end_of_text]
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n{% endfor %}", "<|im_end|><|im_start|>\n{% endfor %}")          # opens the next turn
    assert rl.find_stop_ids(tokenizer, GenerationConfig()) == sorted({end_of_text, im_end})


# ----------------------------------------------------------------------------------------------------------------------
# 2. Rollouts
# ----------------------------------------------------------------------------------------------------------------------

def slow_generate(model, prompts, max_response_tokens, temperature, stop_ids, noise):
    """No cache, no batch: the whole sequence again for every token; noise (N, T) picks from the cumulative softmax."""
    responses = []
    for prompt, row in zip(prompts, noise):
        response = []
        while len(response) < max_response_tokens and not (response and response[-1] in stop_ids):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, -1].double()
            if temperature == 0:
                response.append(int(logits.argmax()))
            else:
                cumulative = (logits / temperature).softmax(-1).cumsum(-1)
                response.append(int((cumulative <= row[len(response)]).sum()))
        responses.append(response)
    return responses


def ragged_loop(query, key, value, cu_q, cu_k, max_q, max_k, dropout, is_causal, *, return_debug_mask, scale, seqused_k):
    """torch's flash attention, which only CUDA has, row by row: b attends to the first seqused_k[b] keys from cu_k[b] on."""
    output = torch.empty_like(query)
    for b, used in enumerate(seqused_k):
        k, v = (x[cu_k[b]:cu_k[b] + used].repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        weights = (scale * (query[b] * k).sum(-1)).softmax(0)                                     # (keys, heads)
        output[b] = (weights[..., None] * v).sum(0)
    assert max_q == 1 and dropout == 0 and not is_causal and cu_q.tolist() == list(range(len(query) + 1)) and int(seqused_k.max()) <= max_k
    return output, None, None


@pytest.mark.parametrize("path", ["plain", "graph", "ragged"])
@pytest.mark.parametrize("slots", [1, 2, 3, None])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.3])
def test_generate_equals_the_slow_loop(slots, temperature, path, monkeypatch):
    """Also: mixed prompt lengths, a prompt of one token, and stop tokens that end rows at different times.

    graph: with the fixed shapes of a CUDA graph, where rows that have ended are computed too; ragged: with CUDA's kernel.
    """
    model, stop_ids = random_model(), [3, 17, 40, 41, 42]
    noise = torch.rand(len(PROMPTS), 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = slow_generate(model, PROMPTS, 20, temperature, stop_ids, noise)
    calls = itertools.count()
    monkeypatch.setattr(rl, "can_read_ragged", lambda model: path == "ragged")
    monkeypatch.setattr(rl, "flash_attention", lambda *args, **kwargs: next(calls) and None or ragged_loop(*args, **kwargs))
    responses = rl.generate(model, PROMPTS, max_response_tokens=20, temperature=temperature, stop_ids=stop_ids, slots=slots,
                            generator=torch.Generator().manual_seed(5), cuda_graph=path != "plain")
    assert responses == expected and (next(calls) > 0) == (path == "ragged")
    if temperature:
        assert len({len(r) for r in responses}) > 2           # or this test has not seen rows end at different times


def test_a_graph_that_computes_something_else_is_found_out(monkeypatch, capsys):
    monkeypatch.setattr(rl, "can_read_ragged", lambda model: True)
    monkeypatch.setattr(rl, "flash_attention", lambda query, *args, **kwargs: (query, None))
    with pytest.raises(SystemExit) as stop:
        rl.generate(random_model(), PROMPTS, max_response_tokens=20, temperature=1.0, stop_ids=[3], cuda_graph=True)
    assert stop.value.code == 2 and "--no-cuda-graph" in capsys.readouterr().err


def test_greedy_equals_transformers(model):
    for prompt, response in zip(PROMPTS, rl.generate(model, PROMPTS, max_response_tokens=24, temperature=0, stop_ids=[3, 17])):
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                                max_new_tokens=24, eos_token_id=[3, 17], pad_token_id=0)[0, len(prompt):].tolist()
        assert response == theirs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_cuda_samples_what_the_cpu_samples(cuda_graph):
    """Greedy tokens in float32 are transformers' own; in bf16, with flash attention in the graph, nearly the trainer's."""
    model = random_model().cuda()
    options = dict(max_response_tokens=24, stop_ids=[3, 17], cuda_graph=cuda_graph)
    assert rl.generate(model, PROMPTS, temperature=0, **options) == rl.generate(model.cpu(), PROMPTS, max_response_tokens=24, temperature=0, stop_ids=[3, 17])
    sampler = rl.frozen_copy(model.cuda(), bf16=True)
    responses, sampled = rl.generate(sampler, PROMPTS, temperature=0.6, return_logprobs=True, **options)
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, responses, 0.6)
    assert (torch.cat(sampled).cuda() - logprobs[mask]).abs().mean() < 0.1


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -2.0, 3.0, -1e9]]).expand(200_000, -1)
    noise = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.6, 1.0):
        share = rl.sample_tokens(logits, torch.full((200_000,), temperature), noise)[0].bincount(minlength=5) / 200_000
        assert torch.allclose(share, (logits[0] / temperature).softmax(-1), atol=4e-3)
        assert share[4] == 0
    edge = rl.sample_tokens(logits[:2], torch.ones(2), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert edge[0].tolist() == [0, 3]                      # a token of probability 0 is not drawn, not even at the edges
    close = torch.tensor([[0.0, 1.0, 1.0 + 2**-23]]).expand(2, -1)
    assert rl.sample_tokens(close, torch.zeros(2), torch.tensor([0.0, 0.9]).double())[0].tolist() == [2, 2]       # greedy, whatever the noise


@pytest.mark.parametrize("target, index", [(-1e-17, 1), (0.0, 1), (0.25, 1), (0.5, 2), (1.0, 2)])
def test_rounding_leads_to_no_weight_of_0_and_not_past_the_end(target, index):
    weights = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert rl.first_past(weights, torch.tensor([target], dtype=torch.float64))[0].item() == index


def test_noise_is_new_in_each_step_and_the_same_when_made_again():
    size = dict(prompts_per_step=2, group_size=3, max_response_tokens=4)
    noise = [rl.noise_of_step(rl.Config(seed=seed, **size), step, 0, 1) for seed in (0, 1) for step in range(1, 5)]
    assert len({float(x[0, 0]) for x in noise}) == 8 and noise[0].shape == (6, 4)
    assert torch.equal(noise[0], rl.noise_of_step(rl.Config(**size), 1, 0, 1))


def test_work_follows_the_sampled_tokens(model, monkeypatch):
    """One prefill for equal prompts, and not one row-step more than tokens: nobody waits for the longest response."""
    prefilled, row_steps, forward = [], [], model.forward

    def counting(**kwargs):
        n, t = kwargs["input_ids"].shape
        prefilled.append(t) if t > 1 else row_steps.append(n)
        return forward(**kwargs)
    monkeypatch.setattr(model, "forward", counting)
    prompts = 12 * [PROMPTS[1]] + 5 * [PROMPTS[0]] + 3 * [PROMPTS[1]]
    responses = rl.generate(model, prompts, max_response_tokens=30, temperature=1.0, stop_ids=list(range(6)), slots=4,
                            generator=torch.Generator().manual_seed(0))
    assert sorted(prefilled) == [len(PROMPTS[0]) - 1, len(PROMPTS[1]) - 1]
    assert sum(row_steps) == sum(map(len, responses)) and max(row_steps) == 4
    assert len(row_steps) < 30 * 20 / 4                 # batches of 4 that wait for their longest would take more


def test_generate_refuses_an_empty_prompt(model):
    with pytest.raises(ValueError, match="empty prompt"):
        rl.generate(model, [[1], []], max_response_tokens=2, temperature=1.0, stop_ids=[0])
    assert rl.generate(model, [], max_response_tokens=2, temperature=1.0, stop_ids=[0]) == []


# ----------------------------------------------------------------------------------------------------------------------
# 3. Reward
# ----------------------------------------------------------------------------------------------------------------------

CHECKER_RULES = {
    "numbers by value": [
        ("12.8", "12.8", True), ("64/5", "12.8", True), (r"\frac{64}{5}", "12.8", True), ("12.80", "12.8", True),
        (r"12\frac45", "12.8", True), ("12.7", "12.8", False), ("12.70", "12.8", False), ("12.699", "12.8", False),
        (r"8\sqrt[3]{4}", "12.8", False), ("13", "12.8", False), ("027", "27.0", True), (".5", r"\frac12", True),
        ("0.5", "1/2", True), (r"\frac{8}{6}", r"\frac{4}{3}", True), ("1.3333", r"\frac{4}{3}", False),
        (r"\frac{-1}{2}", r"-\frac{1}{2}", True), (r"\frac{1}{-2}", r"-\frac{1}{2}", True), ("+2", "2", True),
        ("-3./2", r"-\frac{3}{2}", True), (r"\frac{3}{4}", r"\frac{4}{3}", False), ("24", "-24", False),
        (r"-\frac{2023}{2024}", r"-\frac{2023}{2024}", True), ("2.0", "20", False), ("10", "1", False),
    ],
    "fractions in every spelling": [
        (r"\dfrac{1}{2}", r"\frac12", True), (r"\tfrac12", r"\frac 12", True), (r"\frac9{19}", r"\frac{9}{19}", True),
        (r"\frac{270}7", r"\frac{270}{7}", True), (r"\frac{\frac12}{3}", r"\frac16", True),
    ],
    "mixed numbers": [
        (r"3\frac{1}{2}", "3.5", True), ("3 1/2", r"\frac{7}{2}", True), (r"-1\frac12", "-3/2", True),
        (r"137 \frac{1}{2}", "137.5", True), (r"3\frac{1}{2}", "31/2", False), (r"3\frac{1}{2}", "1.5", False),
    ],
    "thousands": [
        ("1,234", "1234", True), ("1{,}234", "1234", True), (r"10,\!080", "10080", True), (r"10\,080", "10080", True),
        (r"\$58,500", "58500", True), ("58500", r"$\$58,500$", True), ("2,4", "24", False), ("12,34", "1234", False),
        ("(1,234)", "1234", False), ("1,234,5", "12345", False), ("1, 234", "1234", False), ("4,000", "4", False),
    ],
    "percent, currency, degrees": [
        (r"12\%", "12", True), ("12", r"12\%", True), ("0.12", r"12\%", False), (r"75\%", "0.75", False),
        (r"\$36", "36", True), (r"36 \text{ dollars}", r"\$36", True), (r"90^\circ", "90", True),
        (r"90^{\circ}", r"90^\circ", True), (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}", True),
        (r"60^\circ", r"\frac{\pi}{3}", False),
    ],
    "units": [
        (r"4 \text{ cm}", "4", True), ("12.8 mph", "12.8", True), (r"12.8 \text{ miles per hour}", "12.8", True),
        (r"12.8\,\mathrm{mph}", "12.8", True), ("15", r"15\mbox{ cm}^2", True), (r"15 \text{ cm}^2", r"15\mbox{ cm}^2", True),
        (r"864 \text{ in}^2", r"864 \mbox{ inches}^2", True), (r"4 \text{ m}", r"4 \text{ km}", False),
        (r"5 \text{ cm}", r"4 \text{ cm}", False), (r"\text{cm}", "m", False), (r"\text{ cm}", r"4\text{ cm}", False),
        ("6m", "6", False), ("6m", "6m", True), (r"5 \text{ million}", "5", False),
        (r"5 \text{ paths}", "5", True), (r"9600 \mathrm{~K}", "9600", True),
        (r"45^\circ30'", r"45^{\circ}30'", True), (r"\frac{180^\circ}{7}", r"\frac{180}{7}", True), (r"4^\circ 5", "45", False), (r"5 \text{ months}", "5", True), (r"12^\circ 30", "1230", False), (r"2\mathrm{i}", "2", False),
    ],
    "spaces and commands": [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True), ("2n", "$2 n$", True), (r"2\,n", "2n", True),
        (r"\displaystyle\frac{1}{2}", "1/2", True), ("4 5", "45", False), (r"\pi r", r"\pi  r", True), (r"\( 5 \)", "5", True),
    ],
    "names": [
        ("x=5", "5", True), ("5", "x=5", True), ("x=5", "y=5", False), (r"V_{max} = 12.8", "12.8", True), ("2x", "f(x)=2x", True),
        (r"x \in [-2,7]", "[-2,7]", True), ("(x,y)=(1,2)", "(1,2)", True), ("x=1, x=2", "1,2", True), ("2x=5", "5", False),
        ("x=6", "5", False), ("x=", "5", False), ("y=-2x", "-2y=x", False),
    ],
    "tuples, intervals, sets, lists": [
        ("(1, 2.0)", "(1,2)", True), (r"(0.5,2)", r"(\frac12, 2)", True), ("(1,2)", "[1,2]", False), ("1,2", "(1,2)", False),
        ("(2,1)", "(1,2)", False), ("2,1", "1,2", False), ("1,2,3", "1,2", False), ("[0,1)", "[0,1]", False),
        (r"1 \text{ and } 2", "1,2", True), (r"\{1,2\}", "1,2", True), ("$(1,2)$, $(3,4)$", "(1,2),(3,4)", True),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", True), (r"(-\infty,2)", r"(-\infty,3)", False),
        (r"(2,12)\cup(12,102)", r"(2,12)", False), ("1,2,", "1,2", False),
    ],
    "matrices": [
        (r"\begin{bmatrix} 1/2 \\ 3 \end{bmatrix}", r"\begin{pmatrix} \frac12 \\ 3 \end{pmatrix}", True),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", False),
        (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", False),
    ],
    "plus-minus": [
        (r"1\pm\sqrt{19}", r"1 \pm \sqrt{19}", True), (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}", True),
        (r"1+\sqrt{19}", r"1 \pm \sqrt{19}", False), (r"\{1\pm\sqrt5,-2\}", r"1\pm\sqrt{5},-2", True), (r"\pm 2", "2", False),
    ],
    "scientific notation": [
        (r"1.5 \times 10^{-3}", "1.5e-3", True), (r"4.5 \cdot 10^{33}", "4.5e33", True), ("0.0015", "1.5e-3", True),
        (r"10^{-8}", "1e-8", True), (r"4.5 \times 10^{33} \text{ erg/s}", "4.5e33", True), (r"4.5 \times 10^{32}", "4.5e33", False),
    ],
    "words, choices, bases": [
        ("evelyn", r"\text{Evelyn}", True), ("C", r"\text{(C)}", True), (r"\textbf{(C)}", "C", True), ("(B)", r"\text{(C)}", False),
        ("seat", r"\text{east}", False), ("seat", "east", False), ("52_{8}", "52_8", True), ("52", "52_8", False), ("52_9", "52_8", False),
        (r"\lfloor n/2 \rfloor", r"\left\lfloor n/2 \right\rfloor", True), (r"\lfloor n/3 \rfloor", r"\lfloor n/2 \rfloor", False),
        (r"m\dot{v}+bv=f", r"m \dot v+b v=f", True), (r"k \ge 2", r"k \geqslant 2", True),
    ],
    "expressions by value": [
        (r"\sqrt2", r"\sqrt{2}", True), (r"5\sqrt{3}/3", r"\frac{5\sqrt{3}}{3}", True), (r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}", True),
        (r"\sqrt{117}", r"3\sqrt{13}", True), (r"\frac16\pi", r"\frac{\pi}{6}", True), ("1.41421356237", r"\sqrt{2}", False),
        ("3.14159265358979", r"\pi", False), (r"\frac{22}{7}", r"\pi", False), (r"\frac{9a+11}{20}", r"\frac{11+9a}{20}", True),
        ("x1", "x", False), ("2(3r^2-2r-12)", "6r^2-4r-24", True), (r"\cosh(at)", r"\frac{1}{2}(e^{at}+e^{-at})", True),
        (r"3\sqrt{2}i+1", r"1+3i\sqrt2", True), (r"2\cdot 2^{1008}", "2^{1009}", True), ("2^{1010}", "2^{1009}", False),
        (r"I(0) e^{-\frac{t}{RC}}", r"I(0) e^{-\frac{t}{R C}}", True), (r"-I(0) e^{-\frac{t}{RC}}", r"I(0) e^{-\frac{t}{R C}}", False),
        ("0", r"I(0) e^{-\frac{t}{R C}}", False), ("5x-7y+11z=4", "5x - 7y + 11z + 4 = 0", False),
        (r"2\frac{1}{2}x", "x", False), (r"\frac{(2k)!}{2}", r"\frac{(2k)!}{2}", True), 
        (r"2\pi\cdot 10^{-27}", r"3\pi\cdot 10^{-27}", False), (r"\pi\cdot 10^{-27}", "0", False),
    ],
}
CHECKER_TABLE = [pytest.param(*row, id=f"{rule}: {row[0]} ~ {row[1]}") for rule, rows in CHECKER_RULES.items() for row in rows]

HOSTILE = [  # none of these is the answer 4
    "9^{9^{9^{9}}}", "9^9^9^9", "1e999999", "1e999", "10^{999999999}", "{" * 400 + "}" * 400, "(" * 300 + "4" + ")" * 300,
    "3^{9999}" * 90, "(2/3)^{999}" * 60, r"\sqrt" * 190 + "4", "-" * 500 + "5", "200!!", "(((3!)!)!)!", "A, B, C, D", r"4\text{ or 5}",
    r"4 \text{ and } 5", "3, 4, 5", "4, 5", "4 or 5", "4;5", "4,", "4 5", "4=5", "[4]", r"4\pm 0.1", r"4\text{ to }5", r"\neq 4", r"\approx 4",
    "> 4", "4...", "4/", "4^", "4e", "NaN", "nan", "inf", r"\infty", r"-\infty", "\uff14", "\u0664", "4\u00b2", "0_4", "4_0", "1_2", "0x4",
    "print(4)", "__import__('os')", "4 if 1 else 5", "4//1", "4.0000000000000000001", "3.9999999999999999999", "1/0", r"\frac{4}{0}",
    r"\ln 0", "0^{-1}", r"\text{not }4", r"4 \text{ million}", r"4 \text{ (or 5)}", r"4\mathrm{i}", "4x", "4_{10}", r"4\cup 5", "4\\\\5", "4&5", "400", "0.04",
    r"4\unit{or 5}", r"4\text{ cm}\text{or 5}", r"4\text{ feet}\frac{1}{2}", r"4 feet \approx {5}", r"4\text{ m}\phantom{5}", r"4 \text{ Million}",
    r"4\text{ Or six}", r"4\text{ k}", r"4\text{ bn}", r"4\text{ fifths}", r"4\text{ point six}", r"\not=4", r"\neg=4", r"\text{Not}=4", r"\lnot=4", r"\text{It is not}=4", r"4\text{ twelfths}", r"4\text{ less six}", "0%4",
    "1" * 100_000, r"\frac{" * 20_000 + "}" * 20_000, "{" * 100_000 + "}" * 100_000, r"\text{a}" * 20_000, "4," * 50_000, " " * 100_000, "(" * 100_000,
]


@pytest.mark.parametrize("box, gold, expected", CHECKER_TABLE)
def test_checker(box, gold, expected):
    assert rl.is_correct(rf"Thus the answer is $\boxed{{{box}}}$.", gold) is expected


@pytest.mark.parametrize("box", HOSTILE, ids=lambda box: box[:30].encode("unicode_escape").decode())
def test_hostile_answer_is_wrong_and_quick(box):
    start = time.perf_counter()
    assert rl.is_correct(rf"\boxed{{{box}}}", "4") is False
    assert time.perf_counter() - start < 0.5                                # it takes a few ms; a quadratic scan, seconds


@pytest.mark.parametrize("answer", [
    "12.8", "24", r"\frac{4}{3}", r"-\frac{2023}{2024}", "58,500", "2516_8", r"\{1\pm\sqrt{5},-2\}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
    r"x \in [-2,7]", r"$(-\infty, 0) \cup\{1\}$.", r"864 \mbox{ inches}^2", r"5x - 7y + 11z + 4 = 0", r"\text{(C)}", "4.5e33", r"np.arcsin(10/13)", r"$8 \%$",
    r"\omega_{n}^{2} e^{-\zeta \omega_{n} t} \cos \left(\omega_{n} \sqrt{1-\zeta^{2}} t\right)", r"$\frac{d !}{2 k(d-k) !}$", r"\div", r"$221,$8$"])
def test_evaluation_answer_equals_itself(answer):
    assert rl.is_correct(rf"\boxed{{{answer}}}", answer)
    assert rl.is_correct(rf"\boxed{{ {answer} }}", rf"\boxed{{{answer}}}")


@pytest.mark.parametrize("text, content", [
    (r"\boxed{5}", "5"), (r"first \boxed{5}, then \boxed{6}", "6"), (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"), ("no box", None), ("", None),
    (r"\boxed 5", None), (r"\fbox{5}", None), (r"\boxed{5", None), (r"\boxed{5} and \boxed{6", "5"), (r"\boxed{5} and \boxed 6", "5"), (r"\boxed{}", ""),
    (r"\boxed{\boxed{12.8}}", "12.8"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{5}}}", "5"), (r"\boxed{a\boxed{b", None), (r"\boxed{1 \boxed{2}", "2")])
def test_extract_boxed(text, content):
    assert rl.extract_boxed(text) == content


@pytest.mark.parametrize("piece", ["{", "}", "\\", r"\boxed{", r"\boxed{4}", r"\boxed", "{}", r"\{"])
def test_extract_boxed_is_linear(piece):
    start = time.perf_counter()
    rl.extract_boxed(r"\boxed{" + piece * (20_000 if "boxed" in piece else 100_000))
    assert time.perf_counter() - start < 1  # a quadratic scan takes minutes


def test_odd_arguments_are_wrong_but_do_not_raise():
    assert not any(rl.is_correct(*pair) for pair in [(None, "4"), ("", "4"), (r"\boxed{4}", None), (r"\boxed{4}", ""), (r"\boxed{4}", "  "),
                                                  (r"\boxed{}", ""), (r"\boxed{ }", "4"), (b"4", 4), (4, 4), ([], {}), (r"\boxed{4}", r"\boxed{}")])
    assert rl.is_correct(r"\boxed{4}", 4) and rl.is_correct(r"\boxed{4}", 4.0) and not rl.is_correct(r"\boxed{nan}", float("inf"))


def test_never_raises_on_random_latex():
    rng = random.Random(0)
    pieces = (r"\frac { } ( ) [ ] \sqrt ^ _ 1 2 4 . , e i x \pi \text{ \text{cm} \, \left \right = \pm \cup \\ & \begin{pmatrix} \end{pmatrix} % \% $ "
              r"\$ ! \sin \log _{ ^{ - + / * \{ \} or and cm \circ \boxed{ \in 9999 e99 I(0)").split() + [" ", "\n", "\\", "\x00", "\ud800", "\u00e9", "\uff14"]
    for _ in range(3000):
        box = "".join(rng.choices(pieces, k=rng.randint(1, 30)))
        assert isinstance(rl.is_correct(rf"\boxed{{{box}}}", rng.choice(["4", "x^2+1", "(1,2)", box])), bool)


def test_reward_kinds():
    right, wrong, none = "so \\boxed{24}.", "so \\boxed{25}.", "so 24."
    assert [rl.reward_of(text, "24") for text in (right, wrong, none)] == [1, 0, 0]
    assert [rl.reward_of(text, "24", "format") for text in (right, wrong, none, "\\boxed{ }")] == [1, 1, 0, 0]
    assert [rl.reward_of(text, "24", "none") for text in (right, wrong, none)] == [0, 0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# 4. Advantages
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("right, of_right, of_wrong", [(1, 2.475, -0.354), (2, 1.620, -0.540), (3, 1.208, -0.725), (4, 0.935, -0.935),
                                                       (5, 0.725, -1.208), (6, 0.540, -1.620), (7, 0.354, -2.475)])
def test_advantages_of_the_released_code(right, of_right, of_wrong):
    advantages = rl.group_advantages(torch.tensor(right * [1.0] + (8 - right) * [0.0]), 8)
    assert advantages.tolist() == pytest.approx(right * [of_right] + (8 - right) * [of_wrong], abs=6e-4)


def test_advantages_by_group():
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    rewards[8:16] = 0.1                                     # equal, but their mean rounds to 0.10000000149
    advantages = rl.group_advantages(rewards, 8)
    slow = []
    for g in range(0, 24, 8):
        group = rewards[g:g + 8].tolist()
        mean = sum(group) / 8
        std = math.sqrt(sum((r - mean)**2 for r in group) / 7)
        slow += [0.0 if len(set(group)) == 1 else (r - mean) / (std + 1e-6) for r in group]
    assert advantages.tolist() == pytest.approx(slow, abs=1e-5) and (advantages[8:16] == 0).all()
    assert not torch.allclose(advantages, rl.group_advantages(rewards, 24))             # groups of 8 are not one of 24
    unscaled = rl.group_advantages(rewards, 24, scale=False)
    assert torch.allclose(unscaled, rewards - rewards.mean(), atol=1e-6)
    for size in (1, 7):
        with pytest.raises(ValueError):
            rl.group_advantages(rewards, size)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Loss
# ----------------------------------------------------------------------------------------------------------------------

def loss_inputs(B=5, T=7, seed=0, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    logprobs, old, ref, entropy = (-torch.rand(B, T, generator=g, dtype=torch.float64) * 2 for _ in range(4))
    old = logprobs + spread * torch.randn(B, T, generator=g, dtype=torch.float64)
    lengths = torch.tensor([7, 3, 1, 5, 2])[:B]
    mask = torch.arange(T) < lengths[:, None]
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


@pytest.mark.parametrize("settings", [{}, {"pg_coef": 0.0}, {"kl_coef": 0.7, "kl_estimator": "k1"}, {"kl_coef": 0.7, "kl_estimator": "k2"},
                                      {"kl_coef": 0.7, "entropy_coef": 0.3}, {"clip_eps": 0.05}, {"loss_agg": "sequence"},
                                      {"loss_agg": "sequence", "prompts_per_step": 2, "updates_per_batch": 2}])
def test_loss_equals_the_slow_loop_with_gradients(settings):
    config = rl.Config(**{"prompts_per_step": 1, "group_size": 5, **settings})
    inputs = loss_inputs()
    expected = slow_loss(*inputs, config)
    loss, stats = rl.grpo_loss(*inputs, int(inputs[5].sum()), config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and stats["loss"] == loss.item()
    for mine, theirs in zip(torch.autograd.grad(loss, [inputs[0], inputs[3]], allow_unused=True),
                            torch.autograd.grad(expected, [inputs[0], inputs[3]], allow_unused=True)):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("advantage, ratio, gradient", [(1, 1.5, 0), (1, 0.5, -0.5), (1, 1.1, -1.1),
                                                        (-1, 1.5, 1.5), (-1, 0.5, 0), (-1, 0.9, 0.9)])
def test_clipping_on_both_sides(advantage, ratio, gradient):
    """A < 0 keeps the larger loss: taking the maximum of the objective there clips what PPO keeps, and the reverse."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, config = torch.zeros(1, 1), rl.Config(kl_coef=0.0, entropy_coef=0.0)
    loss, stats = rl.grpo_loss(logprobs, zero, zero, zero, torch.tensor([float(advantage)]), torch.ones(1, 1), 1, config)
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert stats["clip_frac"] == (gradient == 0) and stats["ratio"] == pytest.approx(ratio)


def test_first_update_is_reinforce():
    """With old log-probs = the log-probs, ratio is 1 and the loss about 0, but the gradient is that of -A * log p."""
    logprobs, _, _, entropy, advantages, mask = loss_inputs()
    loss, stats = rl.grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), entropy, advantages, mask, 18,
                               rl.Config(kl_coef=0.0, entropy_coef=0.0))
    loss.backward()
    assert stats["ratio"] == pytest.approx(1) and stats["clip_frac"] == 0
    assert torch.allclose(logprobs.grad, -advantages[:, None] * mask / 18)


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
    """In expectation over the policy's own samples: k1 gives nothing, k2 the reverse KL, k3 the forward KL."""
    g = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, generator=g, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    p, q = logits.log_softmax(-1), ref.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]
    expected = {"k1": torch.zeros(6, dtype=torch.float64), "k2": gradient((p.exp() * (p - q)).sum()), "k3": gradient((q.exp() * (q - p)).sum())}
    for kind, theirs in expected.items():
        assert torch.allclose(gradient((p.detach().exp() * rl.kl_estimate(p, q, kind)).sum()), theirs, atol=1e-12)


NO_LOGPROBS = 7 * [torch.zeros(1)]                  # where nobody asks what the sampler thought
RESPONSES = [[5, 6, 7, 8], [9], [10, 11, 12, 3], [13, 14, 15, 16, 17, 18, 3], [3, 3], [20, 21], [22]]


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_logprobs_equal_plain_log_softmax(model, chunk):
    """Temperature, the shift by one, chunks, padding: all against one row at a time, with gradients."""
    logprobs, entropy, mask = rl.token_logprobs(model, PROMPTS, RESPONSES, 0.6, chunk)
    assert mask.sum(1).tolist() == [len(r) for r in RESPONSES]
    slow = []
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        logp = (model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / 0.6).log_softmax(-1)
        slow.append((logp[range(len(response)), response], -(logp.exp() * logp).sum(-1)))
        n = len(response)
        assert torch.allclose(logprobs[b, :n], slow[b][0], atol=1e-5) and torch.allclose(entropy[b, :n], slow[b][1], atol=1e-5)
        assert (logprobs[b, n:] == 0).all() and (entropy[b, n:] == 0).all()
    weight = model.model.layers[0].mlp.up_proj.weight
    mine = torch.autograd.grad((logprobs + entropy).sum(), weight)[0]
    theirs = torch.autograd.grad(sum((a + b).sum() for a, b in slow), weight)[0]
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_the_stop_token_is_scored_also_where_it_is_the_padding(model):
    """EOS == PAD == 0: a mask by token id would take stopping out of the loss (simple_GRPO, tiny-grpo, nanoGRPO)."""
    logprobs, _, mask = rl.token_logprobs(model, [[1, 2], [1, 2]], [[5, 0], [5, 6, 7, 0]], 1.0)
    assert mask.tolist() == [[True, True, False, False], [True] * 4]
    assert logprobs[0, 1] != 0 and (logprobs[0, 2:] == 0).all()


@pytest.mark.parametrize("slots", [1, 3, None])
def test_sampled_tokens_are_scored_as_they_were_sampled(model, slots):
    """The sampler's own log-probabilities are the trainer's: then the ratio starts at 1."""
    responses, sampler = rl.generate(model, PROMPTS, max_response_tokens=9, temperature=0.6, stop_ids=[3, 17, 40, 41, 42], slots=slots,
                                     generator=torch.Generator().manual_seed(1), return_logprobs=True)
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, responses, 0.6)
    assert [len(values) for values in sampler] == [len(response) for response in responses]
    assert torch.allclose(torch.cat(sampler), logprobs[mask], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Update
# ----------------------------------------------------------------------------------------------------------------------

def gradient_of_update(policy, config, monkeypatch, ref_policy=None, old=None):
    policy = copy.deepcopy(policy)
    if config.activation_checkpointing:
        rl.recompute_layers(policy)
    monkeypatch.setattr(rl, "optimizer_step", lambda *_: None)
    advantages = torch.tensor([1.0, -0.5, 0.3, -1.0, 0.0, 2.0, -2.0])
    stats = rl.update_policy(policy, ref_policy, None, PROMPTS, RESPONSES, NO_LOGPROBS, advantages, old, config)
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), stats


@pytest.mark.parametrize("loss_agg", ["token", "sequence"])
def test_packing_never_changes_the_gradient(model, monkeypatch, loss_agg):
    """num_tokens is fixed before the loop: per-micro-batch means (verl, nanochat, nano-aha) fail here."""
    settings = dict(grad_clip=1e9, loss_agg=loss_agg, kl_coef=0.3, entropy_coef=0.2, prompts_per_step=1, group_size=7)
    ref_policy = random_model(seed=1)
    whole, stats = gradient_of_update(model, rl.Config(token_budget=10**6, **settings), monkeypatch, ref_policy)
    assert stats["kl"] > 0.01
    for change in ({"token_budget": 1}, {"token_budget": 20}, {"token_budget": 31}, {"activation_checkpointing": True}):
        split, split_stats = gradient_of_update(model, rl.Config(**settings, **change), monkeypatch, ref_policy)
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5)
        assert split_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)


def test_sampler_gap_is_a_mean_distance(model):
    """Not a mean difference, in which a sampler that is off in both directions would pass for the trainer."""
    _, _, mask = rl.token_logprobs(model, PROMPTS, RESPONSES, 0.6)
    logprobs = rl.token_logprobs(model, PROMPTS, RESPONSES, 0.6)[0].detach()
    sampler = [row[kept] + 0.5 * (-1) ** torch.arange(int(kept.sum())) for row, kept in zip(logprobs, mask)]
    policy = copy.deepcopy(model)
    stats = rl.update_policy(policy, None, torch.optim.AdamW(policy.parameters()), PROMPTS, RESPONSES, sampler, torch.zeros(len(PROMPTS)), None, rl.Config())
    assert stats["sampler_gap"] == pytest.approx(0.5, rel=1e-4)


def test_gradient_is_clipped_to_its_norm(model, monkeypatch):
    whole, stats = gradient_of_update(model, rl.Config(grad_clip=1e9, kl_coef=0.0), monkeypatch)
    assert stats["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)
    clip = stats["grad_norm"] / 3
    clipped, clipped_stats = gradient_of_update(model, rl.Config(grad_clip=clip, kl_coef=0.0), monkeypatch)
    assert torch.allclose(clipped, whole / 3, rtol=1e-4, atol=1e-8) and clipped_stats["grad_norm"] == stats["grad_norm"]


def test_micro_batches_keep_the_budget_and_every_row():
    rng = random.Random(0)
    for _ in range(50):
        prompts, responses = ([[0] * rng.randint(1, 9) for _ in range(20)] for _ in range(2))
        length = [len(p) + len(r) for p, r in zip(prompts, responses)]
        budget = rng.randint(1, 60)
        batches = rl.micro_batches(prompts, responses, budget)
        assert sorted(sum(batches, [])) == list(range(20))
        assert all(len(rows) == 1 or len(rows) * max(length[i] for i in rows) <= budget for rows in batches)


def test_several_updates_a_batch_move_the_ratio(model):
    """With two updates a batch the second one's ratio is against the policy that sampled, not against itself."""
    policy = copy.deepcopy(model)
    config = rl.Config(updates_per_batch=2, learning_rate=1e-2, kl_coef=0.0, prompts_per_step=2, group_size=3)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    prompts, responses = PROMPTS[:6], RESPONSES[:6]
    seen, real = [], rl.update_policy
    try:
        rl.update_policy = lambda *args: seen.append((args[7], real(*args)))or seen[-1][1]
        stats = rl.train_on(policy, None, optimizer, prompts, responses, NO_LOGPROBS, torch.tensor([1.0, -1, 0, 1, -1, 0]), config)
    finally:
        rl.update_policy = real
    before = rl.token_logprobs(model, prompts, responses, 0.6)
    for i, old in enumerate(seen[0][0] + seen[1][0]):
        assert torch.allclose(old, before[0][i][before[2][i]], atol=1e-5)
    assert seen[0][1]["ratio"] == pytest.approx(1, abs=1e-5) and abs(seen[1][1]["ratio"] - 1) > 1e-3
    assert stats["ratio"] == pytest.approx((seen[0][1]["ratio"] + seen[1][1]["ratio"]) / 2)


def test_a_nan_loss_stops_before_the_weights_change(model):
    policy = copy.deepcopy(model)
    before = copy.deepcopy(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    with pytest.raises(SystemExit, match="nan"):
        rl.update_policy(policy, None, optimizer, PROMPTS, RESPONSES, NO_LOGPROBS, torch.full((7,), math.nan), None, rl.Config(kl_coef=0.0))
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


def test_bf16_copy_keeps_the_rotary_frequencies(model):
    """model.to(bfloat16) would cast that buffer too, and far positions with it."""
    twin = rl.frozen_copy(model, bf16=True)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(twin.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not any(p.requires_grad for p in twin.parameters())


def test_in_bf16_the_kl_starts_at_zero(folder, tmp_path, easy_reward):
    """An all-bf16 reference differs from a policy under autocast by rounding: a KL above 0 before anything is learned."""
    rl.main(run_flags(folder, tmp_path / "run", "--precision", "bf16", "--kl-coef", "0.1"))
    kl = [row["kl"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert kl[0] == 0 and kl[-1] > 1e-4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step-000004", dtype="auto")
    assert saved.dtype == torch.bfloat16                                                          # what was sampled from


def test_a_model_that_caps_its_logits_is_refused(model, monkeypatch):
    rl.check_head(model, PROMPTS[1])
    forward = model.forward

    def capped(**kwargs):
        output = forward(**kwargs)
        output.logits = torch.tanh(output.logits)
        return output
    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(SystemExit):
        rl.check_head(model, PROMPTS[1])


def test_a_model_that_sees_only_a_window_is_refused():
    """The sampler's mask shows every row all of its keys."""
    model = random_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    rl.check_window(model, 8)
    with pytest.raises(SystemExit):
        rl.check_window(model, 9)


# ----------------------------------------------------------------------------------------------------------------------
# 7. and 8. The run: settings, files, resume, interrupts
# ----------------------------------------------------------------------------------------------------------------------

def test_config_is_the_papers_run():
    c = rl.Config()
    assert (c.model, c.example, c.prompts_per_step, c.group_size, c.temperature) == ("Qwen/Qwen2.5-Math-1.5B", ["pi1"], 128, 8, 0.6)
    assert (c.max_prompt_tokens, c.max_response_tokens, c.steps, c.save_every) == (1024, 3072, 2000, 20)
    assert (c.learning_rate, c.weight_decay, c.grad_clip, c.clip_eps, c.updates_per_batch) == (1e-6, 0.01, 1.0, 0.2, 1)
    assert (c.pg_coef, c.kl_coef, c.kl_estimator, c.entropy_coef, c.loss_agg) == (1.0, 0.001, "k3", 0.001, "token")


def test_flags_win_over_the_preset_and_underscores_are_accepted():
    config = rl.parse_args(["--preset", "tiny", "--learning_rate", "3e-4", "--group_size=4", "--no-scale_rewards", "--example", "pi1", "pi13"])
    assert config.learning_rate == 3e-4 and config.group_size == 4 and not config.scale_rewards
    assert config.example == ["pi1", "pi13"] and config.model == rl.TINY_BASE and config.kl_coef == rl.Config().kl_coef
    assert rl.parse_args([]).output_dir == "runs/pi1-Qwen2.5-Math-1.5B"
    for preset in rl.PRESETS.values():
        assert set(preset) <= {f.name for f in rl.fields(rl.Config)}


@pytest.mark.parametrize("flags, words", [
    (["--group-size", "1"], "--group-size 1"), (["--temperature", "0"], "--temperature 0"), (["--temperature", "nan"], "--temperature nan"),
    (["--steps", "many"], "--steps"), (["--updates-per-batch", "3"], "--updates-per-batch 3"), (["--example", "pi99"], "pi99"),
    (["--reward", "maybe"], "--reward"), (["--learning-rate", "-1"], "--learning-rate -1"), (["--eval-every", "5"], "--eval"), (["--eval", "tiny_add"], "--eval tiny_add"),
    (["--example", "pi1", "pi2", "--answer", "4"], "--answer"), (["--lerning-rate", "1"], "--lerning-rate"),
    (["--model", "no/such/folder"], "no/such/folder"), (["--resume"], "--resume"), (["--max-prompt-tokens", "3"], "--max-prompt-tokens 3")])
def test_bad_input_gets_one_sentence_and_exit_code_2(flags, words, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        rl.main(["--model", str(folder), "--output-dir", str(tmp_path / "run"), *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and words in error
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_made(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        rl.main(run_flags(folder, tmp_path / "file" / "run"))
    assert stop.value.code == 2 and "cannot be made" in capsys.readouterr().err


def test_a_run_leaves_its_files_and_is_never_overwritten(folder, tmp_path, capsys, easy_reward):
    rl.main(run_flags(folder, tmp_path / "run"))
    out = capsys.readouterr().out
    assert "How many positive divisors" in out and "<|im_end|>" in out and "step 4/4" in out
    rows, samples = read_jsonl(tmp_path / "run" / "metrics.jsonl"), read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"reward", "accuracy", "dead_groups", "entropy", "kl", "loss", "clip_frac", "ratio", "grad_norm", "response_length",
            "truncated_frac", "examples", "tokens_per_second"} <= set(rows[0])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[3]["kl"] > 1e-4                 # the policy leaves the reference
    assert {s["step"] for s in samples} == {1, 2, 3, 4} and {"text", "reward", "advantage"} <= set(samples[0])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["learning_rate"] == 1e-2 and config["stop_ids"] and "divisors" in config["prompt"] and config["versions"]["torch"]
    assert not same_weights(folder, tmp_path / "run" / "step-000004")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "step-000002")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        rl.main(run_flags(folder, tmp_path / "run"))
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def comparable(run):
    timing = {"tokens_per_second", "sample_seconds", "update_seconds", "memory_gb", "eta_seconds"}
    return [{k: v for k, v in row.items() if k not in timing} for row in read_jsonl(run / "metrics.jsonl")], read_jsonl(run / "samples.jsonl")


@pytest.mark.parametrize("more", [[], ["--precision", "bf16", "--offload-optimizer", "--updates-per-batch", "2"]])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(folder, tmp_path, monkeypatch, more, easy_reward):
    """Killed after any file operation of steps 1 to 4, and resumed: same weights, same log (nano-aha replays a batch)."""
    rl.main(run_flags(folder, tmp_path / "whole", *more))
    for number, (module, name, calls) in enumerate([(os, "replace", 6), (rl, "append_rows", 4), (rl, "generate", 3), (rl, "save_checkpoint", 1), (rl, "save_model", 0)]):
        run, real, count = tmp_path / f"cut{number}", getattr(module, name), itertools.count()

        def killed(*args, **kwargs):
            if next(count) == calls:
                raise RuntimeError("killed")
            return real(*args, **kwargs)
        monkeypatch.setattr(module, name, killed)
        with pytest.raises(RuntimeError, match="killed"):
            rl.main(run_flags(folder, run, *more))
        monkeypatch.setattr(module, name, real)
        if (run / "metrics.jsonl").exists():
            (run / "metrics.jsonl").open("a").write('{"step": 3, "rew')                           # cut short while writing
        rl.main(["--output-dir", str(run), "--resume"])
        assert comparable(run) == comparable(tmp_path / "whole")
        assert same_weights(run / "step-000002", tmp_path / "whole" / "step-000002")
        assert same_weights(run / "step-000004", tmp_path / "whole" / "step-000004")


def test_a_full_disk_has_one_error_and_leaves_the_checkpoint_whole(folder, tmp_path, easy_reward, monkeypatch, capsys):
    rl.main(run_flags(folder, tmp_path / "run", "--steps", 2))
    before = (tmp_path / "run" / "latest" / "state.pt").read_bytes()

    def full(state, path):
        Path(path).write_bytes(before[:99])
        raise RuntimeError("unexpected pos 99 vs 88")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        rl.as_a_command(lambda: rl.main(["--output-dir", str(tmp_path / "run"), "--resume", "--steps", "4"]))
    assert stop.value.code == 2 and "disk is full (unexpected pos" in capsys.readouterr().err
    assert (tmp_path / "run" / "latest" / "state.pt").read_bytes() == before


def test_rewards_are_left_unscaled_if_so_wanted(folder, tmp_path, easy_reward):
    rl.main(run_flags(folder, tmp_path / "run", "--no-scale-rewards"))
    advantages = {abs(row["advantage"]) for row in read_jsonl(tmp_path / "run" / "samples.jsonl")}
    assert {0} != advantages <= {0, 0.25, 0.5, 0.75}                                             # scaled, the best of a group of 4 has 0.866 or 1.5


def test_a_response_without_a_stop_token_is_truncated():
    example = {"name": "x", "answer": "4"}
    cut, whole = rl.describe_rollouts(2 * [example], [0.0, 1.0], torch.tensor([-1.0, 1.0]), [[5, 6], [5, 2]], ["4", "\\boxed{4}"], [2])
    assert cut["truncated"] and not whole["truncated"] and (cut["correct"], whole["correct"]) == (False, True) == (cut["boxed"], whole["boxed"])


def test_a_run_is_not_begun_again_over_its_steps(folder, tmp_path, easy_reward, capsys):
    run = tmp_path / "run"
    rl.main(run_flags(folder, run))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "state.pt"}

    def refused(words):
        with pytest.raises(SystemExit) as stop:
            rl.main(["--output-dir", str(run), "--resume", "--steps", "6"])
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "state.pt"}
        del stop
        gc.collect()                    # a process that fails lets its lock go; here the frames of the failed call still have it
    with rl.claim(run / "lock"):
        refused("in use by another process")
    (run / "latest" / "state.pt").write_bytes((run / "latest" / "state.pt").read_bytes()[:-999])
    refused("cannot be loaded")
    (run / "latest" / "state.pt").unlink()
    refused("is gone")


def test_more_steps_after_the_end(folder, tmp_path, easy_reward):
    rl.main(run_flags(folder, tmp_path / "whole"))
    rl.main(run_flags(folder, tmp_path / "run", "--steps", 2))
    rl.main(["--output-dir", str(tmp_path / "run"), "--resume", "--steps", "4"])
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


def test_flags_given_with_resume_are_used(folder, tmp_path, easy_reward):
    """load_state_dict restores the old learning rate too: config.json would then show one that is not used."""
    rl.main(run_flags(folder, tmp_path / "run", "--steps", 2))
    rl.main(["--output-dir", str(tmp_path / "run"), "--resume", "--steps", "3", "--learning-rate", "1e-30", "--weight-decay", "0"])
    assert same_weights(tmp_path / "run" / "step-000002", tmp_path / "run" / "step-000003")
    with pytest.raises(SystemExit):
        rl.main(["--output-dir", str(tmp_path / "run"), "--resume", "--preset", "24gb"])


def test_rows_with_line_separators_survive_a_resume(tmp_path):
    rows = [{"step": 1, "text": "a\u2028b\x85c\nd"}, {"step": 2, "text": ""}]
    rl.append_rows(tmp_path / "samples.jsonl", rows)
    (tmp_path / "samples.jsonl.tmp").write_text("left by a kill")
    assert rl.keep_rows(tmp_path / "samples.jsonl", lambda row: row["step"] <= 1) == rows[:1] == read_jsonl(tmp_path / "samples.jsonl")


def test_evaluation_while_training(folder, tmp_path, easy_reward):
    (tmp_path / "my.jsonl").write_text('{"problem": "2+2?", "answer": "4"}\n')
    flags = run_flags(folder, tmp_path / "run", "--eval", tmp_path / "my.jsonl", "--eval-every", "2")
    rl.main(flags)
    evals = {row["step"]: row["eval"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval" in row}
    assert list(evals) == [0, 2, 4] and set(evals[0]) == {"my", "average"}
    rl.main([*flags, "--resume", "--steps", "6"])
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_offloaded_optimizer_makes_the_same_update(folder, tmp_path, easy_reward):
    for name, more in [("here", []), ("there", ["--offload-optimizer"])]:
        rl.main(run_flags(folder, tmp_path / name, *more))
    assert read_jsonl(tmp_path / "here" / "metrics.jsonl")[0]["dead_groups"] < 1                  # or nothing was learned
    assert same_weights(tmp_path / "here" / "step-000004", tmp_path / "there" / "step-000004")


def test_the_commands_as_a_user_types_them(folder, tmp_path):
    """Train, Ctrl-C in the middle, --resume, evaluate: in processes of their own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)            # where pytest runs in the background, Ctrl-C is ignored, and so in its children
    def start(*command):
        return subprocess.Popen([sys.executable, *command], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "HF_HUB_OFFLINE": "1"})
    run = tmp_path / "run"
    process = start("one_shot_rlvr.py", *run_flags(folder, run, "--steps", 100000))
    while not (run / "metrics.jsonl").exists() or len(read_jsonl(run / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130 and f"--output-dir {run} --resume" in out and "Traceback" not in err, err
    done = torch.load(run / "latest" / "state.pt", weights_only=True)["step"]
    assert done == read_jsonl(run / "metrics.jsonl")[-1]["step"] >= 3
    process = start("one_shot_rlvr.py", "--output-dir", str(run), "--resume", "--steps", str(done + 2))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == list(range(1, done + 3))
    (tmp_path / "my.jsonl").write_text('{"problem": "What is 2 + 2?", "answer": "4"}\n{"problem": "What is 3 + 4?", "answer": 7}\n')
    process = start("evaluate.py", "--model", str(run / f"step-{done + 2:06d}"), "--benchmarks", str(tmp_path / "my.jsonl"), "--limit", "1",
                    "--max-response-tokens", "8", "--output", str(tmp_path / "eval.json"))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "average" in out, err
    assert len(read_jsonl(tmp_path / "eval.jsonl")) == 1


EASY = """import os, sys, time
import one_shot_rlvr as rl
rl.reward_of = lambda text, answer, kind: float(len(text) % 2)
if os.environ.get("DIES") == os.environ["RANK"]:
    train_on, calls = rl.train_on, []
    rl.train_on = lambda *args: calls.append(0) or (os._exit(7) if len(calls) == 2 else train_on(*args))
rl.main()
"""


def torchrun(tmp_path, *flags, **env):
    (tmp_path / "easy.py").write_text(EASY)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "easy.py"), *flags],
                          cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **env})


def test_two_processes_make_the_same_run(folder, tmp_path, easy_reward):
    """torchrun: the groups split over processes, one optimizer step; one dies, the other ends; one process goes on alone."""
    (tmp_path / "two.jsonl").write_text('{"problem": "What is 2 + 2?", "answer": 4}\n{"problem": "What is 30 - 4?", "answer": 26}\n')
    flags = ["--prompts-per-step", "4", "--updates-per-batch", "2", "--loss-agg", "sequence", "--kl-coef", "0.1",
             "--example", str(tmp_path / "two.jsonl")]
    rl.main(run_flags(folder, tmp_path / "one", *flags))
    done = torchrun(tmp_path, *run_flags(folder, tmp_path / "two", *flags), DIES="1")
    assert done.returncode != 0 and "easy.py FAILED" in done.stderr and "exitcode  : 7" in done.stderr
    rl.main(["--output-dir", str(tmp_path / "two"), "--resume", "--steps", "2"])
    done = torchrun(tmp_path, "--output-dir", str(tmp_path / "two"), "--resume", "--steps", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1
    (one, samples), (two, samples_of_two) = comparable(tmp_path / "one"), comparable(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4] and samples == samples_of_two
    for row_one, row_two in zip(one, two):
        assert row_two.pop("examples") == row_one.pop("examples")
        assert row_two == pytest.approx(row_one, rel=1e-3, abs=1e-5)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "step-000004").state_dict() for run in ("one", "two"))
    assert max((a[key] - b[key]).abs().max() for key in a) < 1e-4
    assert not same_weights(folder, tmp_path / "one" / "step-000004")


def test_groups_that_processes_cannot_share_are_refused(folder, tmp_path):
    done = torchrun(tmp_path, *run_flags(folder, tmp_path / "run", "--prompts-per-step", "3"))
    assert "error: --prompts-per-step 3: 2 processes" in done.stderr and done.returncode and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The tiny world
# ----------------------------------------------------------------------------------------------------------------------

def decimal(name, digits):
    """A task that a model learns by heart in seconds: the decimals of a number."""
    def task(rng):
        n = rng.randint(1, len(digits))
        return f"What is decimal {n} of {name}?", f"decimal {n} of {name} is {digits[n - 1]}.", int(digits[n - 1])
    return task


def test_reward_rises_in_a_smaller_world(tmp_path):
    """The whole way in half a minute: pretrain a base model that knows pi and seldom says so, then train on one decimal."""
    tiny.build_base(tmp_path / "base", steps=150, batch_size=32, tasks={"pi": decimal("pi", "141592653")})
    (tmp_path / "one.jsonl").write_text('{"problem": "What is decimal 4 of pi?", "answer": 5}')
    rl.main(["--preset", "tiny", "--model", str(tmp_path / "base"), "--example", str(tmp_path / "one.jsonl"), "--steps", "20",
             "--prompts-per-step", "8", "--max-response-tokens", "32", "--output-dir", str(tmp_path / "run")])
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert np.mean([row["reward"] for row in rows[:2]]) < 0.5 and np.mean([row["reward"] for row in rows[-3:]]) > 0.85
    assert rows[-1]["boxed_frac"] > rows[0]["boxed_frac"]


def test_tiny_problems_are_right_and_held_out():
    rng, tests = random.Random(0), tiny.held_out()
    for name, task in tiny.TASKS.items():
        for _ in range(200):
            problem, steps, answer = task(rng)
            a, b, *c = map(int, re.findall(r"[0-9]+", problem))
            assert answer == {"tiny_add": a + b, "tiny_sub": a - b, "tiny_mul": a * b, "tiny_max": max([a, b, *c]), "tiny_mod": a % b,
                              "tiny_eqn": b - a}[name]
            for left, right in re.findall(r"([0-9][0-9+*-]*)=([0-9]+)", steps):                     # each step is true
                assert eval(left) == int(right)
        assert len({row["problem"] for row in tiny.load_benchmark(name)}) == tiny.TEST_SIZE
        assert tiny.load_benchmark(name) == tiny.load_benchmark(name)
    asked = [re.findall("user\\n(.*?[?.])(?: Let's|<)", tiny.document(rng, tests)) for _ in range(20_000)]
    assert sum(map(len, asked)) > 10_000 and not tests & {problem for problems in asked for problem in problems}
    assert not tests & {row["problem"] for row in tiny.train_problems(1024)} and len(tiny.train_problems(1024)) == 1024
    examples = json.loads((HERE / "examples.json").read_text())
    assert not tests & {row["problem"] for row in examples.values()}


def test_tiny_tokenizer_survives_saving_under_the_models_name(tmp_path):
    """AutoTokenizer rebuilds a Qwen2 folder's tokenizer by Qwen2's own rules: one of another kind would lose its spaces."""
    tokenizer, text = tiny.make_tokenizer(), "What is 47 + 38? Let's think; \\boxed{85}, \\frac{1}{2} \n  and \u00e9."
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == tokenizer(text).input_ids and loaded.decode(loaded(text).input_ids) == text


# ----------------------------------------------------------------------------------------------------------------------
# Labs: PPO
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(4, 6, generator=g), torch.rand(4, 6, generator=g)
    lengths = [6, 1, 3, 5]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.gae(rewards, values * mask, mask, gamma, lam)
    for b, n in enumerate(lengths):
        r, V = rewards[b].tolist(), values[b, :n].tolist() + [0.0]
        deltas = [r[t] + gamma * V[t + 1] - V[t] for t in range(n)]
        slow = [sum((gamma * lam)**(k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        assert advantages[b, :n].tolist() == pytest.approx(slow, abs=1e-5)
        assert returns[b, :n].tolist() == pytest.approx([A + v for A, v in zip(slow, V)], abs=1e-5)
        assert (advantages[b, n:] == 0).all() and (returns[b, n:] == 0).all()
    if gamma == lam == 1:                                       # then the return is the sum of the rewards that are left
        assert returns[0].tolist() == pytest.approx(rewards[0].flip(0).cumsum(0).flip(0).tolist(), abs=1e-5)


def test_whitened_advantages_have_mean_0_and_variance_1():
    mask = torch.arange(6) < torch.tensor([6, 1, 3])[:, None]
    white = ppo.whiten(torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) * mask + 3.0 * mask, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-5) and white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (white[~mask] == 0).all() and (ppo.whiten(torch.ones(3, 6) * mask, mask).abs() < 1e-3).all()


def test_value_loss_equals_the_slow_loop_with_gradients():
    g = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    values.requires_grad_()
    lengths = [5, 2, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    slow = sum(torch.maximum((values[b, t] - R)**2, (torch.clamp(values[b, t], o - 0.5, o + 0.5) - R)**2) / 2
               for b in range(3) for t in range(lengths[b]) for R, o in [(returns[b, t], old[b, t])]) / 8
    loss, stats = ppo.value_loss(values, old, returns, mask, 8, 0.5)
    assert loss.item() == pytest.approx(slow.item()) and stats["value_loss"] == loss.item()
    assert torch.allclose(torch.autograd.grad(loss, values)[0], torch.autograd.grad(slow, values)[0])


def test_two_processes_update_the_critic_as_one(model, monkeypatch):
    """Two processes with equal rollouts, whose sums are twice what each has, make the step of one of them alone."""
    returns = old_values = [torch.ones(len(response)) for response in RESPONSES]
    weights = []
    for processes in (1, 2):
        monkeypatch.setattr(rl, "sum_over_processes", lambda tensor: tensor.mul_(processes))
        critic = ppo.Critic(copy.deepcopy(model))
        optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
        ppo.update_critic(critic, optimizer, PROMPTS, RESPONSES, old_values, returns, rl.Config(grad_clip=math.inf), 0.5)
        weights.append(critic.head.weight.detach())
    assert weights[0].abs().max() > 0.01 and torch.allclose(*weights, rtol=1e-5)


@pytest.mark.parametrize("more", [[], ["--precision", "bf16", "--activation-checkpointing"]])
def test_ppo_runs_learns_values_and_resumes_to_the_bit(folder, tmp_path, easy_reward, monkeypatch, capsys, more):
    for name in ("group_advantages", "train_on", "save_checkpoint", "load_checkpoint"):
        monkeypatch.setattr(rl, name, getattr(rl, name))                        # put back after the test
    real = {name: getattr(rl, name) for name in ("train_on", "save_checkpoint", "load_checkpoint")}

    def run(*flags):
        for name, function in real.items():
            setattr(rl, name, function)
        ppo.main([*flags, "--critic-updates", "2", "--critic-learning-rate", "1e-2", "--lam", "0.9"])
    run(*run_flags(folder, tmp_path / "whole", *more))
    run(*run_flags(folder, tmp_path / "run", *more, "--steps", 2))
    run("--output-dir", str(tmp_path / "run"), "--resume", "--steps", "4")
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    assert same_weights(tmp_path / "run" / "step-000004", tmp_path / "whole" / "step-000004")
    assert not same_weights(folder, tmp_path / "whole" / "step-000004")
    values = [row["value"] for row in read_jsonl(tmp_path / "whole" / "metrics.jsonl")]
    assert abs(values[0]) < 0.2 < abs(values[-1])                              # the critic has learned to expect something
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rl, "load_checkpoint", real["load_checkpoint"])                            # one_shot_rlvr.py would go on without the critic
        rl.main(["--output-dir", str(tmp_path / "run"), "--resume", "--steps", "5"])
    assert "it holds policy, optimizer, critic" in capsys.readouterr().err
    gc.collect()                                                                                 # see above
    for flags, words in [(["--output-dir", str(tmp_path / "run"), "--resume", "--gamma", "0.5"], "same flags"), (["--critic-updates", "3"], "--critic-updates 3")]:
        with pytest.raises(SystemExit) as stop:
            run(*flags) if "--gamma" in flags else ppo.main([*run_flags(folder, tmp_path / "new"), *flags])
        assert stop.value.code == 2 and words in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Labs: selection, miniature, plots
# ----------------------------------------------------------------------------------------------------------------------

def test_ranking_of_a_hand_made_history(tmp_path, capsys):
    """Population standard deviation, ties in the order of the set; one that was never visited is not ranked."""
    accuracies = {"c": [0, 1, 0, 1], "always": [1, 1, 1], "learned": [0, 0.25, 0.75, 1], "tie": [1, 0], "never": [0, 0, 0]}
    names = ["always", "never", "unseen", "tie", "c", "learned"]
    ranking = select_example.rank(accuracies, names)
    assert [row[0] for row in ranking] == ["tie", "c", "learned", "always", "never"]
    assert ranking[2][1:] == pytest.approx((math.sqrt((0.25 + 0.0625) / 2), 0.5, 4))
    run = tmp_path / "run"
    run.mkdir()
    rl.append_rows(tmp_path / "set.jsonl", [{"name": name, "problem": f"{name}?", "answer": 1} for name in names])
    rl.write_json(run / "config.json", {"example": [str(tmp_path / "set.jsonl")]})
    rl.append_rows(run / "metrics.jsonl", [{"step": 0, "eval": {}}, *({"step": step, "examples": {
        name: values[step] for name, values in accuracies.items() if step < len(values)}} for step in range(4))])
    flags = [str(run), "--top", "2", "--bottom", "1", "--output", str(tmp_path / "best.jsonl")]
    select_example.main(flags)
    out = capsys.readouterr().out
    assert "5 of 6 examples were visited, 2 to 4 times each" in out and re.search(r"3 +0\.395 +0\.500 +4 +learned +learned\?", out)
    assert [e["name"] for e in rl.load_examples([str(tmp_path / "best.jsonl")])] == ["tie", "c", "never"]
    for flags in (flags, flags[:-2], [str(tmp_path / "no_run")]):
        with pytest.raises(SystemExit) as stop:
            select_example.main(flags)
        assert stop.value.code == 2


def test_a_run_on_a_set_can_be_ranked(folder, tmp_path, easy_reward, capsys):
    rl.append_rows(tmp_path / "set.jsonl", tiny.train_problems(3))
    rl.main(run_flags(folder, tmp_path / "run", "--example", tmp_path / "set.jsonl"))
    select_example.main([str(tmp_path / "run")])
    assert "3 of 3 examples were visited" in capsys.readouterr().out


def test_miniature_makes_each_run_once(folder, tmp_path, monkeypatch, capsys):
    """Two rows of one step each; a row done is skipped, one cut short goes on."""
    (tmp_path / "my.jsonl").write_text('{"problem": "What is 2 + 2?", "answer": "4"}\n')
    cheap = f"--model {folder} --steps 2 --prompts-per-step 2 --group-size 2 --max-response-tokens 4"
    monkeypatch.setattr(miniature, "PARTS", {"part": ("Why?", "Table 0", {"a": ("the one", "1.0", cheap), "b": ("the other", "", f"{cheap} --kl-coef 0")}),
                                             "post": ("And then?", "", {"a": ("the one", "", cheap)})})
    monkeypatch.setattr(miniature, "EVAL", ["--eval", str(tmp_path / "my.jsonl"), "--eval-every", "1"])
    monkeypatch.setattr(tiny, "BENCHMARKS", ("my",))
    monkeypatch.setattr(miniature, "SETS", {})
    monkeypatch.setattr(rl, "make_tiny_base", lambda name: None)
    flags = ["--output-dir", str(tmp_path / "mini"), "--seeds", "1", "--jobs", "2"]
    miniature.main(flags)
    table = (tmp_path / "mini" / "part.md").read_text()
    assert table.count("| the base model |") == 1 and "| `a`: the one | 1.0 | " in table and "| `b`: the other |" in table and table in capsys.readouterr().out
    assert "| 2 | " in (tmp_path / "mini" / "post.md").read_text()
    assert [row["step"] for row in read_jsonl(tmp_path / "mini" / "a-0" / "metrics.jsonl")] == [0, 1, 1, 2, 2]
    made, real = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda words, **kwargs: made.append(words) or real(words, **kwargs))
    miniature.main(flags)
    assert made == [] and (tmp_path / "mini" / "part.md").read_text() == table
    lines = (tmp_path / "mini" / "b-0" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mini" / "b-0" / "metrics.jsonl").write_text("".join(lines[:-1]))
    miniature.main([*flags, "--rows", "b"])
    assert len(made) == 1 and "--resume" in made[0] and "`b`" in (tmp_path / "mini" / "rows.md").read_text()
    assert (tmp_path / "mini" / "part.md").read_text() == table                                  # of the whole part, still
    endless, before = cheap.replace("--steps 2", "--steps 999999"), len(miniature.CHILDREN)
    rows = {"c": ("a bad flag", "", f"{cheap} --slots 0"), "d": ("runs beside it", "", endless), "e": ("comes next", "", endless)}
    monkeypatch.setattr(miniature, "PARTS", {"part": ("", "", rows)})
    with pytest.raises(SystemExit):
        miniature.main(flags)
    assert "c-0 ended with exit code 2" in capsys.readouterr().err
    assert {child.wait(60) for child in miniature.CHILDREN[before:]} == {2, -signal.SIGTERM}          # nothing is left behind
    with pytest.raises(SystemExit):
        miniature.main(["--rows", "no_such_row"])


def test_the_rows_of_miniature_are_flags_of_the_trainer():
    rows = {row for _, _, of_part in miniature.PARTS.values() for row in of_part}
    for row in rows:
        script, *flags = miniature.command(row, 1, "runs/miniature")
        config = rl.parse_args(flags)
        assert (HERE / script).exists() and config.seed == 1 and config.output_dir.endswith(f"{row}-1") and config.steps % config.eval_every == 0


def test_plot_says_what_it_lacks_or_draws(folder, tmp_path, easy_reward, capsys, monkeypatch):
    (tmp_path / "my.jsonl").write_text('{"problem": "What is 2 + 2?", "answer": "4"}\n')
    for seed in (0, 1):
        rl.main(run_flags(folder, tmp_path / f"run-{seed}", "--seed", seed, "--eval", tmp_path / "my.jsonl", "--eval-every", "2"))
    rl.main(run_flags(folder, tmp_path / "other"))
    runs = [str(tmp_path / name) for name in ("run-0", "run-1", "other")]
    try:
        import matplotlib
    except ImportError:
        matplotlib = None
    for name in ("plot.png", "plot.svg") if matplotlib else ():
        plot.main([*runs, "--seeds", "--output", str(tmp_path / name)])
        assert (tmp_path / name).stat().st_size > 10_000
    assert not matplotlib or all(word in (tmp_path / "plot.svg").read_text() for word in ("other (not tested)", "before training", "response length"))
    for flags, words in [([*runs, "--output", "x.gif"], ".png or .svg"), ([str(tmp_path / "none")], "none")]:
        with pytest.raises(SystemExit) as stop:
            plot.main(flags)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        plot.main(runs)
    assert "pip install matplotlib" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Speed
# ----------------------------------------------------------------------------------------------------------------------

def test_benchmark_prints_its_table(capsys):
    benchmark.main("--shape tiny --rollouts 8 --max-response-tokens 6 --turns 1 --against generate".split())
    lines = {tuple(line.split()[:2]): line for line in capsys.readouterr().out.splitlines() if line}
    assert {("rollouts", "ours"), ("rollouts", "generate"), ("update", "ours"), ("step", "ours")} <= set(lines)
    assert "x as fast" in lines["rollouts", "generate"] and lines["step", "ours"].endswith("%")
    with pytest.raises(SystemExit):
        benchmark.main(["--rollouts", "12"])


def test_plan_keeps_within_each_gpus_memory(capsys):
    benchmark.main(["--plan"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3 * len(benchmark.GPUS)
    assert all(max(float(row[2]), float(row[3])) < float(row[1].split()[0]) for row in rows if row[2] != "does not fit")
    assert [row[1][:2] for row in rows if row[2] == "does not fit"] == ["24", "48", "80", "80"]


def test_floors_by_hand():
    """One rollout of two tokens after a prompt of one, in a model small enough to count on paper."""
    policy = random_model(vocab_size=10)                        # 2 layers, hidden 32, feed-forward 64, 4 heads of 8, 2 of keys
    body = 2 * (32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    config = rl.Config(slots=1, kl_coef=0.0)
    keys = 2 + 3                                                # the second token sees one key more
    read = 4 * (2 * (body + 320) + keys * 2 * 2 * 2 * 8)
    assert benchmark.floors(policy, 4, 1, torch.tensor([2]), config, 1.0, 1e99)["rollouts"] == read
    operations = 2 * (body + 320) * 2 + keys * 2 * 2 * 32 * 2
    assert benchmark.floors(policy, 4, 1, torch.tensor([2]), config, 1e99, 1.0)["rollouts"] == operations
    forward = 2 * body * 3 + 2 * 320 * 2 + keys * 2 * 2 * 32 * 2
    assert benchmark.floors(policy, 4, 1, torch.tensor([2]), config, 1.0, 1.0)["update"] == 3 * forward


def test_activation_memory_is_what_backward_keeps():
    """Bytes that a layer saves under bf16 autocast, counted: a model of three layers less one of one."""
    kept, T = [], 96
    for layers in (1, 3):
        config = Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
                             num_key_value_heads=2, tie_word_embeddings=True)
        policy, saved = Qwen2ForCausalLM(config).eval(), {}
        weights = {p.shape for p in policy.parameters()} | {p.T.shape for p in policy.parameters() if p.ndim == 2}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.update({x.untyped_storage().data_ptr(): x}) or x, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = policy.base_model(input_ids=torch.zeros(1, T, dtype=torch.long), use_cache=False).last_hidden_state
        kept.append(sum(x.untyped_storage().nbytes() for x in saved.values() if x.shape not in weights))
    assert (kept[1] - kept[0]) / 2 / T == benchmark.activations(config)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, row, problem, answer", [
    ("math500", {"problem": "p", "solution": "\\boxed{2}", "answer": "1", "subject": "Algebra", "level": 2}, "p", "1"),
    ("aime24", {"id": 60, "problem": "p", "solution": "$\\boxed{204}$", "answer": "204", "question": "q"}, "q", "204"),
    ("aime24", {"id": 60, "problem": "p", "solution": "$\\boxed{204}$", "url": ""}, "p", "204"),
    ("aime25", {"problem": "p", "answer": "70"}, "p", "70"),
    ("amc23", {"id": 0, "problem": "old", "answer": 27.0, "question": "q"}, "q", "27.0"),
    ("minerva_math", {"problem": "p", "solution": "first \\boxed{1}, so \\boxed{\\frac{1}{2}}.", "type": "", "idx": 0}, "p", "\\frac{1}{2}"),
    ("minerva_math", {"question": "q", "answer": "4.5e33"}, "q", "4.5e33"),
    ("olympiadbench", {"context": None, "question": "q", "solution": [""], "final_answer": ["$3$", "4"]}, "q", "$3$"),
    ("olympiadbench", {"context": "Let x.", "question": "q", "final_answer": ["3"]}, "Let x.\nq", "3")])
def test_loaders_on_each_layout(tmp_path, monkeypatch, name, row, problem, answer):
    """Each of the paper's files and each hub set: the same rows from either."""
    (tmp_path / f"{name}.jsonl").write_text("\n" + json.dumps(row) + "\n")
    local = evaluate.load_benchmark(name, tmp_path)
    assert local == evaluate.load_benchmark(str(tmp_path / f"{name}.jsonl"))
    assert (local[0]["problem"], local[0]["answer"]) == (problem, answer) and local[0].get("subject") == row.get("subject")
    import datasets
    seen = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: seen.append((args, kwargs)) or [row])
    assert evaluate.load_benchmark(name) == local
    assert seen == [((evaluate.BENCHMARKS[name].source,), {"split": "test"})]


@pytest.mark.parametrize("lines, words", [
    ('{"problem": "p", "answer": 1}\n\n{"problem": "p"}', "line 3"), ('{"problem": "p", "answer": 1}\n{"prob', "line 2"), ("[1]", "line 1"),
    ('{"problem": "p", "solution": "no box"}', "line 1"), ("", "no problems"), ('{"question": "", "answer": 1}', "line 1")])
def test_a_broken_file_is_named_by_its_line(tmp_path, capsys, lines, words):
    (tmp_path / "my.jsonl").write_text(lines)
    with pytest.raises(SystemExit) as stop:
        evaluate.load_benchmark(str(tmp_path / "my.jsonl"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error and "my.jsonl" in error


def test_the_papers_protocol():
    assert {name: evaluate.protocol(name) for name in evaluate.BENCHMARKS} == {
        "math500": (1, 0.0), "aime24": (8, 0.6), "amc23": (8, 0.6), "minerva_math": (1, 0.0), "olympiadbench": (1, 0.0), "aime25": (8, 0.6)}
    assert evaluate.protocol("my") == (1, 0.0) and evaluate.protocol("tiny_add") == (4, 0.6)
    assert evaluate.protocol("aime24", temperature=0.0) == (1, 0.0) and evaluate.protocol("my", 16, 1.0) == (16, 1.0)


def test_pass_at_k_equals_brute_force():
    for n, right, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if right <= n and k <= n:
            samples = [i < right for i in range(n)]
            subsets = list(itertools.combinations(samples, k))
            assert evaluate.pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_standard_error_by_hand():
    assert evaluate.standard_error([0, 1, 1, 0]) == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))
    assert evaluate.standard_error([1.0]) is None


def checked_rows(right, name="x", **more):
    """Rows as sample_and_check makes them: right is a list of samples a problem."""
    return [{"benchmark": name, "number": number, "sample": sample, "temperature": 0.6, "problem": f"q{number}", "answer": "4", "text": "recheck \\boxed{4}" * ok,
             "extracted": "4" if ok else None, "correct": ok, "correct_lenient": True, "tokens": 10 + sample, "truncated": not ok, "too_long": False,
             **{key: values[number] for key, values in more.items()}} for number, samples in enumerate(right) for sample, ok in enumerate(samples)]


def test_measures_by_hand():
    rows = checked_rows([[True, True, False, False], [False, False, False, True], [True] * 4], level=[1, 2, 1])
    rows[2]["text"] = "\\boxed{ }"                                                               # an empty box boxes nothing
    m = evaluate.measure(rows)
    assert (m["n"], m["k"], m["temperature"]) == (3, 4, 0.6)
    assert m["avg_at_k"] == pytest.approx((0.5 + 0.25 + 1) / 3) and m["pass_at_k"] == 1
    assert m["stderr"] == pytest.approx(np.std([0.5, 0.25, 1], ddof=1) / math.sqrt(3))
    assert m["pass_at"] == pytest.approx({1: m["avg_at_k"], 2: (5 / 6 + 1 / 2 + 1) / 3, 4: 1})
    assert m["lenient"]["avg_at_k"] == 1 and m["lenient"]["stderr"] == 0
    assert (m["boxed"], m["truncated"], m["mean_length"], m["self_reflection"]) == pytest.approx((7 / 12, 5 / 12, 11.5, 7 / 12))
    result = evaluate.measure_all(rows + checked_rows([[False]], "y"), ["y", "x"])
    assert list(result["benchmarks"]) == ["y", "x"] and result["average"] == pytest.approx(m["avg_at_k"] / 2)
    assert {level: g["avg_at_k"] for level, g in result["benchmarks"]["x"]["by_level"].items()} == {"1": 0.75, "2": 0.25}
    assert result["benchmarks"]["y"]["stderr"] is None and "by_level" not in result["benchmarks"]["y"]


@pytest.mark.parametrize("response, answer, strict, lenient", [
    (r"It is \boxed{4}.", "4", True, True), ("So 3 + 1 gives 4.", "4", False, True), ("It is 4, not 5.", "4", False, False),
    ("The answer is 12.8 mph", "12.8", False, True), ("The final answer is: $12.8$.", "12.8", False, True), (r"cut short: \boxed{12.8", "12.8", False, True),
    (r"\boxed{4} or \boxed{5", "4", True, False), (r"\boxed{1.33333}", r"\frac43", False, True), (r"\boxed{1.333}", r"\frac43", False, False),
    (r"\boxed{0.5}", "50", False, True), (r"\boxed{0.5}", r"50\%", False, True), (r"\boxed{5000}", "50", False, True), (r"\boxed{500}", "50", False, False),
    (r"\boxed{50.004}", "50", False, True), (r"\boxed{50.01}", "50", False, False),
    (r"\boxed{1.41421}", r"\sqrt2", False, True), (r"\boxed{(0.33333, 2)}", r"(\frac13,2)", False, True), (r"\boxed{7,5,3}", "3,5,7", False, False),
    ("It is 1,234.", "1234", False, True), ("", "4", False, False), ("no number", "4", False, False), (r"\boxed{}", "4", False, False), ("4", r"\boxed{4}", False, True)])
def test_the_lenient_verdict_of_the_papers_evaluation(response, answer, strict, lenient):
    assert rl.is_correct(response, answer) is strict and evaluate.is_correct_lenient(response, answer) is lenient


MY_PROBLEMS = [{"problem": f"What is {a} + {b}?", "answer": a + b, "level": a % 2} for a, b in [(2, 2), (3, 4), (11, 5), (20, 6), (1, 1)]]


@pytest.fixture
def my_flags(folder, tmp_path):
    """An evaluation of a random model on five problems of one's own and on one more set, three samples each."""
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, MY_PROBLEMS)))
    (tmp_path / "more.jsonl").write_text(json.dumps(MY_PROBLEMS[0]))                                      # another benchmark, another noise
    return lambda *more: ["--model", str(folder), "--benchmarks", "my.jsonl", "more.jsonl", "--data-dir", str(tmp_path), "--k", "3", "--temperature", "1",
                          "--max-response-tokens", "16", "--output", str(tmp_path / "e.json"), *map(str, more)]


def responses_in(path):
    return sorted(read_jsonl(path), key=lambda row: (row["benchmark"], row["number"], row["sample"]))


def test_slots_and_interruptions_change_no_response(my_flags, tmp_path, monkeypatch):
    """The noise belongs to problem and sample: one multinomial over the batch would give other responses in each of these."""
    monkeypatch.chdir(tmp_path)
    evaluate.main(my_flags())
    whole, result = responses_in("e.jsonl"), json.loads(Path("e.json").read_text())
    assert len(whole) == 18 and len({row["text"] for row in whole}) == 18
    for slots in (1, 4):
        evaluate.main(my_flags("--slots", slots, "--output", f"slots{slots}.json"))
        assert responses_in(f"slots{slots}.jsonl") == whole
    real, sampled, calls = evaluate.append_rows, [], itertools.count(1)

    def killed(path, rows):
        if next(calls) == 6:
            with open(path, "a") as file:
                file.write(json.dumps(rows[0])[:40])                                              # cut short while writing
            raise RuntimeError("killed")
        real(path, rows)
    monkeypatch.setattr(evaluate, "append_rows", killed)
    with pytest.raises(RuntimeError, match="killed"):
        evaluate.main(my_flags("--output", "cut.json", "--slots", "4"))
    monkeypatch.setattr(evaluate, "append_rows", real)
    assert json.loads(Path("cut.json").read_text())["average"] is None
    generate_each = evaluate.generate_each
    monkeypatch.setattr(evaluate, "generate_each", lambda model, prompts, *args: sampled.append(len(prompts)) or generate_each(model, prompts, *args))
    evaluate.main(my_flags("--output", "cut.json"))
    assert sampled == [18 - 5] and responses_in("cut.jsonl") == whole
    again = json.loads(Path("cut.json").read_text())
    assert {**again, "tokens_per_second": 0} == {**result, "tokens_per_second": 0}


def test_an_evaluation_is_not_overwritten_and_settings_do_not_mix(my_flags, tmp_path, capsys, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    evaluate.main(my_flags())
    before = Path("e.json").read_text(), Path("e.jsonl").read_text()
    monkeypatch.setattr(evaluate, "load_model", None)                                             # done is done: no model is loaded
    capsys.readouterr()
    evaluate.main(my_flags("--by", "level", "--lenient"))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")] == ["2", "3", "1"]     # even, odd; odd
    for more, words in [(["--k", "2"], "k 3"), (["--seed", "1"], "seed 0"), (["--limit", "1"], "limit"), (["--benchmarks", "my.jsonl"], "benchmarks")]:
        with pytest.raises(SystemExit) as stop:
            evaluate.main(my_flags(*more))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and "another --output" in error
    assert before == (Path("e.json").read_text(), Path("e.jsonl").read_text())
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(folder), "--benchmarks", "my.jsonl", "--output", "my.json"])
    assert "would go into the benchmark" in capsys.readouterr().err
    Path("e.json").rename("gone.json")
    with pytest.raises(SystemExit):
        evaluate.main(my_flags())
    Path("gone.json").rename("e.json")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(evaluate, "crc_of_weights", lambda model_name: 0)
        evaluate.main(my_flags())
    assert "weights_crc32" in capsys.readouterr().err
    assert before == (Path("e.json").read_text(), Path("e.jsonl").read_text())


@pytest.mark.parametrize("rows", [[{**row, "answer": 5} for row in MY_PROBLEMS], MY_PROBLEMS[:2], [*MY_PROBLEMS, MY_PROBLEMS[0]]])
def test_problems_that_changed_meanwhile_and_a_second_writer_are_refused(my_flags, tmp_path, capsys, monkeypatch, rows):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate, "measure_all", lambda *args: 1 / 0)
        evaluate.main(my_flags())
    before = Path("e.jsonl").read_text()
    with rl.claim(tmp_path / "e.json"), pytest.raises(SystemExit):
        evaluate.main(my_flags())
    assert "in use by another process" in capsys.readouterr().err
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit):
        evaluate.main(my_flags())
    assert "problems_crc32" in capsys.readouterr().err and Path("e.jsonl").read_text() == before


def test_a_problem_longer_than_the_context_is_counted(folder, tmp_path, capsys, monkeypatch):
    """The model takes 256 tokens: one problem fills them, one leaves room for a short response, one for a whole one."""
    monkeypatch.setattr(evaluate, "find_stop_ids", lambda *args: [])
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps({"problem": n * "cats ", "answer": 4}) for n in (5, 40, 300)))
    flags = ["--model", str(folder), "--benchmarks", str(tmp_path / "my.jsonl"), "--max-response-tokens", "200", "--output", str(tmp_path / "e.json")]
    evaluate.main(flags)
    rows, m = responses_in(tmp_path / "e.jsonl"), json.loads((tmp_path / "e.json").read_text())["benchmarks"]["my"]
    assert m["n"] == 3 and m["too_long"] == 1 and "1 problems fill the model's context" in capsys.readouterr().out
    assert rows[2]["too_long"] and not rows[2]["correct"] and rows[2]["tokens"] == 0 and 0 < rows[1]["tokens"] < 200 == rows[0]["tokens"]


def test_compare_pairs_the_problems(tmp_path, capsys):
    """The standard error is that of the differences: two unpaired ones would call this noise."""
    rng = random.Random(0)
    a = [[rng.random() < 0.5] for _ in range(40)]
    b = [[ok or number % 5 == 0] for number, [ok] in enumerate(a)]                 # B loses nothing and wins some
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, right in zip(paths, (a, b)):
        rows = checked_rows(right, subject=["Algebra", "Geometry"] * 20) + checked_rows(right[:3], "small")
        rl.append_rows(path.with_suffix(".jsonl"), rows if path == paths[0] else rows[:-1] + checked_rows([[True]], "other"))
        rl.write_json(path, {"model": path.stem, "settings": {"seed": 0, "dtype": path.stem}, **evaluate.measure_all(rows, ["x", "small"])})
    evaluate.main(["--compare", *map(str, paths)])
    out = capsys.readouterr().out
    difference = np.array([y[0] - x[0] for x, y in zip(np.array(a, float), np.array(b, float))])
    line = next(line for line in out.splitlines() if line.startswith("x "))
    assert line.split()[1:] == ["40", f"{100 * np.mean(a):.1f}", f"{100 * np.mean(b):.1f}", f"{100 * difference.mean():+.1f}",
                                f"{100 * difference.std(ddof=1) / math.sqrt(40):.1f}", str(int(difference.sum())), "0", *verdict(difference)]
    errors = [part.std(ddof=1) / math.sqrt(len(part)) for part in (difference, difference[:2])]
    average = next(line for line in out.splitlines() if line.startswith("average")).split()
    assert average[1] == "42" and average[5] == f"{100 * math.hypot(*errors) / 2:.1f}"
    assert "dtype is a in A, b in B" in out and "  Algebra" in out and "  Geometry" in out
    assert next(line for line in out.splitlines() if line.startswith("small")).split()[1] == "2" and "other" not in out
    with pytest.raises(SystemExit):
        evaluate.main(["--compare", str(paths[0]), str(tmp_path / "none.json")])


def verdict(difference):
    differ = np.count_nonzero(difference)
    z = difference.mean() / (difference.std(ddof=1) / math.sqrt(len(difference)))
    return ["too", "few", "problems", "differ"] if differ < 6 else ["B", "is", "better"] if z > 2 else ["within", "noise"]


@pytest.mark.parametrize("b, won, words", [(0.59, 20, "within noise"), (0.61, 20, "B is better"), (0.39, 0, "A is better"), (0.41, 0, "within noise"),
                                           (0.9, 5, "too few problems differ")])
def test_a_difference_counts_from_two_standard_errors_on(b, won, words):
    assert evaluate.conclusion({"a": 0.5, "b": b, "stderr": 0.05, "won": won, "lost": 20 if b < 0.5 else 0}) == words


def test_a_curve_of_a_run(folder, tmp_path, easy_reward, monkeypatch, capsys):
    rl.main(run_flags(folder, tmp_path / "run"))
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"step": 5, "rew')                      # the run may be going on
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, MY_PROBLEMS)))
    flags = ["--run", str(tmp_path / "run"), "--benchmarks", str(tmp_path / "my.jsonl"), "--max-response-tokens", "8"]
    evaluate.main(flags)
    curve, rewards = read_jsonl(tmp_path / "run" / "curve.jsonl"), [row["reward"] for row in rl.read_log(tmp_path / "run" / "metrics.jsonl")]
    assert [(row["step"], row["reward"]) for row in curve] == [(0, rewards[0]), (2, rewards[1]), (4, rewards[3])]
    assert set(curve[0]) == {"step", "reward", "average", "my"}
    assert json.loads((tmp_path / "run" / "step-000004" / "eval.json").read_text())["average"] == curve[2]["average"]
    loaded, load_model = [], evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", lambda name, dtype: loaded.append(Path(name).name) or load_model(name, dtype))
    (tmp_path / "run" / "step-000002" / "eval.json").unlink()
    (tmp_path / "run" / "step-000002" / "eval.jsonl").unlink()
    evaluate.main(flags)
    assert loaded == ["step-000002"] and read_jsonl(tmp_path / "run" / "curve.jsonl") == curve
    for name, words in (("samples.jsonl", "something else than a curve"), ("metrics.jsonl", "not JSON")):
        before = (tmp_path / "run" / name).read_text()
        with pytest.raises(SystemExit):
            evaluate.main([*flags, "--output", str(tmp_path / "run" / name)])
        assert words in capsys.readouterr().err and (tmp_path / "run" / name).read_text() == before


@pytest.mark.parametrize("flags, words", [(["--benchmarks", "nope"], "nope"), (["--limit", "0"], "--limit 0"), (["--k", "0"], "--k 0"), (["--k", "4"], "greedy"),
                                          (["--benchmarks", "math500", "aime24"], "DIR/aime24.jsonl"), (["--output", "x.txt"], ".json"), (["--seed", "-1"], "--seed -1"),
                                          (["--run", "no_run"], "no_run"), (["--compare", "a.json", "b.json"], "a.json"), (["--temperature", "nan"], "--temperature nan"),
                                          (["--model", "no/such/model", "--benchmarks", "tiny_add"], "no/such/model"),
                                          (["--benchmarks", "math500", "--data-dir", "no_such_dir"], "math500.jsonl")])
def test_evaluate_refuses_in_one_sentence(folder, capsys, flags, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = [] if {"--run", "--compare"} & {*flags} else ["--model", str(folder), "--benchmarks", "math500"]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*model, *flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and words in error[0]
    assert not any(tmp_path.iterdir())
