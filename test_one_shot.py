"""Tests of one_shot_rlvr.py and evaluate.py: no network, no GPU, no weights but those made here.

Each equation and mechanism is held against the slowest, most obvious version of itself. A docstring says
which bug of a public implementation, or which accident of a user, the test would have caught.
"""
import copy
import functools
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
import zlib
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported, which waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what is started here, too

import one_shot_rlvr as rl  # before torch, as in the scripts
import evaluate

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from labs import checker, tiny

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
    paper = [f"{name} {e['problem']} {e['answer']}\n" for name, e in examples.items() if name[:2] == "pi"]
    assert zlib.crc32("".join(paper).encode()) == 415587110

def test_examples_share_a_step_evenly_and_epochs_do_not_repeat():
    assert sorted(Counter(rl.examples_of_step(1, 3, 128, seed=0)).values()) == [42, 43, 43]
    stream = [i for step in range(1, 11) for i in rl.examples_of_step(step, 20, 8, seed=1)]
    epochs = [stream[e:e + 20] for e in range(0, 80, 20)]
    assert all(sorted(epoch) == [*range(20)] != epoch for epoch in epochs) and epochs[0] != epochs[1]

ROW, FOUR = '{"problem": "1+1?", "answer": 2}', '{"name": "four", "problem": "2+2?", "answer": "4"}'

def test_load_examples_from_files(tmp_path):
    texts = {"a.jsonl": f"{ROW}\n{FOUR}\n\n\u00a0\n", "a.json": f"[{ROW}, {FOUR}]", "one.json": ROW}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")  # with the mark of some editors
    for name in ("a.jsonl", "a.json"):
        assert rl.load_examples([str(tmp_path / name)]) \
            == [{"name": "a-1", "problem": "1+1?", "answer": "2"}, json.loads(FOUR)]
    assert [e["name"] for e in rl.load_examples([f"{tmp_path}/one.json", "pi1"])] == ["one", "pi1"]
    assert rl.load_examples(["pi1"], answer="4")[0]["answer"] == "4"

@pytest.mark.parametrize("source, text, words", [
    ("none.json", "", "none.json"), ("pi99", "", "pi99: give a .jsonl file, or one of"),
    ("pi1 pi1", "", "pi1 is there twice"), ("deep.json", "[" * 100_000, "deep.json"),
    ("cut.jsonl", ROW + "\n{", "cut.jsonl, line 2"), ("wide.jsonl", "\xff\xfe", "wide.jsonl"),
    ("empty.jsonl", "\n", "with an answer"), ("a.jsonl", ROW.replace("2", '" "'), "with an answer"),
    *[("bad.jsonl", text, "row 1: it needs") for text in (
        "5", '{"problem": "1+1?"}', ROW.replace('"1+1?"', "2"), ROW.replace("1+1?", ""),
        *(ROW.replace("2", label) for label in ("null", "[2]", "true", "NaN")))]])
def test_examples_that_are_refused(source, text, words, tmp_path, refused):
    """Trained on an answer that can never be right, all groups are dead and nothing says so."""
    (tmp_path / source).write_text(text, encoding="latin-1")
    sentence = refused(rl.load_examples, [str(tmp_path / source)] if text else source.split())
    assert words in sentence and len(sentence) < 600

TURNS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# SmolLM3, gpt-oss, Mistral, Granite write today's date: base and trained model would differ by it
DATES = "{% set f = '%d %B %Y, %Y-%m-%d' %}{{ strftime_now(f) }}, {{ date_string }}"

@pytest.mark.parametrize("template, begins, with_system", [
    (TURNS, "", "<|im_start|>system\nBe brief.<|im_end|>\n"), (tiny.CHAT_TEMPLATE, "", ""),  # refuses it
    (TURNS.replace("messages", "messages if m.role != 'system'"), "", ""),
    (DATES + tiny.CHAT_TEMPLATE, *2 * ["26 July 2024, 2024-07-26, 26 Jul 2024"])])
def test_encode_prompt(template, begins, with_system, tokenizer):
    tokenizer.chat_template = template
    for system, beginning in ((None, begins), ("Be brief.", with_system)):
        assert tokenizer.decode(rl.encode_prompt(tokenizer, "2+2?", system)) \
            == beginning + "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"

def test_prompts_that_are_refused(tokenizer, refused):
    assert "no prompt can be" in refused(rl.encode_prompt, tokenizer, "\ud83d 1+1?")  # half an emoji
    for template, words in [
            ("{{ messages[0].content[0].text }}", "leaves the problem out"),  # it wants a list of parts
            ("{{ raise_exception('no system') }}", "no system"), ("{{ m", "no prompt can be"),
            ({"tool_use": TURNS}, "no prompt can be")]:
        tokenizer.chat_template = template
        assert words in refused(rl.encode_prompt, tokenizer, "2+2?")

def test_without_a_template_a_prompt_is_the_text(tokenizer):
    """Some tokenizers append EOS to it: nothing is left to be said after that."""
    from tokenizers.processors import TemplateProcessing
    tokenizer.chat_template, text = None, tokenizer("2+2?").input_ids
    assert rl.encode_prompt(tokenizer, "2+2?", "Be brief.") == text
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)])
    assert tokenizer("2+2?").input_ids == [*rl.encode_prompt(tokenizer, "2+2?"), tokenizer.eos_token_id]

def test_stop_ids_are_the_union_of_three_sources(tokenizer):
    """A base model's configuration names <|endoftext|> alone; its template ends a turn with <|im_end|>."""
    tokenizer.eos_token = "<|endoftext|>"
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for template, ids in {
            None: [text], TURNS: [text, turn], TURNS.replace("<|im_end|>", "<|endoftext|>"): [text],
            TURNS.replace("<|im_end|>", "<|im_end|><|im_start|>"): [text, turn],  # and opens one
            TURNS.replace("m.content", "m.content | lower"): [text],  # the end is not found
            "{{ messages[1].none.none }}" + TURNS: [text]}.items():
        tokenizer.chat_template = template
        assert rl.find_stop_ids(tokenizer, GenerationConfig()) == ids
        assert rl.find_stop_ids(tokenizer, GenerationConfig(eos_token_id=[7, 9])) == [*ids, 7, 9]


# -- 2. Rollouts -------------------------------------------------------------------------

STOP_IDS = [3, 17, 40, 41, 42]
sample = functools.partial(rl.generate, max_response_tokens=20, temperature=1.0, stop_ids=STOP_IDS)

def slow_response(model, prompt, temperature, noise):
    """No cache, no batch: the whole sequence again for every token; noise picks from the softmax."""
    if not temperature:  # transformers' own, which is greedy
        return model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=len(noise),
                              eos_token_id=STOP_IDS, pad_token_id=0)[0, len(prompt):].tolist()
    response = []
    while len(response) < len(noise) and not {*response} & {*STOP_IDS}:
        logits = model(torch.tensor([prompt + response])).logits[0, -1].double()
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        response.append(int((cumulative <= noise[len(response)]).sum()))
    return response

def ragged_loop(query, key, value, cu_q, cu_k, max_q, max_k, dropout, is_causal, *, return_debug_mask, scale,
                seqused_k):
    """torch's flash attention, which only CUDA has: row b attends to its first seqused_k[b] keys."""
    assert max_q == 1 and dropout == 0 and not is_causal and int(seqused_k.max()) <= max_k
    assert cu_q.tolist() == [*range(len(query) + 1)]
    rows, attention = [], torch.nn.functional.scaled_dot_product_attention
    for q, start, used in zip(query, cu_k, seqused_k):
        k, v = (x[start:start + used].transpose(0, 1) for x in (key, value))
        rows.append(attention(q[:, None], k, v, scale=float(scale), enable_gqa=True))  # (heads, 1, size)
    return torch.stack(rows).squeeze(2), None, None

@pytest.mark.parametrize("path", ["plain", "graph", "ragged"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.3])
def test_generate_equals_the_slow_loop(temperature, path, monkeypatch):
    """graph: in a CUDA graph's fixed shapes, which computes ended rows, too; ragged: by its attention."""
    model = random_model()
    noise = torch.rand(len(PROMPTS), 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = [slow_response(model, prompt, temperature, row) for prompt, row in zip(PROMPTS, noise)]
    assert len({*map(len, expected)}) > 2  # or no row is seen to end before another
    monkeypatch.setattr(rl, "can_read_ragged", lambda model: path == "ragged")
    monkeypatch.setattr(rl, "flash_attention", ragged_loop if path == "ragged" else None)
    for slots in (1, 2, 3, None):
        responses = sample(model, PROMPTS, temperature=temperature, slots=slots, cuda_graph=path != "plain",
                           generator=torch.Generator().manual_seed(5))
        assert responses == expected

def test_a_graph_that_computes_something_else_is_found_out(monkeypatch, refused):
    monkeypatch.setattr(rl, "can_read_ragged", lambda model: True)
    monkeypatch.setattr(rl, "flash_attention", lambda query, *args, **kwargs: (query, None))
    assert "--no-cuda-graph" in refused(sample, random_model(), PROMPTS, cuda_graph=True)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_cuda_samples_what_the_cpu_samples(cuda_graph):
    """Greedy tokens in float32 are the CPU's; in bf16, with flash attention, nearly the trainer's."""
    on_cpu, model = sample(random_model(), PROMPTS, temperature=0), random_model().cuda()
    assert on_cpu == sample(model, PROMPTS, temperature=0, cuda_graph=cuda_graph)
    responses, sampled = sample(rl.frozen_copy(model, bf16=True), PROMPTS, temperature=0.6,
                                cuda_graph=cuda_graph, return_logprobs=True)
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, responses, 0.6)
    assert (torch.cat(sampled).cuda() - logprobs[mask]).abs().mean() < 0.1

def test_sampling_follows_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -2.0, 3.0, -1e9]]).expand(200_000, -1)
    noise = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature in (0.6, 1.0):
        tokens, _ = rl.sample_tokens(logits, torch.full((200_000,), temperature), noise)
        share = tokens.bincount(minlength=5) / 200_000
        assert torch.allclose(share, (logits[0] / temperature).softmax(-1), atol=4e-3)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert rl.sample_tokens(logits[:2], torch.ones(2), edges)[0].tolist() == [0, 3]  # none of probability 0
    close = torch.tensor([[0.0, 1.0, 1.0 + 2**-23]]).expand(2, -1)
    assert rl.sample_tokens(close, torch.zeros(2), edges)[0].tolist() == [2, 2]  # greedy, whatever the noise

def test_rounding_leads_to_no_weight_of_0_and_not_past_the_end():
    targets = torch.tensor([-1e-17, 0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    index, left = rl.where_sum_passes(torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(5, -1), targets)
    assert index.tolist() == [1, 1, 1, 2, 2] and left.tolist() == pytest.approx([0, 0, 0.25, 0, 0.5])

def test_noise_is_new_in_each_step_and_the_same_when_made_again(folder, tmp_path, monkeypatch):
    seen, real = [], rl.generate
    monkeypatch.setattr(rl, "generate", lambda *args, **kw: seen.append(kw["noise"]) or real(*args, **kw))
    for run, seed in enumerate((0, 1, 0)):
        rl.main(run_flags(folder, tmp_path / str(run), "--seed", seed))
    noise = torch.stack(seen).view(3, 4, 8, 12)  # run, step, rollout, token
    assert noise[:2].unique().numel() == 2 * 4 * 8 * 12 and torch.equal(noise[0], noise[2])

def test_work_follows_the_sampled_tokens(model, monkeypatch):
    """One prefill for equal prompts, and not one row-step more than tokens: nobody waits for the longest."""
    fed, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: fed.append(kw["input_ids"].shape) or forward(**kw))
    responses = sample(model, 12 * [PROMPTS[1]] + 5 * [PROMPTS[0]] + 3 * [PROMPTS[1]], slots=4,
                       stop_ids=range(6), generator=torch.Generator().manual_seed(0))
    rows = [n for n, t in fed if t == 1]
    assert [t + 1 for _, t in fed if t > 1] == [len(PROMPTS[1]), len(PROMPTS[0])]
    assert sum(rows) == sum(map(len, responses)) and max(rows) == 4
    assert len(rows) < sum(rows) / 4 + 20  # all four are busy until no prompt is left

@pytest.mark.parametrize("cuda_graph", [False, True])
def test_generate_refuses_what_it_cannot_sample_from(cuda_graph):
    """On CUDA, drawing from logits that are not finite would be an assertion of the device."""
    model = random_model().train()
    assert sample(model, []) == [] and not model.training  # no dropout
    with pytest.raises(ValueError, match="empty prompt"):
        sample(model, [[1], []])
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(SystemExit, match="not finite"):
        sample(model, PROMPTS, cuda_graph=cuda_graph)


# -- 3. Reward ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind, given, gold, right", checker.answer_pairs(), ids=lambda x: str(x)[:30])
def test_answers(kind, given, gold, right):
    start = time.perf_counter()
    assert rl.is_correct(rf"Thus the answer is $\boxed{{{given}}}$.", gold) is right
    assert time.perf_counter() - start < 0.5  # it takes a few ms; a quadratic scan, seconds

@pytest.mark.parametrize("gold", {gold: 0 for _, _, gold, _ in checker.answer_pairs()})
def test_an_answer_equals_itself(gold):
    assert rl.is_correct(rf"\boxed{{ {gold} }}", rf"\boxed{{{gold}}}")

def test_a_rewriting_is_right_and_a_mutation_is_wrong():
    """The value of a tree says whether two expressions are equal."""
    pairs = [("", *pair) for pair in checker.random_pairs(2000)]
    assert checker.mistakes_of(rl.is_correct, pairs) == {"refused": [], "paid": [], "raised": []}
    assert 500 < sum(equal for *_, equal in pairs) < 1500

@pytest.mark.parametrize("content, texts", [
    ("5", r"so $\boxed 5$. | \fbox{5} | \boxed {5} | \boxed{5}}} | \boxed{5} and \boxed{6"),
    ("6", r"\boxed{5} and \boxed{6}. | \boxed{5} and \boxed 6 | \boxed{\boxed{6}} | \boxed{1 \boxed{6}"),
    ("", r"\boxed{}"), (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"), (r"[1)\}", r"\boxed{[1)\}}"),
    (None, r"no box | \boxed 7.5 | \boxed 72 | \boxed 7/2 | \boxed x^2 | \boxed \frac12 | \boxed | \boxedx | "
     r"\boxed{5 | \boxed{a\boxed{b")])
def test_extract_boxed(content, texts):
    assert {rl.extract_boxed(text) for text in texts.split(" | ")} == {content}

def test_is_correct_never_raises():
    assert rl.is_correct(r"\boxed{4}", 4) and rl.is_correct(r"\boxed{4}", 4.0)
    odd = [None, "", "  ", b"4", [], math.inf, r"\boxed{}", r"\boxed{ }"]
    for response, answer in itertools.product([*odd, 4, r"\boxed{4}", r"\boxed{nan}"], odd):
        assert rl.is_correct(response, answer) is False
    rng, golds = random.Random(0), "".join(gold for _, _, gold, right in checker.answer_pairs() if right)
    pieces = re.findall(r"\\?[A-Za-z]+(?:\{[a-z]+\})?|.", golds) + 99 * ["\n", "\\", "\0", "\ud800"]
    for _ in range(3000):
        box = "".join(rng.choices(pieces, k=rng.randint(1, 30)))
        assert isinstance(rl.is_correct(rf"\boxed{{{box}}}", rng.choice(["4", "x^2+1", "(1,2)", box])), bool)

def test_reward_kinds():
    texts = [r"so \boxed{24}.", r"so \boxed{25}.", "24", r"\boxed{ }"]
    for kind, rewards in {"answer": [1, 0, 0, 0], "format": [1, 1, 0, 0], "none": [0, 0, 0, 0]}.items():
        assert [rl.reward_of(text, "24", kind) for text in texts] == rewards


# -- 4. Advantages -----------------------------------------------------------------------

def test_advantages_by_group():
    of_right = [rl.group_advantages(n * [1.0] + (8 - n) * [0.0], 8)[0].item() for n in range(1, 8)]
    # as the released code has them
    assert of_right == pytest.approx([2.475, 1.620, 1.208, 0.935, 0.725, 0.540, 0.354], abs=6e-4)
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    rewards[8:16] = 0.1  # equal, but their mean rounds to 0.10000000149
    slow = []
    for group in rewards.view(3, 8).tolist():
        slow += [(r - np.mean(group)) / (np.std(group, ddof=1) + 1e-6) for r in group]
    advantages = rl.group_advantages(rewards, 8)
    assert advantages.tolist() == pytest.approx(slow, abs=1e-5) and (advantages[8:16] == 0).all()
    for size in (1, 7):
        with pytest.raises(ValueError):
            rl.group_advantages(rewards, size)


# -- 5. Loss -----------------------------------------------------------------------------

def loss_inputs():
    """Log-probabilities: new, old, of the reference; entropy, advantages, mask."""
    g = torch.Generator().manual_seed(0)
    logprobs, gap, ref, entropy, advantages = torch.randn(5, 5, 7, generator=g, dtype=torch.float64) / 2
    old = logprobs + gap
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 2])[:, None]
    return [logprobs.requires_grad_(), old, ref, entropy.requires_grad_(), advantages, mask]

def slow_loss(logprobs, old, ref, entropy, advantages, mask, config):
    """The equations of the paper, token by token."""
    sequences = []
    for b, length in enumerate(mask.sum(1)):
        tokens = []
        for t in range(length):
            ratio, A = torch.exp(logprobs[b, t] - old[b, t]), advantages[b, t]
            clipped = torch.clamp(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
            pg = torch.maximum(-ratio * A, -clipped * A)
            d = ref[b, t] - logprobs[b, t]
            kl = {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - 1 - d}[config.kl_estimator]
            tokens.append(config.pg_coef * pg + config.kl_coef * kl - config.entropy_coef * entropy[b, t])
        sequences.append(tokens)
    if config.loss_agg == "token":  # as if they were one
        sequences = [sum(sequences, [])]
    return sum(sum(tokens) / len(tokens) for tokens in sequences) / len(sequences)

@pytest.mark.parametrize("settings", [
    {}, {"pg_coef": 0.0}, {"kl_coef": 0.7, "kl_estimator": "k1"}, {"kl_coef": 0.7, "kl_estimator": "k2"},
    {"kl_coef": 0.7, "entropy_coef": 0.3}, {"clip_eps": 0.05}, {"loss_agg": "sequence"},
    {"loss_agg": "sequence", "prompts_per_step": 2, "updates_per_batch": 2}])
def test_loss_equals_the_slow_loop_with_gradients(settings):
    config = rl.Config(**{"prompts_per_step": 1, "group_size": 5, **settings})
    logprobs, old, _, entropy, _, mask = inputs = loss_inputs()
    expected = slow_loss(*inputs, config)
    loss, stats = rl.grpo_loss(*inputs, 18, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and stats["loss"] == loss.item()
    gradients = [torch.autograd.grad(x, [logprobs, entropy]) for x in (loss, expected)]
    for mine, theirs in zip(*gradients):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    assert stats["ratio"].item() == pytest.approx((logprobs - old)[mask].exp().mean().item())

@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.5, 1, -1.2, 0), (0.5, 1, -0.5, -0.5), (1.1, 1, -1.1, -1.1),
    (1.5, -1, 1.5, 1.5), (0.5, -1, 0.8, 0), (0.9, -1, 0.9, 0.9),
    (math.exp(200), 1, -1.2, 0), (math.exp(-200), 1, 0, 0), (math.exp(-200), -1, 0.8, 0),
    (math.exp(200), -1, math.exp(20), 0), (math.exp(19), -1, math.exp(19), math.exp(19))])
def test_clipping_on_both_sides(ratio, advantage, loss, gradient):
    """A < 0 keeps the larger loss: a maximum of the objective would clip there what PPO keeps.

    exp(200) is inf, and inf times the gradient of the branch that is clipped, 0, is NaN. The second rollout
    is padding, with an advantage of its own.
    """
    logprobs = torch.tensor([[math.log(ratio)], [0.0]], requires_grad=True)
    zero, A, mask = torch.zeros(2, 1), torch.tensor([advantage, 5.0]), torch.tensor([[1], [0]])
    value, stats = rl.grpo_loss(logprobs, zero, logprobs.detach(), zero, A, mask, 1, rl.Config())
    value.backward()
    assert value.item() == pytest.approx(loss) and logprobs.grad[0].item() == pytest.approx(gradient)
    assert stats["ratio"] == pytest.approx(min(ratio, math.exp(20)))
    assert stats["clip_frac"] == (loss in (-1.2, 0.8))

def test_kl_estimators():
    """Gradients over the policy's own samples: k1 gives nothing, k2 the reverse KL, k3 the forward KL."""
    logits, ref = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = logits.requires_grad_().log_softmax(-1), ref.log_softmax(-1)
    kls = {"k1": 0 * p.sum(), "k2": (p.exp() * (p - q)).sum(), "k3": (q.exp() * (q - p)).sum()}
    for kind, kl in kls.items():
        estimate = (p.detach().exp() * rl.kl_estimate(p, q, kind)).sum()
        mine, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (estimate, kl))
        assert torch.allclose(mine, theirs, atol=1e-12)
    far = torch.tensor([-200.0, -12.0, 0.0], requires_grad=True)  # k3 is cut there
    k3 = rl.kl_estimate(far, torch.tensor([0.0, 0.0, -200.0]))
    k3.sum().backward()
    assert k3.tolist() == [10, 10, 10] and torch.isfinite(far.grad).all()

@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_logprobs_equal_plain_log_softmax(model, chunk):
    """Temperature, the shift by one, chunks, padding: all against one row at a time, with gradients.

    The last response stops by 0, as if EOS == PAD: a mask by id would lose it (simple_GRPO, nanoGRPO).
    """
    prompts, responses = [*PROMPTS, [1, 2]], [*RESPONSES, [5, 0]]
    logprobs, entropy, mask = rl.token_logprobs(model, prompts, responses, 0.6, chunk)
    assert mask.sum(1).tolist() == [len(r) for r in responses]
    slow = torch.zeros(2, *mask.shape)
    for b, (prompt, response) in enumerate(zip(prompts, responses)):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        logp, n = (logits / 0.6).log_softmax(-1), len(response)
        slow[0, b, :n] = logp[range(n), response]
        slow[1, b, :n] = -(logp.exp() * logp).sum(-1)
    fast, weight = torch.stack([logprobs, entropy]), model.model.layers[0].mlp.up_proj.weight
    assert torch.allclose(fast, slow, atol=1e-5)
    mine, theirs = (torch.autograd.grad(x.sum(), weight)[0] for x in (fast, slow))
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)


# -- 6. Update ---------------------------------------------------------------------------

ADVANTAGES = torch.tensor([1.0, -0.5, 0.3, -1.0, 0.0, 2.0, -2.0])

@pytest.fixture
def update(model, monkeypatch):
    """Call update_policy, but for the optimizer's step -> the gradient, the stats."""
    monkeypatch.setattr(rl, "optimizer_step", lambda *_: None)

    def call(ref_policy=None, batch=batch_of(), **settings):
        policy, config = copy.deepcopy(model), rl.Config(**settings)
        if config.activation_checkpointing:
            rl.recompute_layers(policy)
        stats = rl.update_policy(policy, ref_policy, None, batch, range(7), ADVANTAGES, None, config)
        return torch.cat([p.grad.flatten() for p in policy.parameters()]), stats
    return call

def test_the_first_update_is_reinforce_and_its_gradient_is_clipped(model, update):
    """Old log-probs are the log-probs: the ratio is 1 and tells nothing, but the gradient is not 0."""
    settings = dict(kl_coef=0.0, entropy_coef=0.0)
    whole, stats = update(grad_clip=1e9, **settings)
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, RESPONSES, 0.6)
    loss = -(ADVANTAGES[:, None] * logprobs).sum() / mask.sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.allclose(whole, torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)
    assert stats["ratio"] == pytest.approx(1) and stats["clip_frac"] == 0
    assert stats["grad_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)
    clipped, clipped_stats = update(grad_clip=stats["grad_norm"] / 3, **settings)
    assert torch.allclose(clipped, whole / 3, rtol=1e-4, atol=1e-8) and clipped_stats == stats

@pytest.mark.parametrize("loss_agg", ["token", "sequence"])
def test_packing_never_changes_the_gradient(update, loss_agg, monkeypatch):
    """num_tokens is fixed before the loop: means of micro-batches (verl, nanochat, nano-aha) fail here."""
    settings = dict(ref_policy=random_model(seed=1), grad_clip=1e9, loss_agg=loss_agg, kl_coef=0.3,
                    entropy_coef=0.2, prompts_per_step=1, group_size=7)
    packs, score_rows = [], rl.score_rows
    monkeypatch.setattr(rl, "score_rows", lambda *args: packs.append(args[2]) or score_rows(*args))
    whole, stats = update(**settings)
    assert stats["kl"] > 0.01 and len(packs) == 2  # one, by reference and policy
    for change in ({"token_budget": 1}, {"token_budget": 20}, {"activation_checkpointing": True}):
        split, split_stats = update(**settings, **change)
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5)
        assert split_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)
    assert sorted(map(len, packs))[:14] == 14 * [1]  # by a budget of 1 each of the 7 is a pack of its own

def test_the_sampler_has_the_trainers_logprobs(model, update):
    """A mean difference would take a sampler that is off in both directions for the trainer."""
    responses, sampled = sample(model, PROMPTS, max_response_tokens=9, temperature=0.6, slots=3,
                                return_logprobs=True, generator=torch.Generator().manual_seed(1))
    for distance in (0, 0.5):
        off = [row + distance * (-1) ** torch.arange(len(row)) for row in sampled]
        _, stats = update(batch=batch_of(responses=responses, sampler_logprobs=off), token_budget=40)
        assert stats["sampler_gap"] == pytest.approx(distance, abs=1e-5)

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
        assert length[packs[0][0]] == max(length[i] for i in rollouts)

def test_several_updates_a_batch_move_the_ratio(model, monkeypatch):
    """The second update's ratio is against the policy that sampled, not against the policy itself."""
    policy, seen, real = copy.deepcopy(model), [], rl.update_policy
    monkeypatch.setattr(rl, "update_policy",
                        lambda *args: seen.append((*args[4:7], real(*args))) or seen[-1][3])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    stats = rl.train_on(policy, None, optimizer, batch_of(), ADVANTAGES,
                        rl.Config(updates_per_batch=2, kl_coef=0.0, token_budget=20))
    logprobs, _, mask = rl.token_logprobs(model, PROMPTS, RESPONSES, 0.6)
    (first, _, old, stats_1), (second, _, old_2, stats_2) = seen
    assert [*first, *second] == list(range(7)) and old_2 is old
    assert all(torch.allclose(old[i], logprobs[i][mask[i]], atol=1e-5) for i in range(7))
    assert stats_1["ratio"] == pytest.approx(1, abs=1e-5) and abs(stats_2["ratio"] - 1) > 1e-3
    assert stats["ratio"] == pytest.approx((stats_1["ratio"] + stats_2["ratio"]) / 2)

def test_a_nan_loss_stops_before_the_weights_change(update, monkeypatch):
    monkeypatch.setattr(rl, "optimizer_step", None)
    with pytest.raises(SystemExit, match="nan"):
        update(pg_coef=math.nan)


# -- 7. The run --------------------------------------------------------------------------

def test_a_run_leaves_its_files(folder, tmp_path, capsys, easy_reward):
    run = tmp_path / "my run"  # a space, for the commands that are printed
    rl.main(run_flags(folder, run))
    out = capsys.readouterr().out
    assert "How many positive divisors" in out and "<|im_end|>" in out and "step 4/4" in out
    assert f"evaluate.py --model '{run}/step-000004'" in out
    rows, samples = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] == sorted({s["step"] for s in samples})
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[3]["kl"] > 1e-4
    assert {abs(s["advantage"]) for s in samples} & {0.866, 1.5}  # a half or a quarter of 4, scaled
    config = rl.read_json(run / "config.json")
    assert "divisors" in config["prompt"] and config["stop_ids"] and config["versions"]["torch"]
    assert not same_weights(folder, run / "step-000004")
    assert AutoTokenizer.from_pretrained(run / "step-000002").chat_template

def test_summary_of_a_step():
    """Against the obvious counts, with a dead group, a mixed one, two examples and a response cut short."""
    batch = batch_of(8 * [[1]], 7 * [[5, 2]] + [[5, 6, 7]])
    batch.examples = [{"name": name, "answer": "4"} for name in "aaaabbbb"]
    batch.texts = 5 * ["\\boxed{4}"] + ["\\boxed{5}", "4", "4"]
    batch.rewards = [1.0, 1, 1, 1, 0.5, 0, 0, 0]
    run = rl.Run(*16 * [None])
    run.stop_ids = [2]
    assert rl.summarize(rl.describe_rollouts(run, batch, batch.rewards), 4) == {
        "reward": 4.5 / 8, "accuracy": 5 / 8, "boxed_frac": 6 / 8, "response_length": 17 / 8,
        "truncated_frac": 1 / 8, "dead_groups": 0.5, "examples": {"a": 1.0, "b": 0.25}}


# -- A. The command line -----------------------------------------------------------------

def test_config_is_the_papers_run():
    assert vars(rl.parse_args([])).items() >= dict(
        model="Qwen/Qwen2.5-Math-1.5B", output_dir="runs/pi1-Qwen2.5-Math-1.5B", steps=2000, save_every=20,
        prompts_per_step=128, group_size=8, temperature=0.6, max_prompt_tokens=1024, max_response_tokens=3072,
        updates_per_batch=1, learning_rate=1e-6, weight_decay=0.01, grad_clip=1.0, clip_eps=0.2, pg_coef=1.0,
        kl_coef=0.001, kl_estimator="k3", entropy_coef=0.001, loss_agg="token").items()

def test_words_of_a_command_line(monkeypatch, tmp_path):
    """The paper's labels begin with a minus; a shell leaves the ~ of --flag=~/x to the program."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    config = rl.parse_args(["--preset", "tiny", "--learning_rate", "3e-4", "--group_size=4", "--model", ".",
                            "--no-scale_rewards", "--example", "~/x_y.json", "pi1"])
    assert config.learning_rate == 3e-4 and config.group_size == 4 and not config.scale_rewards
    assert config.steps == 60 and config.example == ["/home/me/x_y.json", "pi1"]
    assert config.output_dir == f"runs/x_y+pi1-{tmp_path.name}"
    assert rl.parse_args(["--preset", "24gb", "--output-dir=~/x"]).output_dir == "/home/me/x"
    assert [rl.parse_args(["--answer", label]).answer for label in ("--5", "~/2")] == ["--5", "~/2"]
    assert rl.parse_args([r"--answer=-\frac{1}{2}"]).answer == r"-\frac{1}{2}"

def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        rl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "longest response [C] (default: 3072)" in text
    assert all(rl.flag_of(f.name) in text for f in rl.fields(rl.Config))

@pytest.mark.parametrize("flags, words", [
    *((flags, flags) for flags in [
        "--group-size 1", "--temperature 0", "--temperature nan", "--steps 0", "--seed -1", "--clip-eps inf",
        "--updates-per-batch 3", "--learning-rate -1", "--learning 0", "--max-prompt-tokens 3",
        "--example pi99", "--eval math500", "--model no/such/folder", "--resume"]),
    ("--steps many", "--steps"), ("--reward maybe", "--reward"), ("--eval-every 5", "--eval"),
    ("--answer \t", "with an answer"), ("--example pi1 pi2 --answer 4", "--answer"),
    ("--max-response-tokens 250", "sees 256"), ("--eval math500 --eval-every 5", "DIR/math500.jsonl")])
def test_bad_input_gets_one_sentence(flags, words, folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("datasets.load_dataset", None)  # the hub is away
    sentence = refused(rl.main, run_flags(folder, tmp_path / "run", *flags.split(" ")))
    assert words in sentence and not (tmp_path / "run").exists()


# -- B. Files ----------------------------------------------------------------------------

def resume(run, *more):
    return ["--output-dir", str(run), "--resume", *map(str, more)]

@pytest.fixture
def run(folder, tmp_path, easy_reward):
    """The folder of a run that has made its two steps, on two problems."""
    rows = [{"problem": f"What is 2 × {n}?", "answer": 2 * n} for n in (1, 2)]
    rl.append_rows(tmp_path / "mine.jsonl", rows)
    rl.main(run_flags(folder, tmp_path, "--steps", 2, "--example", tmp_path / "mine.jsonl"))
    return tmp_path

def bytes_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}

@pytest.mark.parametrize("more", [
    [], ["--precision", "bf16", "--offload-optimizer", "--updates-per-batch", "2"]])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(folder, tmp_path, monkeypatch, more, easy_reward):
    """Killed after any file operation of steps 1 to 4: same weights, same log (nano-aha replays a batch)."""
    whole = tmp_path / "whole"
    rl.main(run_flags(folder, whole, *more))
    for number, (module, name, calls) in enumerate([
            (os, "replace", 4), (rl, "append_rows", 4), (rl, "generate", 3), (torch, "save", 1),
            (GenerationConfig, "save_pretrained", 0)]):
        run, real, count = tmp_path / f"cut{number}", getattr(module, name), itertools.count()

        def killed(*args, **kwargs):
            if next(count) == calls:
                raise KeyboardInterrupt("killed")
            return real(*args, **kwargs)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="killed"):
            patch.setattr(module, name, killed)
            rl.main(run_flags(folder, run, *more))
        (run / "metrics.jsonl").open("a").write('{"step": "3"}\n{"step": 3, "rew')  # cut short while writing
        rl.main(resume(run))
        assert comparable(run) == comparable(whole)
        assert all(same_weights(run / step, whole / step) for step in ("step-000002", "step-000004"))

@pytest.mark.parametrize("name, old, new, words", [
    ("latest/state.pt", "PK", "", "cannot be loaded"), ("latest/state.pt", None, None, "cannot be loaded"),
    ("config.json", '"group_size": 4', '"group_size": 2.5', "--group-size: invalid int"),
    ("config.json", '"learning_rate": 0.01', '"learning_rate": null', "--learning-rate: invalid float"),
    ("config.json", '"reward": "answer"', '"reward": "zz"', "'zz' is none of"),
    ("config.json", '"eval_every": 0', '"eval_every": 2', "give both or none"),
    ("config.json", '"steps": 2', '"steps": 1', "is at step 2 already"),
    ("mine.jsonl", "× 1", "× 3", "is not what it was"),
    ("mine.jsonl", '"answer": 4', '"answer": 5', "is not what it was")])
def test_what_cannot_go_on_is_refused_and_stays(run, folder, name, old, new, words, refused):
    """A label or a problem that was changed: the run would go on with another task, silently."""
    content = (run / name).read_bytes()
    (run / name).unlink()
    if old:
        (run / name).write_bytes(content.replace(old.encode(), new.encode()))
    before = bytes_of(run)
    assert words in refused(rl.main, resume(run))
    assert "is of another run" in refused(rl.main, run_flags(folder, run))
    assert before == bytes_of(run)

def test_a_second_writer_or_a_full_disk_leaves_the_checkpoint_whole(run, monkeypatch, refused):
    def full(state, path):
        Path(path).write_text("cut short")
        raise RuntimeError("unexpected pos 99 vs 88")
    flags, before = resume(run, "--steps", 3), bytes_of(run)
    with FileLock(run / "lock"):
        assert "lock is in use" in refused(rl.as_a_command, lambda: rl.main(flags))
    assert before == bytes_of(run)
    monkeypatch.setattr(torch, "save", full)
    assert "disk is full (unexpected pos" in refused(rl.as_a_command, lambda: rl.main(flags))
    assert before[run / "latest" / "state.pt"] == (run / "latest" / "state.pt").read_bytes()

@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "latest", "step-000002"])
def test_no_file_of_another_run_is_overwritten(name, folder, tmp_path, monkeypatch, refused):
    """Of one that begins while the model is loaded, and of one that was there before."""
    real = rl.load_model
    for load_model in (lambda model: (tmp_path / name).touch() or real(model), None):
        monkeypatch.setattr(rl, "load_model", load_model)
        assert "is of another run" in refused(rl.main, run_flags(folder, tmp_path))
    assert not any(path.stat().st_size for path in tmp_path.iterdir())

def test_flags_given_with_resume(run, refused):
    """All but KEPT are used; load_state_dict would restore the old learning rate, unlike config.json."""
    for name, value in zip(rl.KEPT, ["24gb", "x", "pi1", "4", 99, 5], strict=True):
        sentence = refused(rl.main, resume(run, rl.flag_of(name), value))
        assert sentence.startswith(f"error: {rl.flag_of(name)} ") and "a resumed run keeps" in sentence
    rl.main(resume(run, "--steps", 3, "--loss-agg", "sequence", "--no-scale-rewards", "--weight-decay", 0.5,
                   "--learning-rate", 1e-30))
    used = {"steps": 3, "loss_agg": "sequence", "scale_rewards": False, "learning_rate": 1e-30}
    assert rl.read_json(run / "config.json").items() >= used.items()
    last = {abs(row["advantage"]) for row in read_jsonl(run / "samples.jsonl") if row["step"] == 3}
    assert {0} != last <= {0, 0.25, 0.5, 0.75}
    group = torch.load(run / "latest" / "state.pt")["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"]) == (1e-30, 0.5)

def test_a_run_of_an_older_version_goes_on(run):
    config = rl.read_json(run / "config.json")
    older = {key: value for key, value in config.items() if key not in ("examples_crc32", "compile")}
    rl.write_json(run / "config.json", older)
    rl.main(resume(run, "--steps", 3))
    assert rl.read_json(run / "config.json") == {**config, "steps": 3, "resume": True}

def test_a_checkpoint_does_not_stay_mapped(run, monkeypatch):
    """Windows cannot replace a file that is mapped: the next save of a resumed run would fail."""
    real, seen = torch.load, {}
    monkeypatch.setattr(torch, "load", lambda *args, **more: seen.update(more) or real(*args, **more))
    rl.main(resume(run))  # nothing is left to do
    assert not seen.get("mmap")

def test_rows_with_line_separators_survive_a_resume(tmp_path):
    rows = [{"step": 1, "text": "a\u2028b\x85c\nd and half an emoji \ud83d"}, {"step": 2, "text": ""}]
    rl.append_rows(tmp_path / "samples.jsonl", rows)
    (tmp_path / "samples.jsonl.tmp").write_text("left by a kill")
    assert rl.keep_rows(tmp_path / "samples.jsonl", lambda row: row["step"] <= 1) == rows[:1]
    assert read_jsonl(tmp_path / "samples.jsonl") == rows[:1]
    rl.write_json(tmp_path / "x.json", rows[0])
    assert rl.read_json(tmp_path / "x.json") == rows[0]

def test_evaluation_while_training(run, folder):
    """Before the first step, every so many, and after the last; asked for later, too, and then no more."""
    flags = ["--eval", run / "mine.jsonl", "--eval-every", 2]
    rl.main(run_flags(folder, run / "new", "--steps", 1, *flags))
    assert [row["step"] for row in read_jsonl(run / "new" / "metrics.jsonl")] == [0, 1, 1]
    for more in (["--steps", 4, *flags], ["--steps", 7], ["--steps", 8, "--eval-every", 0]):
        rl.main(resume(run, *more))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7, 8]
    assert set(rows[2]["eval"]) == {"mine", "average"}

def test_the_commands_as_a_user_types_them(run, folder):
    """Evaluate; train, and Ctrl-C in the middle; resume: on an ascii console, as Windows > log.txt is."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore Ctrl-C

    def start(*command):
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=HERE, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})

    def finish(process, code=0):
        out, err = process.communicate(timeout=240)
        assert process.returncode == code and "Traceback" not in err, err
        return out
    evaluation = start("evaluate.py", "--model", folder, "--benchmarks", run / "mine.jsonl", "--limit", 1,
                       "--max-response-tokens", 8, "--output", run / "eval.json")
    new = run / "new"
    process = start("one_shot_rlvr.py", *run_flags(folder, new, "--steps", 100000, "--save-every", 100000,
                                                   "--example", run / "mine.jsonl"))
    while len(rl.read_log(new / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert f"--output-dir {new} --resume" in finish(process, 130)
    done = torch.load(new / "latest" / "state.pt")["step"]
    assert done == read_jsonl(new / "metrics.jsonl")[-1]["step"] >= 3
    rl.main(resume(new, "--steps", done + 2))
    assert [row["step"] for row in read_jsonl(new / "metrics.jsonl")] == list(range(1, done + 3))
    assert "average" in finish(evaluation) and len(read_jsonl(run / "eval.jsonl")) == 1


# -- C. Models, and several processes ----------------------------------------------------

@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)

def test_bf16_copy_keeps_the_rotary_frequencies(model):
    """model.to(bfloat16) would cast that buffer too, and far positions with it."""
    twin = rl.frozen_copy(model, bf16=True)
    assert {(p.dtype, p.requires_grad) for p in twin.parameters()} == {(torch.bfloat16, False)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(twin.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)

def test_heads_that_are_refused(refused):
    model = random_model()
    rl.check_head(model, PROMPTS[1])
    model.register_forward_hook(lambda model, inputs, output: type(output)(logits=output.logits / 2))
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

def test_folders_that_lack_something_are_refused(folder, workspace, monkeypatch, refused):
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: x for name, x in model.state_dict().items() if "1.mlp.up" not in name}
    model.save_pretrained("model", state_dict=weights)
    assert "lack model.layers.1.mlp.up_proj.weight" in refused(rl.load_model, "model")
    model.save_pretrained("model")
    assert "lack a tokenizer" in refused(rl.load_model, "model")
    assert "it has no preset" in refused(rl.main, ["--output-dir", "model", "--resume"])
    model.model.layers = None
    assert "layers of this model are not found" in refused(rl.compile_layers, model)
    monkeypatch.setattr(rl, "find_stop_ids", lambda *args: [])
    assert "no token that ends" in refused(rl.main, run_flags(folder, "new"))

def test_a_rank_that_a_shell_left_behind(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert rl.start_processes() == (0, 1) and rl.is_first_process()

def test_groups_that_processes_cannot_share_are_refused(folder, workspace, monkeypatch, refused):
    monkeypatch.setattr(rl, "start_processes", lambda: (0, 2))
    flags = run_flags(folder, "run", "--prompts-per-step", "3")
    assert "a multiple of 2 processes" in refused(rl.main, flags) and not Path("run").exists()

EASY = """import os
import one_shot_rlvr as rl
rl.reward_of = lambda text, answer, kind: float(len(text) % 2)
if os.environ.get("DIES") == os.environ["RANK"]:
    rl.log_step = lambda *args: os._exit(7)
rl.main()
"""

def torchrun(*flags, **env):
    """Start the script on two processes."""
    Path("easy.py").write_text(EASY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*command, "easy.py", *flags], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(HERE), **env})

def test_two_processes_make_the_same_run(folder, workspace, easy_reward):
    """torchrun: the groups split over processes; what one began, two end; one dies, and the other ends."""
    rl.append_rows("two.jsonl", [{"problem": f"What is {a} + 2?", "answer": a + 2} for a in (2, 30)])
    flags = ["--prompts-per-step", "4", "--updates-per-batch", "2", "--loss-agg", "sequence",
             "--kl-coef", "0.1", "--example", "two.jsonl"]
    dying = torchrun(*run_flags(folder, "dies", *flags), DIES="1")
    rl.main(run_flags(folder, "two", *flags, "--steps", "2"))
    process = torchrun("--output-dir", "two", "--resume", "--steps", "4")
    rl.main(run_flags(folder, "one", *flags))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and out.count("step 4/4") == 1, err
    assert re.search("easy.py FAILED.*exitcode  : 7", dying.communicate(timeout=240)[1], re.DOTALL)
    rl.main(["--output-dir", "dies", "--resume"])
    one, two, dies = (comparable(Path(run)) for run in ("one", "two", "dies"))
    assert dies == one and two[1] == one[1]
    for row, row_of_two in zip(one[0], two[0], strict=True):
        assert row.pop("examples") == row_of_two.pop("examples")
        assert row_of_two == pytest.approx(row, rel=1e-3, abs=1e-5)
    assert row["kl"] > 1e-3  # or nothing was learned


# -- D. Compiled layers ------------------------------------------------------------------

@pytest.fixture
def graphs(request, monkeypatch):
    """The graphs that torch.compile makes, which are then run as they are: to compile them takes minutes."""
    made, lookup = [], torch._dynamo.lookup_backend
    compiler = getattr(request, "param", "eager")
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: (
        lambda graph, inputs: made.append(graph) or lookup(compiler)(graph, inputs)))
    return made

@pytest.mark.parametrize("graphs", ["eager", pytest.param("inductor", marks=pytest.mark.skipif(
    "SLOW" not in os.environ, reason="takes minutes and a C++ compiler: SLOW=1 pytest"))], indirect=True)
def test_compiled_layers_compute_the_same_and_are_compiled_once(graphs, capsys):
    """One layer is compiled and all use it, in all lengths: at most three graphs."""
    plain, options = random_model(), dict(max_response_tokens=20, stop_ids=[3, 17], temperature=0)
    model, made = copy.deepcopy(plain), []
    rl.compile_layers(model)
    expected = rl.generate(plain, PROMPTS, **options)
    for first in range(4):  # other numbers of rows, other lengths
        assert rl.generate(model, PROMPTS[first:], slots=2 + first, **options) == expected[first:]
        gradients = []
        for one in (model, plain):
            logprobs, entropy, _ = rl.token_logprobs(one, PROMPTS[first:], RESPONSES[first:], 0.6)
            weight = one.model.layers[1].mlp.up_proj.weight
            gradients += torch.autograd.grad((logprobs + entropy).sum(), weight)
        assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)
        made.append(capsys.readouterr().out.count("compiling a layer took "))
    assert 1 <= made[0] <= 3 and made[1:] == [0, 0, 0]
    written = [node.args[0].op for graph in graphs for node in graph.graph.nodes
               if node.target is operator.setitem]
    assert {*written} == {"placeholder"}  # through a view, the whole cache would be copied

def test_what_cannot_be_compiled_runs_without(graphs, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nand much more")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    model, options = random_model(), dict(max_response_tokens=4, stop_ids=[3], temperature=0)
    expected = rl.generate(model, PROMPTS, **options)
    rl.compile_layers(model)
    assert rl.generate(model, PROMPTS, **options) == expected
    assert "runs as it is (No working C++ compiler found)\n" in capsys.readouterr().out

def test_what_saves_time_or_memory_changes_no_run(folder, workspace, easy_reward, graphs):
    """Not even one that is resumed. The KL starts at 0, as it does not in an all-bf16 reference."""
    flags = ["--precision", "bf16", "--kl-coef", "0.1"]
    more = [*flags, "--compile", "--activation-checkpointing", "--offload-optimizer"]
    rl.main(run_flags(folder, "plain", *flags))
    rl.main(run_flags(folder, "whole", *more))
    rl.main(run_flags(folder, "cut", *more, "--steps", 2))
    rl.main(["--output-dir", "cut", "--resume", "--steps", "4"])
    plain, whole, cut = (comparable(Path(run)) for run in ("plain", "whole", "cut"))
    assert graphs and plain == whole == cut and plain[0][0]["kl"] == 0 and plain[0][3]["kl"] > 1e-4
    assert same_weights("plain/step-000004", "cut/step-000004")
    saved = AutoModelForCausalLM.from_pretrained("cut/step-000004", dtype="auto")
    assert saved.dtype == torch.bfloat16  # what was sampled from


# -- Evaluation --------------------------------------------------------------------------

@pytest.mark.parametrize("name, row, problem, answer", [
    ("math500", {"problem": "p", "solution": "\\boxed{2}", "answer": "1", "subject": "Algebra"}, "p", "1"),
    ("amc23", {"id": 0, "problem": "old", "answer": 27.0, "question": "q"}, "q", "27.0"),
    ("minerva_math", {"problem": "p", "solution": "\\boxed{1}, so \\boxed{\\frac12}."}, "p", "\\frac12"),
    ("olympiadbench", {"context": None, "question": "q", "final_answer": ["$3$", "4"]}, "q", "$3$"),
    ("olympiadbench", {"context": "Let x.", "question": "q", "final_answer": "34"}, "Let x.\nq", "34")])
def test_loaders_on_each_layout(workspace, monkeypatch, name, row, problem, answer):
    """Each of the paper's files and each hub set: the same rows from either."""
    Path(f"{name}.jsonl").write_text("\n" + json.dumps(row) + "\n")
    local = evaluate.load_benchmark(name, ".")
    assert local == evaluate.load_benchmark(f"{name}.jsonl")
    assert (local[0]["problem"], local[0]["answer"]) == (problem, answer)
    assert local[0].get("subject") == row.get("subject")
    hub = {(evaluate.BENCHMARKS[name][0], "test"): [row]}
    monkeypatch.setattr("datasets.load_dataset", lambda source, split: hub[source, split])
    assert evaluate.load_benchmark(name) == local

@pytest.mark.parametrize("lines, words", [
    ('{"problem": "p", "answer": 1}\n\n{"problem": "p"}', ", line 3"), ("[1]", ", line 1"),
    ('{"problem": "p", "answer": 1}\n{"prob', ", line 2"), ('{"problem": " ", "answer": 1}', ", line 1"),
    ('{"problem": "p", "solution": "no box"}', ", line 1"), ("", ": no problems"),
    ('{"problem": "p", "final_answer": []}', ", line 1")])
def test_a_broken_file_is_named_by_its_line(workspace, lines, words, refused):
    Path("my.jsonl").write_text(lines)
    assert f"my.jsonl{words}" in refused(evaluate.load_benchmark, "my.jsonl")

def test_answers_that_can_never_be_met_are_warned_of(workspace, capsys):
    answers = ["so 70 + 2 = 72\n#### 72", "['70']", '["a", "b"]', " ", "x\n" * 201, "[0,1)", 2]
    rl.append_rows("my.jsonl", [{"problem": "p", "answer": answer} for answer in answers])
    evaluate.load_benchmarks(["my.jsonl"])
    assert "my.jsonl: 5 of 7 answers" in capsys.readouterr().out

def test_the_papers_protocol():
    large, small = ("math500", "minerva_math", "olympiadbench"), ("aime24", "amc23", "aime25")
    assert {name: evaluate.protocol(name) for name in evaluate.PAPER} == {
        **dict.fromkeys(large, (1, 0.0)), **dict.fromkeys(small, (8, 0.6))}
    assert evaluate.protocol("my") == evaluate.protocol("aime24", temperature=0.0) == (1, 0.0)
    assert evaluate.protocol("tiny_add") == (4, 0.6) and evaluate.protocol("my", 16, 1.0) == (16, 1.0)

def checked_rows(right, name="x", **more):
    """Rows as sample_and_check makes them; right: a list of samples for each problem."""
    return [{"benchmark": name, "number": number, "sample": sample, "temperature": 0.6,
             "problem": f"q{number}", "text": "recheck \\boxed{4}" * ok, "correct": bool(ok),
             "correct_lenient": True, "tokens": 10 + sample, "truncated": not ok, "too_long": False,
             **{key: values[number] for key, values in more.items()}}
            for number, samples in enumerate(right) for sample, ok in enumerate(samples)]

def test_measures_by_hand():
    right = [[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1]]
    rows = checked_rows(right, level=[1, 2, 1])
    rows[2]["text"] = "\\boxed{ }"  # an empty box boxes nothing
    rows[3]["text"], rows[4]["text"] = "```python\nprint(4)\n``` ", "```python\n``` \\boxed{4}\n```"
    others = checked_rows([[False]], "y") + checked_rows([[1]], "not asked for", level=[1])
    result = evaluate.measure_all(rows + others, ["y", "x"])
    y, x = result["benchmarks"].values()
    for k in (1, 2, 4):
        solved = [np.mean([*map(max, itertools.combinations(samples, k))]) for samples in right]
        assert x["pass_at"][k] == pytest.approx(np.mean(solved))
    by_hand = {"n": 3, "k": 4, "temperature": 0.6, "avg_at_k": (0.5 + 0.25 + 1) / 3, "pass_at_k": 1,
               "stderr": np.std([0.5, 0.25, 1], ddof=1) / math.sqrt(3), "boxed": 8 / 12, "code": 2 / 12,
               "truncated": 5 / 12, "mean_length": 11.5, "would_run": 1 / 12, "self_reflection": 7 / 12}
    assert {key: x[key] for key in by_hand} == pytest.approx(by_hand)
    assert (x["lenient"]["avg_at_k"], x["lenient"]["stderr"], result["average_lenient"]) == (1, 0, 1)
    levels = {level: (part["avg_at_k"], part["stderr"]) for level, part in x["by_level"].items()}
    assert levels == {1: (0.75, pytest.approx(0.25)), 2: (0.25, None)} and "by_level" not in y
    assert result["average"] == pytest.approx(x["avg_at_k"] / 2)

@pytest.mark.parametrize("verdicts, answer, response", [
    ("++", "4", r"It is \boxed{4}."), ("-+", "4", "So 3 + 1 gives 4."), ("--", "4", "4, not 5."),
    ("-+", "12.8", "The answer is 12.8 mph"), ("-+", "12.8", "The final answer is: $12.8$."),
    ("-+", "12.8", r"cut short: \boxed{12.8"), ("+-", "4", r"\boxed{4} or \boxed{5"),
    ("-+", r"\frac43", r"\boxed{1.33333}"), ("--", r"\frac43", r"\boxed{1.333}"),
    ("-+", r"50\%", r"\boxed{0.5}"), ("-+", "50", r"\boxed{5000}"), ("--", "50", r"\boxed{500}"),
    ("-+", "50", r"\boxed{50.004}"), ("--", "50", r"\boxed{50.01}"), ("-+", r"\sqrt2", r"\boxed{1.41421}"),
    ("-+", r"(\frac13,2)", r"\boxed{(0.33333, 2)}"), ("+-", "3,5,7", r"\boxed{7,5,3}"),
    ("++", "3,5,7", r"\boxed{\{3,5,7\}}"), ("-+", "1234", "It is 1,234."), ("--", "4", "no number"),
    ("+-", r"(0,1)\cup(3,\infty)", r"\boxed{(3,\infty)\cup(0,1)}"), ("--", "4", r"\boxed{}"),
    ("-+", r"\boxed{4}", "4"), ("--", "2^{2001}", r"\boxed{2^{2000}}")])
def test_the_lenient_verdict_of_the_papers_evaluation(verdicts, answer, response):
    """The reward's verdict, then the evaluation's."""
    found = rl.is_correct(response, answer), evaluate.is_correct_lenient(response, answer)
    assert "".join("-+"[verdict] for verdict in found) == verdicts

MY_PROBLEMS = [{"problem": f"What is {a} + {b}?", "answer": a + b, "level": a % 2}
               for a, b in [(2, 2), (3, 4), (11, 5), (20, 6), (2, 2)]]  # 2 + 2 twice, with other noise

@pytest.fixture
def my_flags(folder, workspace):
    """An evaluation of a random model on five problems and on one more set, three samples each."""
    shutil.copytree(folder, "model")
    rl.append_rows("my.jsonl", MY_PROBLEMS)
    rl.append_rows("more.jsonl", MY_PROBLEMS[:1])  # another benchmark, another noise
    return lambda *more: ["--model", "model", "--benchmarks", "my.jsonl", "more.jsonl", "--k", "3",
                          "--temperature", "1", "--max-response-tokens", "16", "--output", "e.json",
                          *map(str, more)]

def responses_in(path):
    return sorted(read_jsonl(path), key=lambda row: (row["benchmark"], row["number"], row["sample"]))

def test_slots_and_interruptions_change_no_response(my_flags, monkeypatch, refused):
    """The noise belongs to problem and sample: a multinomial over the batch would change."""
    evaluate.main(my_flags())
    whole, result = responses_in("e.jsonl"), rl.read_json("e.json")
    assert len(whole) == 18 == len({row["text"] for row in whole})
    append_rows, calls = rl.append_rows, itertools.count()

    def killed(*args, **options):
        if next(calls) == 6:  # the first call makes the file, the others write a response each
            Path("cut.jsonl").open("a").write('{"benchmark": "my", "num')
            raise KeyboardInterrupt
        append_rows(*args, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rl, "append_rows", killed)
        evaluate.main(my_flags("--output", "cut.json", "--slots", 4))
    assert rl.read_json("cut.json")["average"] is None and len(rl.read_log("cut.jsonl")) == 5
    assert "seed 0" in refused(evaluate.main, my_flags("--output", "cut.json", "--seed", 1))
    evaluate.main(my_flags("--output", "cut.json", "--slots", 1))
    assert responses_in("cut.jsonl") == whole
    assert {**rl.read_json("cut.json"), "tokens_per_second": 0} == {**result, "tokens_per_second": 0}

def test_an_evaluation_is_not_overwritten_and_settings_do_not_mix(my_flags, capsys, monkeypatch, refused):
    def refuses(words, *more):
        assert words in refused(rl.as_a_command, lambda: evaluate.main(my_flags(*more)))
    evaluate.main(my_flags())
    before = Path("e.json").read_text(), Path("e.jsonl").read_text()
    monkeypatch.setattr(rl, "load_model", None)  # done is done: no model is loaded
    evaluate.main(my_flags("--by", "level", "--lenient"))
    assert re.findall(r"\n  \d +(\d)", capsys.readouterr().out) == ["3", "2", "1"]  # even, odd; even
    for more in (("k 3, not 2; name another --output", "--k", "2"), ("seed 0", "--seed", "1"),
                 ("limit", "--limit", "1"), ("benchmarks", "--benchmarks", "my.jsonl")):
        refuses(*more)
    with FileLock("e.lock"):  # before anything is compared: the other may write other settings
        refuses("e.lock is in use", "--seed", "1")
    for rows in ([{**row, "answer": 5} for row in MY_PROBLEMS], MY_PROBLEMS[:2], 2 * MY_PROBLEMS):
        rl.append_rows("my.jsonl", rows, "w")
        refuses("problems_crc32")
    Path("model/model.safetensors").open("ab").write(b" ")
    refuses("weights_crc32")
    Path("e.json").rename("gone.json")
    refuses("e.json is gone")
    assert before == (Path("gone.json").read_text(), Path("e.jsonl").read_text())

def test_a_problem_longer_than_the_context_is_counted(my_flags, capsys, monkeypatch):
    """The model takes 256 tokens: one problem fills them, one leaves room for a short response."""
    monkeypatch.setattr(rl, "find_stop_ids", lambda *args: [])
    rl.append_rows("long.jsonl", [{"problem": n * "cats ", "answer": 4} for n in (5, 40, 300)])
    evaluate.main(my_flags("--benchmarks", "long.jsonl", "--max-response-tokens", 200))
    m = rl.read_json("e.json")["benchmarks"]["long"]
    assert (m["n"], m["too_long"]) == (3, 1)
    assert "long: 1 problems fill the model's context" in capsys.readouterr().out
    short, long, too_long = responses_in("e.jsonl")[::3]
    assert too_long["too_long"] and not too_long["correct"] and too_long["tokens"] == 0
    assert 0 < long["tokens"] < 200 == short["tokens"]

@pytest.fixture
def compared(workspace, capsys):
    """Write two evaluations and compare them -> the lines with numbers, spaces squeezed."""
    def call(a, b, *flags):
        for name, rows in (("a", a), ("b", b)):
            rl.append_rows(f"{name}.jsonl", rows, "w")
            measures = evaluate.measure_all(rows, list(dict.fromkeys(row["benchmark"] for row in rows)))
            rl.write_json(f"{name}.json", {"model": name, "settings": {"seed": 0, "dtype": name}, **measures})
        evaluate.main(["--compare", "a.json", "b.json", *flags])
        lines = capsys.readouterr().out.splitlines()
        return [" ".join(line.split()) for line in lines if re.search(r"alike| [-+]\d|%", line)]
    return call

def test_compare_pairs_the_problems(compared, refused):
    """The standard error is that of the differences: two unpaired ones would call x noise.

    A benchmark may have the name of the last line, and a subject of another one.
    """
    parts = dict(subject=20 * ["Algebra", "Geometry"], level=40 * [1])
    a = checked_rows([[n < 20] for n in range(40)], **parts)
    b = checked_rows([[0 < n < 29] for n in range(40)], correct_lenient=[n < 30 for n in range(40)], **parts)
    algebra = dict(name="average", subject=6 * ["Algebra"])
    a += checked_rows([[1], [1], [1], [1], [0], [1]], **algebra)
    b += checked_rows([[0], [0], [0], [0], [1]], **algebra) + checked_rows([[1]], "other")
    a[20]["text"], b[0]["text"] = "\\boxed{5}", "so \\boxed{7}"
    a[20]["truncated"] = a[21]["truncated"] = False
    assert compared(a, b) == [
        "not alike: dtype is a in A, b in B",
        "x 40 50.0 70.0 +20.0 7.3 9 1 B is better",
        "Algebra 20 50.0 70.0 +20.0 11.7 5 1 within noise",
        "Geometry 20 50.0 70.0 +20.0 9.2 4 0 too few problems differ",
        "average 5 80.0 20.0 -60.0 40.0 1 4 too few problems differ",
        "Algebra 5 80.0 20.0 -60.0 40.0 1 4 too few problems differ",
        "average 45 65.0 45.0 -20.0 20.3 10 5 within noise",
        "won, responses of A: 10% boxed, 20% came to their end",
        "won, responses of B: 100% boxed, 100% came to their end",
        "lost, responses of A: 100% boxed, 100% came to their end",
        "lost, responses of B: 20% boxed, 0% came to their end"]
    assert compared(a, b, "--lenient", "--by", "level")[1:3] == [
        "x 40 100.0 75.0 -25.0 6.9 0 10 A is better", "1 40 100.0 75.0 -25.0 6.9 0 10 A is better"]
    rl.write_json("b.json", {**rl.read_json("b.json"), "average": None})
    assert "not the .json of a finished" in refused(evaluate.main, ["--compare", "a.json", "b.json"])
    assert "no problem in common" in refused(compared, checked_rows([[1]], "y"), checked_rows([[1]], "z"))

def test_a_curve_of_a_run(folder, workspace, easy_reward, monkeypatch, refused):
    rl.main(run_flags(folder, "run"))
    Path("run/metrics.jsonl").open("a").write('{"step": 5, "rew')  # the run may be going on
    Path("run/step-abcdef").mkdir()
    rl.append_rows("my.jsonl", MY_PROBLEMS)
    flags = ["--run", "run", "--benchmarks", "my.jsonl", "--max-response-tokens", "8"]
    evaluate.main(flags)
    curve, last = read_jsonl("run/curve.jsonl"), rl.read_json("run/step-000004/eval.json")
    first, second, _, fourth = (row["reward"] for row in rl.read_log("run/metrics.jsonl"))
    assert [(row["step"], row["reward"]) for row in curve] == [(0, first), (2, second), (4, fourth)]
    assert curve[0].keys() == {"step", "reward", "average", "my"}
    assert (last["model"], last["average"]) == ("run/step-000004", curve[2]["average"])
    monkeypatch.setattr(rl, "load_model", None)  # nothing is evaluated twice
    evaluate.main(flags)
    assert read_jsonl("run/curve.jsonl") == curve
    before = Path("run/samples.jsonl").read_text()
    assert "something other than a curve" in refused(evaluate.main, [*flags, "--output", "run/samples.jsonl"])
    assert Path("run/samples.jsonl").read_text() == before

@pytest.mark.parametrize("flags, words", [
    (["--benchmarks", "nope"], "or a .jsonl file"), (["--k", "0"], "--k 0"), (["--k", "4"], "greedy"),
    (["--benchmarks", "a/y.jsonl", "b/y.jsonl"], "two benchmarks y"), (["--output", "x.txt"], "end in .json"),
    (["--benchmarks", "my.jsonl", "--output", "my.json"], "would go into my.jsonl"),
    (["--seed", "-1"], "--seed -1"), (["--temperature", "-1"], "--temperature -1"),
    (["--run", "no_run"], "no_run"), (["--compare", "a.json"], "two files"),
    (["--compare", "a.json", "b.json"], "a.json"), (["--model", "no/such/model"], "no/such/model"),
    (["--data-dir", "no_such_dir"], "no_such_dir/math500.jsonl")])
def test_evaluate_refuses_in_one_sentence(folder, workspace, flags, words, monkeypatch, refused):
    """Before anything is fetched: --output x.txt was refused only after the six sets had come."""
    monkeypatch.setattr("datasets.load_dataset", None)
    model = [] if {"--run", "--compare"} & {*flags} else ["--model", str(folder), "--benchmarks", "math500"]
    assert words in refused(evaluate.main, [*model, *flags]) and not os.listdir()

def test_evaluate_needs_no_lab():
    """Copied to a GPU without labs/, the two scripts run; the tiny world alone is built by a lab."""
    evaluation, script = ((HERE / name).read_text() for name in ("evaluate.py", "one_shot_rlvr.py"))
    assert "labs" not in re.sub(r'"""[^"]*"""', "", evaluation)
    assert re.findall("(?:from|import) labs.*", script) == ["from labs import tiny"]
