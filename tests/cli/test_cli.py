"""The command line as it is typed: what it prints, what it writes, how it ends."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from spimpi.inference.config import EMBEDDED_MODEL

KNOWN = json.loads((EMBEDDED_MODEL / "greedy.json").read_text())
SHORT = ["--prompt", "The file ", "--tokens", "4"]
FAULT = ["--inject", "bitflip:rank=1,layer=3,tensor=hidden,element=17,bit=30"]


@pytest.fixture
def spimpi(tmp_path, run_ranks, monkeypatch):
    """``spimpi(n, *arguments)`` in an empty folder; each rank's output also in the folder ranks.

    Returns the CompletedProcess. Its ``returncode`` is what all ranks agree on, and its stdout
    and stderr are rank 0's; the other ranks must have said nothing.
    """
    monkeypatch.chdir(tmp_path)
    runs = iter(range(1000))

    def run(n, *arguments, timeout=120):
        ranks = tmp_path.parent / f"{tmp_path.name}-ranks" / str(next(runs))
        ranks.mkdir(parents=True)
        (ranks / "run.sh").write_text(
            f'cd {ranks} && exec > out.${{r:=${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}}}} 2> err.$r\n'
            f'cd {tmp_path} && {sys.executable} -m spimpi "$@"; echo $? > {ranks}/status.$r\n'
        )  # fmt: skip
        done = run_ranks(n, "sh", ranks / "run.sh", *arguments, timeout=timeout)
        said = [[(ranks / f"{name}.{r}").read_text() for r in range(n)] for name in ("out", "err")]
        statuses = {int((ranks / f"status.{r}").read_text()) for r in range(n)}
        assert len(statuses) == 1, f"ranks ended with {statuses}: {said}"
        assert not any(said[0][1:] + said[1][1:]), "a rank other than 0 spoke"
        done.returncode, done.stdout, done.stderr = statuses.pop(), said[0][0], said[1][0]
        return done

    return run


def files(folder=".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_token_ids_in_and_out_say_the_same_as_text(spimpi):
    text = "The file "
    ids = ",".join(str(byte) for byte in text.encode())
    by_text = spimpi(2, "verify", "--prompt", text, "--tokens", "12", "--no-trace", "--json")
    by_ids = spimpi(1, "verify", "--prompt-ids", ids, "--tokens", "12", "--no-trace", "--json")
    found = [json.loads(done.stdout) for done in (by_text, by_ids)]
    assert [done.returncode for done in (by_text, by_ids)] == [0, 0]
    assert [one["tokens"] for one in found] == [[KNOWN[text][:12]]] * 2
    assert all(one["verdict"] == "verified" and one["failures"] == 0 for one in found)
    assert found[0]["established"] == ["moved", "agreed", "computed", "expected"]
    assert (found[0]["ranks"], found[0]["topology"]) == (2, "tp=2,pp=1,dp=1")
    assert files() == [], "--no-trace left something"


def test_every_run_has_a_trace_of_its_own_name_and_trace_show_reads_it(spimpi):
    named = [json.loads(spimpi(2, "verify", *SHORT, "--json").stdout)["trace"] for _ in range(2)]
    assert len(set(named)) == 2
    assert {name for name in files() if name.endswith(".h5")} == set(named)
    assert not [name for name in files() if name.endswith(".journal")]
    shown = spimpi(1, "trace", "show", named[0], "--json")
    summary = json.loads(shown.stdout)
    assert (shown.returncode, summary["verdict"], summary["complete"]) == (0, "verified", True)
    assert summary["ranks"] == 2
    text = spimpi(1, "trace", "show", named[1])
    assert text.returncode == 0 and named[1] in text.stdout


def test_a_named_trace_is_replaced_only_when_asked(spimpi):
    assert spimpi(1, "verify", *SHORT, "--trace", "run.h5").returncode == 0
    first = Path("run.h5").read_bytes()
    refused = spimpi(1, "verify", *SHORT, "--trace", "run.h5")
    assert (refused.returncode, Path("run.h5").read_bytes()) == (2, first)
    assert "--overwrite" in refused.stderr
    assert spimpi(1, "verify", *SHORT, "--trace", "run.h5", "--overwrite").returncode == 0
    assert Path("run.h5").read_bytes() != first


def test_a_golden_file_of_one_rank_is_reproduced_by_three(spimpi):
    workload = ["--prompt", "If the ", "--prompt", "A list of ", "--tokens", "5"]
    made = spimpi(1, "golden", *workload, "-o", "g.h5")
    assert made.returncode == 0 and "wrote g.h5: tiny" in made.stdout
    done = spimpi(3, "verify", *workload, "--golden", "g.h5", "--no-trace", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["expected_from"]) == (0, "g.h5")
    assert found["stages"]["golden"]["checks"] == 5 * (5 * 8 + 3)
    assert files() == ["g.h5"]


def test_a_golden_file_with_one_other_fingerprint_is_not_reproduced(spimpi):
    import h5py

    assert spimpi(1, "golden", *SHORT, "-o", "g.h5").returncode == 0
    with h5py.File("g.h5", "r+") as file:
        file["fingerprints"][2, 7] ^= 1
    done = spimpi(2, "verify", *SHORT, "--golden", "g.h5", "--no-trace")
    assert done.returncode == 2 and "damaged" in done.stderr
    with h5py.File("g.h5", "r+") as file:
        del file.attrs["digest"]  # as files of earlier versions have none
    done = spimpi(2, "verify", *SHORT, "--golden", "g.h5", "--no-trace", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"], found["failures"]) == (1, "corrupted", 1)
    assert (found["where"]["step"], found["where"]["layer"]) == (2, 1)
    expected, actual = (int(found["where"][key], 16) for key in ("expected", "found"))
    assert expected ^ actual == 1


@pytest.fixture
def manifests(spimpi):
    """good.json, with derived tensors, and model: a copy of the embedded model."""
    shutil.copytree(EMBEDDED_MODEL, "model")
    made = spimpi(2, "manifest", "make", "model", "-o", "good.json", "--derived")
    assert made.returncode == 0 and "75 tensors, 2.9 MiB, 116 derived ones" in made.stdout


def test_tensors_that_the_model_does_not_have_are_said_to_be_not_read(spimpi, manifests):
    config = json.loads(Path("model/config.json").read_text())
    config["num_hidden_layers"] -= 1
    Path("model/config.json").write_text(json.dumps(config))
    shown = spimpi(1, "verify", *SHORT, "--no-trace", "--model", "model")
    assert shown.returncode == 0, shown.stderr
    first = f"model.layers.{config['num_hidden_layers']}.input_layernorm.weight"
    assert f"not read   tensors: {first} and 8 more" in shown.stdout


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_manifest_stands_in_the_place_of_the_second_read(spimpi, manifests, ranks):
    model = [*SHORT, "--model", "model", "--manifest", "good.json", "--no-trace"]
    done = spimpi(ranks, "verify", *model)
    assert done.returncode == 0
    words = "weights    expected: they and what is derived from them equal good.json"
    assert done.stdout.rstrip().endswith(words)
    found = json.loads(spimpi(ranks, "verify", *model, "--json").stdout)
    assert (found["verdict"], found["weights_expected_from"]) == ("verified", "good.json")


def test_a_flipped_byte_of_a_file_is_named_with_its_tensor(spimpi, manifests):
    data = bytearray(Path("model/model.safetensors").read_bytes())
    data[-5] ^= 4
    Path("model/model.safetensors").write_bytes(data)
    shown = spimpi(3, "verify", *SHORT, "--model", "model", "--manifest", "good.json")
    assert shown.returncode == 1 and "CORRUPTION FOUND" in shown.stdout
    assert "tensor    model.norm.weight" in shown.stdout
    assert "rank      not singled out" in shown.stdout
    assert "weights    expected" not in shown.stdout
    (trace,) = [name for name in files() if name.endswith(".h5")]
    assert json.loads(spimpi(1, "trace", "show", trace, "--json").stdout)["verdict"] == "corrupted"


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_no_manifest_of_this_run_ends_with_2_before_anything_is_loaded(
    spimpi, manifests, ranks
):
    text = Path("good.json").read_text()
    Path("cut.json").write_text(text[:-90])
    Path("flipped.json").write_text(text.replace("BF16", "F16", 1))
    Path("newer.json").write_text(text.replace('"spimpi_manifest": 1', '"spimpi_manifest": 2'))
    words = {
        "nosuch.json": "the manifest nosuch.json cannot be read",
        "model/config.json": "is not a manifest",
        "cut.json": "cut short",
        "flipped.json": "damaged",
        "newer.json": "version 2, this spimpi reads version 1",
    }
    for file, said in words.items():
        done = spimpi(ranks, "verify", "--model", "model", "--manifest", file, timeout=60)
        assert (done.returncode, done.stdout) == (2, ""), file
        assert said in done.stderr and done.stderr.count("spimpi: ") == 1
    for wishes, said in {
        ("--model", "model", "--seed", "7"): "has the seed 1069, the run 7",
        ("--config", "llama-3.2-1b", "--layers", "2"): "is of another model: ",
    }.items():
        done = spimpi(ranks, "verify", *wishes, "--manifest", "good.json", timeout=60)
        assert (done.returncode, done.stdout) == (2, "") and said in done.stderr
    assert not [name for name in files() if name.endswith((".h5", ".journal"))]


def test_float32_blas_says_that_nothing_was_expected(spimpi):
    done = spimpi(2, "verify", *SHORT, "--arith", "blas", "--no-trace")
    assert done.returncode == 0
    assert "'expected' is not established: --arith blas has no reproducible" in done.stdout
    assert "float32 BLAS" in done.stdout
    assert repr(bytes(KNOWN["The file "][:4]).decode()) in done.stdout
    verdict = next(line for line in done.stdout.splitlines() if line.startswith("verdict"))
    assert "moved" in verdict and "agreed" in verdict and "computed" not in verdict


def test_a_fault_is_told_first_of_all_by_where_it_is(spimpi):
    done = spimpi(2, "verify", *SHORT, *FAULT, "--trace", "run.h5")
    assert done.returncode == 1
    header, found, rest = done.stdout.partition("CORRUPTION FOUND\n")
    assert found
    labels = [line.split()[0] for line in header.split("\n") if line]
    assert labels == ["mpi", "ranks", "topology", "model", "workload", "injected"]
    where = [line.split(maxsplit=1) for line in rest.split("\n\n")[0].splitlines()]
    assert [label for label, _ in where] == [
        "step", "layer", "tensor", "rank", "check", "expected", "found"
    ]  # fmt: skip
    told = dict(where)
    assert (told["step"], told["layer"], told["tensor"]) == ("0", "3", "hidden")
    assert told["rank"].startswith("1 (")
    assert int(told["expected"], 16) != int(told["found"], 16)
    assert "CORRUPTED" in done.stdout and "VERIFIED" not in done.stdout
    shown = spimpi(1, "trace", "show", "run.h5", "--json")
    assert shown.returncode == 1
    failures = json.loads(shown.stdout)["failures"]
    assert (failures[0]["tensor"], failures[0]["layer"], failures[0]["step"]) == ("hidden", 3, 0)


def test_repeated_runs_repeat_every_check(spimpi):
    once, thrice = (
        json.loads(spimpi(2, "verify", *SHORT, "--no-trace", "--json", *more).stdout)
        for more in ([], ["--repeat", "3"])
    )
    assert (once["runs"], thrice["runs"], thrice["verdict"]) == (1, 3, "verified")
    for stage in ("compute", "tensor", "golden"):
        assert thrice["stages"][stage]["checks"] == 3 * once["stages"][stage]["checks"] > 0
    assert thrice["tokens"] == once["tokens"]


def test_a_ring_of_two_memories_is_verified(spimpi):
    done = spimpi(2, "verify", "--topology", "exo", "--memory", "18,8", *SHORT, "--no-trace")
    assert done.returncode == 0
    assert "layers 6+2" in done.stdout and "inference: pipeline" in done.stdout


def test_published_shapes_run_with_seeded_weights(spimpi):
    """One layer of llama-3.2-1b: 300 M weights, most of them the vocabulary's."""
    done = spimpi(
        2, "verify", "--config", "llama-3.2-1b", "--layers", "1", "--prompt", "The ", "--tokens",
        "2", "--no-trace", "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]) == (0, "verified")
    assert "expected" not in found["established"], "its weights are too many for a golden run"
    assert found["expected_from"] is None
    assert all(0 <= token < 128256 for token in found["tokens"][0])


def test_help_is_printed_once(spimpi):
    done = spimpi(2, "verify", "--help")
    assert done.returncode == 0
    assert done.stdout.count("usage: spimpi verify") == 1


def test_the_commands_are_listed(spimpi):
    done = spimpi(1, "--help")
    assert done.returncode == 0
    assert not {"verify", "golden", "doctor", "bench", "trace"} - set(done.stdout.split())
    assert "0 verified; 1 corruption found; 2 wrong usage" in " ".join(done.stdout.split())


def test_usage_errors_are_said_once(spimpi):
    done = spimpi(2, "verify", "--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("unrecognized arguments: --no-such-option") == 1
