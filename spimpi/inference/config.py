"""What a model is: from a Hugging Face directory, or by a published model's name."""

from pathlib import Path

from spimpi.errors import UsageError
from spimpi.inference.config_json import ARCHITECTURES, Fields  # noqa: F401
from spimpi.inference.model_config import (  # noqa: F401  this is where others look for them
    FULL, SLIDING, Llama3Scaling, ModelConfig, YarnScaling, checkpoint_tensors,
)  # fmt: skip
from spimpi.inference.published import PUBLISHED, published  # noqa: F401
from spimpi.json_file import read_json_object
from spimpi.printable import one_line, printable

EMBEDDED_MODEL = Path(__file__).parent.parent / "models" / "tiny"
CONFIG_FILE = "config.json"


def load_config(directory) -> ModelConfig:
    """The model of a Hugging Face directory, from its config.json.

    Reads what transformers 4 and 5 write; what is missing has the defaults of Hugging Face's
    LlamaConfig, MistralConfig, Olmo2Config or Olmo3Config. Raises UsageError for anything that
    this inference would compute wrongly.
    """
    directory, name = Path(directory), one_line(directory, 250)
    try:
        there, is_file = directory.is_dir(), directory.exists()
    except OSError as error:
        msg = f"no model directory {name}: {error.strerror}"
        raise UsageError(msg) from None
    if not there:
        msg = (
            f"no model directory {name}: expected a Hugging Face directory with {CONFIG_FILE} and "
            f"*.safetensors, found {'a file' if is_file else 'nothing'} there"
        )
        raise UsageError(msg)
    missing = f"model directory {name} has no {CONFIG_FILE}: expected a Hugging Face directory"
    values = read_json_object(directory / CONFIG_FILE, missing)
    return Fields(directory / CONFIG_FILE, values).model(printable(directory.resolve().name))
