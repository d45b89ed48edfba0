"""The program as a user meets it: every command, every wrong input, a suite from its first run to its report."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from transformers import dynamic_module_utils

import kallm_bench
from kallm_bench.models import load_model, save_checkpoint
from kallm_bench.records import ResultsStore
from kallm_bench.training import SCOPES, TASKS

CHAT = "".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"Count to {n}"},
                {"role": "assistant", "content": f"One to {n}. " * 8},
            ]
        }
    )
    + "\n"
    for n in range(120)
)

SUITE = """
description = "Everything the real ones do, small."
model = "base"
[train]
data = "chat.jsonl"
tokens = 256
row_length = 32
rows_per_step = 2
tail_from = 2
heldout_rows = 2
[eval]
source = "procedural"
limit = 2
max_new_tokens = 4
tasks = ["navigate", "web_of_lies"]
[profile]
batch = 1
length = 32
repeats = 2
tail_from = 2
[[arm]]
name = "baseline"
train.tokens = 0
[[arm]]
name = "linear"
basis = "linear"
blocks = "2-3"
[[arm]]
name = "kan"
basis = "cheby2"
blocks = "2-3"
"""


@pytest.fixture(scope="session")
def base_model(tiny_llama: Any, bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's checkpoint folder, with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    save_checkpoint(folder, tiny_llama(), bundled_tokenizer)
    return folder


@pytest.fixture
def home(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a model, conversations, a suite; caches of its own."""
    shutil.copytree(base_model, tmp_path / "base")
    (tmp_path / "chat.jsonl").write_text(CHAT)
    (tmp_path / "small.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache" / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("KALLM_BBH_DIR", raising=False)
    return tmp_path


def records(home: Path) -> list[Any]:
    return ResultsStore(home / "results").records()


def weights(home: Path, stage: str, arm: str) -> Path:
    record = [record for record in records(home) if record.stage == stage and record.arm == arm][-1]
    return home / record.artifacts[0].path


def test_a_suite_from_its_first_run_to_its_report(home: Path, kallm: Run) -> None:
    code, out, err = kallm("run", "small.toml")
    assert code == 0, err
    folder = next((home / "results").glob("local-*/small"))
    first = {record.id: record for record in records(home)}
    stages = sorted((record.arm, record.stage) for record in first.values())
    arms = ("baseline", "kan", "linear")
    expected = [(arm, stage) for arm in arms for stage in ("eval-bbh", "profile", "retrofit", "train")]
    assert stages == [pair for pair in expected if pair != ("baseline", "retrofit")]
    for word in ("baseline", "linear", "kan", "guessing", "majority", "procedural", "not BIG-Bench Hard"):
        assert word in out
    assert "a linear control with as many parameters as 'kan'" in out
    markdown = (folder / "report.md").read_text()
    assert "| kan | cheby2 degree 2, stack, hidden 16, blocks 2-3 | 1 |" in markdown
    assert "44.1 %" in markdown.partition("## Published")[2]
    lines = csv.DictReader((folder / "report.csv").read_text().splitlines())
    rows = {row["arm"]: row for row in lines if row["table"] == "arms"}
    assert float(rows["guessing"]["accuracy (fraction)"]) == 0.5
    assert float(rows["kan"]["heldout_loss (nats/token)"]) > 0

    # again: nothing is run, the same report is printed
    code, out_again, _ = kallm("run", "small.toml")
    assert (code, out_again) == (0, out)
    assert {record.id for record in records(home)} == set(first)

    # all weights gone: nothing needs them, so nothing is done
    trained = weights(home, "train", "kan")
    before = trained.read_bytes()
    shutil.rmtree(home / "runs")
    assert kallm("run", "small.toml")[0] == 0
    assert {record.id for record in records(home)} == set(first)
    assert not trained.exists()

    # a stage that needs them: they are made again, to the same bits, so that what was measured on them still holds
    (profile,) = [record for record in first.values() if (record.arm, record.stage) == ("kan", "profile")]
    next((home / "results").rglob(f"{profile.id}.json")).unlink()
    assert kallm("run", "small.toml")[0] == 0
    assert trained.read_bytes() == before
    new = [record for record in records(home) if record.id not in first]
    assert sorted((record.arm, record.stage) for record in new) == [
        ("kan", "profile"),
        ("kan", "retrofit"),
        ("kan", "train"),
    ]


def test_without_keeping_weights_none_are_left_and_nothing_is_done_twice(home: Path, kallm: Run) -> None:
    later = '[[arm]]\nname = "later"\nafter = "kan"\nbasis = "legendre"\nblocks = "2-3"\n'
    longer = '[[arm]]\nname = "longer"\nbasis = "cheby2"\nblocks = "2-3"\ntrain.tokens = 512\n'
    (home / "small.toml").write_text(SUITE + longer + later)
    assert kallm("retrofit", "base", "--basis", "cheby2", "--blocks", "2-3")[0] == 0  # the very one of arm kan
    (mine,) = records(home)
    code, _, err = kallm("run", "small.toml", "--no-keep-weights")
    assert code == 0, err
    first = {record.id: record for record in records(home)}
    retrofits = [record.reused for record in first.values() if record.stage == "retrofit" and record.suite == "small"]
    assert sorted(retrofits) == ["", "", mine.id, mine.id], "arms that start alike share a retrofit"
    assert len([record for record in first.values() if record.stage == "train"]) == 5
    left = {path.parent for path in (home / "runs").rglob("*.safetensors")}
    begun_after = weights(home, "train", "kan").parent
    assert left == {(home / mine.artifacts[0].path).parent, begun_after}, "what the user made stays"
    assert kallm("run", "small.toml", "--no-keep-weights")[0] == 0
    assert {record.id for record in records(home)} == set(first)


def test_work_done_for_another_cell_is_filed_again_and_not_done_again(home: Path, kallm: Run) -> None:
    assert kallm("run", "small.toml", "--seeds", "0,1")[0] == 0
    first = records(home)
    untouched = [record.stage for record in first if record.arm == "baseline"]
    assert sorted(untouched) == ["eval-bbh", "profile", "train"]  # one measurement serves both seeds
    rows = csv.DictReader(kallm("report", "--format", "csv")[1].splitlines())
    assert {row["arm"]: row["seeds"] for row in rows if row["seeds"]} == {"baseline": "1", "linear": "2", "kan": "2"}

    (home / "other.toml").write_text(SUITE)
    assert kallm("run", "other.toml")[0] == 0
    copies = [record for record in records(home) if record.suite == "other"]
    assert len(copies) == 11
    assert {record.reused for record in copies} <= {record.id for record in first}
    store = ResultsStore(home / "results")
    assert all(store.samples(record) for record in copies if record.stage == "eval-bbh")
    assert kallm("run", "other.toml")[0] == 0
    assert len([record for record in records(home) if record.suite == "other"]) == 11


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_harmed_weights_are_made_again(home: Path, kallm: Run, harm: str) -> None:
    assert kallm("run", "small.toml", "--only", "kan")[0] == 0
    good = {stage: weights(home, stage, "kan").read_bytes() for stage in ("retrofit", "train")}
    for stage, content in good.items():
        path = weights(home, stage, "kan")
        if harm == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            shutil.rmtree(path.parent)
    (home / "small.toml").write_text(SUITE.replace("limit = 2", "limit = 3"))  # so that weights are needed
    code, _, err = kallm("run", "small.toml", "--only", "kan")
    assert code == 0, err
    assert {stage: weights(home, stage, "kan").read_bytes() for stage in good} == good


def test_what_a_model_is_told_by_enters_its_key(home: Path, kallm: Run) -> None:
    """Another chat template or another epsilon is another model, though no weight differs."""
    words = ("eval-bbh", "base", "--source", "procedural", "--tasks", "navigate", "--limit", "1")
    assert kallm(*words)[0] == 0
    for name, old, new in (
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'),
        ("chat_template.jinja", "SmolLM", "Other"),
    ):
        path = home / "base" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        assert kallm(*words)[0] == 0
    assert len([record for record in records(home) if record.stage == "eval-bbh"]) == 3


def test_a_stopped_suite_goes_on_where_it_was(home: Path) -> None:
    """SIGINT as soon as a stage is under way: exit 130, nothing half-written, and the next run does the rest."""
    environment = os.environ | {"PYTHONPATH": str(Path(kallm_bench.__file__).parent.parent)}
    command = [sys.executable, "-m", "kallm_bench.cli", "run", "small.toml"]
    (home / "small.toml").write_text(SUITE.replace("tokens = 256", "tokens = 2048").replace("limit = 2", "limit = 40"))
    for sign in ("linear seed 0 train, training", "kan seed 0 chat eval-bbh, questions"):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stderr is not None
        seen = next((line for line in process.stderr if sign in line), None)
        assert seen, "the stage never came"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        process.stderr.close()
        assert process.wait() == 130, rest
        assert "Traceback" not in rest
        assert not ResultsStore(home / "results").damaged
    unfinished = sorted(path.name for path in (home / "runs" / "unfinished").iterdir())
    assert any(name.endswith(".jsonl") for name in unfinished)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "baseline seed 0 chat eval-bbh" not in done.stderr  # was done before
    assert len(records(home)) == 11
    assert not (home / "runs" / "unfinished").exists()
    assert not list(home.rglob("*.partial"))


def test_one_failing_arm_does_not_stop_the_others(home: Path, kallm: Run) -> None:
    suite = SUITE + '[[arm]]\nname = "broken"\ntrain.tokens = 99999\ntrain.row_length = 500\ntrain.rows_per_step = 1\n'
    (home / "small.toml").write_text(suite)
    code, out, err = kallm("run", "small.toml", "--only", "broken,baseline")
    assert code == 1
    assert "broken, seed 0: chat.jsonl: the heldout part has fewer than 500 tokens" in err
    assert "baseline" in out
    assert "broken, 0, train: chat.jsonl: the heldout part has fewer than 500 tokens" in out  # a row of its own


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ('basis = "cheby2"\nblocks = "2-9"', "the model has 4 blocks, 0-3"),
        ('train.data = "gone.jsonl"', "no data file 'gone.jsonl'"),
        ('train.scope = "most"', "no scope 'most'"),
        ('profile = {scope = "replaced"}', "take --scope all"),
        ('eval.tasks = ["navigat"]', "Did you mean 'navigate'?"),
        ('eval.protocol = "chatt"', "Did you mean 'chat'?"),
        ('eval.source = "./questions"', "no folder"),
        ('train.heldout = "chat.jsonl"', "the held-out data is the training data"),
    ],
)
def test_a_suite_with_an_arm_that_can_never_be_is_refused_before_any_work(
    home: Path, kallm: Run, arm: str, says: str
) -> None:
    (home / "small.toml").write_text(f'{SUITE}[[arm]]\nname = "broken"\n{arm}\n')
    code, _, err = kallm("run", "small.toml")
    assert code == 1
    assert err.startswith("error: arm 'broken': ")
    assert says in err
    assert err.count("\n") == 1
    assert records(home) == []


STARTS = """
model = "base"
stages = ["retrofit"]
[calibration]
data = "./chat.jsonl"
tokens = 1536
heldout_tokens = 128
row_length = 64
[[arm]]
name = "inherit"
basis = "linear"
blocks = "2-3"
hidden = 32
start = "inherit"
[[arm]]
name = "kan"
basis = "cheby2"
blocks = "2-3"
params = "inherit"
start = "lstsq"
"""


def test_a_suite_of_starts_ends_in_a_table_of_how_they_stand_in(home: Path, kallm: Run) -> None:
    (home / "starts.toml").write_text(STARTS)
    code, out, err = kallm("run", "starts.toml")
    assert code == 0, err
    assert "R² block 3" in out
    inherit, kan = records(home)
    assert {"heldout_loss_before", "heldout_loss", "start_seconds", "start_r2/2", "start_r2/3"} <= {
        metric.name for metric in kan.metrics
    }
    assert kan.value("replaced_parameters") == pytest.approx(inherit.value("replaced_parameters"), rel=0.05)
    assert kan.data["source"] == "chat.jsonl"
    written = next((home / "results").glob("local-*")) / "starts" / "report.csv"
    lines = list(csv.reader(written.read_text().splitlines()))
    assert [line[2:4] for line in lines[1:]] == [["starts", "inherit"], ["starts", "kan"]]
    assert kallm("run", "starts.toml")[0] == 0
    assert len(records(home)) == 2


def test_single_layers_have_their_names_in_tables(home: Path, kallm: Run) -> None:
    layers = STARTS.partition("[[arm]]")[0] + (
        '[[arm]]\nname = "layers"\nbasis = "cheby2"\nblocks = "3"\ntarget = "linears"\nstart = "lstsq"\n'
        'activation = "drop"\n'
    )
    (home / "layers.toml").write_text(layers)
    code, _, err = kallm("run", "layers.toml")
    assert code == 0, err
    written = (next((home / "results").glob("local-*")) / "layers" / "report.md").read_text()
    assert "R² block 3.mlp.down_proj | R² block 3.mlp.gate_proj | R² block 3.mlp.up_proj" in written
    assert "cheby2 degree 2, no activation, each linear layer in the feed-forward of blocks 3, start lstsq" in written


def test_a_saved_checkpoint_changes_its_basis_and_is_inspected(home: Path, kallm: Run) -> None:
    assert kallm("retrofit", "base", "--blocks", "2-3", "--basis", "cheby2", "--degree", "2", "--out", "kan")[0] == 0
    code, out, err = kallm("retrofit", "kan", "--blocks", "2-3", "--basis", "legendre", "--degree", "4", "--out", "new")
    assert code == 0, err
    assert "conversion_error" in out
    tokens = torch.arange(20)[None]
    old, new = (load_model(name)[0](input_ids=tokens).logits for name in ("kan", "new"))
    torch.testing.assert_close(old, new, rtol=0, atol=1e-5)
    code, out, err = kallm("inspect", "new", "--format", "svg")
    assert code == 0, err
    assert "layers.1" in out
    assert (home / "runs" / "new-inspect" / "curves.svg").read_text().lstrip().startswith("<?xml")
    assert (home / "runs" / "new-inspect" / "curves.csv").read_text().startswith("block,layer,target,source,curved,u,")
    code, _, err = kallm("inspect", "base")
    assert (code, err) == (1, "error: this model holds no KAN; there is nothing to inspect\n")


def test_a_start_on_the_command_line(home: Path, kallm: Run) -> None:
    words = ("retrofit", "base", "--blocks", "3", "--calibration", "chat.jsonl", "--calibration-tokens", "1536",
             "--calibration-row", "64")  # fmt: skip
    code, out, err = kallm(*words, "--basis", "rational:groups=4", "--form", "glu", "--start", "inherit")
    assert code == 0, err
    assert "start_r2/3" not in out  # a table of its own, a line a block
    assert "start r2" in out
    code, _, err = kallm(*words, "--start", "lstsq+distill", "--start-steps", "3", "--params", "original")
    assert code == 0, err


def test_the_report_of_a_run_is_of_what_the_suite_says_now(home: Path, kallm: Run) -> None:
    def table(suite: str) -> str:
        (home / "small.toml").write_text(suite)
        code, _, err = kallm("run", "small.toml", "--only", "baseline,linear")
        assert code == 0, err
        return (next((home / "results").glob("local-*")) / "small" / "report.md").read_text()

    first = table(SUITE)
    other = table(SUITE.replace("tokens = 256", "tokens = 192"))
    assert "192 tokens" in other
    count = len(records(home))
    again = table(SUITE)
    assert again.replace("\n", "").split("Machine")[0] == first.replace("\n", "").split("Machine")[0]
    assert "kallm run small.toml" in again
    assert all(record.reused for record in records(home)[count:])


def test_what_users_call_things_is_shown_as_they_wrote_it(home: Path, kallm: Run) -> None:
    _, _, err = kallm("eval-bbh", "./[bold]:smile:")
    assert "[bold]:smile:" in err


def test_a_report_goes_where_it_is_sent(home: Path, kallm: Run) -> None:
    code, _, err = kallm("profile", "base", "--batch", "1", "--length", "32", "--repeats", "2")
    assert code == 0, err
    assert kallm("report", "--out", "r.csv")[0] == 0
    assert (home / "r.csv").read_text().startswith("suite,testbed,table,arm")
    assert kallm("report", "--out", "r.txt")[0] == 0
    assert (home / "r.txt").read_text().startswith("## manual")
    code, _, err = kallm("report", "--out", "base")
    assert (code, err.count("\n")) == (1, 1)
    assert "it is a folder" in err
    assert kallm("report", "--suite", "[a]*")[0] == 1


def test_force_replaces_checkpoints_alone(home: Path, kallm: Run) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "diary.txt").write_text("dear")
    words = ("retrofit", "base", "--blocks", "3", "--force", "--out")
    code, _, err = kallm(*words, "mine")
    assert code == 1
    assert "mine is no kallm checkpoint and is never replaced" in err
    assert (home / "mine" / "diary.txt").read_text() == "dear"
    assert kallm(*words, "made")[0] == 0
    code, out, _ = kallm(*words, "made", "--seed", "1")
    assert code == 0
    assert "Found, not done again" not in out
    assert "Found, not done again" in kallm(*words, "made", "--seed", "1")[1]


@pytest.mark.parametrize("place", ["chat.jsonl/x", "/proc/x/y"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(home: Path, kallm: Run, place: str) -> None:
    code, _, err = kallm("retrofit", "base", "--blocks", "3", "--out", place)
    assert code == 1
    assert err.startswith("error: cannot write ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("harm", ["cut", "other", "empty"])
def test_damaged_files_of_our_own_are_made_again(home: Path, kallm: Run, harm: str) -> None:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes({"cut": content[: len(content) // 2], "other": b"[1]\n" + content, "empty": b""}[harm])

    words = ("train", "base", "--data", "chat.jsonl", "--scope", "all", "--tokens", "128", "--row-length", "32",
             "--rows-per-step", "2")  # fmt: skip
    assert kallm(*words)[0] == 0
    for path in (home / "cache" / "rows").rglob("*.npy"):
        damage(path)
    shutil.rmtree(home / "runs")
    code, _, err = kallm(*words, "--seed", "1")
    assert code == 0, err

    (record,) = [each for each in records(home) if each.seed == 1]
    state = home / "runs" / "unfinished" / record.key / "step-00000001"
    state.mkdir(parents=True)
    (state / "state.json").write_text('{"step": 1, "losses": [1.0], "heldout_before": 2.0}')
    (state / "state.safetensors").write_bytes(b"cut")
    shutil.rmtree(home / record.artifacts[0].path.rpartition("/")[0])
    code, _, err = kallm(*words, "--seed", "1")
    assert code == 0, err
    assert "damaged, left aside" in err

    for path in (home / "results").rglob("*.json"):
        damage(path)
    code, _, err = kallm("report")
    assert "Traceback" not in err


def test_two_processes_do_one_work_once(home: Path) -> None:
    command = [sys.executable, "-m", "kallm_bench.cli", "retrofit", "base", "--blocks", "3"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [each.communicate()[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    assert len(records(home)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_leaves_with_its_number_and_one_line(home: Path, number: int) -> None:
    command = [sys.executable, "-m", "kallm_bench.cli", "generate", "base", "hello", "--max-new-tokens", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.decode().strip().startswith("Stopped.")
    assert b"Traceback" not in err


def test_the_four_stages_by_hand(home: Path, kallm: Run) -> None:
    code, out, err = kallm("retrofit", "base", "--blocks", "2-3", "--basis", "cheby2", "--json")
    assert code == 0, err
    (record,) = json.loads(out)
    folder = record["artifacts"][0]["path"].rpartition("/")[0]
    assert re.fullmatch(r"runs/base-cheby2-2-3-[0-9a-f]{8}", folder)
    assert record["settings"]["spec"]["hidden"] == 16

    code, out, _ = kallm("retrofit", "base", "--blocks", "2-3", "--basis", "cheby2")  # named and reused
    assert code == 0
    assert folder in out
    assert len(records(home)) == 1

    code, out, err = kallm("train", folder, "--data", "chat.jsonl", "--tokens", "256", "--row-length", "32",
                           "--rows-per-step", "2", "--out", "trained")  # fmt: skip
    assert code == 0, err
    assert "heldout_loss" in out
    lineage = json.loads((home / "trained" / "kallm.json").read_text())["lineage"]
    assert [entry["stage"] for entry in lineage] == ["retrofit", "train"]

    code, out, err = kallm("eval-bbh", "trained", "--source", "procedural", "--tasks", "navigate", "--limit", "2")
    assert code == 0, err
    assert "navigate" in out
    code, out, err = kallm("profile", "trained", "--batch", "1", "--length", "32", "--repeats", "2")
    assert code == 0, err
    assert "decode_tokens_per_second" in out
    parents = {record.stage: record.parents for record in records(home)}
    trained = next(record.id for record in records(home) if record.stage == "train")
    assert parents["eval-bbh"] == parents["profile"] == (trained,)
    assert parents["retrofit"] == ()

    code, out, _ = kallm("report", "--format", "md")
    assert code == 0
    assert "## manual on local-" in out
    code, out, _ = kallm("generate", "trained", "Hello", "--max-new-tokens", "3")
    assert code == 0
    assert out.endswith("\n")


def test_a_retrained_model_never_meets_old_answers(home: Path, kallm: Run) -> None:
    words = ("--source", "procedural", "--tasks", "navigate", "--limit", "1", "--max-new-tokens", "2")
    for seed in ("0", "1"):
        assert kallm("retrofit", "base", "--blocks", "3", "--seed", seed, "--out", "ck", "--force")[0] == 0
        assert kallm("eval-bbh", "ck", *words)[0] == 0
        assert kallm("eval-bbh", "ck", *words)[0] == 0  # found
    asked = [record for record in records(home) if record.stage == "eval-bbh"]
    assert len(asked) == 2
    assert asked[0].model["fingerprint"] != asked[1].model["fingerprint"]


def bring_code(base: Path, folder: Path) -> None:
    """Makes a copy of a model that loads with code of its own alone."""
    shutil.copytree(base, folder)
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): model_type = 'strange'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("retrofit base --basis chebby2", "Did you mean 'cheby2'"),
        ("retrofit base --blocks 3-9", "the model has 4 blocks, 0-3"),
        ("retrofit base --blocks x", "cannot read blocks 'x'"),
        ("retrofit base --basis drop --degree 2", "no degree"),
        ("retrofit nowhere/at-all", "kallm fetch model nowhere/at-all"),
        ("retrofit ./nowhere", "no folder './nowhere'"),
        ("retrofit chat.jsonl", "is a file"),
        ("retrofit empty", "no config.json"),
        ("retrofit cut", "is damaged"),
        ("retrofit broken.gguf", "broken.gguf"),
        ("retrofit base --blocks 3 --out base", "pass --force"),
        ("train base --data chat.jsonl --scope all --out base", "pass --force"),
        ("retrofit base --results chat.jsonl/results", "cannot write"),
        ("train base --data bad.jsonl --scope all", "bad.jsonl, line 2: not JSON"),
        ("train base --data none.jsonl --scope all", "no conversations"),
        ("train base --data gone.jsonl --scope all", "no data file"),
        ("train base --data chat.jsonl --tokens 64 --row-length 32 --rows-per-step 2", "take --scope all"),
        ("train base --data chat.jsonl --tokens 10", "do not fill one step"),
        ("train base --data notes.csv --scope all", "notes.csv, line 1: not JSON"),
        ("eval-bbh base", "kallm fetch bbh"),
        ("eval-bbh base --source gone", "no folder 'gone'"),
        ("eval-bbh base --source procedural --tasks navigat", "Did you mean 'navigate'"),
        ("eval-bbh base --source procedural --protocol chatt", "Did you mean 'chat'"),
        ("profile base --device tpu", "no device 'tpu'"),
        ("profile base --device cuda:77", "no device 'cuda:77'"),
        ("profile base --dtype float8", "no dtype 'float8'"),
        ("run gone.toml", "no suite file"),
        ("run quikstart", "Did you mean 'quickstart'"),
        ("report", "kallm run quickstart"),
        ("report --format pdf", "no format 'pdf'"),
        ("testbed Not/A/Name", "cannot name a testbed"),
        ("fetch moddel", "Did you mean 'model'"),
        ("generate ./nowhere hello", "no folder"),
        ("retrofit strange --blocks 3", "only with --trust-remote-code"),
        ("train strange --data chat.jsonl --scope all", "only with --trust-remote-code"),
        ("eval-bbh strange --source procedural", "only with --trust-remote-code"),
        ("profile strange", "only with --trust-remote-code"),
        ("inspect strange", "only with --trust-remote-code"),
        ("generate strange hello", "only with --trust-remote-code"),
        ("retrofit strange --blocks 3 --trust-remote-code", "cannot be retrofitted: it brings its own code"),
        ("inspect strange --trust-remote-code", "no KAN"),
    ],
)
def test_bad_input_gets_one_clear_line(home: Path, kallm: Run, words: str, says: str) -> None:
    (home / "empty").mkdir()
    shutil.copytree(home / "base", home / "cut")
    with (home / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    (home / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    bring_code(home / "base", home / "strange")
    (home / "bad.jsonl").write_text(CHAT.splitlines()[0] + "\n{oops\n")
    (home / "none.jsonl").write_text("")
    (home / "notes.csv").write_text("messages\nhello\n")
    before = sorted(path for path in home.rglob("*") if "results" not in path.parts)
    code, out, err = kallm(*words.split())
    assert code == 1
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    after = sorted(path for path in home.rglob("*") if "results" not in path.parts)
    assert [path for path in after if path not in before and "cache" not in path.parts] == []
    assert records(home) == []


def test_usage_errors_leave_with_two(home: Path, kallm: Run) -> None:
    for words in (["retrofit", "--no-such-option"], ["frobnicate"], ["eval-bbh", "base", "--limit", "0"]):
        code, _, err = kallm(*words)
        assert code == 2, words
        assert "Traceback" not in err
    assert kallm("run", "small.toml", "--seeds", "a,b")[0] == 2
    for option in ("--temperature", "--base"):
        code, _, err = kallm("train", "base", option, "1")
        assert (code, f"{option} is for --distill" in err) == (2, True)
    code, _, err = kallm("train", "base", "--tokens", "0", "--out", "there")
    assert (code, "leave --out out" in err) == (2, True)


def test_small_commands(home: Path, kallm: Run) -> None:
    code, out, _ = kallm("bases", "--json")
    assert code == 0
    assert {"cheby2", "legendre"} <= {entry["name"] for entry in json.loads(out)}
    code, out, _ = kallm("doctor", "--json")
    assert code == 0
    assert json.loads(out)["results"].endswith("0 records")
    code, out, _ = kallm("testbed", "my-desk", "--json")
    assert json.loads(out)["name"] == "my-desk"
    assert (home / "results" / "my-desk" / "testbed.json").is_file()
    code, out, _ = kallm("--version")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", out)
    code, out, _ = kallm("run", "small.toml", "--dry-run", "--seeds", "0,1")
    assert out.count("cheby2") == 2
    assert not (home / "runs").exists()


def test_fetching_bbh_is_all_or_nothing(tmp_path: Path, shared_data: Path) -> None:
    from kallm_bench.errors import BBHError
    from kallm_bench.fetch import fetch_bbh

    fetch_bbh(tmp_path / "bbh", address=(shared_data / "data/bbh").as_uri())
    assert len(list((tmp_path / "bbh" / "bbh").glob("*.json"))) == 27
    with pytest.raises(BBHError, match="cannot fetch bbh/boolean_expressions"):
        fetch_bbh(tmp_path / "again", address=tmp_path.as_uri())
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "command", ["", "retrofit", "train", "eval-bbh", "profile", "run", "report", "generate", "inspect"]
)
def test_every_help_teaches(kallm: Run, command: str) -> None:
    code, out, _ = kallm(*filter(None, [command]), "--help")
    assert code == 0
    assert "Usage" in out


def test_the_help_of_train_says_what_scopes_and_tasks_are(kallm: Run) -> None:
    told = kallm("train", "--help")[1]
    assert [name for name in (*SCOPES, *TASKS) if f"{name}:" not in told and name != "all"] == []
