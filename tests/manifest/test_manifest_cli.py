"""``spimpi manifest`` as it is typed: exit statuses, what is said, on one process and on ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from manifest_samples import MIXED, brute_word, finite, flip, tensors, write_file, write_shards

CONTENT = tensors(MIXED)
RUN = [sys.executable, "-m", "spimpi", "manifest"]


def unlaunched() -> dict:
    """The environment without a launcher's variables (MPI sets some in whoever initialises it)."""
    prefixes = ("OMPI_", "PMI", "SLURM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    write_shards(tmp_path / "model", CONTENT, 3)
    return tmp_path


@pytest.fixture
def spimpi(capsys):
    """``spimpi(*arguments)``: (status, stdout, stderr) of the command line in this process."""
    from spimpi.cli import main

    def run(*arguments):
        status = main(["manifest", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def made(folder, spimpi):
    assert spimpi("make", "model", "-o", "model.spi.json")[0] == 0
    return folder / "model.spi.json"


def test_a_good_model_is_verified(made, spimpi):
    status, out, err = spimpi("check", made, "model")
    assert (status, err) == (0, "") and "VERIFIED: 9 tensors" in out and "expected" in out
    assert spimpi("check", made, "model", "--threads", 3)[0] == 0


def test_make_says_what_it_wrote(folder, spimpi):
    status, out, err = spimpi("make", "model", "-o", "a.json", "--seed", 7, "--threads", 2)
    assert (status, err) == (0, "") and out.startswith("wrote a.json: 9 tensors, ")
    words = {n: v[2] for n, v in json.loads((folder / "a.json").read_text())["tensors"].items()}
    assert words == {n: f"{brute_word(n, *facts, 7):016x}" for n, facts in CONTENT.items()}


def test_without_a_model_the_manifest_s_own_folder_is_checked(made, spimpi):
    inside = made.rename(made.parent / "model" / "model.spi.json")
    assert spimpi("check", inside)[0] == 0
    os.chdir(inside.parent)
    assert spimpi("check", inside.name)[0] == 0


def test_corruption_is_named_with_tensor_file_and_words(made, spimpi):
    file = "model-00002-of-00003.safetensors"
    flip(f"model/{file}", -1)
    status, out, _ = spimpi("check", made, "model")
    (line,) = [line for line in out.splitlines() if line.startswith("CORRUPTED")]
    name = line.split()[1]
    expected = f"{brute_word(name, *CONTENT[name]):016x}"
    assert status == 1 and f"{name} in {file}: expected {expected}, found " in line
    assert "verdict    CORRUPTED: 1 of 9 tensors" in out
    status, out, _ = spimpi("check", made, "model", "--json")
    found = json.loads(out)
    assert status == found["exit_status"] == 1 and found["verdict"] == "corrupted"
    assert [(c["tensor"], c["file"], c["expected"]) for c in found["corrupted"]] == [
        (name, file, expected)
    ]
    assert found["tensors_checked"] == 9


def test_incomplete_models_end_with_3_and_corruption_goes_first(made, spimpi):
    os.unlink("model/model-00001-of-00003.safetensors")
    status, out, _ = spimpi("check", made, "model")
    assert status == 3 and "INCOMPLETE: 6 tensors" in out and "3 tensors and 1 files" in out
    assert out.count("MISSING") == 2  # the file, and its tensors
    found = json.loads(spimpi("check", made, "model", "--json")[1])
    assert len(found["missing"]) == 3 and list(found["missing_files"]) == [
        "model-00001-of-00003.safetensors"
    ]
    flip("model/model-00002-of-00003.safetensors", -1)
    assert spimpi("check", made, "model")[0] == 1


def test_files_beside_the_checkpoint_are_left_out_and_named(made, spimpi):
    write_file("model/consolidated.safetensors", tensors({"lora": ("F32", (2,))}))
    for command in (("check", made, "model"), ("make", "model", "-o", "again.json")):
        status, out, _ = spimpi(*command)
        assert status == 0 and "not read   files: consolidated.safetensors" in out
    found = json.loads(spimpi("check", made, "model", "--json")[1])
    assert found["not_read"] == ["files: consolidated.safetensors"]


def test_extra_tensors_are_incomplete(made, spimpi):
    write_file("all.safetensors", CONTENT | tensors({"lora": ("F32", (2,))}))
    status, out, _ = spimpi("check", made, "all.safetensors")
    assert status == 3 and "EXTRA      lora: not in the manifest" in out


def test_a_broken_file_is_corruption(made, spimpi):
    with open("model/model-00001-of-00003.safetensors", "r+b") as file:
        file.truncate(100)
    status, out, _ = spimpi("check", made, "model")
    assert status == 1 and "BROKEN" in out and "cut short" in out and "1 files are broken" in out


def test_tensors_of_a_broken_file_are_one_line(folder, spimpi):
    many = tensors({f"layer.{i}": ("F32", (2,)) for i in range(30)})
    write_file("all.safetensors", many)
    assert spimpi("make", "all.safetensors", "-o", "all.json")[0] == 0
    with open("all.safetensors", "r+b") as file:
        file.truncate(100)
    status, out, _ = spimpi("check", "all.json", "all.safetensors")
    (line,) = [line for line in out.splitlines() if line.startswith("MISSING")]
    assert status == 1 and "30 tensors: perhaps in a broken file: layer.0, layer.1" in line
    assert line.endswith(", … (--json has all)") and line.count("layer.") == 3
    assert len(json.loads(spimpi("check", "all.json", "all.safetensors", "--json")[1])["missing"]) == 30


def test_weights_of_a_sister_model_are_suspected(made, spimpi):
    write_file("sister.safetensors", tensors(MIXED, seed=99))
    status, out, _ = spimpi("check", made, "sister.safetensors")
    # the tensor without elements is equal in all models of this shape
    assert status == 1 and out.count("CORRUPTED  ") == 8


def test_an_existing_output_is_kept_unless_it_is_to_be_replaced(made, spimpi):
    before = made.read_text()
    status, _, err = spimpi("make", "model", "-o", made, "--seed", 3)
    assert status == 2 and "exists" in err and "--overwrite" in err
    assert made.read_text() == before
    # asked before anything is read
    assert "exists" in spimpi("make", "nosuch", "-o", made)[2]
    assert spimpi("make", "model", "-o", made, "--seed", 3, "--overwrite")[0] == 0
    assert json.loads(made.read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("make model -o nosuch/x.json", "cannot write nosuch/x.json"),
        ("make model -o model", "it is a directory"),
        ("make empty -o x.json", "no weights in empty"),
        ("make nosuch -o x.json", "no model in nosuch"),
        ("make model -o x.json --threads 0", "--threads must be at least 1, found 0"),
        ("make model -o x.json --seed -1", "a seed is an unsigned 64-bit number, found -1"),
        ("make model -o x.json --expect-ranks 4", "expected 4 ranks"),
        ("check nosuch.json model", "the manifest nosuch.json cannot be read"),
        ("check model/model.safetensors.index.json model", "is not a manifest"),
        ("check cut.json model", "cut short"),
        ("check flipped.json model", "damaged"),
        ("check newer.json model", "version 2, this spimpi reads version 1"),
        ("check model.spi.json empty", "no weights in empty"),
        ("check model.spi.json other.safetensors", "another model"),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_writes_nothing(made, spimpi, command, words):
    (made.parent / "empty").mkdir()
    text = made.read_text()
    (made.parent / "cut.json").write_text(text[:-40])
    digit = text.index('"]') - 1
    flipped = text[:digit] + ("0" if text[digit] != "0" else "1") + text[digit + 1 :]
    (made.parent / "flipped.json").write_text(flipped)
    newer = text.replace('"spimpi_manifest": 1', '"spimpi_manifest": 2')
    (made.parent / "newer.json").write_text(newer)
    write_file("other.safetensors", tensors({"step": ("F32", ())}))
    status, out, err = spimpi(*command.split())
    assert (status, out) == (2, "") and words in err
    assert not (made.parent / "x.json").exists()


def test_no_mpi_is_imported_where_nothing_launched_it(made):
    code = (
        "import sys\n"
        "from spimpi.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "loaded = [m for m in sys.modules if m.startswith('mpi4py')]\n"
        "sys.exit(f'imported {loaded}' if loaded else status)\n"
    )
    command = [sys.executable, "-c", code, "manifest", "check", made, "model"]
    done = subprocess.run(command, capture_output=True, text=True, env=unlaunched())
    assert done.returncode == 0, done.stderr


def test_a_bar_is_drawn_on_a_terminal_only(made):
    import pty

    shell = [*RUN, "check", made, "model"]
    piped = subprocess.run(shell, capture_output=True, env=unlaunched())
    assert b"\x1b" not in piped.stdout + piped.stderr and b"VERIFIED" in piped.stdout
    ours, theirs = pty.openpty()
    command = subprocess.Popen(shell, stdout=theirs, stderr=theirs, env=unlaunched())
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # its other end is closed
            break
    os.close(ours)
    assert command.wait(60) == 0 and b"checking" in shown and b"VERIFIED" in shown


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_make_the_same_file_and_find_the_same(made, run_ranks, ranks):
    done = run_ranks(ranks, "spimpi", "manifest", "make", "model", "-o", "ranks.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert (made.parent / "ranks.json").read_text() == made.read_text()
    done = run_ranks(ranks, "spimpi", "manifest", "check", made, "model")
    assert done.returncode == 0 and done.stdout.count("VERIFIED") == 1
    flip("model/model-00003-of-00003.safetensors", -1)
    done = run_ranks(ranks, "spimpi", "manifest", "check", made, "model", "--json")
    assert done.returncode == 1
    assert len(json.loads(done.stdout[: done.stdout.rindex("}") + 1])["corrupted"]) == 1
    for words, command in {
        "exists": ("make", "model", "-o", made),
        "no model in": ("make", "nosuch", "-o", "x.json"),
        "cannot be read": ("check", "nosuch.json", "model"),
        "expected 7 ranks": ("check", made, "model", "--expect-ranks", "7"),
    }.items():
        done = run_ranks(ranks, "spimpi", "manifest", *command)
        assert done.returncode == 2 and done.stderr.count("spimpi: ") == 1, (words, done.stderr)
        assert words in done.stderr


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_derive_the_same(folder, run_ranks, spimpi, ranks):
    write_file("x.safetensors", finite(CONTENT))
    assert spimpi("make", "x.safetensors", "-o", "alone.json", "--derived")[0] == 0
    make = ("spimpi", "manifest", "make", "x.safetensors", "-o", "ranks.json", "--derived")
    done = run_ranks(ranks, *make)
    assert done.returncode == 0, done.stderr
    assert "wrote ranks.json: 9 tensors, " in done.stdout and ", 4 derived ones" in done.stdout
    assert Path("ranks.json").read_text() == Path("alone.json").read_text()
    assert '"derived": {' in Path("alone.json").read_text()
    # Bits that are no numbers have fingerprints, and no scaled integers.
    for threads in (1, 2):
        options = ("-o", "x.json", "--derived", "--threads", threads)
        status, out, err = spimpi("make", "model", *options)
        assert (status, out) == (2, "") and "holds NaN or Inf" in err
    assert not Path("x.json").exists()
