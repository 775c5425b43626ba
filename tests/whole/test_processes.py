"""Several processes: each computes its share, one speaks, and the figures are those of a single one."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import sparsify
from sparsify import processes
from sparsify.errors import BadData, SparsifyError
from sparsify.images.loaders import Flaws, LabelledBatches, Stream, share
from sparsify.measure.accuracy import Evaluation, Features, Logits
from sparsify.measure.passes import Pass, figures_of, rates_of, run_pass
from sparsify.processes import Compute

COUNTS = ("images", "broken", "top1", "top5", "dense_top1", "dense_top5", "agreement", "images_lost", "images_gained")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "model.safetensors"
    sparsify.convert("digits", keep=0.05, output=path, calib_images=8, spread="none")
    return path


def launched(folder, *arguments, processes=2):
    how = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*how, "sparsify", *map(str, arguments)], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )


def test_two_processes_count_what_one_counts(model, run, tmp_path):
    assert run("eval", model, "--data", "digits", "--results-file", "one.json")[0] == 0
    two = launched(tmp_path, "eval", model, "--data", "digits", "--results-file", "two.json")
    assert two.returncode == 0, two.stderr
    one, found = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert {name: found[name] for name in COUNTS} == {name: one[name] for name in COUNTS} and found["images"] == 597
    assert found["kl"] == pytest.approx(one["kl"], rel=1e-4)
    assert two.stdout.count("Measured, on the same images") == 1 and found["throughput_sparse"] > 0


def test_an_error_of_one_process_is_said_once(model, tmp_path):
    for c in range(10):
        (tmp_path / "set" / str(c)).mkdir(parents=True)
        Image.new("RGB", (28, 28), (20 * c, 9, 9)).save(tmp_path / "set" / str(c) / "a.png")
    (tmp_path / "set" / "3" / "a.png").write_bytes(b"no picture")  # the fourth: the second process's
    found = launched(tmp_path, "eval", model, "--data", "set", "--strict")
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode and "a.png" in line and "Measured" not in found.stdout


@pytest.fixture
def second_of_three(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_a_single_process_joins_nobody_and_imports_nothing():
    assert (processes.rank(), processes.world(), processes.main()) == (0, 1, True)
    assert processes.gather("a") == ["a"] and processes.local_device("cuda") == "cuda"
    processes.start("cpu"), processes.barrier()
    probe = "import sys, sparsify.processes as p; print('torch' in sys.modules, p.world())"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False 1"
    probe = "import sys, sparsify.measure.evaluate, sparsify.processes as p; p.gather(1); print('accelerate' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_the_environment_says_who_one_is(second_of_three, monkeypatch):
    assert (processes.rank(), processes.world(), processes.main()) == (1, 3, False)
    assert (processes.local_device("cuda"), processes.local_device("cpu"), processes.local_device("cuda:0")) == (
        "cuda:1",
        "cpu",
        "cuda:0",
    )
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert processes.world() == 1


def test_errors_of_any_process_are_raised_in_all(second_of_three, monkeypatch):
    elsewhere = SparsifyError("there")
    monkeypatch.setattr(processes, "gather", lambda item: [elsewhere, item])
    with pytest.raises(SparsifyError, match="there") as caught, processes.agree():
        pass
    assert processes.agreed(caught.value) and not processes.agreed(SparsifyError("here"))
    monkeypatch.setattr(processes, "gather", lambda item: [None, item])
    with pytest.raises(BadData, match="mine"), processes.agree():
        raise BadData("mine")
    with processes.agree():
        pass


class Pictures(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.full((1, 2, 2), float(i)), i


def labels(loader):
    return [label for _, y in loader for label in y.tolist()]


def test_shares_are_every_third_item(second_of_three):
    part = share(LabelledBatches(Pictures(8), 2, name="here"))
    assert labels(part) == [1, 4, 7] and part.total == 3
    assert labels(share(LabelledBatches(Pictures(1), 2))) == []  # nothing for this one is no error


def test_streams_are_shared_out_and_do_not_share_out_themselves(second_of_three):
    class Source(list):
        pass

    source = Source((Image.new("RGB", (2, 2)), i) for i in range(8))
    source.reader = type("Reader", (), {"dist_rank": 1, "dist_num_replicas": 3})()
    part = share(LabelledBatches(Stream(source, lambda image: torch.zeros(1)), 2))
    assert labels(part) == [1, 4, 7]
    assert (source.reader.dist_rank, source.reader.dist_num_replicas) == (0, 1)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("kind", ["logits", "features"])
def test_merged_sums_are_the_sums_over_all(kind, beside):
    torch.manual_seed(0)
    dense, sparse, y = torch.randn(9, 4), torch.randn(9, 4), torch.randint(0, 2, (9,))
    tokens = torch.randn(2, 9, 5, 4)

    def over(rows):
        d: object = dense[rows] if kind == "logits" else (dense[rows], tokens[0][rows])
        s: object = sparse[rows] if kind == "logits" else (sparse[rows], tokens[1][rows])
        sums = Logits() if kind == "logits" else Features(1)
        sums.add(d if beside else None, s, y[rows])
        return sums

    merged = over(slice(0, 4))
    merged.merge(over(slice(4, 9)))
    for name, value in over(slice(0, 9)).result(9).as_dict().items():
        assert merged.result(9).as_dict()[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_rates_of_processes_add_up_and_those_without_images_count_nothing():
    class Answers(torch.nn.Module):
        num_classes = 3

        def forward(self, x):
            return x

    one = run_pass({"sparse": Answers()}, [(torch.eye(3), torch.arange(3))], Compute())
    one.seconds = {"sparse": 1.5}
    empty = Pass({"sparse": Logits()}, {"sparse": 0.0}, flaws=Flaws(2))
    passes = [one, empty, replace(one, sums={"sparse": Logits()}, flaws=Flaws(1))]
    found = figures_of(passes)
    assert (rates_of(passes), found.images, found.broken) == ({"throughput_sparse": 4.0}, 6, 3)
    assert figures_of([empty]) == Evaluation()
