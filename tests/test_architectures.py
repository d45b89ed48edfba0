"""Retrofits of tiny random models of the architectures that transformers has; see architectures.py."""

from __future__ import annotations

import re

import pytest
import transformers
from architectures import KINDS, TABLE, Outcome, examine, row, table

NAMED = re.findall(
    r"\S+",
    """
    afmoe apertus bart bert biogpt bloom codegen cohere cohere2 ctrl deepseek_v3 ernie4_5 exaone4 falcon falcon_h1
    gemma gemma2 gemma3_text glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe jamba lfm2
    llama llama4_text mistral mixtral modernbert-decoder mpt nemotron olmo olmo2 olmo3 olmoe opt persimmon phi
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next roberta seed_oss smollm3 stablelm starcoder2 xglm
    """,
)

REFUSED = ["falcon_mamba", "mamba", "rwkv", "xlm"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NAMED)
def test_a_retrofitted_model_learns_generates_and_comes_back(kind: str) -> None:
    assert examine(kind).status == "covered", examine(kind).text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["minimax", "xlnet"])
def test_those_with_a_cache_of_their_own_keep_it(kind: str) -> None:
    """transformers tells them by the names of their classes."""
    assert examine(kind).status == "covered", examine(kind).text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_where_it_cannot_apply_it_is_refused_with_the_reason(kind: str) -> None:
    found = examine(kind)
    assert found.status == "refused"
    assert "feed-forward" in found.text or "lists of" in found.text


@pytest.mark.filterwarnings("ignore")
def test_the_table_says_what_happens() -> None:
    written = TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" not in written.replace("\n", " "):
        pytest.skip("the table was written with another version of transformers")
    for kind in [*NAMED, *REFUSED]:
        assert row(kind) in written, "run python tests/architectures.py"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NAMED])
def test_every_other_architecture(kind: str) -> None:
    assert isinstance(examine(kind), Outcome)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_whole_table() -> None:
    assert table() == TABLE.read_text(encoding="utf-8")
