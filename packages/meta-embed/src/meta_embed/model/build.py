"""A model from its options, and back: what a run folder holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from core_tensor.app.files import atomic_path, digest, read_json, reading, write_json
from torch import Tensor

from meta_embed.adapt.map_head import MapHead
from meta_embed.config import Config, parse_config
from meta_embed.model.blocks import MemberBlock
from meta_embed.model.global_block import GlobalBlock
from meta_embed.model.personalizer import MamlPersonalizer, MapPersonalizer, Personalizer
from meta_embed.tasks.encode import Vocabulary, rows_of_table

MODEL = "model.safetensors"
ABOUT = "model.json"


def build_model(config: Config, vocabulary: Vocabulary, seed: int = 0) -> Personalizer:
    """A new model.

    Args:
        config: Options.
        vocabulary: Of the categories.
        seed: Of the initial weights.

    Returns:
        The model.
    """
    schema, options = config.columns, config.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = GlobalBlock(
            [rows_of_table(f, vocabulary) for f in schema.row if f.kind == "id"],
            sum(f.width for f in schema.dense_row),
            options.width,
            options.hidden,
            given_base=schema.base is not None,
            given_vector=schema.vector_width,
        )
        member = MemberBlock(
            [rows_of_table(f, vocabulary) for f in schema.member if f.kind == "id"],
            sum(f.width for f in schema.member if f.kind == "dense"),
            options.member_hidden,
            options.width,
        )
        if options.method == "maml":
            return MamlPersonalizer(block, member, config.inner)
        return MapPersonalizer(block, MapHead(member, options.width, options.precision))


def model_version(model: torch.nn.Module, config: Config, vocabulary: Vocabulary) -> str:
    """A digest of everything a vector depends on: weights, options, vocabulary.

    Args:
        model: The model.
        config: Its options.
        vocabulary: Its vocabulary.

    Returns:
        16 hexadecimal digits.
    """
    weights = [part for name, tensor in sorted(model.state_dict().items()) for part in (name, tensor)]
    about = json.dumps([msgspec.to_builtins(config), vocabulary], sort_keys=True)
    return digest(about, *weights)[:16]


def save_model(folder: Path, model: Personalizer, config: Config, vocabulary: Vocabulary) -> str:
    """Write a model into a run folder.

    Args:
        folder: The folder.
        model: The model.
        config: Its options.
        vocabulary: Its vocabulary.

    Returns:
        Its version.
    """
    from safetensors.torch import save_file

    version = model_version(model, config, vocabulary)
    with atomic_path(folder / MODEL) as temporary:
        save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, temporary)
    about: dict[str, Any] = {"version": version, "config": msgspec.to_builtins(config), "vocabulary": dict(vocabulary)}
    write_json(folder / ABOUT, about)
    return version


def put_weights(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights that somebody else may have written.

    Args:
        model: Gets the weights.
        state: Tensors by name.

    Raises:
        ValueError: If names, shapes or dtypes are not those of the model.
    """
    own = model.state_dict()
    wrong = {n for n, t in own.items() if n not in state or (state[n].shape, state[n].dtype) != (t.shape, t.dtype)}
    if wrong or len(state) != len(own):
        raise ValueError(f"other tensors: {', '.join(sorted(wrong)) or 'more of them'}")
    model.load_state_dict(state)


def load_model(folder: str | Path) -> tuple[Personalizer, Config, Vocabulary, str]:
    """Read the model of a run folder.

    Args:
        folder: The folder.

    Returns:
        Model, options, vocabulary and version.

    Raises:
        ValueError: If there is no finished model, a file is broken, or weights and description do not belong together.
    """
    from safetensors.torch import load_file

    path = Path(folder) / ABOUT
    if not path.is_file():
        raise ValueError(f"{folder}: expected the folder of a finished `meta-embed train`, found no {ABOUT}")
    about = read_json(path)
    with reading(path, "the description of a model"):
        config, vocabulary, version = parse_config(about["config"]), dict(about["vocabulary"]), str(about["version"])
        model = build_model(config, vocabulary)
    weights = Path(folder) / MODEL
    with reading(weights, "the weights that model.json describes"):
        put_weights(model, load_file(weights))
    if model_version(model, config, vocabulary) != version:
        raise ValueError(f"{weights}: weights and {ABOUT} are not of the same version")
    return model.eval(), config, vocabulary, version
