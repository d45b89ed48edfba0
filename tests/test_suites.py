"""Suites: every shipped one reads, and one that is wrong is refused in words."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_suite import TRAINED

from kallm_bench import engine
from kallm_bench.engine import cells
from kallm_bench.engine.training import train_model
from kallm_bench.errors import Interrupted, KallmError, ModelError, SuiteError, TrainingError
from kallm_bench.files import DiskError
from kallm_bench.filing import Bench, Stage, find_ref
from kallm_bench.models import KANSpec, complete_spec, load_model, parameters_of, retrofit, save_checkpoint
from kallm_bench.records import ResultsStore
from kallm_bench.reporting import Row, build_tables
from kallm_bench.suite_files import arm_order, find_suite
from kallm_bench.suites import DEVICES, read_suite
from kallm_bench.training import CurriculumSettings, DistillationSettings, parameters_in

SHIPPED = sorted((Path(__file__).parent.parent / "suites").glob("*.toml"))


@pytest.mark.parametrize("device", ["", *DEVICES])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_suite_reads(path: Path, device: str) -> None:
    suite = read_suite(path, device=device)
    assert suite.name == path.stem
    assert suite.description
    assert find_suite(path.stem) == path
    assert len({(cell.arm, cell.seed) for cell in suite.cells}) == len(suite.cells)
    assert arm_order(path.stem) == list(dict.fromkeys(cell.arm for cell in suite.cells))
    assert suite.cells or suite.kernels
    assert f"`{suite.name}`" in (path.parent.parent / "README.md").read_text(encoding="utf-8")


def test_an_arm_overrides_the_suite_and_seeds_reach_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "try.toml"
    path.write_text(
        'seeds = [0, 1]\n[train]\ntokens = 5000\nrow_length = 100\nrows_per_step = 1\nschedule = "wsd"\n'
        'betas = [0.9, 0.95]\nnew_learning_rate = 1e-3\n[eval]\ntasks = ["snarks"]\n'
        '[[arm]]\nname = "plain"\ntrain.tokens = 0\n[[arm]]\nname = "kan"\nbasis = "cheby2"\nblocks = "last:2"\n'
    )
    suite = read_suite(path)
    assert [(cell.arm, cell.seed, cell.train.tokens) for cell in suite.cells] == [
        ("plain", 0, 0),
        ("kan", 0, 5000),
        ("plain", 1, 0),
        ("kan", 1, 5000),
    ]
    assert suite.cells[3].spec == KANSpec("last:2", "cheby2", seed=1)
    assert suite.cells[3].train.seed == 1
    train = suite.cells[3].train
    assert (train.schedule, train.betas, train.new_learning_rate) == ("wsd", (0.9, 0.95), 1e-3)
    assert [each.tasks for each in suite.cells[0].evals] == [("snarks",)]
    assert [cell.seed for cell in read_suite(path, only=["kan"], seeds=[7]).cells] == [7]


def test_questions_can_be_asked_by_several_protocols(tmp_path: Path) -> None:
    path = tmp_path / "try.toml"
    path.write_text(
        '[eval]\nprotocol = ["chat", "leaderboard"]\nlimit = 3\n[[arm]]\nname = "a"\n'
        '[[arm]]\nname = "b"\neval.protocol = "zeroshot"\n'
    )
    first, second = read_suite(path).cells
    assert [(each.protocol, each.limit) for each in first.evals] == [("chat", 3), ("leaderboard", 3)]
    assert [(each.protocol, each.limit) for each in second.evals] == [("zeroshot", 3)]


def test_sizes_may_be_those_of_a_device(tmp_path: Path) -> None:
    path = tmp_path / "try.toml"
    path.write_text(
        "[profile]\nbatch = 32\nlength = 512\ncpu = {batch = 2, repeats = 3}\n"
        '[[arm]]\nname = "a"\n[[arm]]\nname = "b"\nprofile.batch = 8\nprofile.cuda.length = 64\n'
    )
    sizes = {
        device: [(each.profile.batch, each.profile.length, each.profile.repeats) for each in suite.cells]
        for device in ("", *DEVICES)
        for suite in [read_suite(path, device=device)]
    }
    assert sizes == {
        "": [(32, 512, 5), (8, 512, 5)], "cpu": [(2, 512, 3), (8, 512, 3)], "cuda": [(32, 512, 5), (8, 64, 5)]
    }  # fmt: skip


def test_model_and_data_are_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suites").mkdir()
    path = tmp_path / "suites" / "try.toml"
    path.write_text(
        'model = "./model"\n[train]\ndata = "./a.jsonl"\nheldout = "./b.jsonl"\ntokens = 99999\n'
        '[calibration]\nheldout = "./b.jsonl"\n[[arm]]\nname = "one"\n[[arm]]\nname = "own"\ntrain.data = "./c.jsonl"\n'
    )
    own = read_suite(path).cells[0]
    assert (own.model, own.train.data, own.train.heldout) == tuple(
        str(tmp_path / "suites" / name) for name in ("model", "a.jsonl", "b.jsonl")
    )
    one, other = read_suite(path, model="some/model", data="./x.jsonl", heldout="some/data").cells
    assert one.model == "some/model"
    assert (one.train.data, one.train.heldout, one.train.tokens) == (str(tmp_path / "x.jsonl"), "some/data", 99999)
    assert (one.calibration.data, one.calibration.heldout) == (str(tmp_path / "x.jsonl"), "some/data")
    assert other.train.data == str(tmp_path / "suites" / "c.jsonl")
    assert read_suite(path, data="some/data").cells[0].train.heldout is None
    with pytest.raises(SuiteError, match="pass --data too"):
        read_suite(path, heldout="some/data")
    assert one.cut.data is None
    path.write_text('[cut]\nblocks = 3\ndata = "./a.jsonl"\n[[arm]]\nname = "one"\n')
    assert read_suite(path).cells[0].cut.data == str(tmp_path / "suites" / "a.jsonl")
    cut = read_suite(path, data="./x.jsonl").cells[0].cut
    assert (cut.blocks, cut.data) == (3, str(tmp_path / "x.jsonl"))


KAN = '[[arm]]\nbasis = "cheby2"\nblocks = "1"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[arm]\n", "line 1"),
        ('modl = "x"\n[[arm]]\nname = "a"\n', "Did you mean 'model'"),
        ("", r"needs \[\[arm\]\] tables"),
        ('[[arm]]\nname = "a"\n[[arm]]\nname = "a"\n', "two arms have one name"),
        ('[[arm]]\nname = "a"\nbasis = "cheby2"\n', "no blocks"),
        ('[[arm]]\nname = "a"\nbasis = "chebby2"\nblocks = "1"\n', "Did you mean 'cheby2'"),
        ('[[arm]]\nname = "a"\ntrain.token = 5\n', "Did you mean 'tokens'"),
        ('[[arm]]\nname = "a"\ntrain.schedule = "cosin"\n', "Did you mean 'cosine'"),
        ('[[arm]]\nname = "a"\ntrain.betas = [0.9, "x"]\n', "betas are two numbers"),
        ('[[arm]]\nname = "a"\ntrain.tokens = "many"\n', "tokens should be of type int"),
        ('[[arm]]\nname = "a"\neval.limit = "8"\n', "limit should be of type int"),
        ('[[arm]]\nname = "a"\ntrain.tail_from = "25"\n', "tail_from should be of type int"),
        ('[[arm]]\nname = "a"\nprofile.repeats = 0\n', "repeats must be at least 2"),
        ('[[arm]]\nname = "a/b"\n', "'name' of letters"),
        ('[[arm]]\nname = "a"\nbasis = 3\nblocks = "1"\n', "basis must be text"),
        ('[[arm]]\nname = "a"\nbasis = "cheby2"\nblocks = 3\n', "blocks must be text"),
        ('[[arm]]\nname = "a"\nprofile.cpu = 3\n', "cpu should be like"),
        ('[[arm]]\nname = "a"\nprofile.cpu.batsch = 3\n', "Did you mean 'batch'"),
        ('seeds = 3\n[[arm]]\nname = "a"\n', "seeds should be like"),
        ('seeds = ["x"]\n[[arm]]\nname = "a"\n', "whole numbers"),
        ("arm = 3\n", "arm should be like"),
        ('train = 3\n[[arm]]\nname = "a"\n', "train should be like"),
        ('[[arm]]\nname = "a"\ntrain = 3\n', "train should be like"),
        ('model = 5\n[[arm]]\nname = "a"\n', "model should be like"),
        ('[[arm]]\nname = "a"\ntrain.seed = 5\n', "no key 'seed'"),
        ('[[arm]]\nname = "a"\ncurriculum.stage = "backwards"\n', "Did you mean 'stages'"),
        ('[[arm]]\nname = "a"\ncurriculum.start_degree = 1.5\n', "start_degree should be of type int"),
        ('[[arm]]\nname = "a"\ncurriculum.anneal = "cosin"\n', "Did you mean 'cosine'"),
        ('[[arm]]\nname = "a"\ndistillation.weight = 2\n', "a share from 0 to 1, got 2"),
        ('distillation = 0.5\n[[arm]]\nname = "a"\n', "distillation should be like"),
        (f'{KAN}name = "a"\nparams = "b"\n{KAN}name = "b"\nparams = "a"\n', "no arm with a size of its own"),
        ('[[arm]]\nname = "a"\nbasis = "cheby2"\nblocks = "1"\nparams = ["b"]\n', "params should be a number"),
        ('[[arm]]\nname = "a"\nbasis = "cheby2"\nblocks = "1"\nparams = "b"\n', "params should be a number above 0"),
        ('stages = ["retrofitt"]\n[[arm]]\nname = "a"\n', "Did you mean 'retrofit'"),
        ('once = ["profil"]\n[[arm]]\nname = "a"\n', "Did you mean 'profile'"),
        ('seeds = []\n[[arm]]\nname = "a"\n', "at least one"),
        ('seeds = [1, 1]\n[[arm]]\nname = "a"\n', "stands twice"),
        ('[[arm]]\nname = "a"\nblocks = "1"\n', "has blocks but no basis"),
        ('eval.protocol = []\n[[arm]]\nname = "a"\n', "one or several, each once"),
        ('eval.protocol = ["chat", "chat"]\n[[arm]]\nname = "a"\n', "one or several, each once"),
        ('eval.protocol = ["chat", 3]\n[[arm]]\nname = "a"\n', "protocol should be of type str"),
        ('dtype = "fp16"\n[[arm]]\nname = "a"\n', "no dtype 'fp16'"),
        ('dtype = 16\n[[arm]]\nname = "a"\n', "dtype should be like"),
        ('[[arm]]\nname = "one"\n[[arm]]\nname = "b"\nafter = "ones"\n', "Did you mean 'one'"),
        ('[[arm]]\nname = "a"\nafter = "b"\n[[arm]]\nname = "b"\nafter = "a"\n', "no arm to start after 'a'"),
        ('[[arm]]\nname = "a"\nafter = "b"\n', "no arm to start after 'b'. There is none."),
        ('[[arm]]\nname = "a"\ntrain.lora_rank = 64\n', 'lora_rank would decide nothing without scope = "lora"'),
        ('train.lora_alpha = 8\n[[arm]]\nname = "a"\n', "lora_alpha would decide nothing without scope"),
        ('[[arm]]\nname = "a"\ntrain.decay_share = 0.5\n', 'decay_share would decide nothing without schedule = "wsd"'),
        ('[[arm]]\nname = "a"\ntrain.schedule = "constant"\ntrain.final_share = 0\n', "without a schedule that falls"),
        ('[[arm]]\nname = "a"\ncurriculum.anneal_over = 0.5\n', "anneal_over would decide nothing without anneal"),
        ('[[arm]]\nname = "a"\ncurriculum.stages_over = 0.1\n', "stages_over would decide nothing without stages"),
        ('distillation.temperature = 4\n[[arm]]\nname = "a"\n', "temperature would decide nothing without a weight"),
        ("kernels = 3\n", r"kernels should be tables, \[\[kernels\]\]"),
        ("[[kernels]]\nshape = [[4, 4]]\n", "Did you mean 'shapes'"),
        ('[[kernels]]\nshapes = "4x4"\n', "shapes should be of type tuple"),
        ("[[kernels]]\nshapes = [[4, 4]]\n[[kernels]]\nshapes = [[4, 4]]\n", "two arms have one name"),
        ('[[arm]]\nname = "a"\nbasis = "linear"\nblocks = "1"\nconstant = "edge"\n', "is no KAN"),
    ],
)
def test_a_wrong_suite_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(KallmError, match=says) as error:
        read_suite(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_what_a_suite_says_for_some_of_its_arms_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text(
        "train.lora_rank = 8\ndistillation.temperature = 4\n"
        '[[arm]]\nname = "plain"\n[[arm]]\nname = "lora"\ntrain.scope = "lora"\ndistillation.weight = 0.5\n'
    )
    assert [cell.train.lora_rank for cell in read_suite(path).cells] == [8, 8]
    assert [cell.arm for cell in read_suite(path, only=["plain"]).cells] == ["plain"]


def test_ways_to_teach_are_read_for_the_suite_and_for_an_arm(tmp_path: Path) -> None:
    path = tmp_path / "taught.toml"
    path.write_text(
        "[distillation]\nweight = 0.5\n[curriculum]\nstart_degree = 1\nraise_at = [0.2, 0.4]\n"
        '[[arm]]\nname = "a"\ndistillation.weight = 0\n[[arm]]\nname = "b"\ncurriculum.anneal = "linear"\n'
    )
    a, b = read_suite(path).cells
    assert (a.distillation, b.distillation) == (DistillationSettings(0.0), DistillationSettings(0.5))
    assert a.curriculum == CurriculumSettings(start_degree=1, raise_at=(0.2, 0.4))
    assert b.curriculum == CurriculumSettings(start_degree=1, raise_at=(0.2, 0.4), anneal="linear")


def test_the_arms_of_suite_curricula_have_as_many_parameters_and_can_be_taught_so(bundled: Any, tmp_path: Path) -> None:
    suite, config = read_suite(find_suite("curricula"), seeds=[0]), bundled[0].config
    (tmp_path / "chat.jsonl").write_text("{}")
    for cell in suite.cells:
        assert cell.train.tokens in (0, 9_200_000)
        if cell.curriculum.active:
            here = dataclasses.replace(cell.train, data=str(tmp_path / "chat.jsonl"), heldout=None)
            engine.check_cell(dataclasses.replace(cell, train=here))
    ((kan, as_many),) = {(cell.spec, cell.match) for cell in suite.cells if cell.match}
    (linear,) = {cell.spec for cell in suite.cells if cell.spec and not cell.match}
    assert as_many == linear
    wanted = parameters_of(config, complete_spec(config, linear))
    found = parameters_of(config, complete_spec(config, dataclasses.replace(kan, params=wanted)))
    assert found == pytest.approx(wanted, rel=0.01)
    taught = {cell.arm: (cell.curriculum.active, cell.distillation.active) for cell in suite.cells}
    assert sum(any(each) for each in taught.values()) == 7
    for arm, how in taught.items():  # equal effort: what the KAN gets, the control gets, as far as it has degrees
        name, plus, way = arm.partition("+")
        if name == "kan" and way != "degree":
            assert taught["linear-matched" + plus + way] == how


def test_the_adapters_of_suite_lora_have_as_many_parameters_and_the_same_lessons(bundled: Any, tmp_path: Path) -> None:
    data, model = tmp_path / "chat.jsonl", bundled[0]
    data.write_text("{}")
    cells = read_suite(find_suite("lora"), seeds=[0], data=str(data)).cells
    learning = {}
    for cell in cells:
        assert cell.train.tokens == 9_200_000
        engine.check_cell(cell)
        if cell.spec and cell.spec.is_adapter:
            assert cell.train.scope == "replaced"
            learning[cell.arm] = parameters_of(model.config, complete_spec(model.config, cell.spec))
        elif not cell.spec and cell.train.scope == "lora":
            ours = parameters_in(model, "lora", cell.train.tail_from, cell.train.lora)
            learning[cell.arm] = sum(parameter.numel() for parameter in ours)
    for kan, lora in (("kan-adapter", "lora"), ("kan-adapter-code", "lora"), ("kan-adapter-64", "lora-64")):
        assert learning[kan] == pytest.approx(learning[lora], rel=0.01)


def test_stages_are_chosen_by_hand_and_some_are_for_the_first_seed_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text('seeds = [3, 1]\nonce = ["profile", "eval-bbh"]\n[[arm]]\nname = "a"\n[[arm]]\nname = "b"\n')
    all_stages = ("retrofit", "train", "eval-bbh", "profile")

    def stages(**given: Any) -> dict[tuple[str, int], tuple[str, ...]]:
        return {(cell.arm, cell.seed): cell.stages for cell in read_suite(path, **given).cells}

    later = ("retrofit", "train")
    assert stages() == {("a", 3): all_stages, ("b", 3): all_stages, ("a", 1): later, ("b", 1): later}
    assert stages(seeds=[1]) == {("a", 1): all_stages, ("b", 1): all_stages}
    some = stages(stages=["profile", "train"])
    assert some == {
        ("a", 3): ("train", "profile"),
        ("b", 3): ("train", "profile"),
        ("a", 1): ("train",),
        ("b", 1): ("train",),
    }
    with pytest.raises(SuiteError, match=r"^no stage 'profil'\. Did you mean 'profile'"):
        read_suite(path, stages=["profil"])
    with pytest.raises(SuiteError, match="suite 'lead' has no stage 'profile', it has retrofit, train"):
        read_suite(find_suite("lead"), stages=["profile"])


TAUGHT = (
    TRAINED
    + """[[arm]]
name = "kan"
basis = "cheby2"
degree = 3
blocks = "2-3"
[[arm]]
name = "kan+curriculum"
basis = "cheby2"
degree = 3
blocks = "2-3"
curriculum = {start_degree = 1, stages = "backwards", anneal = "linear"}
[[arm]]
name = "kan+all"
basis = "cheby2"
degree = 3
blocks = "2-3"
curriculum = {start_degree = 1, stages = "backwards", anneal = "linear"}
distillation.weight = 0.5
"""
)


@pytest.fixture
def bench(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A place to run suites in, with a model and conversations beside them."""
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "base", tiny_llama(), bundled_tokenizer)
    turns = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two, three. " * 8}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 120)
    store = ResultsStore(tmp_path / "results")
    return Bench(store, "here", tmp_path / "runs", torch.device("cpu"), torch.float32)


def test_a_taught_arm_is_another_one_and_a_plain_one_is_what_it_was(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "taught.toml").write_text(TAUGHT)
    suite = read_suite(tmp_path / "taught.toml")
    ran = engine.run_suite(bench, suite)
    assert not ran.failures
    kan, staged, taught = (record for record in ran.records if record.stage == "train")
    more = {"base", "curriculum", "distillation"}
    assert taught.settings.keys() - kan.settings.keys() == more  # so the keys of plain training are what they were
    base = find_ref(str(tmp_path / "base"))
    assert taught.settings["base"] == base.fingerprint
    assert taught.settings["curriculum"]["start_degree"] == 1
    assert taught.settings["distillation"] == {"weight": 0.5, "temperature": 2.0}
    assert taught.value("heldout_loss_before") == kan.value("heldout_loss_before")
    assert len({record.value("heldout_loss") for record in (kan, staged, taught)}) == 3
    (table,) = engine.write_report(bench.store, suite, "here", ran.records).tables
    assert [(row.name, row.seeds) for row in table.rows] == [("kan", 1), ("kan+curriculum", 1), ("kan+all", 1)]
    model, _ = load_model(taught.artifacts[0].path.rpartition("/")[0])
    assert not any("forward" in vars(module) for module in model.modules())

    again = engine.run_suite(bench, suite).records
    assert [record.id for record in again] == [record.id for record in ran.records]  # nothing is done again


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ('basis = "rbf"\nblocks = "2-3"\ncurriculum.start_degree = 1', "arm 'wrong': .*basis 'rbf' cannot rise"),
        ('basis = "linear"\nblocks = "2-3"\ncurriculum.start_degree = 1', "start_degree 1 is for layers of functions"),
        ('basis = "cheby2"\nblocks = "2-3"\ntrain.tail_from = 3\ncurriculum.stages = "forwards"',
         "arm 'wrong': tail_from 3: block 2 was replaced and would not learn"),
        ('train.scope = "all"\ncurriculum.anneal = "linear"', "arm 'wrong': stages and annealing need replaced blocks"),
        ("train.tokens = 0\ntrain.row_length = 513", "arm 'wrong': rows of 513 tokens .* take rows of at most 512"),
    ],
)  # fmt: skip
def test_what_an_arm_cannot_be_taught_is_refused_before_the_first_stage(
    bench: Bench, tmp_path: Path, arm: str, says: str
) -> None:
    (tmp_path / "wrong.toml").write_text(f'{TAUGHT}[[arm]]\nname = "wrong"\n{arm}\n')
    with pytest.raises(KallmError, match=says):
        engine.run_suite(bench, read_suite(tmp_path / "wrong.toml"))
    assert not bench.store.records()


SWAP = """
[[arm]]
name = "swapped"
after = "kan"
basis = "legendre"
degree = 3
blocks = "2-3"
distillation.weight = 0.5
[[arm]]
name = "longer"
after = "swapped"
"""


def test_an_arm_goes_on_from_where_another_one_ended(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "swap.toml").write_text(TAUGHT + SWAP)
    alone = engine.run_suite(bench, read_suite(tmp_path / "swap.toml", only=["longer"]))
    assert not alone.failures
    assert {record.arm for record in alone.records} == {"longer"}
    ran = engine.run_suite(bench, read_suite(tmp_path / "swap.toml", only=["kan", "swapped", "longer"]))
    stages = {(record.arm, record.stage): record for record in ran.records}
    assert stages.keys() == {*itertools.product(["kan", "swapped"], ["retrofit", "train"]), ("longer", "train")}
    assert len(bench.store.records()) == len(stages)  # those before an arm are run for it, and once
    kan, swapped, longer = (stages[arm, "train"] for arm in ("kan", "swapped", "longer"))
    assert stages["swapped", "retrofit"].settings["spec"]["start"] == "convert"
    assert swapped.settings["base"] == find_ref(str(tmp_path / "base")).fingerprint
    # polynomials of degree 3 in another basis are the same functions, and so each begins where the other ended
    for before, after in ((kan, swapped), (swapped, longer)):
        assert after.value("heldout_loss_before") == pytest.approx(before.value("heldout_loss"), abs=1e-4)
    assert len({record.value("heldout_loss") for record in (kan, swapped, longer)}) == 3


def test_arms_compute_in_the_dtypes_they_name(bench: Bench, tmp_path: Path) -> None:
    plain = TAUGHT[: TAUGHT.index('[[arm]]\nname = "kan+curriculum"')]
    (tmp_path / "dtypes.toml").write_text(f'{plain}[[arm]]\nname = "half"\n{KAN[8:]}dtype = "bfloat16"\n')
    suite = read_suite(tmp_path / "dtypes.toml")
    assert [cell.dtype for cell in suite.cells] == ["", "bfloat16"]
    ran = engine.run_suite(bench, suite)
    assert not ran.failures
    trained = [record for record in ran.records if record.stage == "train"]
    assert [record.settings["dtype"] for record in trained] == ["float32", "bfloat16"]
    assert [forecast.trouble for forecast in engine.foresee_suite(bench, suite)] == ["", ""]
    over = [cell.dtype for cell in read_suite(_said(tmp_path, "float16"), only=["kan"]).cells]
    assert over == ["float16"]


def test_records_of_one_moment_are_read_in_the_order_they_came_in(bench: Bench) -> None:
    """Work that is only filed again takes no time, and a row is about the newest record."""
    stages = ["retrofit", "profile", "retrofit"]  # not in the order of the alphabet, in which ids of one second are
    for stage in stages:
        Stage(bench, stage, {"spec": {}}).finish([])
    assert [record.stage for record in bench.store.records()] == stages


def _said(folder: Path, dtype: str) -> Path:
    path = folder / "said.toml"
    path.write_text(f'dtype = "{dtype}"\n{TAUGHT}')
    return path


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TrainingError("the loss is infinite"), "the loss is infinite"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; a smaller --batch-size"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero (test_suites.py, line "),
    ],
    ids=["foreseen", "memory", "bug"],
)
def test_a_cell_that_fails_leaves_the_others_alone(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    (tmp_path / "three.toml").write_text(TAUGHT)
    arms = iter(["kan", "kan+curriculum", "kan+all"])

    def train(*arguments: Any, **named: Any) -> Any:
        if next(arms) == "kan+curriculum":
            raise error
        return train_model(*arguments, **named)

    monkeypatch.setattr(cells, "train_model", train)
    lines = []
    told = dataclasses.replace(
        bench, watch=lambda work, done, total, note="": lines.append(work) if not total else None
    )
    suite = read_suite(tmp_path / "three.toml")
    ran = engine.run_suite(told, suite)
    assert [record.arm for record in ran.records if record.stage == "train"] == ["kan", "kan+all"]
    one, failed, last = (line for line in lines if ", seed 0" in line)
    losses = [f"{record.value('heldout_loss'):.3f}" for record in ran.records if record.stage == "train"]
    assert one.startswith(f"kan, seed 0: held-out loss {losses[0]}, ")
    assert says in failed
    assert last.startswith(f"kan+all, seed 0: held-out loss {losses[1]}, ")
    assert list(ran.failures) == ["kan+curriculum, seed 0"]
    assert says in ran.failures["kan+curriculum, seed 0"]
    (row,) = _failed(bench)
    assert (row.name, row.words["seed"], row.words["stage"]) == ("kan+curriculum", "0", "train")
    assert row.words["why it failed"] == ran.failures["kan+curriculum, seed 0"]
    report = engine.write_report(bench.store, suite, bench.testbed, ran.records).folder / "report.md"
    assert f"| kan+curriculum | 0 | train | {ran.failures['kan+curriculum, seed 0']} |" in report.read_text()


def _failed(bench: Bench) -> Sequence[Row]:
    """What a report tells as failed."""
    return [row for table in build_tables(bench.store) if table.kind == "failures" for row in table.rows]


def test_a_cell_that_goes_well_after_all_is_no_failure_any_more(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all of it was done before it failed, so that success leaves no new record."""
    (tmp_path / "one.toml").write_text(TAUGHT)
    suite = read_suite(tmp_path / "one.toml", only=["kan"])
    with monkeypatch.context() as broken:
        broken.setattr(cells, "train_model", _fails)
        engine.run_suite(bench, suite)
        assert [row.words["why it failed"] for row in _failed(bench)] == ["the loss is infinite"]
    assert not engine.run_suite(bench, suite).failures
    assert not _failed(bench)
    arms = [table for table in build_tables(bench.store) if table.kind == "arms"]
    with monkeypatch.context() as broken:
        broken.setattr(cells, "train_model", _fails)
        engine.run_suite(bench, suite)
    (table,) = [table for table in build_tables(bench.store) if table.kind == "arms"]
    assert table.rows == arms[0].rows, "the results of a finished cell are gone"
    assert table.notes[0].startswith("Failed when last run: kan, seed 0. ")
    assert len(_failed(bench)) == 1
    assert not engine.run_suite(bench, suite).failures
    assert not _failed(bench)
    assert [bool(each.reason) for each in bench.store.endings()] == [True, False, True, False]


def _fails(*arguments: Any, **named: Any) -> Any:
    raise TrainingError("the loss is infinite")


def test_a_full_disk_keeps_no_failure_from_the_other_cells(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise DiskError("cannot write: no space left on device")

    (tmp_path / "two.toml").write_text(TAUGHT)
    monkeypatch.setattr(cells, "train_model", _fails)
    monkeypatch.setattr(ResultsStore, "write_ending", full)
    words: list[str] = []
    told = dataclasses.replace(bench, watch=lambda work, done, total, note="": words.append(work))
    ran = engine.run_suite(told, read_suite(tmp_path / "two.toml", only=["kan", "kan+all"]))
    assert list(ran.failures) == ["kan, seed 0", "kan+all, seed 0"]
    assert "how kan, seed 0 ended cannot be noted for the report: cannot write: no space left on device" in words


@pytest.mark.parametrize("stop", [Interrupted(15, "told to"), KeyboardInterrupt()], ids=["told", "at once"])
def test_a_stop_stops_the_suite(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    (tmp_path / "three.toml").write_text(TAUGHT)

    def train(*arguments: Any, **named: Any) -> Any:
        raise stop

    monkeypatch.setattr(cells, "train_model", train)
    with pytest.raises(type(stop)):
        engine.run_suite(bench, read_suite(tmp_path / "three.toml"))
    assert not bench.store.endings()


def test_a_retrofitted_model_that_does_not_know_its_origin_is_no_teacher_of_its_own(
    bench: Bench, tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    save_checkpoint(tmp_path / "kan", model, bundled_tokenizer)
    ref, lessons = find_ref(str(tmp_path / "kan")), engine.Lessons(distillation=DistillationSettings(0.5))
    with pytest.raises(ModelError, match="does not say what it was made of; pass --base"):
        lessons.of(ref)
    base = find_ref(str(tmp_path / "base"))
    assert dataclasses.replace(lessons, base=base).of(ref).base == base
    assert lessons.of(base).base == base
    assert engine.Lessons(base=base).of(ref).base is None


def test_paths_of_a_suite_start_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    path = tmp_path / "suites" / "mine.toml"
    path.write_text('[train]\ndata = "../chat.jsonl"\n[[arm]]\nname = "a"\n')
    assert read_suite(path).cells[0].train.data == str(tmp_path / "chat.jsonl")


@pytest.mark.parametrize("text", ["arm = 3", "arm = [3]", "[[arm]]\nbasis = 'linear'", "[[arm", "\xff"])
def test_of_a_file_that_is_no_suite_no_order_is_known(text: str, tmp_path: Path) -> None:
    path = tmp_path / "try.toml"
    assert arm_order(str(path)) == []
    path.write_text(text, encoding="latin-1")
    assert arm_order(str(path)) == []


def test_a_suite_that_is_not_there_gets_the_nearest_name() -> None:
    with pytest.raises(SuiteError, match="Did you mean 'quickstart'"):
        find_suite("quikstart")
    with pytest.raises(SuiteError, match="no suite file 'gone"):
        find_suite("gone.toml")
    with pytest.raises(SuiteError, match="Did you mean 'kan'"):
        read_suite(find_suite("quickstart"), only=["kam"])
