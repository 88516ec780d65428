"""What a run is asked to verify, validated before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spimpi.errors import ArgumentKindError, UsageError
from spimpi.inference import golden as golden_runs
from spimpi.inference import prompts as prompt_texts
from spimpi.inference.checkpoint import open_checkpoint
from spimpi.fingerprint.tag import DEFAULT_SEED
from spimpi.inference.config import EMBEDDED_MODEL, load_config, published
from spimpi.topology import grid as grids
from spimpi.verification.embedded import is_embedded, require_intact, shipped_golden

DEFAULT_PROMPTS = 8
DEFAULT_TOKENS = 16


@dataclass(frozen=True)
class Request:
    """What to verify, each field as ``spimpi verify``'s option of that name takes it.

    model: a Hugging Face directory (None: the embedded model); config: published shapes with seeded
    weights, of which the first ``layers``; topology: "tp=2,pp=2" or "exo", with ``memory``, and
    ``rule`` for --exo-rule (None: exo's); ``prompt_ids``: texts such as "84,104,101"; tokens and seed None: those
    of the golden file, the seed also of the manifest, else the defaults; arith: "exact" or "blas";
    golden, manifest: file names; faults: as --inject takes them; repeat: how many runs; sketch:
    whether its trace gets sketches. UsageError where prompts, prompt_ids or faults are one text.
    """

    model: str | None = None
    config: str | None = None
    layers: int | None = None
    topology: str | None = None
    memory: str | None = None
    rule: str | None = None
    prompts: tuple[str, ...] = ()
    prompt_ids: tuple[str, ...] = ()
    tokens: int | None = None
    seed: int | None = None
    arith: str = "exact"
    golden: str | None = None
    manifest: str | None = None
    faults: tuple[str, ...] = ()
    repeat: int = 1
    sketch: bool = False

    def __post_init__(self):
        for field in ("prompts", "prompt_ids", "faults"):
            _require_texts(field, getattr(self, field))


@dataclass(frozen=True)
class Job:
    """A validated request: the open checkpoint, the grid, the prompts as token ids."""

    config: object
    checkpoint: object
    directory: Path | None
    grid: grids.Grid
    prompts: tuple[np.ndarray, ...]
    texts: tuple[str, ...] | None
    n_tokens: int
    seed: int
    exact: bool
    golden: golden_runs.Golden | None
    golden_wanted: bool
    faults: tuple
    repeat: int
    known: object = None  # KnownWeights or GoldenWeights, where a file has fingerprints of them
    sketch: bool = False  # whether its trace gets sketches

    @property
    def has_derived(self) -> bool:
        """Whether the run checks what it derives from the weights."""
        return self.exact and self.known is not None and self.known.has_derived

    @property
    def origin(self) -> dict:
        """Where the model is from, as golden files say it."""
        if self.directory is None:
            return {"config": self.config.name, "layers": self.config.n_layers}
        return {} if is_embedded(self.directory) else {"model": str(self.directory.resolve())}

    @property
    def lengths(self) -> list[int]:
        return [len(p) for p in self.prompts]

    @property
    def workload(self) -> golden_runs.Workload:
        return golden_runs.Workload.of(
            self.config, self.checkpoint, self.seed, self.n_tokens, self.prompts
        )


def _require_texts(field: str, value) -> None:
    if not isinstance(value, (tuple, list)):
        msg = f"{field} is a tuple of texts, found {_a(value)}"
        raise ArgumentKindError(msg)
    for one in value:
        if not isinstance(one, str):
            msg = f"{field} is a tuple of texts, found {_a(one)} in it"
            raise ArgumentKindError(msg)


def _a(value) -> str:
    kind = type(value).__name__
    return f"a{'n' * (kind[0] in 'aeiou')} {kind}"


def prepare(request: Request, world_size: int, rank: int = 0) -> Job:
    """Validate a request for a world of this size. Local: reads headers and small files only.

    What is not asked for is taken from the golden file, where one is named. Raises UsageError for
    everything that can be known to be wrong before loading.
    """
    golden = golden_runs.read(request.golden) if request.golden is not None else None
    known = None
    if request.manifest is not None:
        from spimpi.verification.known_weights import read_known_weights

        known = read_known_weights(request.manifest)
    request = _completed(request, golden, known)
    directory, config = _model(request)
    for option, found in (("--tokens", request.tokens), ("--repeat", request.repeat)):
        if found < 1:
            msg = f"{option} must be 1 or more, found {found}"
            raise UsageError(msg)
    if not 0 <= request.seed < 2**64:
        msg = f"--seed must be from 0 to 2**64 - 1, found {request.seed}"
        raise UsageError(msg)
    # Before anything is made of the sizes in config.json: the files bound them.
    checkpoint = _checkpoint(directory, config, request.seed)
    config = checkpoint.config
    memory = None
    if request.memory is not None:
        from spimpi.topology.exo import parse_memory

        if request.topology is None:
            msg = "--memory goes with --topology exo, found no --topology"
            raise UsageError(msg)
        memory = parse_memory(request.memory)
    grid = grids.parse(
        request.topology, world_size, config.n_heads, config.n_layers, memory, request.rule
    )
    if is_embedded(directory):
        require_intact(rank)
    prompts = _prompts(request, config, directory, grid.dp)
    grids.require_prompts(
        grid, len(prompts.ids), config.n_heads, asked=request.topology is not None
    )
    grids.require_tokens(grid, [len(ids) for ids in prompts.ids], config.n_heads)
    prompt_texts.check_length(prompts, request.tokens, config)
    if known is not None:
        known.require_fit(config, checkpoint, request.seed, request.arith == "exact")
    faults = _faults(request, grid, config, prompts, checkpoint)
    texts = tuple(prompts.texts) if prompts.texts else None
    job = Job(
        config, checkpoint, directory, grid, tuple(prompts.ids), texts, request.tokens,
        request.seed, request.arith == "exact", None, request.golden is not None, faults,
        request.repeat, known, request.sketch,
    )  # fmt: skip
    job = replace(job, golden=_golden_for(job, golden, rank))
    return replace(job, known=_known_by(job, golden))


def _checkpoint(directory, config, seed):
    if directory is not None:
        return open_checkpoint(directory, config)
    from spimpi.inference.checkpoint_seeded import SeededCheckpoint

    return SeededCheckpoint(config, seed)


def _completed(request: Request, golden, known) -> Request:
    """The request with what it leaves open taken from the golden file, else the manifest, else from
    the defaults."""
    tokens, seed = DEFAULT_TOKENS, known.manifest.seed if known else DEFAULT_SEED
    if golden is not None:
        theirs = golden.workload
        tokens, seed = theirs.n_steps, theirs.seed
        if request.model is None and request.config is None:
            request = replace(request, **golden.origin)
        if not request.prompts and not request.prompt_ids:
            ids = tuple(",".join(map(str, prompt)) for prompt in theirs.prompts)
            request = replace(request, prompt_ids=ids)
    return replace(
        request,
        tokens=tokens if request.tokens is None else request.tokens,
        seed=seed if request.seed is None else request.seed,
    )


def _model(request):
    if request.model is not None and request.config is not None:
        msg = "--model (a directory) and --config (published shapes) exclude each other"
        raise UsageError(msg)
    if request.config is not None:
        return None, published(request.config, request.layers)
    if request.layers is not None:
        msg = "--layers goes with --config; a model directory has the layers that it has"
        raise UsageError(msg)
    directory = EMBEDDED_MODEL if request.model is None else Path(request.model)
    return directory, load_config(directory)


def _prompts(request, config, directory, dp):
    if request.prompts and request.prompt_ids:
        msg = "--prompt and --prompt-ids exclude each other"
        raise UsageError(msg)
    if request.prompt_ids:
        ids = [prompt_texts.parse_ids(text, config.vocab_size) for text in request.prompt_ids]
        return prompt_texts.Prompts(ids)
    texts = list(request.prompts) or prompt_texts.built_in(max(DEFAULT_PROMPTS, dp))
    return prompt_texts.encode(texts, config, directory)


def _faults(request, grid, config, prompts, checkpoint):
    if not request.faults:
        return ()
    from spimpi.faults import parse, validate

    lengths = [len(ids) for ids in prompts.ids]
    faults = tuple(parse(text) for text in request.faults)
    itemsize = max(record.itemsize for record in checkpoint.tensors.values())
    for fault in faults:
        validate(
            fault, grid, config, lengths, request.tokens,
            exact=request.arith == "exact", weight_itemsize=itemsize,
        )  # fmt: skip
    return faults


def _golden_for(job: Job, golden, rank: int):
    """The golden file that was named, or on rank 0 the embedded model's where it fits."""
    if golden is not None:
        if not job.exact:
            msg = "--golden needs exact arithmetic: --arith blas has no reproducible fingerprints"
            raise UsageError(msg)
        golden_runs.require_same(golden, job.workload)
        return golden
    if rank == 0 and job.exact and is_embedded(job.directory):
        shipped = shipped_golden(job.workload, rank)
        if golden_runs.fits(shipped, job.workload):
            return shipped
    return None


def _known_by(job: Job, golden):
    """What knows the weights beforehand: the manifest, else the golden file that was named."""
    if golden is None or golden.weights is None:
        return job.known
    from spimpi.verification.known_weights import golden_weights

    theirs = golden_weights(golden, job.checkpoint)
    if job.known is not None:
        theirs.require_same(job.known)
    return job.known or theirs
