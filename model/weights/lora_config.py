"""Read the settings of an adapter: peft's adapter_config.json, or the metadata that diffusers writes into the file."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from model.weights.lora import PEFT_CONFIG
from model.weights.paths import weight_files
from model.weights.safetensors_file import is_safetensors, read_metadata
from utils.errors import UserError
from utils.patterns import compile_pattern
from utils.side_files import check_schema, parse_json, read_json

DIFFUSERS_METADATA = "lora_adapter_metadata"
PEFT_KINDS = ("LORA", "LOHA", "LOKR")
# Initialisations of a LoRA that change the base weights too. Its matrices do not fit the published weights then.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Rank = Annotated[int, Field(ge=1, le=2**20)]
Alpha = Annotated[float, Field(allow_inf_nan=False, ge=-(2**32), le=2**32)]


@dataclass
class AdapterSettings:
    """The entries of adapter_config.json that decide what the tensors mean. Others are ignored."""

    peft_type: str = "LORA"
    """The kind of adapter."""
    r: Rank | None = None
    """Rank of the matrices."""
    lora_alpha: Alpha | None = None
    """Numerator of the scale. None: the rank."""
    alpha: Alpha | None = None
    """The same, for LoHa and LoKr."""
    rank_pattern: dict[str, Rank] | None = field(default_factory=dict)
    """Regular expression of a layer's name -> its rank."""
    alpha_pattern: dict[str, Alpha] | None = field(default_factory=dict)
    """Regular expression of a layer's name -> its alpha."""
    use_rslora: bool | None = False
    """Divide alpha by the square root of the rank."""
    init_lora_weights: bool | str | None = True
    """How the matrices were initialised."""
    modules_to_save: list[str] | None = None
    """Layers that are stored whole."""
    bias: str | None = "none"
    """Which biases are stored whole."""
    source: str = ""
    """The file, for messages."""

    @property
    def has_whole_values(self) -> bool:
        """Return whether the file may hold new values of whole parameters."""
        return bool(self.modules_to_save) or self.bias not in (None, "none")

    def scale(self, name: str, rank: int | None, alpha: Tensor | None) -> float:
        """Return the factor of a layer's difference.

        Args:
            name: the layer as the file spells it.
            rank: the rank of its matrices. None if they have none (LoKr of two whole factors).
            alpha: the alpha in the file. It replaces the one of the settings.
        """
        if alpha is not None:
            return alpha.float().item() / rank if rank else 1.0
        numerator = self.alpha if self.peft_type in ("LOHA", "LOKR") else self.lora_alpha
        numerator = self._matching(self.alpha_pattern, name, numerator)
        if self.peft_type == "LOKR":
            rank = self._matching(self.rank_pattern, name, self.r) or rank
        if numerator is None or rank is None:
            return 1.0
        return numerator / (math.sqrt(rank) if self.use_rslora else rank)

    def check(self) -> "AdapterSettings":
        """Raise UserError for settings that this program cannot apply exactly."""
        kind, start = self.peft_type.upper(), str(self.init_lora_weights).lower()
        if kind not in PEFT_KINDS:
            raise UserError(f"{self.source}: is an adapter of the kind {kind}, which cannot be merged; use a LoRA")
        if start.startswith(CHANGED_BASE):
            raise UserError(
                f"{self.source}: init_lora_weights={start!r} has changed the base weights as well; "
                "convert the adapter with peft (path_initial_model_for_weight_conversion) first"
            )
        self.peft_type = kind
        return self

    def _matching(self, patterns: Mapping[str, float] | None, name: str, default: float | None) -> float | None:
        for pattern, value in (patterns or {}).items():
            compile_pattern(pattern, self.source)
            if re.fullmatch(rf".*\.({pattern})", f".{name}"):
                return value
        return default


def read_settings(path: Path) -> AdapterSettings:
    """Return the settings in the files beside an adapter or in its metadata; the defaults if there are none."""
    config = path.parent / PEFT_CONFIG
    if config.is_file() and (path.stem == "adapter_model" or len(weight_files(path.parent)) == 1):
        return replace(read_json(config, AdapterSettings), source=str(config)).check()
    if is_safetensors(path) and (text := read_metadata(path).get(DIFFUSERS_METADATA)):
        source = f"{path}: its metadata {DIFFUSERS_METADATA}"
        values = {
            key.removeprefix("transformer."): value for key, value in parse_json(text.encode(), dict, source).items()
        }
        return replace(check_schema(values, AdapterSettings, source), source=source).check()
    return AdapterSettings(source=str(path))
