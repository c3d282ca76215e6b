"""The names of weight files: what is read from them, and the names that unpack gives (spec, section 7.7).

The weights of a folder have one *name*, that of the file they would be in if they were not cut into shards:
``model.safetensors``, ``diffusion_pytorch_model.fp16.safetensors``. A checkpoint of several folders, such as a pipeline
of diffusers, has a name for each folder that holds weights, its *component*. The tensors of a component are called
``COMPONENT/NAME``, for example ``unet/conv_in.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from deltafmt.errors import InvalidFileError
from deltafmt.index.file_names import is_safe_path

ENDING: Final = ".safetensors"
DEFAULT: Final = "model.safetensors"
# The names that loaders look for, with the programs that do: transformers, diffusers.
KNOWN_STEMS: Final = ("model", "diffusion_pytorch_model")

METADATA_WEIGHTS: Final = "weights"
METADATA_VARIANT: Final = "base_variant"

SHARD: Final = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,6})-of-(?P<count>[0-9]{1,6})(?P<variant>\.[^.]+)?")


def with_variant(stem: str, variant: str | None) -> str:
    """Return the name of the weights of a stem: ``model.safetensors``, ``model.fp16.safetensors``."""
    return f"{stem}{f'.{variant}' if variant else ''}{ENDING}"


def split_name(name: str) -> tuple[str, str | None]:
    """Return stem and variant of a weight file's name; only the stems that loaders know have variants."""
    stem = name.removesuffix(ENDING)
    for known in KNOWN_STEMS:
        if stem.startswith(f"{known}.") and "." not in stem[len(known) + 1 :]:
            return known, stem[len(known) + 1 :]
    return stem, None


def index_name(name: str) -> str:
    """Return the name of the index of weights that are cut into shards, as transformers and diffusers write it."""
    stem, variant = split_name(name)
    return f"{stem}{ENDING}.index{f'.{variant}' if variant else ''}.json"


def shard_name(name: str, number: int, count: int) -> str:
    """Return the name of one of ``count`` shards; ``number`` begins at 1."""
    return f"{name.removesuffix(ENDING)}-{number:05d}-of-{count:05d}{ENDING}"


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The name of the weights in each folder of a checkpoint; its own folder is the component ``""``."""

    components: Mapping[str, str] = field(default_factory=lambda: {"": DEFAULT})

    def split(self, tensor: str) -> tuple[str, str]:
        """Return the component that a tensor belongs to, and its name in the weight file of that component."""
        place = len(tensor)
        while (place := tensor.rfind("/", 0, place)) > 0:
            if tensor[:place] in self.components:
                return tensor[:place], tensor[place + 1 :]
        return "", tensor

    def of_component(self, component: str) -> str:
        """Return the name of a component's weights."""
        return self.components.get(component, DEFAULT)

    def variant(self) -> str | None:
        """Return the variant of the weights, if a component has one."""
        return next((found for name in self.components.values() if (found := split_name(name)[1])), None)

    def completed(self, others: WeightNames, tensors: Iterable[str]) -> WeightNames:
        """Return these names, and another checkpoint's for the components of some tensors that have none here."""
        components = {others.split(tensor)[0] for tensor in tensors}
        return WeightNames(
            {**{component: others.of_component(component) for component in components}, **self.components}
        )

    def metadata(self) -> dict[str, str]:
        """Return the form that a delta file's metadata has; ``model.safetensors`` at the top is not recorded."""
        return {
            f"{METADATA_WEIGHTS}/{component}" if component else METADATA_WEIGHTS: name
            for component, name in self.components.items()
            if component or name != DEFAULT
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: str) -> Self:
        """Return the names that a delta file records, after checking that they stay in the folder and are weights.

        Raises:
            InvalidFileError: a recorded name is not one for a file of weights.
        """
        components = {"": DEFAULT}
        for key, name in metadata.items():
            component = key.removeprefix(f"{METADATA_WEIGHTS}/")
            if key not in (METADATA_WEIGHTS, f"{METADATA_WEIGHTS}/{component}"):
                continue
            component = "" if key == METADATA_WEIGHTS else component
            whole = name if key == METADATA_WEIGHTS else f"{component}/{name}"
            if "/" in name or not name.endswith(ENDING) or name == ENDING or not is_safe_path(whole):
                raise InvalidFileError(f'{where}: metadata["{key}"]: {name!r} is not the name of a weight file')
            components[component] = name
        return cls(components)


# The names of a checkpoint whose weights are where transformers puts them.
USUAL_NAMES: Final = WeightNames()


def bounded(names: Iterable[str], most: int = 10) -> str:
    """Return names joined by commas, the first few of them and the number of the others: ``a, b and 3 more``."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
