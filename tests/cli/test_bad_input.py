"""What cannot be done is refused: status 2 on every rank, one message, nothing written.

Most cases run in one MPI job that calls the command line again and again; those that say
"processes" start it as a user does.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reference_models import random_tensors, tiny_config, write

RANKS = 3
FACTS = dict(
    vocab_size=256, hidden_size=24, intermediate_size=20, n_layers=3, n_heads=6, n_kv_heads=2,
    head_dim=4,
)  # fmt: skip
K_PROJ = "model.layers.1.self_attn.k_proj.weight"

# One JSON list of arguments a line in, the outcome on every rank a line out.
DRIVER = """
import contextlib, io, json, sys, time
from mpi4py import MPI
from spimpi.cli import main

world = MPI.COMM_WORLD
for line in open(sys.argv[1]):
    out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(json.loads(line))
        except SystemExit as error:
            status = error.code
    found = status, out.getvalue(), err.getvalue(), time.monotonic() - start
    found = world.gather(found)
    if world.rank == 0:
        print(json.dumps(found), flush=True)
"""

# Breaks one rank, then runs the command line as usual.
BROKEN_RANK = """
import sys
from mpi4py import MPI
from spimpi.cli import main
from spimpi.errors import UsageError
from spimpi.{module} import {name} as broken

original = broken.{method}

def breaks_on_rank_1(self, *args):
    if self.ctx.rank == 1:
        raise {error}("a disk of rank 1 is gone")
    return original(self, *args)

broken.{method} = breaks_on_rank_1
sys.exit(main(["verify", "--no-trace", "--tokens", "1"]))
"""

PROMPTED = "verify --no-trace --prompt hello --tokens 3 --model good"
# Name of the case: (command line, words that its message must have).
CASES = {
    # models
    "no model directory": ("verify --model nosuch", "nosuch config.json found nothing"),
    "a file for a directory": ("verify --model a-file", "no model directory a-file found a file"),
    "no config": ("verify --model empty", "empty has no config.json expected"),
    "config is not JSON": ("verify --model badjson", "badjson/config.json not valid JSON"),
    "other architecture": (
        "verify --model qwen",
        "Qwen3ForCausalLM is not supported supported are LlamaForCausalLM MistralForCausalLM",
    ),
    "a window that masks": ("verify --model mistral", "sliding_window 32 MistralForCausalLM"),
    "more layers than tensors": ("verify --model layers", "50000 layers hold 30 tensors in all"),
    "an adapter": ("verify --model adapter", "adapter_config.json adapters are not supported"),
    "no weights": ("verify --model weightless", "no weights in expected model.safetensors"),
    "file cut short": ("verify --model cut", "cut/model.safetensors is cut short expected found"),
    "header cut short": ("verify --model cuthead", "cuthead/model.safetensors is cut short"),
    "a tensor missing": ("verify --model lacks", f"lacks 1 of the 30 tensors {K_PROJ}"),
    "a tensor of another shape": (
        "verify --model shape", f"shape/model.safetensors {K_PROJ} [24, 8] expected [8, 24]"
    ),
    "a tensor of another type": ("verify --model float64", f"{K_PROJ} F64 supported BF16 F32"),
    "a shard missing": ("verify --model sharded", "model-00002-of-00003.safetensors not in"),
    "a weight is NaN": ("verify --model nan --topology pp=3", f"{K_PROJ} nan element [1, 2]"),
    "an embedding is Inf": ("verify --model inf", "model.embed_tokens.weight inf element [200, 3]"),
    "a weight so large that the model overflows": (
        "verify --model huge --prompt hello --tokens 2",
        f"own arithmetic leaves float32 layer 1 3.39e+38 in {K_PROJ}",
    ),
    "a FIFO for a config": ("verify --model pipe", "pipe/config.json no ordinary file"),
    "no such published model": ("verify --config nosuch", "nosuch known are llama-3.2-1b"),
    "more layers than the model": (
        "verify --config llama-3.2-1b --layers 17", "has 16 layers found 17"
    ),
    "layers without a config": ("verify --layers 2", "--layers goes with --config"),
    "a directory and a config": ("verify --model good --config llama-3.2-1b", "exclude each other"),
    "a model larger than the memory": (
        "verify --config llama-3.2-3b --topology dp=3 --prompt-ids 1 --prompt-ids 2 "
        "--prompt-ids 3 --tokens 131000",
        "does not fit 3 ranks GiB are available",
    ),
    # topologies
    "not the world's size": ("verify --topology tp=2,pp=2", "4 ranks the world has 3 tp=3 pp=3"),
    "more tensor ranks than heads": (
        "verify --model twoheads --topology tp=3", "more tensor ranks than the model's 2 heads pp=3"
    ),
    "more stages than layers": (
        "verify --model twolayers --topology pp=3", "more pipeline stages model's 2 layers tp=3"
    ),
    "not a topology": ("verify --topology ep=3", "axes tp, sp, pp and dp found 'ep=3'"),
    "no ranks": ("verify --topology tp=0", "tp whole number of 1 or more found '0'"),
    "fewer prompts than dp": ("verify --topology dp=3 --prompt a", "3 data ranks only 1 tp=3 pp=3"),
    "fewer tokens than sp": (
        "verify --topology sp=3 --prompt ab --prompt c", "3 sequence ranks longest 2 tokens idle tp=3"
    ),
    "not the world's size over sequence ranks": (
        "verify --topology sp=2,dp=2", "1·2·1·2 = 4 ranks the world has 3 sp=3"
    ),
    "a gather without sequence ranks": (
        "verify --inject bitflip:rank=0,tensor=kv,layer=1", "kv only where sp > 1 sp=1"
    ),
    "memory sizes for another count": ("verify --topology exo --memory 18,8", "3 ranks 2 sizes"),
    "memory is not numbers": ("verify --topology exo --memory 1,2,x", "positive number GB 1,2,x"),
    "memory without exo": ("verify --memory 1,2,3", "--memory goes with --topology exo"),
    "a rule without exo": ("verify --exo-rule gay", "--exo-rule --topology exo found no --topology"),
    "a rule of another topology": ("verify --exo-rule exo --topology tp=3", "--exo-rule exo tp=3"),
    "two rules": ("verify --topology gay --exo-rule exo", "--topology gay found --exo-rule exo"),
    "exo ring longer than the layers": (
        "verify --model twolayers --topology exo", "idle 2 layers nearest 2 ranks"
    ),
    "another world size than expected": ("verify --expect-ranks 4", "expected 4 ranks found 3"),
    # faults
    "unknown kind": (
        "verify --inject bitflop:rank=1,tensor=hidden,layer=0",
        "unknown kind 'bitflop' did you mean bitflip? known are swap stale replica",
    ),
    "unknown tensor": (
        "verify --inject bitflip:rank=1,tensor=hiden,layer=0", "'hiden' did you mean hidden?"
    ),
    "unknown key": ("verify --inject bitflip:rank=1,tensor=hidden,layr=0", "'layr' layer?"),
    "no rank": ("verify --inject bitflip:tensor=hidden,layer=0", "rank= is missing, as in"),
    "no such rank": (
        "verify --inject bitflip:rank=3,tensor=hidden,layer=0", "ranks of this run are 0 to 2"
    ),
    "no such layer": (
        "verify --inject bitflip:rank=1,tensor=hidden,layer=8", "layers of this model are 0 to 7"
    ),
    "layer of another rank": (
        "verify --topology pp=3 --inject bitflip:rank=0,tensor=hidden,layer=7",
        "layer 7 is on ranks 2 rank 0 has layers 0 to 2",
    ),
    "no such element": (
        "verify --inject bitflip:rank=1,tensor=hidden,layer=0,element=99999999",
        "one of the 14208 elements of shape (111, 128)",
    ),
    "element of another rank": (
        "verify --inject bitflip:rank=1,tensor=ffn,layer=0,element=0", "rank 1 has columns"
    ),
    "no such bit": (
        "verify --inject bitflip:rank=1,tensor=hidden,layer=0,bit=32", "32 bits, 0 to 31"
    ),
    "no such step": (
        "verify --inject bitflip:rank=1,tensor=hidden,layer=0,step=16",
        "steps 0 (the prefill) to 15",
    ),
    "a kind that cannot happen there": (
        "verify --inject drop:rank=1,tensor=hidden,layer=0", "drop can happen to embed attn_out"
    ),
    # golden files
    "golden of another model": (
        "verify --golden g.h5 --model other --prompt hello --tokens 3", "g.h5 model good other"
    ),
    "golden of other weights": (
        "verify --golden g.h5 --model changed --prompt hello --tokens 3", "g.h5 good changed"
    ),
    "golden of another prompt": (
        "verify --golden g.h5 --model good --prompt hellx --tokens 3",
        "g.h5 other prompts 104,101,108,108,111 104,101,108,108,120",
    ),
    "golden of another seed": (PROMPTED + " --golden g.h5 --seed 7", "seed 1069 has 7 --seed 1069"),
    "golden of fewer steps": (
        "verify --golden g.h5 --model good --prompt hello --tokens 4", "3 tokens 4 --tokens 3"
    ),
    "golden in floats": (PROMPTED + " --golden g.h5 --arith blas", "--golden needs exact"),
    "no golden file": (PROMPTED + " --golden nosuch.h5", "no golden file nosuch.h5 spimpi golden"),
    "a directory for a golden file": (PROMPTED + " --golden good", "no golden file a directory"),
    "not a golden file": (PROMPTED + " --golden a-file", "a-file no readable golden file"),
    "another HDF5 file": (PROMPTED + " --golden a.h5", "a.h5 not a golden file spimpi-golden-1"),
    "a damaged golden file": (PROMPTED + " --golden damaged.h5", "damaged.h5 no readable golden"),
    "golden made on several ranks": ("golden -o new.h5", "runs on one rank, found 3"),
    # files to write
    "a trace that exists": (PROMPTED.replace("--no-trace", "--trace a.h5"), "a.h5 --overwrite"),
    "a trace in a file": (PROMPTED.replace("--no-trace", "--trace a-file/t.h5"), "a-file/t.h5"),
    "a trace in no directory": (PROMPTED.replace("--no-trace", "--trace nosuch/t.h5"), "nosuch"),
    "a trace where nobody can write": (
        PROMPTED.replace("--no-trace", "--trace /proc/t.h5"), "cannot write /proc/t.h5"
    ),
    "a directory for a trace": (PROMPTED.replace("--no-trace", "--trace good"), "a directory"),
    "sketches without a trace": (f"{PROMPTED} --sketch", "--sketch trace --no-trace"),
    "journals without a trace": (f"{PROMPTED} --journal disk", "--journal trace --no-trace"),
    "a disk without a trace": (f"{PROMPTED} --sync", "--sync trace --no-trace"),
    "a trace to replace and none": (f"{PROMPTED} --overwrite", "--overwrite trace --no-trace"),
    "a driver without a trace": (f"{PROMPTED} --trace-driver auto", "--trace-driver --no-trace"),
    "a trace without a name": (PROMPTED.replace("--no-trace", "--trace="), "a trace needs a name"),
    "journals in no directory": (
        PROMPTED.replace("--no-trace", "--trace t.h5 --journal nosuch/q"), "no directory nosuch"
    ),
    "journals beside the trace": (
        PROMPTED.replace("--no-trace", "--trace t.h5 --journal ."), "beside the trace t.h5 anyway"
    ),
    "journals in a file": (
        PROMPTED.replace("--no-trace", "--trace t.h5 --journal a-file"), "a-file no directory"
    ),
    "a trace and none": ("verify --trace t.h5 --no-trace", "--no-trace not allowed with --trace"),
    # prompts and numbers
    "more tokens than positions": ("verify --tokens 2000", "2013 at most 1024"),
    "no tokens": ("verify --tokens 0", "--tokens must be 1 or more found 0"),
    "no runs": ("verify --repeat 0", "--repeat must be 1 or more found 0"),
    "ids are not numbers": ("verify --prompt-ids 1,x", "separated by commas found 'x'"),
    "an id outside the vocabulary": ("verify --prompt-ids 1,256", "256 expected 0 to 255"),
    "a negative id": ("verify --prompt-ids=-1", "-1 expected 0 to 255"),
    "an empty prompt": ("verify --prompt=", "empty at least one token"),
    "text and ids": ("verify --prompt a --prompt-ids 1", "exclude each other"),
    "a negative seed": ("verify --seed -1", "--seed 0 to 2**64 - 1 found -1"),
    "a negative timeout": ("verify --timeout -5", "--timeout found -5"),
    "an endless timeout": ("verify --timeout inf", "--timeout finite 0 (never) found inf"),
    "a timeout that is no number": ("verify --timeout nan", "--timeout finite found nan"),
    "tokens are not a number": ("verify --tokens many", "--tokens invalid 'many'"),
    "an unknown option": ("verify --bogus", "unrecognized --bogus spimpi verify --help"),
    "an unknown command": ("verfy", "invalid choice 'verfy'"),
    "no command": ("", "required COMMAND"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_ranks):
    """Models and files with one thing wrong in each, and what they were made from."""
    root = tmp_path_factory.mktemp("bad")
    config = tiny_config(name="good", **FACTS)
    tensors = random_tensors(config)
    write(root / "good", config, tensors)

    def copy(name) -> Path:
        return Path(shutil.copytree(root / "good", root / name))

    def damage(name, change):
        path = copy(name) / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    def replace_k(name, values):
        write(root / name, config, tensors | {K_PROJ: values})

    (root / "empty").mkdir()
    (copy("badjson") / "config.json").write_text("{nope")
    for name, changes in (
        ("qwen", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}),
        ("mistral", {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32}),
        ("layers", {"num_hidden_layers": 50_000}),
    ):  # fmt: skip
        changed = copy(name) / "config.json"
        changed.write_text(json.dumps(json.loads(changed.read_text()) | changes))
    (copy("adapter") / "adapter_config.json").write_text("{}")
    (copy("pipe") / "config.json").unlink()
    os.mkfifo(root / "pipe" / "config.json")
    (copy("weightless") / "model.safetensors").unlink()
    damage("cut", lambda data: data[: len(data) // 2])
    damage("cuthead", lambda data: data[:50])
    write(root / "lacks", config, {n: v for n, v in tensors.items() if n != K_PROJ})
    replace_k("shape", np.ascontiguousarray(tensors[K_PROJ].T))
    replace_k("float64", tensors[K_PROJ].astype(np.float64))
    nan = tensors[K_PROJ].copy()
    nan[1, 2] = np.nan
    replace_k("nan", nan)
    replace_k("huge", np.where(np.arange(24) == 3, np.float32(3.39e38), tensors[K_PROJ]))
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[200, 3] = np.inf
    write(root / "inf", config, tensors | {"model.embed_tokens.weight": embedding})
    write(root / "sharded", config, tensors, n_files=3)
    (root / "sharded" / "model-00002-of-00003.safetensors").unlink()
    write(root / "changed", config, random_tensors(config, seed=2))
    for name, fact in (
        ("other", dict(intermediate_size=24)),
        ("twoheads", dict(n_heads=2)),
        ("twolayers", dict(n_layers=2)),
    ):
        changed = tiny_config(name=name, **FACTS | fact)
        write(root / name, changed, random_tensors(changed))
    (root / "a-file").write_text("hello")

    import h5py

    h5py.File(root / "a.h5", "w").close()
    golden = f"golden --model {root}/good --prompt hello --tokens 3 -o {root}/g.h5"
    done = run_ranks(1, "spimpi", *golden.split())
    assert done.returncode == 0, done.stderr
    shutil.copy(root / "g.h5", root / "damaged.h5")
    with h5py.File(root / "g.h5") as file:
        where = file["fingerprints"].id.get_chunk_info(0).byte_offset
    with open(root / "damaged.h5", "r+b") as file:
        file.seek(where + 20)
        byte = file.read(1)[0]
        file.seek(where + 20)
        file.write(bytes([byte ^ 4]))
    (root / "driver.py").write_text(DRIVER)
    return root


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def outcomes(folder, run_ranks):
    """Every case on three ranks: name -> a list of (status, stdout, stderr, seconds) a rank."""
    before = contents(folder)
    (folder / "cases").write_text("\n".join(json.dumps(c.split()) for c, _ in CASES.values()))
    # Paths in the cases are relative to the folder.
    command = f"cd {folder} && {sys.executable} -m mpi4py driver.py cases"
    done = run_ranks(RANKS, "sh", "-c", command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (folder / "cases").unlink()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert contents(folder) == before, "a refused run wrote something"
    assert not [path for path in folder.rglob("*.journal")]
    return dict(zip(CASES, lines, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_on_every_rank_at_once_and_said_once(outcomes, case):
    _, expected = CASES[case]
    found = outcomes[case]
    assert [status for status, *_ in found] == [2] * RANKS, found
    assert all(seconds < 60 for *_, seconds in found)
    message = found[0][2]
    assert "Traceback" not in message
    missing = [word for word in expected.split() if word not in message]
    assert not missing, f"{missing} in: {message}"
    lines = [line for line in message.splitlines() if "compiling kernels" not in line]
    own = [line for line in lines if line.startswith("spimpi")]
    assert len(own) == 1, message
    assert all((out, err) == ("", "") for _, out, err, _ in found[1:]), found[1:]


def statuses(run_ranks, command, timeout=60):
    """The status of a command line on every rank, as separate processes see it; their output."""
    script = f"{command}; echo rank ${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}} status $?"
    done = run_ranks(RANKS, "sh", "-c", script, timeout=timeout)
    ended = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    return ended, done


ALL_REFUSE = [f"rank {rank} status 2" for rank in range(RANKS)]


@pytest.mark.parametrize(
    "case", ["file cut short", "not the world's size", "tokens are not a number"]
)
def test_processes_of_bad_input_all_end_with_status_2(folder, run_ranks, case):
    command, expected = CASES[case]
    start = time.monotonic()
    ended, done = statuses(run_ranks, f"cd {folder} && {sys.executable} -m spimpi {command}")
    assert ended == ALL_REFUSE
    assert time.monotonic() - start < 30
    assert all(word in done.stderr for word in expected.split())
    assert done.stderr.count("spimpi: ") + done.stderr.count("error: ") == 1, done.stderr


def test_a_trace_that_exists_keeps_its_bytes(folder, run_ranks):
    before = contents(folder)
    command = PROMPTED.replace("--no-trace", f"--trace {folder}/g.h5")
    ended, done = statuses(run_ranks, f"cd {folder} && {sys.executable} -m spimpi {command}")
    assert ended == ALL_REFUSE
    assert "g.h5 exists" in done.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("output", ["g.h5", "a-file/new.h5", "nosuch/new.h5", "/proc/new.h5"])
def test_golden_refuses_a_file_that_it_cannot_write(folder, output, monkeypatch, capsys):
    """Before the run is made, for that may take long."""
    from spimpi.cli import main
    from spimpi.verification import run

    def never(job):
        raise AssertionError("the golden run was made first")

    monkeypatch.setattr(run, "make_golden", never)
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert main(["golden", "--model", "good", "--prompt", "hello", "-o", output]) == 2
    assert output in capsys.readouterr().err
    assert contents(folder) == before


# Runs a command without the launcher's variables, but for those that say rank and size.
ALONE = r"""
for name in $(env | sed -n -E 's/^((PMI|OMPI|OPAL|ORTE|PRTE)[A-Za-z0-9_]*)=.*/\1/p'); do
    case $name in
        OMPI_COMM_WORLD_RANK | OMPI_COMM_WORLD_SIZE | OMPI_ALLOW*) ;;
        *) unset $name ;;
    esac
done
exec "$@"
"""


def test_processes_that_are_each_a_world_of_their_own_are_refused(tmp_path, run_ranks):
    """What a launcher of another MPI gives, here by hiding the launcher from Open MPI's library.

    Each of them would verify itself alone, and pass.
    """
    (tmp_path / "alone.sh").write_text(ALONE)
    hidden = f"sh {tmp_path}/alone.sh {sys.executable}"
    script = "from mpi4py import MPI; print(MPI.COMM_WORLD.size)"
    probe = run_ranks(RANKS, "sh", "-c", f"{hidden} -c '{script}'")
    if "".join(probe.stdout.split()) != "1" * RANKS:
        pytest.skip(f"hiding Open MPI's launcher has no effect on this MPI: {probe.stdout!r}")
    ended, done = statuses(run_ranks, f"{hidden} -m spimpi verify --no-trace")
    assert ended == ALL_REFUSE
    assert "started 3 ranks, but the MPI world of this process has 1" in done.stderr
    assert "VERIFIED" not in done.stdout


def test_another_mpis_python_under_this_launcher_is_refused(run_ranks):
    other = Path(__file__).parents[2] / ".venv-mpich" / "bin" / "python"
    if not other.exists():
        pytest.skip("needs the environment of the mpich wheel beside this one")
    ended, done = statuses(run_ranks, f"{other} -m spimpi verify --no-trace")
    assert ended == ALL_REFUSE
    assert done.stderr.count("mpi4py uses MPICH") == 1, done.stderr


@pytest.mark.parametrize(
    ("module", "name", "method"),
    [("inference.weights", "Loader", "load"), ("inference.model", "Stage", "step")],
)
@pytest.mark.parametrize(("error", "status"), [("RuntimeError", 4), ("UsageError", 2)])
def test_an_error_of_one_rank_ends_the_whole_job(
    tmp_path, run_ranks, module, name, method, error, status
):
    """While the others wait for it, in a reduction of the loader's or of a layer's."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN_RANK.format(module=module, name=name, method=method, error=error))
    done = run_ranks(RANKS, sys.executable, script, timeout=60)
    assert done.returncode == status, done.stderr
    assert "a disk of rank 1 is gone" in done.stderr
    assert "VERIFIED" not in done.stdout
