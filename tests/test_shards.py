"""Weights as files: what a retrofit does not touch is linked or copied byte by byte, and damaged files are refused."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_retrofit import make_sharded, measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from kallm_bench import engine
from kallm_bench.engine import retrofitting
from kallm_bench.errors import CheckpointError, KallmError
from kallm_bench.files import DiskError
from kallm_bench.models import (
    CalibrationSettings,
    KANSpec,
    complete_spec,
    find_model,
    load_checkpoint,
    load_config,
    load_model,
    open_original,
    retrofit,
    retrofit_reporting,
    save_checkpoint,
    stored_dtype,
)
from kallm_bench.models.shards import INDEX, SINGLE, Shard, Weights, weight_files

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def sources(tiny_llama, tmp_path_factory):
    """Folders to start from, by name."""
    home = tmp_path_factory.mktemp("sources")
    llama = tiny_llama(vocab_size=97)
    llama.generation_config.max_new_tokens = 7
    llama.save_pretrained(home / "llama")
    llama.save_pretrained(home / "sharded", max_shard_size="20KB")
    tiny_llama(vocab_size=97, tie_word_embeddings=False).save_pretrained(home / "untied")
    tiny_llama(vocab_size=97, dtype=torch.bfloat16).save_pretrained(home / "bfloat16")
    tiny_gpt2().save_pretrained(home / "gpt2")
    for spec in (KANSpec("1-2", "cheby2", linear=True), KANSpec((2,), "linear", hidden=24)):
        retrofit(llama, spec)
    save_checkpoint(home / "retrofitted", llama)
    return {folder.name: folder for folder in home.iterdir()}


@pytest.fixture
def sharded(sources, tmp_path):
    """A model in several files, of the test's own."""
    return shutil.copytree(sources["sharded"], tmp_path / "source")


def opened(folder, spec):
    """A retrofitted skeleton, ready to be saved by what has changed."""
    source = find_model(str(folder))
    complete = complete_spec(load_config(source), spec)
    original = open_original(source, complete)
    assert original is not None
    retrofit_reporting(original.model, complete, device="cpu")
    return original


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The same model, however it was written

SPECS = {
    "stack": KANSpec("last:2", "cheby2", seed=3),
    "linear": KANSpec("1-2", "linear"),
    "drop": KANSpec((0,), "drop"),
    "glu": KANSpec("0,3", "rational", form="glu"),
    "all": KANSpec("all", "bspline:grid=4", constant="edge", form="single"),
}
WRITTEN = [(source, spec) for source in ("llama", "sharded", "bfloat16", "gpt2") for spec in SPECS.values()]
WRITTEN += [("untied", SPECS["stack"]), *(("retrofitted", SPECS[name]) for name in ("stack", "linear", "drop"))]
WRITTEN.append(("retrofitted", KANSpec((1,), "legendre", degree=4, start="convert")))


@pytest.mark.parametrize(("source", "spec"), WRITTEN, ids=lambda each: getattr(each, "basis", each))
def test_what_is_written_is_the_model_that_whole_loading_makes(sources, source, spec, tmp_path):
    source = find_model(str(sources[source]))
    dtype = stored_dtype(source)
    model, _ = load_model(source, dtype)
    retrofit(model, spec)
    save_checkpoint(tmp_path / "whole", model)
    opened(source.folder, spec).save_changed(tmp_path / "changed")

    whole, changed = (load_checkpoint(tmp_path / name, dtype)[0] for name in ("whole", "changed"))
    assert whole.state_dict().keys() == changed.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(changed.state_dict()[name], tensor), name
    assert torch.equal(logits(changed), logits(model))
    assert changed.generation_config == whole.generation_config
    for name in ("config.json", "kallm.json", "README.md"):
        assert (tmp_path / "changed" / name).read_text() == (tmp_path / "whole" / name).read_text(), name
    written = [path.stat() for path in (tmp_path / "changed").iterdir()]
    assert {status.st_mode & 0o777 for status in written if status.st_nlink == 1} == {0o644}


def test_every_tensor_stands_at_a_multiple_of_its_size(sources, tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(2), "c": torch.ones(5, dtype=torch.bfloat16)}
    save_file(tensors | {"d": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "all.safetensors", {"format": "pt"})
    Shard.open(tmp_path / "all.safetensors").copy(tmp_path / "some.safetensors", {"a", "b", "c"})
    some = Shard.open(tmp_path / "some.safetensors")
    assert some.metadata == {"format": "pt"}
    for name, stored in some.tensors.items():
        assert (some.data + stored.start) % tensors[name].element_size() == 0
        assert torch.equal(load_file(tmp_path / "some.safetensors")[name], tensors[name])


def test_the_index_says_where_everything_is(sharded, tmp_path):
    opened(sharded, SPECS["stack"]).save_changed(tmp_path / "new")
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    found = {name: path.name for path in weight_files(tmp_path / "new") for name in Shard.open(path).tensors}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(
        stored.end - stored.start for stored in Weights(tmp_path / "new").tensors.values()
    )
    last = weight_files(tmp_path / "new")[-1]
    assert all(".mlp." in name for name in Shard.open(last).tensors)  # what is new has a file of its own
    assert {name for name in found if ".2.mlp." in name} <= Shard.open(last).tensors.keys()


def test_what_stands_beside_the_weights_is_copied_byte_by_byte(sharded, bundled_tokenizer, tmp_path):
    bundled_tokenizer.save_pretrained(sharded)
    (sharded / "additional_chat_templates").mkdir()
    (sharded / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}\n")
    (sharded / "training_args.bin").write_bytes(b"\x80\x04")
    opened(sharded, SPECS["stack"]).save_changed(tmp_path / "new")
    new, old = contents(tmp_path / "new"), contents(sharded)
    alike = {str(path) for path in new if path in old and new[path] == old[path]}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= alike
    assert "additional_chat_templates/tools.jinja" in alike
    assert "training_args.bin" not in {str(path) for path in new}


# Links


def names_of_inodes(folder):
    return {path.stat().st_ino: path for path in folder.glob("*.safetensors")}


def test_files_that_keep_all_they_hold_are_linked(sharded, tmp_path):
    for path in sharded.glob("*.safetensors"):
        path.chmod(0o600)
    before = contents(sharded)
    opened(sharded, SPECS["stack"]).save_changed(tmp_path / "new")
    old, new = names_of_inodes(sharded), names_of_inodes(tmp_path / "new")
    touched = {
        path
        for path in old.values()
        if any(f".{block}.mlp." in name for block in (2, 3) for name in Shard.open(path).tensors)
    }
    assert 0 < len(touched) < len(old)
    assert {path for inode, path in old.items() if inode in new} == set(old.values()) - touched
    assert contents(sharded) == before
    assert {path.stat().st_mode & 0o777 for path in old.values()} == {0o600}


def test_a_link_outlives_its_source(sharded, tmp_path):
    original = opened(sharded, SPECS["stack"])
    original.save_changed(tmp_path / "new")
    expected = logits(load_checkpoint(tmp_path / "new")[0])
    AutoModelForCausalLM.from_config(load_config(find_model(str(sharded)))).save_pretrained(
        sharded, max_shard_size="20KB"
    )
    assert torch.equal(logits(load_checkpoint(tmp_path / "new")[0]), expected)  # saving anew into the source's folder
    shutil.rmtree(sharded)
    assert torch.equal(logits(load_checkpoint(tmp_path / "new")[0]), expected)


def test_saving_anew_into_a_folder_of_links_leaves_the_source_alone(sharded, tmp_path):
    """What hard links rest on: safetensors writes a file beside its place and renames it."""
    opened(sharded, SPECS["drop"]).save_changed(tmp_path / "new")
    before = contents(sharded)
    for path in weight_files(tmp_path / "new"):
        save_file({name: torch.zeros_like(each) for name, each in load_file(path).items()}, path, {"format": "pt"})
    assert contents(sharded) == before


def test_symbolic_links_are_followed(sharded, tmp_path):
    """The hub's cache is a folder of them."""
    (tmp_path / "links").mkdir()
    for path in sharded.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    opened(tmp_path / "links", SPECS["stack"]).save_changed(tmp_path / "new")
    assert not any(path.is_symlink() for path in (tmp_path / "new").iterdir())
    assert set(names_of_inodes(sharded)) & set(names_of_inodes(tmp_path / "new"))


@pytest.mark.parametrize("refused", [errno.EXDEV, errno.EPERM, errno.EMLINK], ids=errno.errorcode.get)
@pytest.mark.parametrize("inside", [True, False], ids=["copied inside the system", "copied by us"])
def test_where_nothing_can_be_linked_it_is_copied(sharded, tmp_path, monkeypatch, refused, inside):
    def refuse(*args, **kwargs):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "link", refuse)
    if not inside:
        monkeypatch.setattr(os, "copy_file_range", lambda *args: refuse() if refused == errno.EXDEV else 0)
    original = opened(sharded, SPECS["stack"])
    original.save_changed(tmp_path / "new")
    assert not set(names_of_inodes(sharded)) & set(names_of_inodes(tmp_path / "new"))
    old = Weights(sharded)
    kept = old.tensors.keys() & Weights(tmp_path / "new").tensors.keys()
    assert len(kept) > 20
    for name, tensor in Weights(tmp_path / "new").read(kept).items():
        assert torch.equal(tensor, old.read([name])[name]), name


# Whole or not at all


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(errno.ENOSPC, "full")], ids=str)
def test_what_is_interrupted_leaves_nothing(sharded, tmp_path, monkeypatch, error):
    def stop(*args):
        raise error

    before = contents(tmp_path)
    original = opened(sharded, SPECS["stack"])
    monkeypatch.setattr(Shard, "copy", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit, DiskError)):
        original.save_changed(tmp_path / "new")
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Which way is taken


@pytest.fixture
def bench(tmp_path):
    from kallm_bench.filing import Bench
    from kallm_bench.records import ResultsStore

    store = ResultsStore(tmp_path / "results")
    return Bench(store, store.testbed({"cpu": "here"}), tmp_path / "runs", torch.device("cpu"), torch.float32)


def made(bench, folder, spec, text=None):
    from kallm_bench.filing import find_ref

    record = engine.retrofit(bench, find_ref(str(folder)), spec, calibration=text)
    return record, Path(record.artifacts[0].path).parent


def test_a_retrofit_loads_nothing_it_does_not_need(bench, sharded, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded whole")

    monkeypatch.setattr(retrofitting, "load_weights", refuse)
    monkeypatch.setattr(Weights, "read", refuse)
    record, folder = made(bench, sharded, SPECS["stack"])
    values = {metric.name: metric.value for metric in record.metrics}
    model, _ = load_checkpoint(folder)
    assert values["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record.model["fingerprint"] == find_model(str(folder)).fingerprint
    assert "weights_dtype" not in record.settings


def test_a_start_from_text_writes_only_what_changes_too(bench, sharded, bundled_tokenizer, tiny_llama, tmp_path):
    tiny_llama().save_pretrained(sharded, max_shard_size="20KB")
    bundled_tokenizer.save_pretrained(sharded)
    said = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, three. " * 30}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 200)
    text = CalibrationSettings(str(tmp_path / "chat.jsonl"), tokens=1024, row_length=64, heldout_tokens=256)
    before = contents(sharded)
    record, folder = made(bench, sharded, KANSpec("last:2", "cheby2", start="lstsq"), text)
    assert len(set(names_of_inodes(sharded)) & set(names_of_inodes(folder))) > 2
    assert contents(sharded) == before
    losses = {metric.name: metric.value for metric in record.metrics}
    assert losses["heldout_loss"] > 0
    load_checkpoint(folder)


def test_a_change_of_basis_refuses_values_that_are_not_finite(bench, sources, tmp_path):
    folder = shutil.copytree(sources["retrofitted"], tmp_path / "source")
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1.mlp.layers.0.coefficients"][0, 0, 0] = float("nan")
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.layers\.0\.coefficients is damaged"):
        made(bench, folder, KANSpec((1,), "legendre", degree=4, start="convert"))
    assert not list(bench.runs.glob("*-legendre-*"))


def test_the_checkpoints_own_dtype_is_kept(bench, sources):
    record, folder = made(bench, sources["bfloat16"], SPECS["stack"])
    assert {stored.dtype for stored in Weights(folder).tensors.values()} == {"BF16"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert record.settings["weights_dtype"] == "bfloat16"


def test_names_that_are_changed_in_loading_are_loaded_whole(bench, sources, tmp_path):
    """As of GPT-2 on the hub, whose tensors lack the prefix that the class has."""
    folder = shutil.copytree(sources["gpt2"], tmp_path / "hub")
    tensors = {name.removeprefix("transformer."): each for name, each in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    source = find_model(str(folder))
    assert open_original(source, complete_spec(load_config(source), SPECS["stack"])) is None
    model, _ = load_model(source)
    retrofit(model, SPECS["stack"])
    _, saved = made(bench, folder, SPECS["stack"])
    assert torch.equal(logits(load_checkpoint(saved)[0]), logits(model))


# Damage


def with_header(change):
    """Damages the header of the file whose bytes are given; keeps what follows it."""

    def edit(content):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = json.dumps(header if changed is None else changed).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return edit


def entry(**fields):
    """Changes what the header says of one tensor."""
    return with_header(lambda header: header["model.norm.weight"].update(fields))


def moved(by):
    def move(header):
        offsets = header["model.norm.weight"]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [offset + by for offset in offsets]

    return with_header(move)


DAMAGE = {
    "empty": (lambda content: b"", "header"),
    "three bytes": (lambda content: content[:3], "header"),
    "cut in the header": (lambda content: content[:100], "header"),
    "cut in the tensors": (lambda content: content[:-5], "bytes"),
    "bytes too many": (lambda content: content + b"\0" * 8, "bytes"),
    "a header longer than the file": (lambda content: b"\xff" * 7 + b"\0" + content[8:], "header"),
    "a header of a gigabyte": (lambda content: (2**30).to_bytes(8, "little") + content[8:], "header"),
    "a header too short": (lambda content: (50).to_bytes(8, "little") + content[8:], "JSON"),
    "no text": (lambda content: content[:8] + b"\xff" * 20 + content[28:], "JSON"),
    "a list": (with_header(lambda header: [header]), "JSON object"),
    "deep": (lambda content: (50_000).to_bytes(8, "little") + b"[" * 50_000, "JSON"),
    "a tensor that is none": (with_header(lambda header: header.update(stray=3)), "stray"),
    "a dtype that is none": (entry(dtype="F31"), "'F31'"),
    "a dtype that is a list": (entry(dtype=["F32"]), "model.norm.weight"),
    "another dtype": (entry(dtype="F64"), "model.norm.weight is (32,) in F64, which is 256 bytes, not 128"),
    "another shape": (entry(shape=[33]), "model.norm.weight"),
    "a shape below zero": (entry(shape=[-32]), "model.norm.weight"),
    "a shape that is text": (entry(shape="32"), "model.norm.weight"),
    "one offset": (entry(data_offsets=[0]), "model.norm.weight"),
    "offsets below zero": (entry(data_offsets=[-128, 0]), "model.norm.weight"),
    "offsets that overlap": (moved(-64), "overlaps"),
    "offsets with a gap": (moved(64), "gap"),
    "a tensor too few": (with_header(lambda header: {k: v for k, v in header.items() if "norm" not in k}), "gap"),
    "metadata in a list": (with_header(lambda header: header.update(__metadata__=[])), "__metadata__"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_refused_by_its_name(sources, damage, named, tmp_path):
    folder = shutil.copytree(sources["llama"], tmp_path / "checkpoint")
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    with pytest.raises(CheckpointError) as refused:
        find_model(str(folder))
    assert str(folder / SINGLE) in str(refused.value)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_safetensors_reads_we_read(sources):
    for folder in sources.values():
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == Shard.open(path).tensors.keys()


def renamed(name):
    """Makes the index call one of its files something else."""

    def edit(folder):
        index = json.loads((folder / INDEX).read_text())
        first = min(index["weight_map"].values())
        index["weight_map"] = {key: name if at == first else at for key, at in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def second_copy(folder):
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    shutil.copyfile(folder / files[0], folder / "again.safetensors")
    index["weight_map"]["again"] = "again.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


INDEX_DAMAGE = {
    "a file missing": (lambda folder: min(folder.glob("model-00002*")).unlink(), "model-00002"),
    "a file of another name": (renamed("model-9.safetensors"), "model-9.safetensors is missing"),
    "a file elsewhere": (renamed("../../etc/passwd"), "'../../etc/passwd'"),
    "a file above": (renamed("../other.safetensors"), "'../other.safetensors'"),
    "a file at the root": (renamed("/etc/model.safetensors"), "'/etc/model.safetensors'"),
    "a pickle": (renamed("pytorch_model.bin"), "'pytorch_model.bin'"),
    "a file twice": (second_copy, "another file"),
    "no JSON": (lambda folder: (folder / INDEX).write_bytes(b"\xff"), INDEX),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), INDEX),
    "no places": (lambda folder: (folder / INDEX).write_text('{"weight_map": 3}'), INDEX),
    "no index": (lambda folder: (folder / INDEX).unlink(), "safetensors"),
}


@pytest.mark.parametrize(("damage", "named"), INDEX_DAMAGE.values(), ids=INDEX_DAMAGE)
def test_a_damaged_index_is_refused(sharded, damage, named):
    damage(sharded)
    with pytest.raises(KallmError) as refused:
        load_model(str(sharded))
    assert named in str(refused.value)
    assert str(sharded) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", ["single", "sharded"])
def test_pickles_beside_the_weights_are_never_opened(sources, shape, tmp_path):
    """One that would write a file, as it is unpickled, writes none."""
    folder = shutil.copytree(sources["llama" if shape == "single" else "sharded"], tmp_path / "checkpoint")
    evil = f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(evil)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"model.norm.weight": "pytorch_model.bin"}}')
    load_model(str(folder))
    opened(folder, SPECS["stack"]).save_changed(tmp_path / "new")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with contextlib.suppress(KallmError):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


# Memory


@pytest.mark.long
def test_the_peak_memory_of_a_retrofit(bundled, tmp_path):
    """On 2 GiB in shards: at most 1.3 times the largest, and the new modules; the bundled model below 1.5 GiB."""
    make_sharded(tmp_path / "sharded")
    told = measure(str(tmp_path / "sharded"), tmp_path)
    assert told["peak"] <= 1.3 * told["largest"] + told["new"]
    assert measure("bundled", tmp_path)["peak"] <= 1.5 * 2**30


def test_a_retrofit_that_needs_no_weights_holds_none(tiny_llama, tmp_path):
    """In a process of its own: of 128 MB of embeddings next to nothing is ever in memory."""
    model = tiny_llama(vocab_size=1_000_000)
    model.save_pretrained(tmp_path / "wide")
    script = f"""
from pathlib import Path
import torch
from kallm_bench.models import KANSpec, complete_spec, find_model, load_config, open_original, retrofit_reporting
def held():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
source = find_model({str(tmp_path / "wide")!r})
spec = complete_spec(load_config(source), KANSpec("last:2", "cheby2"))
before = held()
original = open_original(source, spec)
retrofit_reporting(original.model, spec, device='cpu')
original.save_changed({str(tmp_path / "new")!r})
print((held() - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) < 48 * 2**20
