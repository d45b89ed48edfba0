"""Suites: every shipped one reads, and one that is wrong is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from kallm_bench.errors import KallmError, SuiteError
from kallm_bench.models import KANSpec
from kallm_bench.suites import find_suite, read_suite

SHIPPED = sorted((Path(__file__).parent.parent / "suites").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_suite_reads(path: Path) -> None:
    suite = read_suite(path)
    assert suite.name == path.stem
    assert suite.description
    assert find_suite(path.stem) == path
    assert len({(cell.arm, cell.seed) for cell in suite.cells}) == len(suite.cells)
    assert suite.cells or suite.kernels


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
    assert suite.cells[0].eval.tasks == ("snarks",)
    assert [cell.seed for cell in read_suite(path, only=["kan"], seeds=[7]).cells] == [7]


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
        ('seeds = 3\n[[arm]]\nname = "a"\n', "seeds should be like"),
        ('seeds = ["x"]\n[[arm]]\nname = "a"\n', "whole numbers"),
        ("arm = 3\n", "arm should be like"),
        ('train = 3\n[[arm]]\nname = "a"\n', "train should be like"),
        ('[[arm]]\nname = "a"\ntrain = 3\n', "train should be like"),
        ('model = 5\n[[arm]]\nname = "a"\n', "model should be like"),
        ('[[arm]]\nname = "a"\ntrain.seed = 5\n', "no key 'seed'"),
        (f'{KAN}name = "a"\nparams = "b"\n{KAN}name = "b"\nparams = "a"\n', "no arm with a size of its own"),
        ('[[arm]]\nname = "a"\nbasis = "cheby2"\nblocks = "1"\nparams = ["b"]\n', "params should be a number"),
        ('[[arm]]\nname = "a"\nbasis = "cheby2"\nblocks = "1"\nparams = "b"\n', "params should be a number above 0"),
        ('stages = ["retrofitt"]\n[[arm]]\nname = "a"\n', "Did you mean 'retrofit'"),
        ('seeds = []\n[[arm]]\nname = "a"\n', "at least one"),
        ('seeds = [1, 1]\n[[arm]]\nname = "a"\n', "stands twice"),
        ('[[arm]]\nname = "a"\nblocks = "1"\n', "has blocks but no basis"),
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


def test_paths_of_a_suite_start_at_its_file(tmp_path: Path) -> None:
    (tmp_path / "suites").mkdir()
    path = tmp_path / "suites" / "mine.toml"
    path.write_text('[train]\ndata = "../chat.jsonl"\n[[arm]]\nname = "a"\n')
    assert read_suite(path).cells[0].train.data == str(tmp_path / "chat.jsonl")


def test_a_suite_that_is_not_there_gets_the_nearest_name() -> None:
    with pytest.raises(SuiteError, match="Did you mean 'quickstart'"):
        find_suite("quikstart")
    with pytest.raises(SuiteError, match="no suite file 'gone"):
        find_suite("gone.toml")
    with pytest.raises(SuiteError, match="Did you mean 'kan'"):
        read_suite(find_suite("quickstart"), only=["kam"])
